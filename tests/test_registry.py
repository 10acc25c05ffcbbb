"""Plugins are found in three places, listed without being imported, and wrong names and options are explained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import xcomp
from xcomp.cli import main
from xcomp.registry import KINDS, PluginError, find, load_class, plugins

CHECKOUT = Path(xcomp.__file__).resolve().parent.parent
EVERY_OTHER = """
from dataclasses import dataclass
from xcomp.compressor import Compressor


class EveryOther(Compressor):
    @dataclass
    class Config:
        step: int = 2

        def __post_init__(self):
            if self.step < 1:
                raise ValueError(f"step is {self.step}; it must be at least 1")

    def plan(self, num_layers, tokens_per_frame):
        return [tuple(range(0, tokens_per_frame, self.config.step))] * num_layers
"""


@pytest.fixture
def folder(tmp_path):
    """A user's folder with one compressor."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "every_other.py").write_text(EVERY_OTHER)
    return tmp_path / "mine"


def options(name, folder, **given):
    return xcomp.load_compressor(name, plugins=[folder], **given).config


# --- three places -----------------------------------------------------------------------------------------------------


def test_built_in_plugins_are_the_files_of_the_checkout():
    for kind, (place, _, _) in KINDS.items():
        files = {p.stem for root in (CHECKOUT, CHECKOUT / "xcomp") for p in (root / place).glob("*.py")}
        assert files and {name for name, p in plugins(kind).items() if p.origin == "built-in"} == files


def test_a_file_in_a_users_folder_is_a_plugin_of_the_kind_its_class_has(folder):
    found = plugins("compressor", [folder])
    assert found["every_other"].origin == str(folder)
    assert all("every_other" not in plugins(kind, [folder]) for kind in KINDS if kind != "compressor")
    assert options("every_other", folder).step == 2
    assert options("every_other", folder, step=3).step == 3


def test_a_subfolder_named_after_the_kind_holds_plugins_of_that_kind(folder):
    (folder / "compressors").mkdir()
    shutil.move(folder / "every_other.py", folder / "compressors")
    assert "every_other" in plugins("compressor", [folder]) and "every_other" not in plugins("selector", [folder])
    assert options("every_other", folder).step == 2


@pytest.mark.parametrize(
    "imports, base",
    [
        ("from xcomp import Compressor", "Compressor"),
        ("import xcomp", "xcomp.Compressor"),
        ("from xcomp.compressor import Compressor as Base", "Base"),
        ("from xcomp.compressor import PlannedDrop", "PlannedDrop"),
        ("from xcomp.compressors.lp_comp import LPComp", "LPComp"),
    ],
)
def test_the_kind_is_told_however_the_base_class_is_imported(folder, imports, base):
    (folder / "other.py").write_text(
        f"from dataclasses import dataclass\n{imports}\nclass Other({base}):\n    @dataclass\n    class Config: pass\n"
    )
    assert "other" in plugins("compressor", [folder])
    assert load_class("compressor", "other", [folder]).__name__ == "Other"


def test_other_files_in_a_users_folder_are_no_plugins(folder):
    (folder / "notes.py").write_text("class Compressor: pass\n")
    (folder / "_private.py").write_text(EVERY_OTHER)
    assert set(plugins("compressor", [folder])) - set(plugins("compressor")) == {"every_other"}


def install(site, name="halve", group="xcomp.compressors", target="halving:EveryOther"):
    """An installed distribution as pip leaves it, with one entry point."""
    (site / "halving.py").write_text(EVERY_OTHER)
    info = site / "halving-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


@pytest.mark.parametrize("target", ["halving:EveryOther", "halving"])
def test_an_installed_package_brings_plugins_by_entry_point(tmp_path, monkeypatch, target):
    install(tmp_path, target=target)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "halving", raising=False)
    assert plugins("compressor")["halve"].origin == "halving 1.5" and "halving" not in sys.modules
    assert xcomp.load_compressor("halve", step=4).plan(2, 8) == [(0, 4), (0, 4)]


# --- names ------------------------------------------------------------------------------------------------------------


def test_two_plugins_of_one_name_are_an_error_naming_both_origins(folder, tmp_path, monkeypatch):
    (folder / "lp_comp.py").write_text(EVERY_OTHER)
    with pytest.raises(PluginError, match=rf"two compressors are called 'lp_comp': built-in and {folder}; rename one"):
        plugins("compressor", [folder])
    (folder / "lp_comp.py").unlink()
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    with pytest.raises(PluginError, match=rf"called 'every_other': {folder} and {second}"):
        find("compressor", "none", [folder, second])
    install(tmp_path, name="every_other")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=rf"called 'every_other': halving 1.5 and {folder}"):
        plugins("compressor", [folder])


def test_an_unknown_name_lists_what_exists_and_suggests_the_nearest(folder):
    with pytest.raises(PluginError, match="unknown compressor 'lp_cmp'; did you mean 'lp_comp'") as error:
        xcomp.load_compressor("lp_cmp", plugins=[folder])
    assert str(error.value).endswith("known: " + ", ".join(plugins("compressor", [folder])))
    with pytest.raises(PluginError, match="unknown selector 'zzz'; known: "):
        xcomp.load_selector("zzz")


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(PluginError, match=r"plugin folder '.*nowhere' does not exist"):
        plugins("compressor", [tmp_path / "nowhere"])


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"stepp": 3}, "compressor 'every_other' has no option 'stepp'; did you mean 'step'. options: step"),
        ({"qqq": 3}, "has no option 'qqq'; options: step"),
        ({3: 3}, "has no option '3'; options: step"),
        ({"step": "many"}, "compressor 'every_other' option 'step': .*'many'.*could not be converted to Integer"),
        ({"step": 2.5}, "option 'step': .*'2.5'.*could not be converted to Integer"),
        ({"step": None}, "option 'step': .*None"),
        ({"step": [1]}, "option 'step': "),
        ({"step": 0}, "compressor 'every_other': step is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_explained(folder, given, message):
    from xcomp.registry import build, configure

    for make in (configure, build):
        with pytest.raises(PluginError, match=message):
            make("compressor", "every_other", given, [folder])


# --- files that are no plugin -----------------------------------------------------------------------------------------

CLASS = "from dataclasses import dataclass\nfrom xcomp.compressor import Compressor\nclass {}(Compressor):\n    {}\n"
WITH_CONFIG = "Config = dataclass(type('Config', (), {}))"


@pytest.mark.parametrize(
    "source, message",
    [
        ("import math\n", r"'broken' .* must define one public Compressor class; found: none"),
        (
            CLASS.format("One", WITH_CONFIG) + CLASS.format("Two", WITH_CONFIG),
            r"must define one public Compressor class; found: One, Two",
        ),
        ("raise RuntimeError('no licence')\n", r"'broken' .* failed to import: RuntimeError: no licence"),
        ("import nothing_of_this_name\n", r"failed to import: ModuleNotFoundError: No module named 'nothing_of_"),
        ("def f(:\n", r"failed to import: SyntaxError"),
        (CLASS.format("One", "pass"), r"'broken' .* breaks its contract: One must have a nested dataclass Config"),
        ("import sys; sys.exit(3)\n", "failed to import: SystemExit: 3"),
        ("x = 1\0\n", "failed to import: (SyntaxError|ValueError): source code string cannot contain null bytes"),
        (
            CLASS.format("One", WITH_CONFIG + "\n    def __init__(self): pass"),
            r"compressor 'broken' breaks its contract: One\(config\) must make one, but too many positional arguments",
        ),
        (
            CLASS.format("One", WITH_CONFIG + "\n    def plan(self, num_layers): pass"),
            r"breaks its contract: plan\(\) must take \(num_layers, tokens_per_frame\), but too many positional",
        ),
    ],
)
def test_a_file_that_is_no_plugin_says_why(tmp_path, source, message):
    (tmp_path / "compressors").mkdir()
    (tmp_path / "compressors" / "broken.py").write_text(source)
    for _ in range(2):  # a failed import leaves nothing behind that the second one would find
        with pytest.raises(PluginError, match=message):
            xcomp.load_compressor("broken", plugins=[tmp_path])
    assert xcomp.load_compressor("none", plugins=[tmp_path]) is not None


def test_a_private_helper_class_beside_the_plugin_is_fine(folder):
    (folder / "every_other.py").write_text(EVERY_OTHER + "\nclass _Helper(EveryOther): pass\n")
    assert load_class("compressor", "every_other", [folder]).__name__ == "EveryOther"


def test_a_flat_file_that_is_not_python_is_an_error_for_who_asks_for_it_only(folder):
    (folder / "torn.py").write_text("def f(:\n")
    for kind in ("compressor", "selector"):
        with pytest.raises(PluginError, match=rf"{kind} 'torn' \({folder}\) failed to import: SyntaxError"):
            find(kind, "torn", [folder])
        assert "torn" not in plugins(kind, [folder])
    assert options("every_other", folder).step == 2


@pytest.mark.parametrize("parameters, fault", [
    ("backbone, pixels, *args, **kwargs", None),
    ("llm, frames, before, about, after, compressor=None, *, question", None),
    ("backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None", "got an unexpected .* 'question'"),
    ("backbone, pixels, question, *, compressor=None", "multiple values for argument 'question'"),
    ("backbone, pixels, *args, weight, **kwargs", "missing a required .*'weight'"),
])  # fmt: skip
def test_a_method_must_take_what_the_framework_gives(tmp_path, parameters, fault):
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom xcomp import FrameSelector\nclass Own(FrameSelector):\n"
        f"    {WITH_CONFIG}\n    def score_frames(self, {parameters}): pass\n"
    )
    if fault is None:
        load_class("selector", "own", [tmp_path])
    else:
        with pytest.raises(PluginError, match=rf"'own' .* score_frames\(\) must take \(backbone, .*, but {fault}"):
            load_class("selector", "own", [tmp_path])


def test_an_entry_point_to_something_else_says_so(tmp_path, monkeypatch):
    install(tmp_path, target="halving:dataclass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"'halve' \(halving 1.5\) must define one public Compressor class"):
        xcomp.load_compressor("halve")
    (tmp_path / "halving-1.5.dist-info" / "entry_points.txt").write_text("[xcomp.compressors]\nhalve = pathlib:Path\n")
    with pytest.raises(PluginError, match=r"'halve' \(halving 1.5\) .*: Path must be a subclass of Compressor"):
        xcomp.load_compressor("halve")


# --- listing ----------------------------------------------------------------------------------------------------------


def test_listing_imports_no_plugin_and_no_torch(folder):
    (folder / "compressors").mkdir()
    (folder / "compressors" / "loud.py").write_text("raise RuntimeError('imported')\n")
    script = (
        "import json, sys; from xcomp.registry import KINDS, plugins\n"
        f"found = {{kind: list(plugins(kind, [{str(folder)!r}])) for kind in KINDS}}\n"
        "print(json.dumps([found, sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'xcomp'))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, modules = json.loads(done.stdout)
    assert {"every_other", "loud", "lp_comp"} <= set(found["compressor"]) and all(found.values())
    assert modules == ["xcomp", "xcomp.messages", "xcomp.registry"]


@pytest.fixture
def broken(folder, tmp_path, monkeypatch):
    """A folder with a sound compressor among broken plugins, and broken entry points."""
    (folder / "torn.py").write_text("def f(:\n")
    (folder / "selectors").mkdir()
    for name, source in {
        "cut": "x = (\n",
        "outside": "return 1\n",
        "absent": "import nothing_of_this_name\n",
        "empty": "",
        "loose": "from xcomp import FrameSelector\nclass Loose(FrameSelector): pass\n",
        "two": "from xcomp import FrameSelector as F\nclass A(F): pass\nclass B(F): pass\n",
    }.items():
        (folder / "selectors" / f"{name}.py").write_text(source)
    install(tmp_path)
    (tmp_path / "halving").mkdir()
    (tmp_path / "halving" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "halving" / "there.py").touch()
    (tmp_path / "halving-1.5.dist-info" / "entry_points.txt").write_text(
        "[xcomp.benchmarks]\ngone = halving_gone:X\nmoved = halving.moved:X\ndeep = halving.there.deep:X\n"
        "loud = halving.there:X\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("halving", "halving.there"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


def listed(out):
    """{name: (kind, origin, problem or None)}"""
    rows = [[*re.split(" {2,}", line, maxsplit=3), ""][:4] for line in out.splitlines()]
    problems = [said.removeprefix("broken: ") if said.startswith("broken: ") else None for *_, said in rows]
    return {name: (kind, origin, wrong) for (kind, name, origin, _), wrong in zip(rows, problems)}


def test_the_listing_names_what_is_broken_as_far_as_it_shows_without_importing(broken, capsys):
    assert main(["plugins", str(broken)]) == 0
    rows = listed(capsys.readouterr().out)
    bad = {name: row for name, row in rows.items() if row[2]}
    assert set(bad) == {"torn", "cut", "outside", "gone", "moved", "deep"}
    assert bad["torn"][:2] == ("?", str(broken)) and bad["torn"][2].startswith("SyntaxError: ")
    assert bad["cut"][:2] == ("selector", str(broken / "selectors")) and "cut.py, line 1" in bad["cut"][2]
    assert bad["moved"] == ("benchmark", "halving 1.5", "ModuleNotFoundError: No module named 'halving.moved'")
    assert rows["every_other"] == ("compressor", str(broken), None) and rows["lp_comp"][1:] == ("built-in", None)
    assert "halving" not in sys.modules


def test_the_checked_listing_names_everything_that_is_broken(broken, capsys):
    assert main(["plugins", str(broken), "--check"]) == 1
    out = capsys.readouterr().out
    rows = listed(out)
    problems = {name: row[2] for name, row in rows.items() if row[2]}
    for name, start in {
        "torn": "SyntaxError: ",
        "cut": "failed to import: SyntaxError: ",
        "absent": "failed to import: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        "empty": "must define one public FrameSelector class; found: none",
        "two": "must define one public FrameSelector class; found: A, B",
        "loose": "breaks its contract: Loose must have a nested dataclass Config",
        "gone": "failed to import: ModuleNotFoundError: No module named 'halving_gone'",
        "loud": "failed to import: RuntimeError: imported",
    }.items():
        assert problems.pop(name).startswith(start)
    assert set(problems) == {"outside", "moved", "deep"}  # every built-in plugin is sound
    assert len(out.splitlines()) == sum(len(plugins(kind, [broken])) for kind in KINDS) + 1
    for name in ("every_other", "lp_comp"):
        assert xcomp.load_compressor(name, plugins=[broken]) is not None


def test_a_listing_without_broken_plugins_passes_the_check(folder, capsys):
    assert main(["plugins", str(folder), "--check"]) == 0
    assert "every_other" in capsys.readouterr().out


def test_the_listing_refuses_two_of_one_name(folder, capsys):
    (folder / "compressors").mkdir()
    shutil.copy(folder / "every_other.py", folder / "compressors")
    assert main(["plugins", str(folder)]) == 2
    message = f"two compressors are called 'every_other': {folder} and {folder / 'compressors'}; rename one"
    assert capsys.readouterr().err == f"xcomp: error: {message}\n"


# --- from a dropped file to a result ----------------------------------------------------------------------------------


def test_a_compressor_dropped_as_one_file_is_used_from_yaml(folder, tmp_path, tiny_run):
    tiny_run |= {"plugins": [str(folder)], "compressor": {"name": "every_other", "step": 4}, "limit": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run))
    assert main(["evaluate", str(tmp_path / "run.yaml")]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "records.jsonl").open()]
    assert record["arm"] == "every_other + uniform" and record["error"] is None
    assert record["tokens_per_layer"] == [4 * 4, 4 * 4]  # 4 frames, every fourth of 16 tokens


def test_a_file_dropped_into_the_checkouts_own_folder_is_used_from_yaml(tmp_path, tiny_run):
    copy = tmp_path / "checkout"
    for part in ("xcomp", "backbones", "compressors", "selectors", "pyproject.toml"):
        source = CHECKOUT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
        else:
            shutil.copy(source, copy / part)
    (copy / "compressors" / "every_other.py").write_text(EVERY_OTHER)
    tiny_run |= {"compressor": "every_other", "limit": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run))
    done = subprocess.run(
        [sys.executable, "-m", "xcomp.cli", "evaluate", "run.yaml"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "records.jsonl").open()]
    assert record["arm"] == "every_other + uniform" and record["tokens_per_layer"] == [4 * 8, 4 * 8]
