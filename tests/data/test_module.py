"""Training samples and batches: frames drawn the same for an item every time, and an order that can be resumed."""

import json
from itertools import islice

import pytest
import torch

import xcomp
from xcomp.config import ConfigError, Sampling, parse_config
from xcomp.data.module import ConversationData, ConversationDataset, EpochOrder, ResumableLoader, collate
from xcomp.data.records import Conversation
from xcomp.sampling import uniform_indices
from xcomp.video import Video


@pytest.fixture(scope="module")
def backbone(tiny_checkpoint):
    return xcomp.load_backbone("videochat_flash", checkpoint=str(tiny_checkpoint))


@pytest.fixture(scope="module")
def video(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0].video


def conversations(video, count=12, **options):
    return [Conversation(video, ((f"What is {i}?", "A"),), **options) for i in range(count)]


# --- samples ----------------------------------------------------------------------------------------------------------


def test_frames_are_drawn_by_item_and_seed_alone(backbone, video):
    def counts(seed, items):
        dataset = ConversationDataset(conversations(video), backbone, frames=[4, 8], seed=seed)
        return [len(dataset[i].pixels) for i in items]

    order = range(12)
    once = counts(0, order)
    assert set(once) == {4, 8}
    assert counts(0, order) == once and counts(0, reversed(order)) == once[::-1]
    assert any(counts(seed, order) != once for seed in (1, 2))


def test_a_sample_shows_the_frames_it_says(backbone, video):
    sample = ConversationDataset(conversations(video), backbone, frames=[8])[3]
    with Video(video) as opened:
        expected = backbone.pixel_format.resize(opened.frames(uniform_indices(opened.num_frames, 8)))
    assert torch.equal(sample.pixels, expected) and sample.pixels.dtype == torch.uint8
    text = backbone.tokenizer.decode(sample.text.suffix_ids)
    assert "lasts for 4.00 seconds, and 8 frames" in text and "What is 3?" in text


def test_a_records_own_frame_counts_come_first(backbone, video):
    dataset = ConversationDataset(conversations(video, 1, frames=(12,)), backbone, frames=[4])
    assert len(dataset[0].pixels) == 12


def test_without_counts_frames_follow_the_sampling_rule(backbone, video):
    sampling = Sampling(rate=2, min_frames=4, max_frames=8, multiple=4)
    assert len(ConversationDataset(conversations(video), backbone, sampling=sampling)[0].pixels) == 8


# --- the order of batches ---------------------------------------------------------------------------------------------


def loader(items=10, batch_size=3, seed=0, workers=0, **ranks):
    data = list(range(items))
    order = EpochOrder(data, batch_size, seed=seed, **ranks)
    return ResumableLoader(data, batch_size=batch_size, sampler=order, num_workers=workers, collate_fn=collate)


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return list(loader)


def test_each_epoch_has_an_order_of_its_own_that_follows_from_the_seed():
    epochs = [epoch(loader(9), number) for number in range(3)]
    assert all(sorted(sum(batches, [])) == list(range(9)) for batches in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    one = loader(9)
    torch.manual_seed(99)  # nor does it depend on what else draws random numbers
    assert [epoch(one, number) for number in range(3)] == epochs
    assert epoch(loader(9, seed=1), 0) != epochs[0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("done", [1, 2])
def test_a_loader_goes_on_where_its_state_was_taken(done, workers):
    first = loader(workers=workers)
    first.sampler.set_epoch(4)
    seen = list(islice(first, done))
    state = first.state_dict()
    second = loader(workers=workers)
    second.load_state_dict(state)
    assert seen + epoch(second, 4) == epoch(loader(), 4) and len(second) == 3
    assert epoch(second, 5) == epoch(loader(), 5)  # only that epoch is cut


def test_the_state_at_an_epochs_end_starts_the_next_from_its_beginning():
    first = loader()
    first.sampler.set_epoch(0)
    list(islice(first, 3))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert epoch(second, 1) == epoch(loader(), 1)


@pytest.mark.parametrize("ranks, accumulated", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("items", [26, 5])
def test_a_step_sees_the_same_batches_with_any_number_of_ranks(items, ranks, accumulated):
    def steps(ranks, accumulated):
        loaders = [loader(items, 2, ranks=ranks, rank=rank, accumulated=accumulated) for rank in range(ranks)]
        batches = [epoch(one, 3) for one in loaders]
        assert {len(one) for one in loaders} == {len(own) for own in batches}
        turns = [own[i] for i in range(len(batches[0])) for own in batches]
        return [turns[i : i + 4] for i in range(0, len(turns), 4)]

    alone = steps(1, 4)
    assert steps(ranks, accumulated) == alone and [len(step) for step in alone] == [4] * (3 if items == 26 else 1)
    seen = [item for step in alone for batch in step for item in batch]
    assert sorted(seen) == sorted(set(seen)) if items == 26 else sorted(set(seen)) == list(range(5))


@pytest.mark.parametrize("before, after", [((1, 4), (2, 2)), ((4, 1), (1, 4)), ((2, 2), (4, 1))])
def test_other_ranks_go_on_from_a_loaders_state(before, after):
    def made(ranks, accumulated, rank=0):
        return loader(26, 2, ranks=ranks, rank=rank, accumulated=accumulated)

    first = made(*before)
    first.sampler.set_epoch(3)
    list(islice(first, before[1]))  # one step
    for rank in range(after[0]):
        resumed = made(*after, rank)
        resumed.load_state_dict(first.state_dict())
        assert epoch(resumed, 3) == epoch(made(*after, rank), 3)[after[1] :]


# --- the data of a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def make_data(tmp_path, backbone, video):
    """ConversationData on a file of ``count`` records."""

    def make(count=7, **tune):
        turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
        (tmp_path / "records.json").write_text(json.dumps([{"video": video, "conversations": turns}] * count))
        source = {"records": str(tmp_path / "records.json")}
        tune = {"data": [source], "frames": [4], "num_workers": 0, "batch_size": 2, **tune}
        validation = [source] if tune.pop("validate", False) else []
        return ConversationData(parse_config({"tune": {**tune, "validation": validation}}, "x"), backbone)

    return make


def test_training_batches_are_whole_and_validation_takes_all(make_data):
    data = make_data(validate=True)
    assert [len(batch) for batch in data.train_dataloader()] == [2, 2, 2]
    assert [len(batch) for batch in data.val_dataloader()] == [2, 2, 2, 1]
    assert make_data().val_dataloader() == []


def test_fewer_records_than_a_batch_are_still_a_batch(make_data):
    assert [len(batch) for batch in make_data(count=2, batch_size=5).train_dataloader()] == [2]


@pytest.mark.parametrize("where", ["run", "source"])
def test_a_budget_that_cuts_clips_is_refused_before_training(make_data, where):
    with pytest.raises(ValueError, match="a budget of 6 frames does not divide into encoder clips of 4; take 4"):
        data = make_data(frames=[4, 6] if where == "run" else [4])
        source = {**data.config.tune.data[0], "frames": [8, 6]}
        data.config.tune.data = [source]
        ConversationData(data.config, data.backbone)


def test_a_bad_validation_source_is_named_as_such(make_data):
    data = make_data()
    data.config.tune.validation = [{"recods": "x"}]
    with pytest.raises(ConfigError, match=r"tune.validation\[0\]"):
        ConversationData(data.config, data.backbone)
