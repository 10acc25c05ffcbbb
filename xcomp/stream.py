"""The video stream of a file through PyAV: its packets, its frames from the start or from a keyframe, its pictures.

What is decoded, in which order, and how it becomes RGB is what the ffmpeg command does with
``-i FILE -fps_mode passthrough -pix_fmt rgb24``; so are the rules for choosing a stream and for turning pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import av
import numpy as np
from av.stream import Discard, Disposition

from xcomp.sampling import VideoError


class VideoStream:
    """A file's video stream, open for demuxing and decoding. ``threads``: what its decoder may use.

    A packet that cannot be decoded gives no frame, and where reading fails the file ends, as for the ffmpeg command.

    Raises:
        VideoError: if the file has no video stream, or there is no decoder for it. PyAV's errors if it cannot be read.
    """

    def __init__(self, path: str, threads: int = 1):
        # "file:" because FFmpeg takes what stands before a colon for a protocol.
        self._source = f"file:{path}"
        self.threads = threads  # from the next restart on
        self.broken_off = False  # reading failed before the end
        self._open()

    def _open(self) -> None:
        self.container = av.open(self._source, metadata_errors="replace")
        try:
            self.stream = _chosen(self.container)
        except VideoError:
            self.container.close()
            raise
        for stream in self.container.streams:
            stream.discard = Discard.default if stream is self.stream else Discard.all
        self.stream.codec_context.thread_count = self.threads
        self.stream.codec_context.thread_type = "AUTO" if self.threads > 1 else "NONE"

    @property
    def codec(self) -> str:
        return self.stream.codec_context.codec.canonical_name

    @property
    def format(self) -> str:
        """The container's name as FFmpeg probed it, whatever the file's extension says."""
        return self.container.format.name

    @property
    def reorders(self) -> bool:
        """Whether frames of the codec may be stored in another order than they are shown."""
        return self.stream.codec_context.codec.reorder

    @property
    def tick(self) -> Fraction:
        """The unit of the stream's timestamps in seconds."""
        return self.stream.time_base

    def packets(self) -> Iterator[Any]:
        """The packets from where the file stands. Empty ones, which repeat a picture, are left out."""
        try:
            yield from (packet for packet in self.container.demux(self.stream) if packet.size)
        except MemoryError:  # which PyAV counts among FFmpeg's errors; the rest of the file may be fine
            raise
        except av.FFmpegError:
            self.broken_off = True

    def decode(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Frames in the order they are shown."""
        for packet in chain(packets, [None]):  # None: the frames that the decoder still holds
            try:
                frames = self.stream.codec_context.decode(packet)
            except MemoryError:
                raise
            except av.FFmpegError:
                continue
            yield from frames

    def restart(self) -> Iterator[Any]:
        """All packets' frames, from a file opened afresh: no seek can be trusted to find the very first packet."""
        self.close()
        self._open()
        return self.decode(self.packets())

    def seek(self, targets: Iterable[int], keys: Mapping[int, int], last: int) -> tuple[int, Iterator[Any]] | None:
        """Time of the keyframe where the file then stands, and the frames from there.

        ``targets``: times to seek to until one leads to a keyframe not after ``last``. ``keys``: bytes of keyframes'
        packets, by their times: after a seek, those of MPEG streams may be others. None if no known one is found.
        """
        for target in dict.fromkeys(targets):
            try:
                self.container.seek(target, stream=self.stream)
            except av.FFmpegError:
                continue
            packets = self.packets()
            first = next((packet for packet in packets if packet.is_keyframe), None)
            if first is not None and first.pts is not None and first.pts <= last and keys.get(first.pts) == first.size:
                return first.pts, self.decode(chain([first], packets))
        return None

    def close(self) -> None:
        self.container.close()


def _chosen(container: Any) -> Any:
    """The stream that the ffmpeg command takes: the largest, a default one above others, covers last."""
    streams = container.streams.video
    if not streams:
        raise VideoError("file has no video stream")
    stream = max(streams, key=_preference)
    if stream.codec_context is None:
        raise VideoError("FFmpeg has no decoder for its video stream")
    return stream


def _preference(stream: Any) -> int:
    context = stream.codec_context
    if context is None or stream.disposition & Disposition.attached_pic:
        return 0 if context is None else 1
    return context.width * context.height + (5_000_000 if stream.disposition & Disposition.default else 0)


class Pictures:
    """Frames as (H, W, 3) uint8 RGB, through FFmpeg's filters: turned as their display matrix says, of one size.

    The size is the first picture's, even where the stream changes it. ``turns``: the filters that turn, most often
    none.
    """

    def __init__(self, first: Any):
        self.turns = turns(_display_matrix(first))
        self._size: tuple[int, int] | None = None
        self._layout: tuple[Any, ...] = ()
        self._size = self(first).shape[1::-1]
        self._layout = ()  # from here on with the size

    def __call__(self, frame: Any) -> np.ndarray:
        layout = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if layout != self._layout:
            self._graph, self._layout = self._filters(frame), layout
        self._graph.push(frame)
        return np.ascontiguousarray(self._graph.pull().to_ndarray())

    def _filters(self, frame: Any) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1  # a picture is too little work to share
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        scale = ("scale", "{}:{}".format(*self._size) if self._size else "")
        named = [*self.turns, scale, ("format", "rgb24"), ("buffersink", "")]
        graph.link_nodes(source, *(graph.add(name, options or None) for name, options in named)).configure()
        return graph


def _display_matrix(frame: Any) -> Sequence[int]:
    """Nine numbers, row by row, or none. A matrix of the file comes with its frames."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return () if data is None else np.frombuffer(data, np.int32, 9).tolist()


def turns(matrix: Sequence[int]) -> list[tuple[str, str]]:
    """FFmpeg filters, with their options, that show a picture as its display matrix says."""
    if not matrix:
        return []
    width, height = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not width or not height:
        return []
    angle = round(math.degrees(math.atan2(matrix[1] / height, matrix[0] / width))) % 360
    if angle == 90:
        return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    if angle == 270:
        return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    if angle == 180:
        return [("hflip", "")] * (matrix[0] < 0) + [("vflip", "")] * (matrix[4] < 0)
    if angle == 0:
        return [("vflip", "")] * (matrix[4] < 0)
    return [("rotate", f"{angle}*PI/180")]
