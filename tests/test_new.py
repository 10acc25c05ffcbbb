"""``xcomp new``: what it writes works as it is, and nothing is written where something is in the way."""

import ast
import os
import subprocess
import sys

import pytest

import xcomp
from xcomp.cli import main
from xcomp.new import TEMPLATES
from xcomp.registry import KINDS, load_class, plugins


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_skeleton_works_and_keeps_its_contract_as_written(here, capsys):
    for kind, (folder, _, _) in KINDS.items():
        assert main(["new", kind, f"my_{kind}"]) == 0
        out = capsys.readouterr().out
        test = f"plugins/tests/test_my_{kind}.py"
        assert f"pytest {test}" in out and "plugins: [plugins]" in out and f"{kind}: {{name: my_{kind}" in out
        assert plugins(kind, ["plugins"])[f"my_{kind}"].origin == f"plugins/{folder}"
        assert load_class(kind, f"my_{kind}", ["plugins"]).__name__ == f"My{kind.capitalize()}"
        for path in (here / "plugins" / folder / f"my_{kind}.py", here / test):
            assert "skeleton" not in path.read_text().lower() and f"my_{kind}" in path.read_text()
    assert len(files(here)) == 2 * len(KINDS)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "plugins"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(KINDS)} passed" in done.stdout, done.stdout


def test_there_is_a_template_and_its_test_for_every_kind():
    names = {p.name for p in TEMPLATES.glob("*.py")}
    assert names == {f"{prefix}{kind}.py" for kind in KINDS for prefix in ("", "test_")}


def test_another_folder_and_names_that_a_template_uses(here):
    for name, class_name in {"compressor": "CompressorCompressor", "true": "TrueCompressor", "a_2b": "A2b"}.items():
        assert main(["new", "compressor", name, "--folder", "deep/er"]) == 0
        assert load_class("compressor", name, ["deep/er"]).__name__ == class_name
        assert xcomp.load_compressor(name, plugins=["deep/er"], step=4).plan(2, 8) == [tuple(range(8)), (0, 4)]


@pytest.mark.parametrize("kind, name, message", [
    ("compresor", "mine", "unknown kind 'compresor'; did you mean 'compressor'? kinds: backbone, "),
    ("compressor", "lp_comp", "there is a compressor 'lp_comp' already: built-in; choose another name"),
    *[
        ("selector", name, f"'{name}' cannot name a plugin; take lower-case words joined by '_'")
        for name in ("Mine", "my-own", "_mine", "2nd", "my__own", "mine.py", "../mine", "class", "a b", "", "größe")
    ],
])  # fmt: skip
def test_a_name_that_cannot_be_is_one_line(here, capsys, kind, name, message):
    assert main(["new", kind, name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("xcomp: error: ") and message in err and err.count("\n") == 1
    assert not list(here.iterdir())


@pytest.mark.parametrize("there", [
    "plugins/selectors/mine.py", "plugins/mine.py", "plugins/tests/test_mine.py", "plugins/tests", "plugins",
])  # fmt: skip
def test_nothing_is_overwritten_or_half_written(here, capsys, there):
    path = here / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from xcomp import FrameSelector\nclass Mine(FrameSelector): pass\n")
    assert main(["new", "selector", "mine"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "already" in err and "choose another name" in err
    assert files(here) == [there] and "class Mine(FrameSelector)" in path.read_text()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(here, capsys):
    here.chmod(0o500)
    assert main(["new", "selector", "mine"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_templates_speak_of_themselves_by_the_names_that_are_replaced():
    for path in TEMPLATES.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        assert classes == ([] if path.name.startswith("test_") else ["Skeleton"])
        assert ast.get_docstring(tree).startswith("skeleton")
