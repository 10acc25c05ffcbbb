"""Frames to pixels: what every vision encoder here does to an image before its first layer.

Resize (bicubic, antialiased), optionally crop the centre, rescale to 0..1, normalise. A processor of ``transformers``
is a handful of numbers around the same steps; one :class:`PixelFormat` of those numbers serves every backbone and CLIP
alike, in batches and on any device. Its first half (resizing) gives bytes, which are what is kept of a frame; its
second (normalising) runs where the encoder does.

The resized picture is rounded to whole levels, because Pillow's is. Deviation: Pillow's fixed-point arithmetic is not
imitated, so about one value in two hundred differs from Pillow by a level (1/255). Rows are resized before columns, as
Pillow long did; Pillow 13 takes columns first where an upright picture is stretched to a square, and there about one
value in six differs by a level.

Shape letters: T frames; H, W height and width as read; h, w after resizing and cropping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# Where torch resizes bytes without a detour through floats: far faster, and rounded as Pillow rounds.
INTEGER_DEVICES = ("cpu",)


@dataclass(frozen=True)
class PixelFormat:
    """What a vision encoder is given of a frame: how it is resized and cropped, and what its values mean.

    ``size`` is (h, w), or one number for a square; with ``shortest_edge`` it is one number, the length of the shorter
    side, and the aspect is kept. ``crop`` then cuts (h, w) from the centre. ``mean`` and ``std`` are for values in
    0..1. With ``longest_edge`` a frame is first resized with its aspect kept, so that its longer side is of that length
    (and its shorter one of an even length, as SmolVLM has it), then to ``size``. Plain numbers, so that a process which
    decodes can resize without knowing the model.
    """

    size: int | tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    shortest_edge: bool = False
    crop: int | tuple[int, int] | None = None
    resample: str = "bicubic"  # bilinear, bicubic, lanczos
    longest_edge: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std", "crop"):  # lists, as JSON and YAML have them, are not hashable
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be 3 numbers each, std above 0")
        if self.shortest_edge and not isinstance(self.size, int):
            raise ValueError(f"with shortest_edge, size is one number (the shorter side's length), not {self.size!r}")

    def resize(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8, RGB → (T, 3, h, w) uint8, on the frames' device.

        Raises:
            ValueError: if frames are of another form, or the crop is larger than the resized picture.
        """
        _check_frames(frames)
        images = frames.permute(0, 3, 1, 2)
        if self.longest_edge is not None:
            images = resize_uint8(images, longest_to(self.longest_edge, frames.shape[1:3]), self.resample)
        resized = self._target_size(images.shape[2:])
        final = resized if self.crop is None else _check_crop(_pair(self.crop), resized)
        return _center(resize_uint8(images, resized, self.resample), final).contiguous()

    def normalise(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(T, 3, h, w) uint8 → the same normalised, of ``dtype``; computed in float32."""
        exact = {"device": pixels.device, "dtype": torch.float32}  # torch's default type may be a shorter one
        mean, std = (torch.tensor(values, **exact).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).to(dtype)

    def __call__(self, frames: Tensor, dtype: torch.dtype = torch.float32, *, batch_size: int = 32) -> Tensor:
        """(T, H, W, 3) uint8 → (T, 3, h, w) normalised; ``batch_size`` frames at once, so only the result grows."""
        _check_frames(frames)
        pixels = None
        for start in range(0, len(frames), batch_size):
            part = self.normalise(self.resize(frames[start : start + batch_size]), dtype)
            pixels = part.new_empty(len(frames), *part.shape[1:]) if pixels is None else pixels
            pixels[start : start + batch_size] = part
        return pixels

    @property
    def largest(self) -> tuple[int, int]:
        """(h, w) of a resized frame; where the aspect is kept, that of one twice as long as wide."""
        if self.shortest_edge and self.crop is None:
            return self.size, 2 * self.size
        return _pair(self.size if self.crop is None else self.crop)

    def _target_size(self, shape: Sequence[int]) -> tuple[int, int]:
        if not self.shortest_edge:
            return _pair(self.size)
        height, width = shape
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def longest_to(edge: int, size: Sequence[int]) -> tuple[int, int]:
    """(H, W) → (h, w) of the same aspect, the longer side ``edge``, the other rounded down and then up to an even."""
    height, width = size
    if width >= height:
        short = int(edge / (width / height))
        return max(short + short % 2, 1), edge
    short = int(edge * (width / height))
    return edge, max(short + short % 2, 1)


@cache
def _filter(resample: str) -> str:
    """The filter, or bicubic in place of Lanczos' where this torch does not have it."""
    if resample == "lanczos":
        try:
            interpolate(torch.zeros(1, 1, 4, 4), (2, 2), mode=resample, antialias=True)
        except (NotImplementedError, ValueError):
            return "bicubic"
    return resample


def resize_uint8(images: Tensor, size: tuple[int, int], resample: str = "bicubic") -> Tensor:
    """(T, 3, H, W) uint8 → (T, 3, h, w) uint8, antialiased, as Pillow resizes to within a level."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    resample = _filter(resample)
    if resample == "lanczos" and images.device.type != "cpu":  # torch has it there only
        return resize_uint8(images.cpu(), size, resample).to(images.device)
    if images.device.type in INTEGER_DEVICES:
        return interpolate(images, size, mode=resample, antialias=True)
    wide = interpolate(images.float(), (images.shape[2], size[1]), mode=resample, antialias=True)
    # Pillow resizes rows first and rounds before the columns
    tall = interpolate(wide.round().clamp(0, 255), size, mode=resample, antialias=True)
    return tall.round().clamp(0, 255).to(torch.uint8)


def _center(images: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], size, strict=True))
    return images[..., top : top + size[0], left : left + size[1]]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_crop(crop: tuple[int, int], resized: tuple[int, int]) -> tuple[int, int]:
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise ValueError(f"crop {crop} is larger than the resized picture {resized}; crop at most its size")
    return crop


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or not len(frames) or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames must be (T, H, W, 3) uint8, T at least 1, not {tuple(frames.shape)} {frames.dtype}; "
            "decode to RGB bytes with the colour channel last"
        )
