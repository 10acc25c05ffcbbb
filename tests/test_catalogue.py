"""The table of compressors: what it says is what they do, and the documentation holds it."""

from pathlib import Path

import pytest
import torch

import xcomp.tiny
from xcomp.catalogue import COLUMNS, LAYERS, TOKENS, compressor_rows, markdown, plain
from xcomp.cli import main
from xcomp.compressor import About
from xcomp.decoder import QuestionNeeded
from xcomp.registry import KINDS, load_class, plugins

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "compressors.md"
ROWS = {row["name"]: row for row in compressor_rows()}
UNKNOWN = {"avg_pool", "prunevid"}  # a number of tokens; what the video has of static patches


@pytest.fixture(scope="module")
def backbone():
    return xcomp.tiny.tiny_backbone(tokens_per_frame=TOKENS, layers=LAYERS)


def test_the_documentation_holds_the_table():
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index("\n| name") + 1 :].partition("\n\n")[0].rstrip("\n") + "\n"
    assert table == markdown(compressor_rows()), "write docs/compressors.md anew: xcomp.catalogue.markdown"


@pytest.mark.parametrize("name", plugins("compressor"))
@torch.no_grad()
def test_every_compressor_says_what_it_is(name, backbone):
    row, about = ROWS[name], load_class("compressor", name).about
    assert isinstance(about, About) and row["source"] == about.source and row["acts"] == about.acts
    rule = xcomp.load_compressor(name)
    video = backbone.visual(torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0)), rule.needs)
    decoder, prefix = xcomp.Decoder(backbone, rule), torch.tensor([1, 2])
    if row["question"] == "yes":
        with pytest.raises(QuestionNeeded):
            decoder.prefill_video(video, prefix)
    else:
        decoder.prefill_video(video, prefix)
    counts = decoder.prefill(video, prefix, torch.arange(3, 9)).tokens_per_layer
    assert bool(row["held"]) == (name not in UNKNOWN)
    if row["held"]:
        assert sum(counts) / LAYERS / len(video) == pytest.approx(float(row["held"]), abs=0.02)
    acts_inside = any(a > b for a, b in zip(counts, counts[1:]))
    assert acts_inside == ("layer" in about.acts.replace("before the first layer", ""))


@pytest.mark.parametrize("word", ["compressor", "compressors"])
def test_the_command_prints_it(word, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom xcomp.compressors.evs import EVS\n\n"
        "class Mine(EVS):\n    @dataclass\n    class Config:\n        q: float\n"
    )
    (tmp_path / "torn.py").write_text("from xcomp import Compressor\nclass Torn(Compressor): pass\n")
    assert main(["plugins", word, str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(COLUMNS[:-2])
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == sorted([*ROWS, "mine", "torn"])
    place = lines.index(next(line for line in lines if line.startswith("torn")))
    assert lines[place].split() == ["torn"] and lines[place + 1].startswith("    broken: breaks its contract: ")
    mine = next(line for line in lines if line.startswith("mine"))
    assert mine.split() == ["mine"] and max(map(len, lines)) < 160


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "compressor"])
def test_other_kinds_are_listed_alone(kind, capsys):
    for word in (kind, KINDS[kind][0]):
        assert main(["plugins", word]) == 0
        found = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
        assert found == [[kind, name] for name in plugins(kind)]
    assert main(["plugins", "compressors", "--check"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)


def test_a_narrow_terminal_gets_narrow_lines():
    rows = compressor_rows()
    lines = plain(rows, 60).splitlines()
    assert max(map(len, lines)) <= 60 and [line for line in lines if line[0] != " "] == sorted(ROWS)
    words = " ".join(plain(rows, 60).split())
    assert all(row[column] in words for row in rows for column in ("acts", "source", "deviations"))
    assert plain(rows, 200).splitlines()[0] == plain(rows).splitlines()[0]
