"""Training samples and batches: frames drawn the same for an item every time, and an order that can be resumed."""

import json
from itertools import islice

import misbehave
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

import xcomp
from xcomp.backbone import Backbone
from xcomp.compressor import Compressor
from xcomp.config import ConfigError, Decoding, Sampling, parse_config
from xcomp.data.module import ConversationData, ConversationDataset, SampleError, SampleLoader
from xcomp.data.order import EpochOrder, drawn_frames, estimated_tokens, grouped
from xcomp.data.records import IGNORED, Conversation, TokenisedConversation
from xcomp.data.skipped import Skipped
from xcomp.data.sources import Refused
from xcomp.decoding import DecodingPool
from xcomp.sampling import uniform_indices
from xcomp.video import Video, VideoError


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


class Number(int):
    counted = True


class Numbers:
    """In place of a dataset: samples are their own numbers, read in a process where there are any; some are no good."""

    def __init__(self, count, bad=()):
        self.conversations = [Conversation(None, (("Q", "A"),), where=str(i)) for i in range(count)]
        self.bad, self.asked = set(bad), []

    def __len__(self):
        return len(self.conversations)

    def read(self, item, pool):
        return pool.hand_out(str.upper, str(item))

    def sample(self, item, reading):
        self.asked.append(item)
        if item in self.bad:
            raise VideoError(f"{item}: broken")
        return Number(reading.result())


@pytest.fixture
def loader(tmp_path):
    pools = []

    def make(items=10, batch_size=3, seed=0, workers=0, bad=(), most=0, shuffle=True, **options):
        data = Numbers(items, bad)
        ranked = EpochOrder(data, batch_size, seed=seed, **options) if shuffle else None
        order = ranked or DistributedSampler(data, shuffle=False, **options)
        pools.append(DecodingPool(Decoding(workers=workers)))
        skipped = Skipped(tmp_path / "run", "train" if shuffle else "validation", most, items, 0.01)
        return SampleLoader(data, order, batch_size, pools[-1], skipped)

    yield make
    for pool in pools:
        pool.close()


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return list(loader)


def test_each_epoch_has_an_order_of_its_own_that_follows_from_the_seed(loader):
    epochs = [epoch(loader(9), number) for number in range(3)]
    assert all(sorted(sum(batches, [])) == list(range(9)) for batches in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    one = loader(9)
    torch.manual_seed(99)  # nor does it depend on what else draws random numbers
    assert [epoch(one, number) for number in range(3)] == epochs
    assert epoch(loader(9, seed=1), 0) != epochs[0]


@pytest.mark.parametrize("workers, done", [(0, 1), (0, 2), (1, 1)])
def test_a_loader_goes_on_where_its_state_was_taken(loader, done, workers):
    first = loader(workers=workers)
    first.sampler.set_epoch(4)
    seen = list(islice(first, done))
    state = first.state_dict()
    second = loader(workers=workers)
    second.load_state_dict(state)
    assert seen + epoch(second, 4) == epoch(loader(), 4) and len(second) == 3
    assert epoch(second, 5) == epoch(loader(), 5)  # only that epoch is cut


def test_the_state_at_an_epochs_end_starts_the_next_from_its_beginning(loader):
    first = loader()
    first.sampler.set_epoch(0)
    list(islice(first, 3))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert epoch(second, 1) == epoch(loader(), 1)


@pytest.mark.parametrize("ranks, accumulated", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("items", [26, 5])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_sees_the_same_batches_with_any_number_of_ranks(loader, items, ranks, accumulated, grouped):
    def steps(ranks, accumulated):
        options = {"ranks": ranks, "accumulated": accumulated}
        options["lengths"] = [3 * i % 7 for i in range(items)] if grouped else None
        loaders = [loader(items, 2, rank=rank, **options) for rank in range(ranks)]
        batches = [epoch(one, 3) for one in loaders]
        assert {len(one) for one in loaders} == {len(own) for own in batches}
        turns = [own[i] for i in range(len(batches[0])) for own in batches]
        return [turns[i : i + 4] for i in range(0, len(turns), 4)]

    alone = steps(1, 4)
    assert steps(ranks, accumulated) == alone and [len(step) for step in alone] == [4] * (3 if items == 26 else 1)
    seen = [item for step in alone for batch in step for item in batch]
    assert sorted(seen) == sorted(set(seen)) if items == 26 else sorted(set(seen)) == list(range(5))


@pytest.mark.parametrize("before, after", [((1, 4), (2, 2)), ((4, 1), (1, 4)), ((2, 2), (4, 1))])
def test_other_ranks_go_on_from_a_loaders_state(loader, before, after):
    def made(ranks, accumulated, rank=0):
        return loader(26, 2, ranks=ranks, rank=rank, accumulated=accumulated)

    first = made(*before)
    first.sampler.set_epoch(3)
    list(islice(first, before[1]))  # one step
    for rank in range(after[0]):
        resumed = made(*after, rank)
        resumed.load_state_dict(first.state_dict())
        assert epoch(resumed, 3) == epoch(made(*after, rank), 3)[after[1] :]


# --- batches of like length -------------------------------------------------------------------------------------------


def test_batches_are_of_like_length_and_steps_of_any():
    noise = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (2016,), generator=noise).tolist()
    order = grouped(list(range(2016)), lengths, 4, 32, noise)
    assert sorted(order) == list(range(2016))
    cuts = ([[lengths[i] for i in items[k : k + 4]] for k in range(0, 2016, 4)] for items in (order, range(2016)))
    batches, random = cuts
    share = [1 - sum(map(sum, cut)) / sum(max(batch) * 4 for batch in cut) for cut in (batches, random)]
    assert share[0] < 0.02 < 0.3 < share[1]  # of padding
    steps = [[batch[0] for batch in batches[k : k + 8]] for k in range(0, len(batches), 8)]
    assert all(step == sorted(step, reverse=True) for step in steps)  # ranks that take turns wait little
    assert min(max(step) - min(step) for step in steps) > 200  # but a step holds what is short and what is long
    assert steps[0][0] == max(lengths)  # the longest first: it fits into memory, or one knows at once


def test_the_grouped_order_follows_from_seed_and_epoch():
    lengths = [3 * i % 17 for i in range(100)]

    def order(seed, number):
        made = EpochOrder(range(100), 4, seed=seed, lengths=lengths)
        made.set_epoch(number)
        return list(made)

    assert order(0, 0) == order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    batches = [{lengths[i] for i in order(0, 0)[k : k + 4]} for k in range(0, 100, 4)]
    assert max(max(batch) - min(batch) for batch in batches) <= 1


@pytest.mark.parametrize(
    "conversation, count, expected",
    [
        (Conversation(None, (("Q" * 30, "A" * 10),)), None, 10),
        (Conversation(None, (("Q" * 8, ""),), images=("i", "j")), None, 2 * 16 + 2),
        (Conversation("v", (("Q" * 8, ""),)), 8, 8 * 16 + 2),
        (Conversation("v", (("Q" * 8, ""),)), None, 64 * 16 + 2),  # of unknown length: the longest
        (Conversation("v", (("Q" * 8, ""),), duration=10.3), None, 16 * 16 + 2),  # 2 a second, in eights
        (Conversation("v", (("Q" * 8, ""),), duration=1000), None, 64 * 16 + 2),
        (Conversation("v", (("Q" * 8, ""),), duration=1000, span=(5, 10)), None, 8 * 16 + 2),
        (Conversation("v", (("Q" * 8, ""),), duration=25, span=(5, None)), None, 40 * 16 + 2),
        (Conversation("v", (("Q" * 8, ""),), duration=25, read_type="img"), None, 48 * 16 + 2),  # the last one repeated
    ],
)
def test_lengths_are_estimated_from_records(conversation, count, expected):
    sampling = Sampling(rate=2, min_frames=8, max_frames=64)
    assert estimated_tokens(conversation, count, sampling, 16) == expected


def test_estimates_know_the_counts_that_are_drawn(backbone, video):
    dataset = ConversationDataset(conversations(video), backbone, frames=[4, 8], seed=3)
    frames = [len(dataset[i].pixels) for i in range(12)]
    assert frames == [drawn_frames(c, (4, 8), 3, i) for i, c in enumerate(dataset.conversations)]
    assert [length // 16 for length in dataset.lengths()] == frames


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_item_stands_in_for_one_that_is_no_good(loader, workers, tmp_path):
    whole = [epoch(loader(), number) for number in range(2)]
    one = loader(bad=[3, 4, 9], most=3, workers=workers)
    expected = [[[{3: 5, 4: 5, 9: 0}.get(i, i) for i in batch] for batch in batches] for batches in whole]
    assert {3, 4, 9} <= {i for batches in whole for batch in batches for i in batch}
    assert [epoch(one, number) for number in range(2)] == expected
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["record"] for line in lines) == ["3", "4", "9"]
    assert {"set": "train", "record": "9", "media": None, "reason": "9: broken"} in lines
    assert [one.dataset.asked.count(i) for i in (3, 4, 9)] == [1, 1, 1]  # in two epochs


def test_what_hangs_dies_or_grows_is_left_out_too(loader):
    """Media are read by the processes that decode for comparisons, within the same limits."""
    one = loader(6, 2, bad=[], most=4, workers=1)
    one.pool.options.seconds, function = 1.0, {1: misbehave.hang, 2: misbehave.abort, 4: misbehave.leave}
    one.dataset.read = lambda item, pool: pool.hand_out(function.get(item, str.upper), str(item))
    assert sorted(sum(epoch(one, 0), [])) == [0, 3, 3, 3, 5, 5]
    reasons = {
        "1": "1: decoding took longer than 1 s; raise decoding.seconds, or mend the file",
        "2": "2: decoding it ended the process (SIGABRT); the file is broken",
        "4": "4: decoding it ended the process (status 3); the file is broken",
    }
    assert one.skipped.known == reasons


def test_a_loader_that_resumes_knows_what_is_no_good(loader):
    first = loader(bad=[3, 4, 9], most=3)
    whole = [epoch(first, number) for number in range(2)]
    with open(first.skipped.path, "a") as file:
        file.write('{"set": "train", "rec')  # a kill cut it short
    second = loader(bad=[], most=4)  # mended by now: the run goes on as it began
    second.load_state_dict({"batches": 1})
    assert epoch(second, 0) == whole[0][1:] and epoch(second, 1) == whole[1]
    second.skipped.add(Refused("x", "later"))
    again = Skipped(first.skipped.path.parent, "train", 9, 10, 0.9)
    assert set(again.known) == {"3", "4", "9", "x"}
    assert len(Skipped(first.skipped.path.parent, "validation", 9, 10, 0.9)) == 0


def test_one_too_many_ends_the_run_in_a_line(loader, tmp_path):
    message = (
        "3 of the 12 records of tune.data are left out, more than tune.max_skipped=0.01 allows; the last: .: broken"
    )
    with pytest.raises(ConfigError, match=f"{message}; all of them are in {tmp_path}/run/skipped.jsonl"):
        epoch(loader(12, bad=[3, 4, 9], most=2), 0)
    with pytest.raises(ConfigError, match="no record of tune.data can be used"):
        epoch(loader(bad=range(10), most=10), 0)


def test_in_a_validation_what_stands_in_or_is_repeated_is_not_counted(loader):
    ranks = [loader(9, 3, bad=[3, 4], most=2, shuffle=False, num_replicas=2, rank=rank) for rank in range(2)]
    batches = [list(rank) for rank in ranks]
    assert batches == [[[0, 2, 5], [6, 8]], [[1, 5, 5], [7, 0]]]
    counted = [[[sample.counted for sample in batch] for batch in own] for own in batches]
    assert counted == [[[True, True, False], [True, True]], [[True, False, True], [True, False]]]


def test_a_sample_without_labels_and_one_that_is_too_long_are_none(backbone, video, monkeypatch):
    long = Conversation(video, (("What?", "A" * 200),), where="file, line 3")
    dataset = ConversationDataset([long], backbone, frames=[8], limit=300)
    with pytest.raises(
        SampleError, match=r"^file, line 3: a sequence of \d+ tokens \(8 frames\), but .* takes 300; show"
    ):
        dataset[0]
    text = dataset.__class__([long], backbone, frames=[8])[0].text
    length = len(text.prefix_ids) + 8 * 16 + len(text.suffix_ids) - 1
    assert ConversationDataset([long], backbone, frames=[8], limit=length)[0]
    with pytest.raises(SampleError, match=f"a sequence of {length} tokens"):
        ConversationDataset([long], backbone, frames=[8], limit=length - 1)[0]
    silent = TokenisedConversation(text.prefix_ids, text.suffix_ids, torch.full_like(text.suffix_ids, IGNORED))
    monkeypatch.setattr("xcomp.data.module.tokenise", lambda *_: silent)
    with pytest.raises(SampleError, match="file, line 3: no token of it is supervised"):
        dataset[0]


# --- the data of a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def make_data(tmp_path, backbone, video):
    """ConversationData on a file of ``count`` records, for the tiny backbone."""

    def make(count=7, **tune):
        turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
        (tmp_path / "records.json").write_text(json.dumps([{"video": video, "conversations": turns}] * count))
        source = {"records": str(tmp_path / "records.json"), **tune.pop("source", {})}
        tune = {"data": [source], "frames": [4], "num_workers": 0, "batch_size": 2, **tune}
        validation = [source] if tune.pop("validate", False) else []
        config = parse_config({"output": str(tmp_path), "tune": {"validation": validation, **tune}}, "x")
        data = ConversationData(config)
        data.attach(backbone, Compressor(None))
        return data

    return make


def test_training_batches_are_whole_and_validation_takes_all(make_data):
    data = make_data(validate=True)
    assert [len(batch) for batch in data.train_dataloader()] == [2, 2, 2]
    assert [len(batch) for batch in data.val_dataloader()] == [2, 2, 2, 1]
    assert make_data().val_dataloader() == []


def test_fewer_records_than_a_batch_are_still_a_batch(make_data):
    assert [len(batch) for batch in make_data(count=2, batch_size=5).train_dataloader()] == [2]


def test_batches_of_several_are_grouped_unless_told_otherwise(make_data):
    def is_grouped(**tune):
        return make_data(**tune).train_dataloader().sampler.lengths is not None

    assert is_grouped() and not is_grouped(batch_size=1)
    assert not is_grouped(group_by_length=False) and is_grouped(batch_size=1, group_by_length=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": [4, 6]}, "a budget of 6 frames does not divide into encoder clips of 4; take 4"),
        ({"source": {"frames": [8, 6]}}, "a budget of 6 frames does not divide into encoder clips of 4"),
        ({"source": {"sampling": {"multiple": 2}}}, "sampling.multiple is 2; it must be a multiple of 4"),
        ({"validation": [{"recods": "x"}]}, r"tune.validation\[0\]"),
    ],
)
def test_what_the_backbone_or_nobody_takes_is_refused_before_training(make_data, options, message):
    with pytest.raises(ValueError, match=message):
        make_data(**options)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "pictures.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    return {"records": str(tmp_path / "pictures.json"), "root": str(tmp_path)}


def test_pictures_are_refused_where_they_cannot_be_trained_on(make_data, picture, backbone, monkeypatch):
    data = make_data(data=[picture])
    needy = Compressor(None)
    needy.needs = ("grid", "attention")
    with pytest.raises(
        ConfigError, match="compressor 'Compressor' needs 'attention' of the vision tower, which is known"
    ):
        data.attach(backbone, needy)
    needy.needs = ("grid",)
    data.attach(backbone, needy)
    with pytest.raises(
        ConfigError, match="pictures.json', record 0: backbone 'x' trains on videos alone, not on pictures"
    ):
        data.check(Backbone, "backbone 'x'")
    data.config.tune.format, data.records = "released", {}
    with pytest.raises(ConfigError, match="tune.format is 'released', which backbone 'x' does not know"):
        data.check(Backbone, "backbone 'x'")
