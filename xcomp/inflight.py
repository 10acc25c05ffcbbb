"""One video in flight: everything that is known about a video while questions are asked about it.

It owns the file, the resized frames, the visual tokens and what selectors know of the frames; each is computed on first
use, once, in bounded memory, and forgotten when the video is done. What it gives is a function of frame numbers, so
questions and arms share what coincides: frames one by one, tokens by encoder clip (the frames encoded together).

Shape letters: T frames · F frames a clip · N tokens a frame · D width.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from xcomp.backbone import Backbone
from xcomp.config import Memory
from xcomp.decoding import GIGABYTE, DecodingPool, Pending, Pixels, Span, VideoInfo
from xcomp.ledger import Ledger, Work
from xcomp.pixels import PixelFormat
from xcomp.video import VideoError
from xcomp.visual import VisualTokens

# Frames that the device sees at once; backbones may cut them further.
ENCODED_TOGETHER = 32


class PixelBudget:
    """Bytes of resized frames that the videos in flight may hold together."""

    def __init__(self, memory: Memory):
        self.limit = int(memory.pixels * GIGABYTE)
        self.used = 0


class VideoInFlight:
    """A video file, or a ``span`` of it in seconds, opened and decoded by a pool, as one backbone sees it.

    ``ledger`` is told what everything took. ``keep_states`` keeps key-value caches too (:meth:`state`), for a video
    that is asked one question after the other. ``needs`` is what some compressor wants to know of the vision tower.

    Raises:
        VideoError: from any of its methods, if the file cannot be opened or decoded.
    """

    def __init__(
        self,
        path: str,
        backbone: Backbone,
        pool: DecodingPool,
        memory: Memory | None = None,
        *,
        span: Span = None,
        budget: PixelBudget | None = None,
        keep_states: bool = False,
        needs: Sequence[str] = (),
    ):
        self.path = str(path)
        self.backbone = backbone
        self.memory = memory or Memory()
        self.ledger = Ledger(self._wait_for_device)
        self.scores: dict[Hashable, Any] = {}  # what selectors found, by selector, compressor and question
        self.following: VideoInFlight | None = None  # the next one, decoded ahead while this one is asked
        self._frames = _Frames(self.path, pool, budget or PixelBudget(self.memory), self.ledger)
        self._tokens = _Kept(int(self.memory.tokens * GIGABYTE))
        self._states = _Kept(int(self.memory.states * GIGABYTE) if keep_states else 0, at_least=1)
        self._keep_states = keep_states
        self._needs = tuple(needs)
        self._opening: Pending = pool.inspect(self.path, span)
        self._info: VideoInfo | None = None
        self._opened: Work | None = None
        self._expected: Callable[[VideoInfo], tuple[Iterable[int], Sequence[PixelFormat]]] | None = None

    @property
    def known(self) -> VideoInfo | None:
        """``info`` if the file was opened, without waiting."""
        return self._info

    # --- the file ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> VideoInfo:
        """Waits until the file is open."""
        if self._info is None:
            with self.ledger.waiting():
                info, seconds = self._opening.result()
            self._info, self._opened = info, Work("decode", seconds)
            self._announce_expected()
        self.ledger.use(self._opened)
        return self._info

    @property
    def candidates(self) -> tuple[int, ...]:
        """Numbers of the frames that the sampling rule takes, ascending; a short video may repeat some."""
        return self.info.candidates

    def times(self, frames: Iterable[int]) -> list[float]:
        """Seconds of candidate frames."""
        known = dict(zip(self.info.candidates, self.info.times))
        return [known[frame] for frame in frames]

    def expect(self, frames_of: Callable[[VideoInfo], tuple[Iterable[int], Sequence[PixelFormat]]]) -> None:
        """Decode ahead, once the file is open, the frames that ``frames_of`` names, in those formats."""
        self._expected = frames_of
        self.advance()

    def advance(self) -> None:
        """Hand out more of what is expected, without waiting."""
        if self._info is None and self._opening.done() and self._expected is not None:
            try:
                _ = self.info
            except VideoError:
                return  # whoever asks for the video will be told
        self._frames.advance()
        if self.following is not None:
            self.following.advance()

    def _announce_expected(self) -> None:
        if self._expected is not None:
            frames, formats = self._expected(self._info)
            self._frames.announce(frames, tuple(formats))

    def pixels(self, frames: Sequence[int], pixel_format: PixelFormat | None = None) -> Tensor:
        """(T, 3, h, w) uint8 on the host: these frames in this format (default: the backbone's)."""
        _ = self.info
        self.advance()
        return self._frames.get(frames, pixel_format or self.backbone.pixel_format)

    def normalised(self, frames: Sequence[int], pixel_format: PixelFormat | None = None) -> Tensor:
        """(T, 3, h, w) normalised, where the backbone is; the backbone's own format in its own type."""
        given = pixel_format or self.backbone.pixel_format
        dtype = self.backbone.dtype if pixel_format is None else torch.float32
        return given.normalise(self.pixels(frames, given).to(self.backbone.device), dtype)

    # --- tokens and features ----------------------------------------------------------------------------------------

    def tokens(self, frames: Sequence[int]) -> Tensor:
        """(T / merged_frames, N, D): visual tokens of these frames, encoded in clips of F in this order.

        Clips that were encoded before, for another question or arm, are not encoded again.
        """
        return self.visual(frames).frames()

    def visual(self, frames: Sequence[int]) -> VisualTokens:
        """The same with the grid of a frame's tokens, and what the tower knows of them as far as it is needed."""
        self.backbone.check_frames(len(frames))
        clips = list(zip(*[iter(frames)] * self.backbone.clip_frames))
        found: dict[tuple[int, ...], VisualTokens] = {}
        missing = [clip for clip in dict.fromkeys(clips) if not self._tokens.take(clip, self.ledger, found)]
        self._frames.announce([frame for clip in missing for frame in clip], (self.backbone.pixel_format,))
        together = max(1, ENCODED_TOGETHER // self.backbone.clip_frames)
        for start in range(0, len(missing), together):
            self._encode(missing[start : start + together], found)
        return VisualTokens.join([found[clip] for clip in clips])

    def _encode(self, clips: list[tuple[int, ...]], found: dict[tuple[int, ...], VisualTokens]) -> None:
        together = Work("vision")
        with self.ledger.charge(together):
            visual = self.backbone.visual(self.normalised([frame for clip in clips for frame in clip]), self._needs)
        with self.ledger.charge(Work("vision")):  # counting is no question's work
            macs = self.backbone.clip_macs(self._frames.size_of(self.backbone.pixel_format))
        groups = len(clips[0]) // self.backbone.merged_frames
        for clip, part in zip(clips, visual.split([groups] * len(clips))):
            needs = {self._opened, *(self._frames.works[frame] for frame in clip)}
            work = Work("vision", together.seconds / len(clips), macs, needs)
            self.ledger.use(work)
            found[clip] = part
            self._tokens.put(clip, part, part.nbytes, work)

    def features(
        self,
        key: Hashable,
        frames: Sequence[int],
        compute: Callable[[Tensor], Tensor],
        pixel_format: PixelFormat,
        batch_size: int,
        macs: int = 0,
    ) -> Tensor:
        """(T, …): what ``compute`` makes of each frame's normalised pixels (t, 3, h, w), once a frame and ``key``.

        ``macs`` are those of one frame.
        """
        found: dict[Hashable, Tensor] = {}
        wanted = [(key, frame) for frame in dict.fromkeys(frames)]
        missing = [item for item in wanted if not self._tokens.take(item, self.ledger, found)]
        self._frames.announce([frame for _, frame in missing], (pixel_format,))
        for start in range(0, len(missing), batch_size):
            part = [frame for _, frame in missing[start : start + batch_size]]
            together = Work("select")
            with self.ledger.charge(together):
                rows = compute(self.normalised(part, pixel_format))
            for frame, row in zip(part, rows):  # a work each: a question may need few of them
                needs = {self._opened, self._frames.works[frame]}
                work = Work("select", together.seconds / len(part), macs, needs)
                self.ledger.use(work)
                found[key, frame] = row
                self._tokens.put((key, frame), row, row.nbytes, work)
        return torch.stack([found[key, frame] for frame in frames])

    def state(self, key: Hashable, stage: str, compute: Callable[[Work], Any]) -> Any:
        """What ``compute`` makes of the language model's pass over (part of) the video; at least the last is kept.

        The result is a :class:`xcomp.decoder.State`; whoever goes on from it forks it first.
        """
        self.advance()
        found: dict[Hashable, Any] = {}
        if not self._states.take(key, self.ledger, found):
            with self.ledger.work(stage) as work:
                found[key] = state = compute(work)
            size = sum(t.nbytes for layer in state.cache.layers for t in (layer.keys, layer.values))
            self._states.put(key, state, size, work)
        return found[key]

    def release_states(self) -> None:
        """Let go of passes that no further question is going to be put behind, unless they are kept for such."""
        if not self._keep_states:
            self._states.clear()

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget everything; what is being decoded ahead is given up."""
        self._opening.cancel()
        self._frames.close()
        self._tokens.clear()
        self._states.clear()
        self.scores.clear()

    def __enter__(self) -> VideoInFlight:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wait_for_device(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)


class _Kept:
    """Things by key up to a number of bytes, and the work that each took. The oldest go first.

    ``at_least`` so many are kept whatever their size.
    """

    def __init__(self, limit: int, at_least: int = 0):
        self.limit, self.at_least, self.used = limit, at_least, 0
        self._items: OrderedDict[Hashable, tuple[Any, int, Work]] = OrderedDict()

    def take(self, key: Hashable, ledger: Ledger, found: dict[Hashable, Any]) -> bool:
        """Whether ``key`` is here; then it is put into ``found``, and its work counted as used."""
        if key not in self._items:
            return False
        found[key], _, work = self._items[key]
        ledger.use(work)
        return True

    def put(self, key: Hashable, thing: Any, size: int, work: Work) -> None:
        if size > self.limit and not self.at_least:
            return
        self._items[key] = thing, size, work
        self.used += size
        while self.used > self.limit and len(self._items) > self.at_least:
            self.used -= self._items.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._items.clear()
        self.used = 0


class _Piece:
    """Some frames that are decoded together, in some formats."""

    def __init__(self, frames: tuple[int, ...], formats: tuple[PixelFormat, ...]):
        self.frames, self.formats = frames, formats
        self.rows = {frame: row for row, frame in enumerate(frames)}
        self.unused = set(frames)
        self.pending: Pending | None = None
        self.error: VideoError | None = None
        self.arrays: tuple[Tensor, ...] | None = None
        self.work = Work("decode")
        self.size = 0  # bytes charged to the budget


class _Frames:
    """Resized frames of one video: handed out to be decoded in pieces, held while there is room.

    A piece is held at least until each of its frames was used once. Beyond the budget a piece that was used is dropped,
    and decoded again should it be needed again.
    """

    def __init__(self, path: str, pool: DecodingPool, budget: PixelBudget, ledger: Ledger):
        self._path, self._pool, self._budget, self._ledger = path, pool, budget, ledger
        self._pieces: dict[tuple[PixelFormat, int], _Piece] = {}
        self._queue: deque[_Piece] = deque()  # not handed out yet
        self._working: deque[_Piece] = deque()  # handed out, result not taken
        self.works: dict[int, Work] = {}  # what decoded each frame, also of pieces that are held no longer
        self._sizes: dict[PixelFormat, tuple[int, int]] = {}

    def announce(self, frames: Iterable[int], formats: tuple[PixelFormat, ...]) -> None:
        """These frames will be needed; those that are neither held nor on their way are decoded, in ascending order."""
        lacking: dict[tuple[PixelFormat, ...], list[int]] = {}
        for frame in sorted(set(frames)):
            absent = tuple(f for f in formats if (f, frame) not in self._pieces)
            if absent:
                lacking.setdefault(absent, []).append(frame)
        size = self._pool.options.chunk
        for absent, numbers in lacking.items():
            for start in range(0, len(numbers), size):
                piece = _Piece(tuple(numbers[start : start + size]), absent)
                self._pieces |= {(f, frame): piece for f in absent for frame in piece.frames}
                self._queue.append(piece)
        self.advance()

    def advance(self, at_least: int = 0) -> None:
        """Hand out pieces while the budget has room; ``at_least`` so many are on their way whatever the budget says."""
        while self._queue:
            size = self._size(self._queue[0])
            if self._budget.used + size > self._budget.limit and len(self._working) >= at_least:
                return
            self._hand_out(self._queue.popleft(), size)

    def _hand_out(self, piece: _Piece, size: int) -> None:
        self._charge(piece, size)
        piece.pending = self._pool.decode(self._path, piece.frames, piece.formats)
        self._working.append(piece)

    def get(self, frames: Sequence[int], pixel_format: PixelFormat) -> Tensor:
        """(T, 3, h, w) uint8, in the order asked; waits for what is not decoded yet."""
        self.announce(frames, (pixel_format,))
        pictures = []
        for frame in frames:
            piece = self._pieces[pixel_format, frame]
            self._load(piece)
            pictures.append(piece.arrays[piece.formats.index(pixel_format)][piece.rows[frame]])
            self._ledger.use(piece.work)
            piece.unused.discard(frame)
        result = torch.stack(pictures)
        for piece in {self._pieces[pixel_format, frame] for frame in frames}:
            if not piece.unused and self._budget.used > self._budget.limit:
                self._drop(piece)
        self.advance()
        return result

    def _load(self, piece: _Piece) -> None:
        if piece.arrays is not None:
            return
        if piece.error is not None:  # decoding it once more would take as long and end alike
            raise piece.error
        if piece.pending is None:  # stands behind others, for which there was no room
            self._queue.remove(piece)
            self._hand_out(piece, self._size(piece))
        self.advance(at_least=2 * max(1, self._pool.workers))
        try:
            with self._ledger.waiting():
                pixels: Pixels = piece.pending.result()
        except VideoError as error:
            piece.error = error
            self._charge(piece, 0)
            raise
        finally:
            self._working.remove(piece)
        piece.arrays = tuple(map(torch.from_numpy, pixels.arrays))
        self._charge(piece, sum(array.nbytes for array in piece.arrays))
        piece.work.seconds = pixels.seconds / max(1, self._pool.workers)
        for frame in piece.frames:
            self.works[frame] = piece.work
        for pixel_format, array in zip(piece.formats, piece.arrays):
            self._sizes[pixel_format] = tuple(array.shape[-2:])

    def _charge(self, piece: _Piece, size: int) -> None:
        """``piece`` holds, or will hold, so many bytes."""
        self._budget.used += size - piece.size
        piece.size = size

    def _size(self, piece: _Piece) -> int:
        """Bytes of a piece before it is decoded: as the last ones, else as the formats say."""
        return len(piece.frames) * sum(3 * math.prod(self._sizes.get(f) or f.largest) for f in piece.formats)

    def size_of(self, pixel_format: PixelFormat) -> tuple[int, int]:
        """(h, w) of the frames that were decoded."""
        return self._sizes[pixel_format]

    def _drop(self, piece: _Piece) -> None:
        for pixel_format in piece.formats:
            for frame in piece.frames:
                self._pieces.pop((pixel_format, frame), None)
        piece.arrays = None
        self._charge(piece, 0)

    def close(self) -> None:
        for piece in self._working:
            piece.pending.cancel()
        self._working.clear()
        self._queue.clear()
        for piece in set(self._pieces.values()):
            self._drop(piece)
