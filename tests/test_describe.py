"""What a plugin's source says of it: the same as its class, once imported, and every option in words."""

import dataclasses
import subprocess
import sys
import typing

import pytest
import yaml

from xcomp.cli import main
from xcomp.config import ConfigError, check_component
from xcomp.describe import describe, first_sentence, lines_of, table
from xcomp.registry import KINDS, Plugin, load, plugins

BUILT_IN = {(p.kind, p.name): p for kind in KINDS for p in plugins(kind).values() if p.origin == "built-in"}
FILES = {
    "base.py": '''
from dataclasses import dataclass, field
from typing import ClassVar
from xcomp import Compressor
WIDTH = 64

class Base(Compressor):
    """The class's own words.

    Not these."""

    @dataclass
    class Config:
        must: str  # has no default
        width: int = WIDTH  # a constant
        share: float = 1 / 9  # computed
        names: list[str] = field(default_factory=list)  # none
        node: dict = field(
            default_factory=lambda: {"name": "lp_comp", "end": 2}
        )  # over several lines
        unsaid: bool = True
        kept: ClassVar[int] = 3

class _Private(Base):
    @dataclass
    class Config:
        hidden: int = 0
''',
    "derived.py": '''
"""The file's words: a
first paragraph. And a second sentence.

Not these."""
from dataclasses import dataclass
from xcomp.compressors.pyramid_drop import PyramidDrop as Pyramid

class Derived(Pyramid):
    @dataclass
    class Config(Pyramid.Config):
        more: int = 1  # of its own
        ratios: float = 0.5  # in its old place
''',
    "inherits.py": "import xcomp.compressors.evs\nclass Inherits(xcomp.compressors.evs.EVS):\n    pass\n",
    "made.py": "from xcomp import Compressor\nclass Made(Compressor):\n    Config = dict\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind, name", BUILT_IN)
def test_every_option_of_a_built_in_plugin_is_told_of(kind, name):
    found = describe(BUILT_IN[kind, name])
    assert not found.unread and found.text.endswith(".") and len(found.text) > 30
    lacking = [option.name for option in found.options if len(option.text) < 3]
    assert not lacking, f"say behind each option of {kind} '{name}' what it is, in a comment on its line: {lacking}"


@pytest.mark.parametrize("kind, name", BUILT_IN)
def test_what_the_source_says_is_what_the_class_has(kind, name):
    found, config = describe(BUILT_IN[kind, name]), load(BUILT_IN[kind, name]).Config
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert [option.name for option in found.options] == list(fields)
    for option in found.options:
        field = fields[option.name]
        assert option.type == field.type if isinstance(field.type, str) else typing.get_type_hints(config)[option.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING:
            assert option.default is None
        else:
            said = yaml.safe_load(option.default)
            if said != default:  # arithmetic
                assert eval(option.default, {"__builtins__": {}}) == default


@pytest.mark.parametrize("kind, name", BUILT_IN)
def test_the_example_is_a_line_of_a_configuration(kind, name):
    node = yaml.safe_load(describe(BUILT_IN[kind, name]).example)[kind]
    assert (node if isinstance(node, str) else node["name"]) == name
    try:
        check_component(kind, node)
    except ConfigError as error:  # of what stands for a file
        raise AssertionError(node) from error
    except ValueError as error:
        assert "has no option" not in str(error) and "must be given" not in str(error), error


def test_sources_are_read_without_running_them(folder):
    found = describe(plugins("compressor", [folder])["base"])
    assert found.text == "The class's own words." and found.unread == ()
    assert [(o.name, o.default, o.text) for o in found.options] == [
        ("must", None, "has no default"),
        ("width", "64", "a constant"),
        ("share", "1 / 9", "computed"),
        ("names", "[]", "none"),
        ("node", "{name: lp_comp, end: 2}", "over several lines"),
        ("unsaid", "true", ""),
    ]
    assert found.example == "compressor: {name: base, must: MUST}"


def test_bases_are_followed_into_their_files(folder):
    known = plugins("compressor", [folder])
    inherited = [option.name for option in describe(known["pyramid_drop"]).options]
    found = describe(known["derived"])
    assert found.text == "The file's words: a first paragraph. And a second sentence."
    assert first_sentence(found.text) == "The file's words: a first paragraph."
    assert [option.name for option in found.options] == [*inherited, "more"]
    assert {o.name: o.text for o in found.options}["ratios"] == "in its old place"
    assert describe(known["inherits"]).options == describe(known["evs"]).options != ()


def test_what_cannot_be_read_is_said(folder):
    found = describe(plugins("compressor", [folder])["made"])
    assert found.options == () and found.unread == ("Made",)
    assert any("Made show only when it is run" in line for line in lines_of(found))


def test_lines_keep_to_the_terminal():
    rows = [(plugin, describe(plugin).text) for plugin in BUILT_IN.values()]
    for width in (50, 80, 140):
        assert max(map(len, table(rows, width))) <= width
        for plugin in BUILT_IN.values():
            *lines, _, _ = lines_of(describe(plugin), width)  # source and example are to be copied
            assert max(map(len, lines)) <= width, plugin
    assert len(table(rows)) == len(rows)


def test_the_command_tells_of_one_plugin_without_loading_torch(folder):
    script = "import sys; from xcomp.cli import main; s = main(sys.argv[1:]); sys.exit(s or 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, "plugins", "derived", str(folder), "uniform"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    blocks = done.stdout.split("\n\n")
    assert blocks[0].startswith("compressor derived\n  The file's words")
    assert "  more: int = 1\n      of its own\n" in blocks[1] and "  budget: mapping = null\n" in blocks[1]
    assert str(folder / "derived.py") in blocks[2] and "selector uniform" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["lp_cmp"], "no plugin, kind or folder is called 'lp_cmp'; did you mean 'lp_comp'?"),
        (["compresors"], "did you mean 'compressors'?"),
        (["selector", "lp_comp"], "no selector or folder is called 'lp_comp'"),
        (["elsewhere/plugins"], "no plugin, kind or folder is called 'elsewhere/plugins'"),
    ],
)
def test_unknown_words(words, message, capsys):
    assert main(["plugins", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_a_plugins_name(folder, tmp_path, monkeypatch, capsys):
    """A name is a built-in plugin first and then a folder; with ``./`` before it, it is the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evs").mkdir()
    (tmp_path / "evs" / "evs_too.py").write_text(FILES["inherits.py"])
    assert main(["plugins", "evs"]) == 0 and "compressor evs\n" in capsys.readouterr().out
    assert main(["plugins", "./evs"]) == 0 and "evs_too" in capsys.readouterr().out
    (tmp_path / "evs_too").mkdir()
    (tmp_path / "evs" / "evs_too.py").rename(tmp_path / "evs_too" / "evs_too.py")
    assert main(["plugins", "evs_too"]) == 0
    assert any(line.split()[1:3] == ["evs_too", "evs_too"] for line in capsys.readouterr().out.splitlines())


def test_a_plugin_that_is_torn(tmp_path, capsys):
    (tmp_path / "selectors").mkdir()
    (tmp_path / "selectors" / "torn.py").write_text("class Torn(:\n")
    assert describe(Plugin("selector", "torn", "here", path=tmp_path / "selectors" / "torn.py")).text == ""
    assert main(["plugins", "torn", str(tmp_path)]) == 0
    assert "broken   SyntaxError" in capsys.readouterr().out
    assert main(["plugins", "torn", str(tmp_path), "--check"]) == 1
