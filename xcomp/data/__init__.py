"""Instruction data: records, tokens and labels, batches."""
