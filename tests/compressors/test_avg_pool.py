"""Average pooling against means written out."""

import pytest
import torch

import xcomp


@pytest.mark.parametrize(
    "tokens, runs",
    [
        (1, [(0, 12)]),
        (3, [(0, 4), (4, 8), (8, 12)]),
        (5, [(0, 3), (2, 5), (4, 8), (7, 10), (9, 12)]),  # runs of 2.4 tokens, widened to whole ones
        (12, [(i, i + 1) for i in range(12)]),
    ],
)
def test_a_token_is_the_mean_of_its_run(tokens, runs):
    torch.manual_seed(0)
    video = torch.randn(3, 12, 5)
    pooled = xcomp.load_compressor("avg_pool", tokens=tokens).before_llm(video)
    expected = torch.stack([torch.stack([frame[a:b].mean(0) for a, b in runs]) for frame in video])
    torch.testing.assert_close(pooled, expected)


def test_all_layers_keep_what_is_left():
    assert xcomp.load_compressor("avg_pool", tokens=3).plan(2, 3) == [(0, 1, 2)] * 2


def test_more_tokens_than_a_frame_has_are_refused():
    with pytest.raises(ValueError, match="tokens is 13, but a frame has only 12"):
        xcomp.load_compressor("avg_pool", tokens=13).before_llm(torch.zeros(1, 12, 5))
    with pytest.raises(ValueError, match="tokens is 0; a frame must keep at least 1"):
        xcomp.load_compressor("avg_pool", tokens=0)
