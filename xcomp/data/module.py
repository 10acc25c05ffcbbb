"""Training batches: conversations about video files, decoded and tokenised in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xcomp.backbone import Backbone, ShownVideo
from xcomp.config import RunConfig, Sampling
from xcomp.data.records import Conversation, TokenisedConversation, load_conversations, tokenise
from xcomp.video import Video, sample_indices, uniform_indices


@dataclass
class Sample:
    """One conversation ready for the model: pixels (T, 3, h, w) and token ids."""

    pixels: Tensor
    text: TokenisedConversation


def candidate_indices(video: Video, sampling: Sampling) -> list[int]:
    """The candidate frames of a video by a run's sampling rule."""
    return sample_indices(
        video.num_frames,
        video.fps,
        rate=sampling.rate,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
        multiple=sampling.multiple,
        style=sampling.style,
    )


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
            pixels = self.backbone.preprocess(video.frames(indices))
            times = tuple(i / video.fps for i in indices)
            shown = ShownVideo(video.duration, len(indices), times)
        return Sample(pixels, tokenise(self.backbone, conversation, shown))

    def _indices(self, video: Video, item: int, frames: tuple[int, ...]) -> list[int]:
        if not frames:
            return candidate_indices(video, self.sampling)
        generator = torch.Generator().manual_seed(hash((self.seed, item)) & 0x7FFFFFFF)
        count = frames[int(torch.randint(len(frames), (1,), generator=generator))]
        return uniform_indices(video.num_frames, count)


def collate(samples: list[Sample]) -> list[Sample]:
    """A batch is a list: videos and texts of unequal length go to the decoder as they are."""
    return samples


class ConversationData(L.LightningDataModule):
    """The training and validation conversations of a run."""

    def __init__(self, config: RunConfig, backbone: Backbone):
        super().__init__()
        self.config = config
        self.backbone = backbone

    def _loader(self, sources: Sequence, shuffle: bool) -> DataLoader:
        c = self.config
        dataset = ConversationDataset(
            load_conversations(sources, c.plugins), self.backbone, frames=c.tune.frames, sampling=c.sampling, seed=c.seed
        )
        return DataLoader(
            dataset,
            batch_size=c.tune.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and len(dataset) >= c.tune.batch_size,
            num_workers=c.tune.num_workers,
            persistent_workers=c.tune.num_workers > 0,
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.config.tune.data, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.config.tune.validation, shuffle=False) if self.config.tune.validation else []
