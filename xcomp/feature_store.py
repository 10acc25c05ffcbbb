"""Frame features on disk, so that a video is looked at once for all runs and processes that ask for the same.

One safetensors file holds the features of a video's candidate frames under one model. Its name is a digest of the
video file's content, the frames' numbers and how they were read and resized, the model's files and the version of this
format; whoever changes any of these looks elsewhere. A file appears whole or not at all, so processes may share a
folder: those that make the same features at the same time write the same file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import tensor as as_tensor

from xcomp.decoding import VideoInfo
from xcomp.pixels import PixelFormat

FORMAT = 1


class FeatureStore:
    """Features of one model in a folder, which is made when something is written. ``model`` says which, as text."""

    def __init__(self, folder: str | Path, model: str, pixel_format: PixelFormat):
        self.folder, self.model, self.pixel_format = Path(folder), model, pixel_format
        self._last: tuple[Path, dict[int, Tensor]] | None = None

    def path(self, info: VideoInfo) -> Path:
        """Where the features of a video's candidates are, or would be."""
        about = (FORMAT, file_digest(info.path), info.candidates, info.reader, info.reader_version)
        key = hashlib.sha256(repr((*about, repr(self.pixel_format), self.model)).encode()).hexdigest()
        return self.folder / f"{Path(info.path).stem[:40]}-{key[:32]}.safetensors"

    def read(self, info: VideoInfo) -> Mapping[int, Tensor] | None:
        """Features by frame number; None where there are none yet.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path(info)
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        if not path.is_file():
            return None
        try:
            content = load_file(path)
            rows = dict(zip(content["frames"].tolist(), content["features"], strict=True))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(f"stored features '{path}' cannot be read ({error}); delete the file") from error
        self._last = path, rows
        return rows

    def write(self, info: VideoInfo, features: Tensor) -> None:
        """(T, …) features of the candidates, in their order."""
        path = self.path(info)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        first = {frame: row for row, frame in reversed(list(enumerate(info.candidates)))}  # a short video repeats some
        frames = as_tensor(list(first))
        rows = features.detach().cpu()[as_tensor(list(first.values()))].contiguous()
        try:
            save_file({"frames": frames, "features": rows}, partial, metadata={"video": info.path, "model": self.model})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content; read again only if its size or time changed."""
    found = os.stat(path)
    return _digest(str(path), found.st_size, found.st_mtime_ns)


def files_digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256("".join(file_digest(p) for p in sorted(paths)).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, changed: Any) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
