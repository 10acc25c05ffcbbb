"""Training batches: conversations with their frames, read ahead in processes of their own, in an order that resumes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from xcomp.backbone import Backbone, ShownVideo
from xcomp.compressor import Compressor, defines
from xcomp.config import ConfigError, Decoding, RunConfig, Sampling
from xcomp.contract import name_of
from xcomp.data.media import Media, MediaRequest, read_media
from xcomp.data.order import EpochOrder, drawn_frames, estimated_tokens
from xcomp.data.records import Conversation, TokenisedConversation, tokenise
from xcomp.data.skipped import Skipped
from xcomp.data.sources import Records, Refused, read_records
from xcomp.decoding import DecodingPool, Pending
from xcomp.video import VideoError


@dataclass
class Sample:
    """One conversation ready for the model: resized frames or pictures (T, 3, h, w) uint8, if any, and token ids."""

    pixels: Tensor | None
    text: TokenisedConversation
    images: bool = False  # pictures, each of which is encoded on its own
    counted: bool = True  # in a validation: not one that another rank has too, or that stands in for another

    def size(self, backbone: Backbone) -> tuple[int, int]:
        """Tokens that enter the language model before anything leaves, and frames."""
        frames = 0 if self.pixels is None else len(self.pixels)
        text = [
            self.text.prefix_ids,
            self.text.suffix_ids,
            *(ids for pair in self.text.frame_texts or () for ids in pair),
        ]
        groups = frames if self.images else frames // backbone.merged_frames
        return sum(map(len, text)) + groups * backbone.tokens_per_frame, frames


class SampleError(ValueError):
    """A conversation that is no sample for the model, e.g. because it is too long."""


class ConversationDataset:
    """Conversations as samples. ``frames``: frame counts to draw from (seeded by the item); empty: by ``sampling``.

    ``limit``: the longest sequence that is a sample, in tokens as they leave the vision path; None: any.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        backbone: Backbone,
        *,
        frames: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
        format: str = "answers",
        limit: int | None = None,
    ):
        self.conversations = conversations
        self.backbone = backbone
        self.frames = tuple(frames)
        self.sampling = sampling or Sampling()
        self.seed = seed
        self.format = format
        self.limit = limit

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, item: int) -> Sample:
        """Read here and now.

        Raises:
            VideoError: if its media cannot be read.
            SampleError: if it is no sample.
        """
        with DecodingPool(Decoding(workers=0), self.sampling) as pool:
            return self.sample(item, self.read(item, pool))

    def read(self, item: int, pool: DecodingPool) -> Pending | None:
        """Have an item's media read; None where it has none."""
        conversation = self.conversations[item]
        if not conversation.media:
            return None
        request = MediaRequest(
            self.backbone.pixel_format,
            images=conversation.images,
            sampling=conversation.sampling or self.sampling,
            count=drawn_frames(conversation, self.frames, self.seed, item),
            span=conversation.span,
            is_folder=conversation.read_type in ("img", "frame"),
        )
        return pool.hand_out(read_media, conversation.media[0], request, pool.threads)

    def sample(self, item: int, reading: Pending | None) -> Sample:
        """The sample of an item whose media are being read; errors as above."""
        conversation = self.conversations[item]
        media: Media | None = None if reading is None else reading.result()
        video = None
        if media is not None and media.seconds is not None:
            video = ShownVideo(media.seconds, len(media.pixels), media.times)
        text = tokenise(self.backbone, conversation, video, self.format)
        pixels = None if media is None else torch.from_numpy(media.pixels)
        sample = Sample(pixels, text, images=bool(conversation.images))
        if not text.num_labels:
            raise SampleError(f"{conversation.where}: no token of it is supervised, so there is nothing to learn")
        tokens, frames = sample.size(self.backbone)
        if self.limit is not None and tokens - 1 > self.limit:  # the last one is not run
            raise SampleError(
                f"{conversation.where}: a sequence of {tokens - 1} tokens ({frames} frames), but the language model "
                f"takes {self.limit}; show fewer frames"
            )
        return sample

    def lengths(self) -> list[int]:
        """Of each item, in tokens, as far as can be told without opening its media."""
        tokens = self.backbone.tokens_per_frame / self.backbone.merged_frames
        return [
            estimated_tokens(c, drawn_frames(c, self.frames, self.seed, item), c.sampling or self.sampling, tokens)
            for item, c in enumerate(self.conversations)
        ]


class SampleLoader:
    """Batches of samples in the order of a sampler, read ahead by a pool of processes.

    It goes on in the middle of an epoch, with the batches that an uninterrupted run would have seen: Lightning keeps
    ``state_dict`` in its checkpoints; it counts the batches of all ranks, so that another number of ranks goes on from
    it. In the place of an item that cannot be read, or is known not to be, comes the next one that can.
    """

    batch_sampler = None  # Lightning looks for one where there is a sampler
    _start = _yielded = 0  # batches of this epoch

    def __init__(
        self,
        dataset: ConversationDataset,
        sampler: DistributedSampler,
        batch_size: int,
        pool: DecodingPool,
        skipped: Skipped,
    ):
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self.pool, self.skipped = pool, skipped

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        self._yielded, self._start = self._start, 0
        self.sampler.skip = self._yielded * self.batch_size
        items = list(self.sampler)
        # One sample more than there are processes: none of them waits for the model to take what is ready.
        ahead = self.batch_size + self.pool.workers + 1 if self.pool.workers else 1
        reading: deque[tuple[int, Pending | None]] = deque()
        batch: list[Sample] = []
        try:
            for taken, item in enumerate(items):
                while len(reading) < min(ahead, len(items) - taken):
                    reading.append(self._read(items[taken + len(reading)]))
                found, sample = self._sample(*reading.popleft())
                sample.counted = found == item and not self._is_repeated(taken)
                batch.append(sample)
                if len(batch) == self.batch_size or taken + 1 == len(items):
                    self._yielded += 1
                    ready, batch = batch, []
                    yield ready
        finally:
            for _, pending in reading:
                if pending is not None:
                    pending.cancel()

    def _is_repeated(self, place: int) -> bool:
        """Whether what stands there in this rank's order is there to make ranks equally long."""
        return place * self.sampler.num_replicas + self.sampler.rank >= len(self.dataset)

    def _read(self, item: int) -> tuple[int, Pending | None]:
        item = self._next(item) if self._is_known(item) else item
        return item, self.dataset.read(item, self.pool)

    def _sample(self, item: int, reading: Pending | None) -> tuple[int, Sample]:
        """The sample of an item, or of the next that is one."""
        while True:
            conversation = self.dataset.conversations[item]
            if not self._is_known(item):  # as it may be by now
                try:
                    return item, self.dataset.sample(item, reading)
                except (VideoError, SampleError) as error:
                    media = conversation.media[0] if conversation.media else None
                    self.skipped.add(Refused(conversation.where, str(error), media))
            item, reading = self._read(item)

    def _is_known(self, item: int) -> bool:
        return self.dataset.conversations[item].where in self.skipped

    def _next(self, item: int) -> int:
        """The next item that is not known to be no good."""
        number = len(self.dataset)
        for step in range(1, number):
            if not self._is_known((item + step) % number):
                return (item + step) % number
        raise ConfigError(f"no record of {self.skipped.source} can be used; why is in {self.skipped.path}")

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._yielded % len(self) * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["batches"] // self.sampler.num_replicas


class ConversationData(L.LightningDataModule):
    """The training and validation conversations of a run: read and checked when made, before there is a model.

    Raises:
        ConfigError: as :func:`xcomp.data.sources.read_records` does.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.records = {"train": self._records(config.tune.data, "tune.data")}
        if config.tune.validation:
            self.records["validation"] = self._records(config.tune.validation, "tune.validation")
        self._pool: DecodingPool | None = None

    def _records(self, sources: Sequence[Any], where: str) -> Records:
        c = self.config
        return read_records(sources, c.plugins, where, sampling=c.sampling, max_skipped=c.tune.max_skipped)

    def check(self, backbone: type[Backbone], who: str) -> None:
        """ConfigError unless a backbone of this class, called ``who``, takes what the records hold."""
        for records in self.records.values():
            for kind in records.kinds:
                if kind != "video" and backbone.image_prompt is Backbone.image_prompt:
                    first = next(c.where for c in records.conversations if c.kind == kind)
                    what = {"text": "text alone"}.get(kind, "pictures")
                    raise ConfigError(
                        f"{first}: {who} trains on videos alone, not on {what} (it has no image_prompt()); 'kinds: "
                        "[video]' of the source leaves such records out"
                    )
        if self.config.tune.format == "released" and backbone.training_text is Backbone.training_text:
            raise ConfigError(f"tune.format is 'released', which {who} does not know (it has no training_text())")

    def attach(self, backbone: Backbone, compressor: Compressor) -> None:
        """Name the model that samples are for. ConfigError if it cannot take them."""
        self.check(type(backbone), name_of("backbone", backbone))
        tune = self.config.tune
        for records in self.records.values():
            for count in sorted({*tune.frames, *(n for c in records.conversations for n in c.frames)}):
                backbone.check_frames(count)
            for sampling in {id(c.sampling): c.sampling for c in records.conversations if c.sampling}.values():
                backbone.check_sampling(sampling)
            needs = [need for need in compressor.needs if need != "grid"]
            if needs and not records.kinds.keys().isdisjoint(("image", "images")):
                raise ConfigError(
                    f"{name_of('compressor', compressor)} needs '{', '.join(needs)}' of the vision tower, which is "
                    "known of videos alone; 'kinds: [video, text]' of the source leaves pictures out"
                )
        # Where tokens may leave before the language model, only the model itself can tell what fits.
        early = any(defines(compressor, method) for method in ("compress", "before_llm"))
        limit = None if early else backbone.text_config.max_position_embeddings
        self.datasets = {
            name: ConversationDataset(
                records.conversations,
                backbone,
                frames=tune.frames,
                sampling=self.config.sampling,
                seed=self.config.seed,
                format=tune.format,
                limit=limit,
            )
            for name, records in self.records.items()
        }

    def skipped(self, name: str) -> Skipped:
        """What is left out of a set; records that were refused as they were read are among it."""
        records, share = self.records[name], self.config.tune.max_skipped
        total = len(records.conversations) + len(records.refused)
        return Skipped(self.config.folder, name, int(share * total), total, share)

    def note_refused(self) -> None:
        """Write down what was refused as it was read, into the run folder. ConfigError if too much is left out."""
        for name, records in self.records.items():
            skipped = self.skipped(name)
            for refused in records.refused:
                skipped.add(refused)
            skipped.check()  # those of a run that is resumed

    @property
    def pool(self) -> DecodingPool:
        if self._pool is None:
            ranks = self.trainer.world_size if self.trainer else 1
            decoding = replace(self.config.decoding, workers=self.config.tune.num_workers)
            self._pool = DecodingPool(decoding, self.config.sampling, ranks=ranks)
        return self._pool

    def close(self) -> None:
        """Ends the processes that read ahead."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def train_dataloader(self) -> SampleLoader:
        data, size, (ranks, rank) = self.datasets["train"], self.config.tune.batch_size, self._ranks()
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        wanted = self.config.tune.group_by_length
        lengths = data.lengths() if (size > 1 if wanted is None else wanted) else None
        options = {"ranks": ranks, "rank": rank, "accumulated": accumulated, "seed": self.config.seed}
        order = EpochOrder(data, size, lengths=lengths, **options)
        return SampleLoader(data, order, size, self.pool, self.skipped("train"))

    def val_dataloader(self) -> SampleLoader | list:
        if "validation" not in self.datasets:
            return []
        data, (ranks, rank) = self.datasets["validation"], self._ranks()
        # As many batches on every rank: what the last ones repeat is not counted.
        order = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
        return SampleLoader(data, order, self.config.tune.batch_size, self.pool, self.skipped("validation"))

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
