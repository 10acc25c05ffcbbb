"""The checkout shadows nothing of Python's own, and a wheel carries all that a checkout has."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import xcomp
from xcomp.registry import KINDS

CHECKOUT = Path(xcomp.__file__).resolve().parent.parent
FOLDERS = ("backbones", "compressors", "selectors", "configs")


def run(*command, cwd, **variables):
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )


def test_the_component_folders_shadow_no_standard_module():
    script = "import sys; sys.path.insert(0, '.'); import subprocess, asyncio, selectors; print(selectors.__file__)"
    done = run(sys.executable, "-c", script, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == Path(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_component_folders_are_no_packages(folder):
    assert (CHECKOUT / folder).is_dir() and not list((CHECKOUT / folder).rglob("__init__.py"))


def files_of_checkout():
    """What git would commit: neither ignored nor built files."""
    done = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=CHECKOUT)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name and (CHECKOUT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout with a new plugin, a new folder of configurations and a checkpoint; nothing is edited."""
    copy = tmp_path_factory.mktemp("source")
    new = {
        "configs/brand_new/deeper/run.yaml": "name: deep\n",
        "xcomp/checkpoints/small/config.json": "{}",
        "xcomp/checkpoints/small/model.safetensors": "weights",
        "selectors/brand_new.py": "raise RuntimeError('imported')\n",
    }
    for name in files_of_checkout():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, copy / name)
    for name, text in new.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("xcomp-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python where xcomp is the installed wheel, and the checkout cannot be found, from an unrelated folder.

    ``-S`` leaves out the site-packages' ``.pth`` files, and with them an editable install; the dependencies are found
    by path.
    """
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    done = run(*pip, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])

    def python(*arguments):
        done = run(sys.executable, "-S", *arguments, cwd=elsewhere, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(python("-c", "import xcomp; print(xcomp.__file__)").strip()) == target / "xcomp" / "__init__.py"
    python.target = target
    return python


def test_the_wheel_holds_the_package_and_nothing_else(source, wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"xcomp"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    carried = {name for name in names if name.startswith("xcomp/")}
    wanted = {p.relative_to(source).as_posix() for p in (source / "xcomp").rglob("*") if p.is_file()}
    for folder in FOLDERS:
        wanted |= {f"xcomp/{p.relative_to(source).as_posix()}" for p in (source / folder).rglob("*") if p.is_file()}
    assert "xcomp/configs/brand_new/deeper/run.yaml" in carried and "xcomp/checkpoints/small/config.json" in carried
    assert carried == wanted


def test_the_installed_command_lists_every_plugin(installed, source):
    expected = [
        [kind, file.stem, "built-in"]
        for kind, (folder, _, _) in KINDS.items()
        for root in (source, source / "xcomp")
        for file in (root / folder).glob("*.py")
    ]
    assert ["selector", "brand_new", "built-in"] in expected
    for command in (["-m", "xcomp.cli"], [installed.target / "bin" / "xcomp"]):
        listed = [line.split()[:3] for line in installed(*command, "plugins").splitlines()]
        assert sorted(listed) == sorted(expected)


def test_installed_configs_checkpoints_and_plugins_are_found_by_name(installed, source):
    script = (
        "import json; from xcomp.checkpoint import find_folder; from xcomp.config import load_config\n"
        "from xcomp.shipped import built_in\n"
        "from xcomp.registry import load_class\n"
        "plugin = __import__('sys').modules[load_class('compressor', 'lp_comp').__module__]\n"
        "config = load_config('brand_new/deeper/run').name\n"
        "configs = list(built_in('configs', '**/*.yaml'))\n"
        "print(json.dumps([configs, str(find_folder('small')), plugin.__file__, config]))"
    )
    configs, checkpoint, plugin, name = json.loads(installed("-c", script))
    shipped = {p.relative_to(source / "configs").with_suffix("").as_posix() for p in source.glob("configs/**/*.yaml")}
    assert set(configs) == shipped and "brand_new/deeper/run" in configs and name == "deep"
    assert Path(checkpoint) == installed.target / "xcomp" / "checkpoints" / "small"
    assert Path(plugin) == installed.target / "xcomp" / "compressors" / "lp_comp.py"


def test_the_installed_command_writes_every_kind_of_plugin(installed):
    for kind in KINDS:
        assert "wrote fresh/" in installed("-m", "xcomp.cli", "new", kind, f"fresh_{kind}", "--folder", "fresh")
    listed = installed("-m", "xcomp.cli", "plugins", "fresh")
    assert all(f"fresh_{kind}" in listed for kind in KINDS) and "broken" not in listed


def test_the_scripts_that_measure_can_be_imported():
    folder = CHECKOUT / "perf"
    names = ", ".join(sorted(path.stem for path in folder.glob("*.py")))
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = ['{folder}', '{CHECKOUT}']; import {names}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
