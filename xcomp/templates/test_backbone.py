"""skeleton keeps the contract of a backbone."""

from pathlib import Path

from xcomp.registry import load_class
from xcomp.testing import check_backbone

FOLDER = Path(__file__).parents[1]


def test_contract():
    check_backbone(load_class("backbone", "skeleton", [FOLDER]))
