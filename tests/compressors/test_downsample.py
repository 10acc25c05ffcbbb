"""Down-sampling: Pillow's pictures of the reference, and areas of a grid averaged by hand."""

import pytest
import torch
from golden import each_case
from made_visual import class_of, make, visual
from xcomp.compressors.downsample import shrink

from xcomp.compressor import Budget


@each_case("downsample")
def test_released(case):
    shrunk = shrink(case.inputs["image"][None], case.params["ratio"])
    assert torch.equal(shrunk[0], case.outputs["resized"])


@pytest.mark.parametrize("grid, ratio", [((6, 6), 2), ((4, 8), 4), ((7, 5), 2), ((3, 3), 5), ((1, 6), 1.5)])
def test_a_token_is_the_mean_of_its_area(grid, ratio):
    height, width = max(1, int(grid[0] / ratio)), max(1, int(grid[1] / ratio))
    video = visual(2, grid[0] * grid[1], grid=grid)
    out = make("downsample", ratio=ratio).compress(video, None)
    expected, slots = [], []
    for frame in video.frames():
        for i in range(height):
            for j in range(width):
                rows = range(i * grid[0] // height, -(-(i + 1) * grid[0] // height))
                columns = range(j * grid[1] // width, -(-(j + 1) * grid[1] // width))
                area = [r * grid[1] + c for r in rows for c in columns]
                expected.append(frame[area].mean(0))
                slots.append(out.slot[len(slots)].item())
                assert slots[-1] in area
    torch.testing.assert_close(out.tokens, torch.stack(expected))
    assert out.counts().tolist() == [height * width] * 2
    assert out.size.sum().item() == pytest.approx(len(video))


def test_an_unknown_grid_is_refused():
    with pytest.raises(ValueError, match="^downsample needs to know the grid"):
        make("downsample").compress(visual(2, 9), None)


@pytest.mark.parametrize("width, keep, left", [(196, 0.25, 49), (144, 0.25, 36), (196, 1, 196)])
def test_budgets_that_a_grid_can_meet(width, keep, left):
    rule, side = class_of("downsample"), int(width**0.5)
    config = rule.for_budget(rule.Config(), Budget(keep), 28, width)
    out = rule(config).compress(visual(2, width, 4, grid=(side, side)), None)
    assert out.counts().tolist() == [left] * 2 and config.ratio == keep**-0.5


def test_budgets_that_a_grid_cannot_meet():
    rule = class_of("downsample")
    with pytest.raises(ValueError, match=r"^downsample cannot keep 0.1 of a grid of 14 x 14; nearest: 0.08163$"):
        rule.for_budget(rule.Config(), Budget(0.1), 28, 196)


def test_a_picture_can_be_too_small():
    with pytest.raises(ValueError, match="ratio 5 leaves nothing of pictures of 4 x 8"):
        shrink(torch.zeros(1, 8, 4, 3, dtype=torch.uint8), 5)


@pytest.mark.parametrize("ratio", [0.5, float("nan"), float("inf")])
def test_wrong_options_are_refused(ratio):
    with pytest.raises(ValueError, match="^ratio is .*; it must be at least 1$"):
        class_of("downsample").Config(ratio=ratio)
