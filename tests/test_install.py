"""What is installed works: from a wheel, regular and editable, away from the clone and in its root. Works offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("autoseg", "experiment_planning", "preprocessing", "training", "inference")
STAGES = PARTS[1:]
IMPORT_ALL = "import " + ", ".join(f"autoseg.{stage}" for stage in STAGES) + ", autoseg.networks, autoseg.errors"
SETUP = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")

pytestmark = pytest.mark.slow


def run(*command: str | Path, folder: Path) -> str:
    """Output of a command that must succeed, without the clone on its import path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: Path, *words: str | Path, folder: Path) -> None:
    """Install into the environment of `python`, with what is installed here in place of a package index."""
    common = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *common, *words, folder=folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("clone") / "autoseg"
    copy.mkdir()
    for name in SETUP:
        shutil.copy(ROOT / name, copy)
    for name in PARTS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with autoseg in it, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "env", with_pip=False)
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    if not python.exists():
        python = scripts / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    here = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(here) + "\n")
    if request.param == "wheel":
        build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, clone)
        run(sys.executable, "-m", "pip", *build, folder=folder)
        (wheel,) = folder.glob("autoseg-*.whl")
        pip(python, wheel, folder=folder)
        assert not [name for name in STAGES if (site / name).exists()], "a generic name landed in site-packages"
        assert (site / "autoseg" / "py.typed").is_file()
    else:
        pip(python, "--config-settings", "editable_mode=strict", "--editable", clone, folder=folder)
    return python


def test_it_is_the_installed_one_that_is_imported_away_from_the_clone(
    installed: Path, clone: Path, tmp_path: Path
) -> None:
    found = Path(run(installed, "-c", "import autoseg; print(autoseg.__file__)", folder=tmp_path).strip())
    assert ROOT not in found.parents
    assert installed.parents[2] in found.parents or clone in found.parents


@pytest.mark.parametrize("place", ["away", "root"])
def test_every_stage_imports_away_from_the_clone_and_in_its_root(
    installed: Path, clone: Path, tmp_path: Path, place: str
) -> None:
    run(installed, "-c", IMPORT_ALL, folder=tmp_path if place == "away" else clone)


def test_the_command_works_and_its_workers_find_the_package(installed: Path, tmp_path: Path) -> None:
    command = installed.parent / "autoseg"
    assert "plan-and-preprocess" in run(command, "--help", folder=tmp_path)
    script = (
        "from pathlib import Path; from autoseg.demo import write_synthetic_dataset as write; "
        "write(Path('Dataset900_Small'), cases=3, test_cases=0, shape=(8, 16, 16))"
    )
    run(installed, "-c", script, folder=tmp_path)
    assert "0 errors" in run(command, "verify", "Dataset900_Small", "--workers", "2", folder=tmp_path)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = [
        line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if "pytest" in line
    ]
    assert len(commands) == 1
    # as it stands, so that what is tested is what a newcomer types
    assert commands[0] in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_every_dependency_has_a_tested_version() -> None:
    pinned = {
        line.split("==")[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    }
    required = re.findall(r'"([A-Za-z][\w-]*)>=[\d.]+"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert "torch" in required and "pytest" in required
    assert {name.lower() for name in required} <= pinned
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton")) or name == "torchvision"]
