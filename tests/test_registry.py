"""Plugins are found in three places, listed without being imported, and wrong names and options are explained."""

import json
import os
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
        (CLASS.format("One", "pass"), r"compressor 'broken' breaks its contract: One.Config must be a dataclass"),
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


def test_a_flat_file_that_is_not_python_is_named(folder):
    (folder / "torn.py").write_text("def f(:\n")
    with pytest.raises(PluginError, match=r"plugin file '.*torn.py' is not valid Python"):
        plugins("compressor", [folder])


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
    assert modules == ["xcomp", "xcomp.registry"]


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
