"""Opening and decoding videos: ``Video`` reads single frames of a file or of a folder of images.

Shape letters: T frames, H and W pixels.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from xcomp.messages import printable
from xcomp.readers import READERS, Reader, first_line, open_reader
from xcomp.sampling import VideoError

__all__ = ["READERS", "Video", "VideoError"]


class Video:
    """A video file, or a folder of images named ``*_<number>.jpg`` or ``.png``, opened for reading single frames.

    Frames are numbered in the order they are shown, and are those of ``ffmpeg -i FILE -fps_mode passthrough``: an edit
    list is applied, pictures are turned as the file says. ``threads``: what the decoder may use.

    Attributes: ``path``; ``num_frames``; ``fps`` (frames a second); ``duration`` (seconds); ``reader``, the one that
    serves (decord, av, torchcodec or images), and ``reader_version``. Use it as a context manager, or call ``close``.

    Folders count as 1 frame a second (TVQA's: 3), and animated GIFs as 1, as in VideoChat-Flash.

    Raises:
        VideoError: if the path does not exist, is no video, or has no frames, or if ``reader`` is not known to give its
            frames right.
    """

    def __init__(self, path: str | Path, reader: str = "auto", *, threads: int = 1):
        if reader not in READERS:
            raise ValueError(f"reader={reader!r} is not one of {', '.join(READERS)}")
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        self.path = str(path)
        self._check_path()
        self._source: Reader | None = None
        try:
            self._source = open_reader(self.path, reader, threads)
        except VideoError as error:
            raise self._error(str(error)) from error
        except MemoryError:  # no fault of the file's
            raise
        except Exception as error:  # PyAV and Pillow raise types of their own
            raise self._error(f"not a readable video ({first_line(error)})") from error
        self.reader, self.reader_version = self._source.name, self._source.version
        self.num_frames, self.fps = len(self._source.starts), self._source.fps
        self.duration = self.num_frames / self.fps

    def _check_path(self) -> None:
        """Opening a pipe or a device would wait for whoever writes to it."""
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError as error:
            raise self._error("no such file or folder") from error
        except (OSError, ValueError) as error:  # ValueError: a null byte
            raise self._error(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise self._error("neither a file nor a folder")
        if not os.access(self.path, os.R_OK):
            raise self._error("no permission to read it")

    def times(self, indices: Iterable[int] | torch.Tensor) -> list[float]:
        """When these frames are shown, in seconds counted from the video's first frame.

        Raises:
            VideoError: if a number is not in 0..num_frames - 1, or the video is closed.
        """
        source, wanted = self._checked(indices)
        return source.starts[wanted].tolist()

    def read(self, indices: Iterable[int] | torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Each distinct frame once, ascending: its number and its picture, (H, W, 3) uint8 RGB. One is held at a time.

        Raises:
            VideoError: if a number is not in 0..num_frames - 1, or the video is closed; later, if a frame cannot be
                decoded.
        """
        _, wanted = self._checked(indices)
        return self._read(sorted(set(wanted)))

    def _read(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        source, _ = self._checked(())
        pictures = source.read(wanted)
        while True:
            try:
                self._checked(())
                index, picture = next(pictures)
            except StopIteration:
                return
            except VideoError as error:
                raise self._error(str(error)) from error
            except MemoryError:
                raise
            except Exception as error:  # the libraries raise types of their own
                raise self._error(f"cannot decode frames ({first_line(error)})") from error
            yield index, picture

    def frames(self, indices: Iterable[int] | torch.Tensor) -> torch.Tensor:
        """(T, H, W, 3) uint8 RGB: the frames of these numbers, in this order; repeats are allowed.

        Raises:
            VideoError: as ``read``; if no frame is asked for, or they differ in size.
        """
        _, wanted = self._checked(indices)
        if not wanted:
            raise self._error("no frame was asked for")
        places: dict[int, list[int]] = {}
        for place, index in enumerate(wanted):
            places.setdefault(index, []).append(place)
        frames: torch.Tensor | None = None
        for index, picture in self._read(sorted(places)):
            if frames is None:
                frames = torch.empty((len(wanted), *picture.shape), dtype=torch.uint8)
            if picture.shape != frames.shape[1:]:
                raise self._error("frames differ in size")
            for place in places[index]:
                frames[place] = torch.from_numpy(picture)
        return frames

    def _checked(self, indices: Iterable[int] | torch.Tensor) -> tuple[Reader, list[int]]:
        if self._source is None:
            raise self._error("video is closed")
        wanted = [int(index) for index in indices]
        for index in wanted:
            if not 0 <= index < self.num_frames:
                raise self._error(f"no frame {index}, the video has {self.num_frames} (from 0)")
        return self._source, wanted

    def _error(self, reason: str) -> VideoError:
        return VideoError(f"{printable(self.path)}: {reason}")

    def close(self) -> None:
        """Releases the file. Closing twice is fine."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __len__(self) -> int:
        return self.num_frames

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Video({self.path!r}, {self.num_frames} frames, {self.fps:g} fps, {self.reader})"
