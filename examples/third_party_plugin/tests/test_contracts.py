"""Both plugins keep their contracts."""

from xcomp_example.merge_frames import MergeFrames
from xcomp_example.sharpest import Sharpest

from xcomp.testing import check_compressor, check_selector


def test_contracts():
    check_compressor(MergeFrames)
    check_compressor(MergeFrames, frames=3)
    check_selector(Sharpest)
