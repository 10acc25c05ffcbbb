"""skeleton keeps the contract of a compressor."""

from pathlib import Path

from xcomp.registry import load_class
from xcomp.testing import check_compressor

FOLDER = Path(__file__).parents[1]


def test_contract():
    check_compressor(load_class("compressor", "skeleton", [FOLDER]))
