"""Costs of shared work: alone each question pays in full, amortised all of them together pay once."""

import random
import time

import pytest

from xcomp.ledger import STAGES, Ledger, Work, shares


def test_alone_in_full_and_amortised_by_those_who_used_it():
    opened = Work("decode", 1.0)
    clip = Work("vision", 2.0, 100, {opened})
    video = Work("prefill", 4.0, 1000, {clip})
    users = {i: Work("answer", 0.5, 10, {video}) for i in range(4)}
    users["chosen"] = Work("answer", 0.5, 10, {Work("select", 3.0, 7, {clip}), clip})
    found = shares(users)
    assert found[0].seconds == {"decode": 1, "vision": 2, "select": 0, "compress": 0, "prefill": 4, "answer": 0.5}
    assert found[0].seconds_amortised == {
        "decode": 0.2,
        "vision": 0.4,
        "select": 0,
        "compress": 0,
        "prefill": 1,
        "answer": 0.5,
    }
    assert found["chosen"].seconds_amortised == {
        "decode": 0.2,
        "vision": 0.4,
        "select": 3,
        "compress": 0,
        "prefill": 0,
        "answer": 0.5,
    }
    assert found["chosen"].macs == {"decode": 0, "vision": 100, "select": 7, "compress": 0, "prefill": 0, "answer": 10}


@pytest.mark.parametrize("seed", range(5))
def test_amortised_costs_add_up_to_what_was_spent(seed):
    rng = random.Random(seed)
    works = [Work(rng.choice(STAGES), rng.random(), rng.randrange(100)) for _ in range(30)]
    for i, work in enumerate(works):
        work.needs = set(rng.sample(works[:i], min(i, 3)))
    users = {i: Work("answer", rng.random(), 1, set(rng.sample(works, 4))) for i in range(6)}
    used = set().union(*(work.all() for work in users.values()))
    found = shares(users)
    spent = sum(sum(share.seconds_amortised.values()) for share in found.values())
    assert spent == pytest.approx(sum(work.seconds for work in used), abs=1e-4)
    for user, share in found.items():
        assert sum(share.seconds.values()) == pytest.approx(sum(w.seconds for w in users[user].all()), abs=1e-4)


def test_a_work_has_its_own_seconds_and_not_those_inside():
    ledger, own = Ledger(), Work("select")
    with ledger.work("prefill") as outer:
        time.sleep(0.02)
        with ledger.work("vision") as inner:
            time.sleep(0.05)
            with ledger.waiting():
                time.sleep(0.04)
        with ledger.charge(own):
            time.sleep(0.03)
        ledger.use(own)
    assert outer.needs == {inner, own} and inner.needs == set()
    assert 0.02 <= outer.seconds < 0.04 and 0.05 <= inner.seconds < 0.08 and 0.03 <= own.seconds < 0.05
    assert 0.04 <= ledger.seconds_waiting < 0.06


def test_what_is_charged_is_not_needed_by_what_stands_around_it():
    ledger, own = Ledger(), Work("select")
    with ledger.work("select") as shared:
        with ledger.charge(own):
            with ledger.work("vision") as inner:
                pass
    assert shared.needs == set() and own.needs == {inner}


def test_an_error_ends_what_was_measured():
    ledger = Ledger()
    with pytest.raises(KeyError), ledger.work("vision"):
        raise KeyError
    with ledger.work("prefill") as later:
        pass
    assert later.needs == set()
