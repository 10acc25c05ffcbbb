"""skeleton: every token up to the middle of the language model, then every ``step``-th token of a frame.

A compressor acts in one or more places, and inherits the others, which keep everything:

- ``before_llm(tokens)``: (T, N, D) → (T', N', D), to pool or merge whole frames before the first layer;
- ``compress(visual, question)``: VisualTokens → VisualTokens, to drop or merge any of them, by the question if need be;
- ``plan(num_layers, tokens_per_frame)``: which tokens of each frame every layer keeps, where that is known beforehand;
- ``before_layers``, ``after_attention``, ``after_layer(output)``: what goes on, where it depends on the data (``plan``
  then returns None).
"""

from __future__ import annotations

from dataclasses import dataclass

from xcomp import Compressor


class Skeleton(Compressor):
    """Keeps every ``step``-th token from the middle layer on."""

    @dataclass
    class Config:
        """The options that YAML can set, their types and defaults, and what `xcomp plugins skeleton` says of them."""

        step: int = 2  # one token of so many stays

        def __post_init__(self) -> None:
            if self.step < 1:
                raise ValueError(f"step is {self.step}; it must be at least 1")

    def plan(self, num_layers: int, tokens_per_frame: int) -> list[tuple[int, ...]]:
        """For each layer the slots (0 to N - 1) of a frame that enter it: ascending, and none that was dropped."""
        everything = tuple(range(tokens_per_frame))
        some = everything[:: self.config.step]
        return [everything if layer < num_layers // 2 else some for layer in range(num_layers)]
