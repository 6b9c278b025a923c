"""The whole story through the real command line: plan, train, be killed, go on, predict, evaluate; 3D and 2D."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autoseg.demo import write_synthetic_dataset
from autoseg.image import read_grid, read_image, write_image

pytestmark = pytest.mark.slow

STEPS = 14
KILL_AT_ROWS = 5  # of history.csv, which has one for each step in so short a training
# the command line with the state saved after every step instead of once a minute
SAVE_ALWAYS = "import autoseg.training.loop as l; l.SAVE_SECONDS = 0.0; from autoseg.cli import main; main()"


def autoseg(*words: object) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "autoseg", *map(str, words)]


def environment() -> dict[str, str]:
    """One thread, so that a resumed training computes what the undisturbed one computed, to the bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the synthetic dataset, planned and preprocessed."""
    folder = tmp_path_factory.mktemp("story")
    root = write_synthetic_dataset(folder / "Dataset900_Demo", cases=6, test_cases=2, shape=(8, 32, 32))
    said = autoseg("plan-and-preprocess", root, "--configurations", "3d_fullres", "--fold-time", "1m", "--workers", 2)
    assert "3d_fullres" in said
    return folder


def fold_folder(folder: Path, fold: str, *, workspace: str = "autoseg_workspace") -> Path:
    return folder / workspace / "Dataset900_Demo" / "models" / "3d_fullres" / f"fold_{fold}"


@pytest.fixture(scope="module")
def trained(planned: Path) -> Path:
    """The same with fold 0 trained undisturbed."""
    said = autoseg("train-fold", planned / "Dataset900_Demo", "3d_fullres", 0, "--steps", STEPS)
    assert "organ_front" in said
    return planned


def test_planning_leaves_a_readable_explained_plan(planned: Path) -> None:
    said = autoseg("explain", planned / "Dataset900_Demo")
    assert "patch" in said and "spacing" in said
    plan = json.loads((planned / "autoseg_workspace" / "Dataset900_Demo" / "plan.json").read_text())
    assert all(decision["because"] for decision in plan["decisions"])
    (mirroring,) = [decision for decision in plan["decisions"] if decision["name"] == "mirror_axes"]
    assert mirroring["value"] == [0, 1] and "gland_left" in mirroring["because"]


def test_planning_again_changes_nothing_and_makes_nothing_anew(planned: Path) -> None:
    workspace = planned / "autoseg_workspace" / "Dataset900_Demo"
    stored = {path: path.stat().st_mtime_ns for path in (workspace / "preprocessed").rglob("*") if path.is_file()}
    configurations = json.loads((workspace / "plan.json").read_text())["configurations"]
    autoseg("plan-and-preprocess", planned / "Dataset900_Demo", "--keep-plan")
    assert json.loads((workspace / "plan.json").read_text())["configurations"] == configurations
    assert stored == {
        path: path.stat().st_mtime_ns for path in (workspace / "preprocessed").rglob("*") if path.is_file()
    }


def test_training_leaves_what_the_readme_says(trained: Path) -> None:
    fold = fold_folder(trained, "0")
    for name in ("checkpoint.safetensors", "resume.safetensors", "history.csv", "curve.png", "validation/summary.json"):
        assert (fold / name).is_file(), name
    assert len(list((fold / "validation" / "pictures").glob("*.png"))) >= 1
    assert not list(trained.rglob("*.partial*"))


def test_a_training_killed_without_warning_goes_on_to_identical_weights(trained: Path) -> None:
    words = ("train-fold", trained / "Dataset900_Demo", "3d_fullres", "1", "--steps", STEPS)
    fold = fold_folder(trained, "1")
    autoseg(*words)
    undisturbed = fold.rename(fold.with_name("undisturbed"))

    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_ALWAYS, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    wait_until(lambda: rows(fold) >= KILL_AT_ROWS, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (fold / "resume.safetensors").exists()
    assert rows(fold) < STEPS, "killed too late"

    autoseg(*words, "--continue")
    assert weights(fold / "checkpoint.safetensors") == weights(undisturbed / "checkpoint.safetensors")
    assert rows(fold) == rows(undisturbed) == STEPS


def rows(fold: Path) -> int:
    """Rows of the history so far."""
    history = fold / "history.csv"
    return len(history.read_text().splitlines()) - 1 if history.exists() else 0


def weights(path: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, to the bit."""
    from safetensors.numpy import load_file

    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_predictions_lie_on_the_grid_of_their_images_and_can_be_scored(trained: Path, tmp_path: Path) -> None:
    root = trained / "Dataset900_Demo"
    said = autoseg("predict", root / "imagesTs", tmp_path / "out", "--model", fold_folder(trained, "0").parent)
    assert "2 cases" in said
    for image in sorted((root / "imagesTs").iterdir()):
        labels = tmp_path / "out" / image.name.replace("_0000", "")
        wanted, grid = read_grid(image), read_grid(labels)
        assert grid.shape == wanted.shape
        for field in ("spacing", "origin", "direction"):
            np.testing.assert_allclose(getattr(grid, field), getattr(wanted, field), atol=1e-4)
    scores = tmp_path / "scores.json"
    assert "gland_left" in autoseg("evaluate", tmp_path / "out", root / "labelsTs", "--json", scores)
    assert set(json.loads(scores.read_text())["cases"]) == {"demo_test_000", "demo_test_001"}


def test_python_predicts_what_the_command_predicts(trained: Path, tmp_path: Path) -> None:
    import autoseg as package

    image = sorted((trained / "Dataset900_Demo" / "imagesTs").iterdir())[0]
    model = fold_folder(trained, "0")
    autoseg("predict", image, tmp_path / "one.nii.gz", "--model", model)
    labels = package.load_model(model, device="cpu").predict(image)
    np.testing.assert_array_equal(labels.array, read_image(tmp_path / "one.nii.gz").array)


def test_two_dimensional_images_go_all_the_way(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root = tiny_dataset(name="Dataset002_Plane", cases=5, shape=(1, 48, 40), channels=("gray",), ending=".png")
    assert "2d" in autoseg("plan-and-preprocess", root, "--fold-time", "1m", "--workers", 1)
    autoseg("train-fold", root, "2d", 0, "--steps", 4)
    model = tmp_path / "autoseg_workspace" / "Dataset002_Plane" / "models" / "2d"
    autoseg("predict", root / "imagesTr", tmp_path / "out", "--model", model)
    assert read_image(tmp_path / "out" / "case_00.png").shape == (1, 48, 40)
    assert "ball" in autoseg("evaluate", tmp_path / "out", root / "labelsTr")


def test_a_cascade_with_regions_and_an_ignore_label_goes_all_the_way(
    tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_dataset(cases=4, shape=(8, 24, 24))
    description = json.loads((root / "dataset.json").read_text())
    description["labels"] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    (root / "dataset.json").write_text(json.dumps({**description, "regions_class_order": [1, 2]}))
    for path in sorted((root / "labelsTr").iterdir()):
        label = read_image(path)
        label.array[:, :2] = 3  # nobody annotated the first two slices
        write_image(label, path)
    cases = [f"case_{number:02d}" for number in range(4)]
    place = tmp_path / "autoseg_workspace" / root.name
    place.mkdir(parents=True)
    folds = [{"train": cases[:2], "val": cases[2:]}, {"train": cases[2:], "val": cases[:2]}]
    (place / "folds.json").write_text(json.dumps(folds))  # nnU-Net's splits_final.json has this form

    said = autoseg("plan-and-preprocess", root, "--configurations", "3d_cascade", "--fold-time", "1m", "--workers", 0)
    assert "3d_lowres" in said and "3d_cascade" in said
    for fold in (0, 1):
        assert "core" in autoseg("train-fold", root, "3d_lowres", fold, "--steps", 2, "--workers", 0)
    assert "core" in autoseg("train-fold", root, "3d_cascade", 0, "--steps", 2, "--workers", 0)
    summary = json.loads((place / "models" / "3d_cascade" / "fold_0" / "validation" / "summary.json").read_text())
    assert sorted(summary["cases"]) == cases[2:] and set(summary["by_class"]) == {"whole", "core"}

    model = place / "models" / "3d_cascade"
    autoseg("predict", root / "imagesTr", tmp_path / "out", "--model", model, "--probabilities", "--part", "1/2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["case_00.nii.gz", "case_02.nii.gz"]
    answer = read_image(tmp_path / "out" / "case_00.nii.gz")
    assert answer.shape == (8, 24, 24) and set(np.unique(answer.array)) <= {0, 1, 2}
    core = read_image(tmp_path / "out" / "case_00_probabilities" / "1_core.nii.gz")
    assert core.grid.shape == answer.shape and 0 <= core.array.min() <= core.array.max() <= 1
    np.testing.assert_array_equal(answer.array == 2, core.array > 0.5)
