"""Training batches: conversations about video files, decoded and tokenised in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from xcomp.backbone import Backbone, ShownVideo
from xcomp.config import RunConfig, Sampling
from xcomp.data.records import Conversation, TokenisedConversation, load_conversations, tokenise
from xcomp.decoding import read_resized
from xcomp.sampling import uniform_indices
from xcomp.video import Video


@dataclass
class Sample:
    """One conversation ready for the model: resized frames (T, 3, h, w) uint8 and token ids."""

    pixels: Tensor
    text: TokenisedConversation

    def size(self, backbone: Backbone) -> tuple[int, int]:
        """Tokens that enter the language model before anything leaves, and frames."""
        frames = 0 if self.pixels is None else len(self.pixels)
        text = [
            self.text.prefix_ids,
            self.text.suffix_ids,
            *(ids for pair in self.text.frame_texts or () for ids in pair),
        ]
        return sum(map(len, text)) + frames // backbone.merged_frames * backbone.tokens_per_frame, frames


class ConversationDataset(Dataset):
    """Conversations as samples. ``frames``: frame counts to draw from (seeded by the item); empty: by ``sampling``."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        backbone: Backbone,
        *,
        frames: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
    ):
        self.conversations = conversations
        self.backbone = backbone
        self.frames = tuple(frames)
        self.sampling = sampling or Sampling()
        self.seed = seed

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, item: int) -> Sample:
        conversation = self.conversations[item]
        with Video(conversation.video, reader=self.sampling.reader) as video:
            indices = self._indices(video, item, conversation.frames or self.frames)
            rows = {index: row for row, index in enumerate(sorted(set(indices)))}
            (resized,) = read_resized(video, list(rows), (self.backbone.pixel_format,))
            pixels = torch.from_numpy(resized)[[rows[index] for index in indices]]
            times = tuple(video.times(indices))
            shown = ShownVideo(video.duration, len(indices), times)
        return Sample(pixels, tokenise(self.backbone, conversation, shown))

    def _indices(self, video: Video, item: int, frames: tuple[int, ...]) -> list[int]:
        if not frames:
            return self.sampling.candidates(video.num_frames, video.fps)
        generator = torch.Generator().manual_seed(hash((self.seed, item)) & 0x7FFFFFFF)
        count = frames[int(torch.randint(len(frames), (1,), generator=generator))]
        return uniform_indices(video.num_frames, count)


def collate(samples: list[Sample]) -> list[Sample]:
    """A batch is a list: videos and texts of unequal length go to the decoder as they are."""
    return samples


def start_worker(worker: int) -> None:
    """Leave Ctrl-C and the first SIGTERM to the main process: a terminal or batch system sends them to all processes.

    The main process still needs batches to finish its step, and shuts its workers down itself.
    """
    pl_worker_init_function(worker)  # Lightning's own, in whose place this one is
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class EpochOrder(DistributedSampler):
    """Each epoch's order follows from seed and epoch alone, and so does what every optimizer step sees.

    A step takes ``batch_size`` × ranks × ``accumulated`` records that stand together in the order, batch by batch to
    the ranks in turn: as many records a step make the same steps with any number of ranks. What is left at the end of
    an epoch waits for the next; fewer records than a step are taken over and over, but by a single rank that
    accumulates none, whose only batch is then smaller. The first ``skip`` items of the next epoch are left out.
    """

    skip = 0

    def __init__(self, dataset: Dataset, batch_size: int, *, ranks: int = 1, rank: int = 0, accumulated: int = 1,
                 seed: int = 0):  # fmt: skip
        super().__init__(dataset, num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.batch_size, self.per_step = batch_size, batch_size * ranks * accumulated
        whole = len(dataset) // self.per_step * self.per_step
        self.total_size = whole or (len(dataset) if self.per_step == batch_size else self.per_step)
        self.num_samples = self.total_size // ranks

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        noise = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=noise).tolist()
        order = list(islice(cycle(order), self.total_size))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return islice(chain.from_iterable(batches[self.rank :: self.num_replicas]), skip, None)


class ResumableLoader(DataLoader):
    """Goes on in the middle of an epoch, with the batches that an uninterrupted run would have seen.

    Lightning keeps ``state_dict`` in its checkpoints; it counts the batches of all ranks, so that another number of
    ranks goes on from it. Its ``sampler`` is an ``EpochOrder``.
    """

    _start = _yielded = 0  # batches of this epoch

    def __iter__(self) -> Iterator[list[Sample]]:
        self._yielded, self._start = self._start, 0
        self.sampler.skip = self._yielded * self.batch_size
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._yielded % len(self) * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["batches"] // self.sampler.num_replicas


class ConversationData(L.LightningDataModule):
    """The training and validation conversations of a run."""

    def __init__(self, config: RunConfig, backbone: Backbone):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.train_set = self._dataset(config.tune.data, "tune.data")
        validation = config.tune.validation
        self.validation_set = self._dataset(validation, "tune.validation") if validation else None

    def _dataset(self, sources: Sequence, where: str) -> ConversationDataset:
        c = self.config
        conversations = load_conversations(sources, c.plugins, where)
        for count in sorted({*c.tune.frames, *(n for conversation in conversations for n in conversation.frames)}):
            self.backbone.check_frames(count)
        return ConversationDataset(conversations, self.backbone, frames=c.tune.frames, sampling=c.sampling, seed=c.seed)

    def _loader(self, kind: type[DataLoader], dataset: ConversationDataset, **options: Any) -> DataLoader:
        workers = self.config.tune.num_workers
        return kind(
            dataset,
            batch_size=self.config.tune.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            worker_init_fn=start_worker,
            **options,
        )

    def train_dataloader(self) -> DataLoader:
        ranks, rank = self._ranks()
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        batch_size, seed = self.config.tune.batch_size, self.config.seed
        order = EpochOrder(self.train_set, batch_size, ranks=ranks, rank=rank, accumulated=accumulated, seed=seed)
        return self._loader(ResumableLoader, self.train_set, sampler=order)

    def val_dataloader(self) -> DataLoader | list:
        if self.validation_set is None:
            return []
        ranks, rank = self._ranks()  # as many batches on every rank: what the last ones repeat has no weight
        order = DistributedSampler(self.validation_set, num_replicas=ranks, rank=rank, shuffle=False)
        return self._loader(DataLoader, self.validation_set, sampler=order)

    def repeated(self, batch_idx: int, size: int) -> int:
        """How many of a validation batch's ``size`` samples other ranks have too, at its end."""
        ranks, rank = self._ranks()
        first = batch_idx * self.config.tune.batch_size
        return sum((first + i) * ranks + rank >= len(self.validation_set) for i in range(size))

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
