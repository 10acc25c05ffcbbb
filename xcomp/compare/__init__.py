"""Comparing methods head to head: arms, the runner, statistics and the report."""
