"""skeleton keeps the contract of a selector."""

from pathlib import Path

from xcomp.registry import load_class
from xcomp.testing import check_selector

FOLDER = Path(__file__).parents[1]


def test_contract():
    check_selector(load_class("selector", "skeleton", [FOLDER]))
