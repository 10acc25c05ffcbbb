"""Frames to pixels: what every vision encoder here does to an image before its first layer.

Resize (bicubic, antialiased), optionally crop the centre, rescale to 0..1, normalise. A processor of ``transformers``
is a handful of numbers around the same steps; one tensor function driven by those numbers serves every backbone and
CLIP alike, in batches and on any device.

The resized picture is rounded to whole levels, because Pillow's is. Deviation: Pillow's fixed-point arithmetic is not
imitated, so about one value in two hundred differs from Pillow by a level (1/255). Rows are resized before columns, as
Pillow long did; Pillow 13 takes columns first where an upright picture is stretched to a square, and there about one
value in six differs by a level.

Shape letters: T frames; H, W height and width as read; h, w after resizing and cropping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# Where torch resizes bytes without a detour through floats: far faster, and rounded as Pillow rounds.
INTEGER_DEVICES = ("cpu",)


def preprocess_frames(
    frames: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    shortest_edge: bool = False,
    crop: int | tuple[int, int] | None = None,
    resample: str = "bicubic",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
) -> Tensor:
    """(T, H, W, 3) uint8, RGB → (T, 3, h, w) of ``dtype``, on the frames' device.

    ``size`` is (h, w), or one number for a square; with ``shortest_edge`` it is one number, the length of the shorter
    side, and the aspect is kept. ``crop`` then cuts (h, w) from the centre. ``mean`` and ``std`` are for values in
    0..1. ``batch_size`` frames are worked on at once; only the result grows with T.
    """
    _check_frames(frames)
    resized = _target_size(frames.shape[1:3], size, shortest_edge)
    final = resized if crop is None else _check_crop(_pair(crop), resized)
    pixels = torch.empty(len(frames), 3, *final, dtype=dtype, device=frames.device)
    mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
    for start in range(0, len(frames), batch_size):
        part = resize_uint8(frames[start : start + batch_size].permute(0, 3, 1, 2), resized, resample)
        pixels[start : start + batch_size] = (_center(part, final).float() / 255 - mean) / std
    return pixels


def resize_uint8(images: Tensor, size: tuple[int, int], resample: str = "bicubic") -> Tensor:
    """(T, 3, H, W) uint8 → (T, 3, h, w) uint8, antialiased, as Pillow resizes to within a level."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if images.device.type in INTEGER_DEVICES:
        return interpolate(images, size, mode=resample, antialias=True)
    wide = interpolate(images.float(), (images.shape[2], size[1]), mode=resample, antialias=True)
    # Pillow resizes rows first and rounds before the columns
    tall = interpolate(wide.round().clamp(0, 255), size, mode=resample, antialias=True)
    return tall.round().clamp(0, 255).to(torch.uint8)


def _target_size(shape: Sequence[int], size: int | tuple[int, int], shortest_edge: bool) -> tuple[int, int]:
    if not shortest_edge:
        return _pair(size)
    if not isinstance(size, int):
        raise ValueError(f"with shortest_edge, size is one number (the shorter side's length), not {size!r}")
    height, width = shape
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


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
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames must be (T, H, W, 3) uint8, not {tuple(frames.shape)} {frames.dtype}; "
            "decode to RGB bytes with the colour channel last"
        )
