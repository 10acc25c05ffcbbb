"""In which order samples are trained on, and which of them stand in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from xcomp.config import Sampling
from xcomp.data.records import Conversation

BLOCK = 50  # steps whose samples are sorted together, as in transformers' LengthGroupedSampler
CHARACTERS = 4  # to a token of text, roughly
FRAME_RATE = 25.0  # of a video of which only the length is known


class EpochOrder(DistributedSampler):
    """Each epoch's order follows from seed and epoch alone, and so does what every optimizer step sees.

    A step takes ``batch_size`` × ranks × ``accumulated`` records that stand together in the order, batch by batch to
    the ranks in turn: as many records a step make the same steps with any number of ranks. What is left at the end of
    an epoch waits for the next; fewer records than a step are taken over and over, but by a single rank that
    accumulates none, whose only batch is then smaller. The first ``skip`` items of the next epoch are left out. With
    ``lengths``, one number an item, batches are of like length (:func:`grouped`).
    """

    skip = 0

    def __init__(self, dataset: Sequence[Any], batch_size: int, *, ranks: int = 1, rank: int = 0, accumulated: int = 1,
                 seed: int = 0, lengths: Sequence[int] | None = None):  # fmt: skip
        super().__init__(dataset, num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.batch_size, self.per_step, self.lengths = batch_size, batch_size * ranks * accumulated, lengths
        whole = len(dataset) // self.per_step * self.per_step
        self.total_size = whole or (len(dataset) if self.per_step == batch_size else self.per_step)
        self.num_samples = self.total_size // ranks

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        noise = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=noise).tolist()
        order = list(islice(cycle(order), self.total_size))
        if self.lengths is not None and self.total_size % self.per_step == 0:
            order = grouped(order, self.lengths, self.batch_size, self.per_step, noise)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return islice(chain.from_iterable(batches[self.rank :: self.num_replicas]), skip, None)


def grouped(order: list[int], lengths: Sequence[int], size: int, per_step: int, noise: torch.Generator) -> list[int]:
    """A random order of items, whole steps of them, changed so that the ``size`` items of a batch are of like length.

    The order is cut into blocks of ``BLOCK`` steps and each is sorted by length; its batches are then shuffled over all
    blocks, so that a step holds batches of any length. Within a step the longest comes first, as in the released
    training, so that ranks which take turns wait little for one another. The longest batch of all stands in the first
    step: what does not fit into memory shows at once.
    """
    blocks = [order[i : i + BLOCK * per_step] for i in range(0, len(order), BLOCK * per_step)]
    in_length = [item for block in blocks for item in sorted(block, key=lambda item: -lengths[item])]
    batches = [in_length[i : i + size] for i in range(0, len(order), size)]
    batches = [batches[i] for i in torch.randperm(len(batches), generator=noise).tolist()]
    longest = max(range(len(batches)), key=lambda i: lengths[batches[i][0]])
    batches[0], batches[longest] = batches[longest], batches[0]
    turns = per_step // size
    steps = [batches[i : i + turns] for i in range(0, len(batches), turns)]
    return [item for step in steps for batch in sorted(step, key=lambda batch: -lengths[batch[0]]) for item in batch]


def drawn_frames(conversation: Conversation, frames: Sequence[int], seed: int, item: int) -> int | None:
    """How many frames an item is shown with: drawn by seed and item; None: as many as the sampling rule takes."""
    counts = conversation.frames or tuple(frames)
    if not counts:
        return None
    generator = torch.Generator().manual_seed(hash((seed, item)) & 0x7FFFFFFF)
    return counts[int(torch.randint(len(counts), (1,), generator=generator))]


def estimated_tokens(conversation: Conversation, count: int | None, sampling: Sampling, tokens_per_frame: float) -> int:
    """A sample's length in tokens, from what its record says, without opening a file.

    A video of unknown length counts as the longest; of a span, and where the record has a ``duration``, the rule tells
    the frames, at 25 a second in the file (1 in a folder or a GIF).
    """
    text = sum(len(text) for turn in conversation.turns for text in turn) // CHARACTERS
    if conversation.video is None:
        return round(len(conversation.images) * tokens_per_frame) + text
    if count is None:
        start, end = conversation.span or (None, None)
        seconds = conversation.duration if end is None else end
        seconds = None if seconds is None else seconds - (start or 0)
        if seconds is None:
            count = sampling.max_frames
        else:
            rate = 1.0 if conversation.read_type in ("img", "frame", "gif") else FRAME_RATE
            count = len(sampling.candidates(max(int(seconds * rate), sampling.multiple), rate))
    return round(count * tokens_per_frame) + text
