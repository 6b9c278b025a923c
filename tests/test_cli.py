"""The command line: help, options, and one clear sentence with the right exit status for whatever is wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_dataset
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.dataset import RawDataset
from autoseg.image import Image, read_image, write_image
from autoseg.plan import (
    Architecture,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    TrainingSettings,
)

COMMANDS = ("verify", "plan-and-preprocess", "explain", "train-fold", "predict", "evaluate", "demo")
NAME = "Dataset001_Tiny"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("autoseg")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


class Answer:
    """What a command said and its exit status."""

    def __init__(self, words: tuple[object, ...]) -> None:
        result = CliRunner().invoke(app, [str(word) for word in words], prog_name="autoseg")
        self.status, self.out, self.errors = result.exit_code, result.stdout, result.stderr
        assert "Traceback" not in result.output
        assert "should not happen" not in result.output, result.output

    def refused(self, *parts: object) -> None:
        """Status 2 and one sentence that names all `parts`."""
        self.complained(2, *parts)

    def complained(self, status: int, *parts: object) -> None:
        assert self.status == status, f"status {self.status}\n{self.out}\n{self.errors}"
        for part in parts:
            assert str(part) in self.errors, f"'{part}' is not named in: {self.errors}"


def autoseg(*words: object) -> Answer:
    return Answer(words)


def small_plan(root: Path) -> Plan:
    """A plan for the tiny dataset whose network trains in no time."""
    dataset = RawDataset.load(root)
    settings = PreprocessingSettings((2.0, 1.0, 1.0), (0, 1, 2), (Normalization("zscore"),) * len(dataset.channels))
    architecture = Architecture(
        input_channels=len(dataset.channels),
        output_channels=dataset.labels.output_channels,
        features=(4, 8),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((3, 3, 3), (3, 3, 3)),
        encoder_convs=(1, 1),
        decoder_convs=(1,),
    )
    fullres = Configuration(
        "3d_fullres", "3d", settings, (12, 16, 14), (8, 16, 16), 2, architecture, TrainingSettings(steps=3)
    )
    return Plan(
        dataset.name,
        dataset.channels,
        dataset.labels,
        dataset.file_ending,
        Budget(10**9, 60.0),
        (fullres,),
        {},
        (),
        fingerprint="made by hand",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny dataset, its workspace `ws` and a trained fold; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    root = tiny_dataset.__wrapped__(folder)(cases=5)  # type: ignore[attr-defined]  # the factory behind the fixture
    small_plan(root).save(folder / "ws" / NAME / "plan.json")
    common = ("--workspace", folder / "ws")
    assert autoseg("plan-and-preprocess", root, "--keep-plan", "--workers", 1, *common).status == 0
    answer = autoseg("train-fold", root, "3d_fullres", "0", "--workers", 0, *common)
    assert answer.status == 0, answer.errors
    assert "ball" in answer.out
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may break."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def fold_of(folder: Path) -> Path:
    return folder / "ws" / NAME / "models" / "3d_fullres" / "fold_0"


def train(folder: Path, *words: object, fold: str = "0") -> Answer:
    return autoseg(
        "train-fold", folder / NAME, "3d_fullres", fold, "--workspace", folder / "ws", "--workers", 0, *words
    )


def predict(folder: Path, images: Path, output: Path, *words: object) -> Answer:
    model = folder / "ws" / NAME / "models" / "3d_fullres"
    return autoseg("predict", images, output, "--model", model, *words)


def leftovers(folder: Path) -> list[Path]:
    """Files that were being written when something went wrong."""
    return [path for path in folder.rglob("*") if ".partial" in path.name]


# ---- help and options


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_the_common_options(command: str) -> None:
    answer = autoseg(command, "--help")
    assert answer.status == 0
    assert f"autoseg {command}" in answer.out.split("Example:")[1]
    for option in ("--workspace", "--device", "-v", "--quiet"):
        assert option in answer.out


def test_help_lists_every_command() -> None:
    answer = autoseg("--help")
    assert all(command in answer.out for command in COMMANDS)
    assert autoseg("--version").out.startswith("autoseg ")


def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:  # of processor time, which other programs on the machine do not lengthen
        before = os.times()
        subprocess.run([sys.executable, "-m", "autoseg", "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_an_unknown_option_or_command_is_refused() -> None:
    autoseg("verify", "--fixx").refused("--fixx")
    autoseg("train").refused("train")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--gpu-memory", "much"), ("--gpu-memory", "8"), ("--fold-time", "soon"), ("--fold-time", "0m")],
)
def test_nonsense_sizes_and_times_are_refused_with_an_example(
    tiny_dataset: Callable[..., Path], option: str, value: str
) -> None:
    autoseg("plan-and-preprocess", tiny_dataset(cases=1), option, value).refused(option, value, "such as")


def test_an_unknown_configuration_or_fold_names_the_ones_there_are(finished: Path) -> None:
    common = ("--workspace", finished / "ws")
    autoseg("train-fold", finished / NAME, "3d_fulres", "0", *common).refused("Did you mean '3d_fullres'")
    train(finished, fold="7").refused("0 to 4", "all")


def test_a_fold_that_holds_nothing_out_is_trained_and_not_scored(copy: Path) -> None:
    path = copy / "ws" / NAME / "folds.json"
    first, second, *others = json.loads(path.read_text())
    path.write_text(json.dumps([first, {"train": sorted(second["train"] + second["val"]), "val": []}, *others]))
    answer = train(copy, "--steps", 1, fold="1")
    assert answer.status == 0, answer.errors
    assert "No case is held out, so none is scored." in answer.errors + answer.out


def test_an_unknown_device_is_refused(finished: Path) -> None:
    train(finished, "--device", "gpu", fold="1").refused("gpu", "cpu", "cuda")


def test_a_part_beyond_the_parts_is_refused(finished: Path, tmp_path: Path) -> None:
    predict(finished, finished / NAME / "imagesTr", tmp_path / "out", "--part", "5/4").refused("--part", "5/4")


# ---- where things are


def test_commands_without_a_plan_say_how_to_make_one(tiny_dataset: Callable[..., Path]) -> None:
    root = tiny_dataset(cases=2)
    autoseg("explain", root).refused("plan-and-preprocess")
    autoseg("train-fold", root, "3d_fullres", "0").refused("plan-and-preprocess")


def test_a_dataset_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for words in (("verify",), ("plan-and-preprocess",), ("explain",)):
        autoseg(*words, tmp_path / "nowhere").refused("nowhere")


def test_a_workspace_of_another_dataset_is_refused(copy: Path) -> None:
    description = copy / NAME / "dataset.json"
    content = json.loads(description.read_text())
    content["labels"] = {"background": 0, "liver": 1, "spleen": 2}
    description.write_text(json.dumps(content))
    train(copy, "--continue").refused("another dataset", "ball", "liver")


def test_planning_over_trained_models_needs_replan(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(small_plan(copy / NAME), fingerprint="another")
    stand_in_planner(monkeypatch, changed)
    words = ("plan-and-preprocess", copy / NAME, "--workspace", copy / "ws", "--workers", 1)
    before = (copy / "ws" / NAME / "plan.json").read_bytes()
    autoseg(*words).refused("--replan", "--workspace")
    assert (copy / "ws" / NAME / "plan.json").read_bytes() == before
    assert autoseg(*words, "--replan").status == 0
    assert not fold_of(copy).exists()
    assert len(list((copy / "ws" / NAME).glob("models_of_plan_*/3d_fullres/fold_0/checkpoint.safetensors"))) == 1


def test_planning_again_keeps_the_plan_of_trained_models(copy: Path) -> None:
    from autoseg.experiment_planning.fingerprint import extract_fingerprint

    plan_file = copy / "ws" / NAME / "plan.json"
    found = extract_fingerprint(RawDataset.load(copy / NAME), workers=1).id
    replace(Plan.load(plan_file), fingerprint=found).save(plan_file)  # as if the planner had made it
    before = plan_file.read_bytes()
    words = ("plan-and-preprocess", copy / NAME, "--workspace", copy / "ws", "--workers", 1)
    assert autoseg(*words).status == 0
    assert plan_file.read_bytes() == before and fold_of(copy).exists()
    autoseg(*words, "--fold-time", "3h").refused("--replan")


def stand_in_planner(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """Let `plan-and-preprocess` find this plan, whatever the dataset."""
    import autoseg.experiment_planning.planner as planner

    monkeypatch.setattr(planner, "plan_experiment", lambda *_args, **_options: plan)


# ---- broken training data: refused, every case named, nothing half-written; --drop-cases goes on


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    image = read_image(path)
    write_image(image.with_array(change(image.array.copy())), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put_nan(path: Path) -> None:
    import SimpleITK as sitk

    array = read_image(path).array[0].astype(np.float32)
    array[1, 2, 3] = np.nan
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(sitk.ReadImage(str(path)))
    sitk.WriteImage(changed, str(path))


def with_value_7(array: Any) -> Any:
    array[0, 0, 0, 0] = 7
    return array


def make_4d(path: Path) -> None:
    import SimpleITK as sitk

    volume = sitk.ReadImage(str(path))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(path))


def shrink(path: Path) -> None:
    image = read_image(path)
    array = image.array[:, 1:]
    write_image(Image(array, replace(image.grid, shape=array.shape[1:])), path)


IMAGE, LABEL = "imagesTr/case_01_0000.nii.gz", "labelsTr/case_01.nii.gz"
BREAK: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a truncated file": (IMAGE, truncate),
    "an empty file": (IMAGE, lambda path: path.write_bytes(b"")),
    "a NaN": (IMAGE, put_nan),
    "an unknown label": (LABEL, lambda path: rewrite(path, with_value_7)),
    "another size": (LABEL, shrink),
    "a missing channel": ("imagesTr/case_01_0001.nii.gz", lambda path: path.unlink()),
    "a 4D file": (IMAGE, make_4d),
}


@pytest.mark.parametrize("what", BREAK)
def test_broken_training_data_is_refused_naming_case_and_file(
    tiny_dataset: Callable[..., Path], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_dataset(cases=3, channels=("T1", "T2"))
    plan = small_plan(root)
    file, damage = BREAK[what]
    damage(root / file)
    workspace = tmp_path / "ws"
    words = ("plan-and-preprocess", root, "--workspace", workspace, "--workers", 1)
    autoseg(*words).refused("case_01", Path(file).name)
    assert not (workspace / NAME / "plan.json").exists()
    assert not leftovers(workspace)

    stand_in_planner(monkeypatch, plan)
    dropped = autoseg(*words, "--drop-cases")
    assert dropped.status == 0, dropped.errors
    assert "case_01" in dropped.errors
    stored = {path.stem for path in (workspace / NAME / "preprocessed").rglob("*.json")}
    assert stored == {"case_00", "case_02"}


def test_incomplete_and_damaged_cases_are_named_together(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root = tiny_dataset(cases=4)
    (root / "labelsTr/case_00.nii.gz").unlink()
    truncate(root / "imagesTr/case_02_0000.nii.gz")
    answer = autoseg("plan-and-preprocess", root, "--workspace", tmp_path, "--workers", 1)
    answer.refused("2 of 4 training cases", "case_00.nii.gz is missing", "case_02_0000.nii.gz", "--drop-cases")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("words", [(), ("--replan", "--group-by", "nosuch.json")])
def test_a_refused_plan_leaves_models_store_and_plan_as_they_were(
    copy: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    root = copy / NAME
    rewrite(root / "imagesTr" / "case_01_0000.nii.gz", lambda array: array[:, ::-1])
    stand_in_planner(monkeypatch, replace(small_plan(root), fingerprint="of other images"))
    before = contents(copy / "ws")
    autoseg("plan-and-preprocess", root, "--workspace", copy / "ws", "--workers", 2, *words).refused()
    assert contents(copy / "ws") == before


def test_a_store_that_was_made_from_other_files_is_not_trained_on(copy: Path) -> None:
    rewrite(copy / NAME / "imagesTr" / "case_01_0000.nii.gz", lambda array: array[:, ::-1])
    (copy / NAME / "imagesTr" / "case_02_0000.nii.gz").unlink()
    (copy / NAME / "labelsTr" / "case_02.nii.gz").unlink()
    train(copy, fold="1").refused("2 cases", "case_01 (changed)", "case_02 (gone)", "plan-and-preprocess")
    assert not (copy / "ws" / NAME / "models" / "3d_fullres" / "fold_1").exists()


def test_a_volume_is_not_predicted_to_a_picture(copy: Path, tmp_path: Path) -> None:
    scan = copy / NAME / "imagesTr" / "case_00_0000.nii.gz"
    answer = predict(copy, scan, tmp_path / "labels.png")
    assert answer.status == 2 and "a volume of 12 slices is not written to .png" in answer.errors
    assert not (tmp_path / "labels.png").exists()


@pytest.mark.parametrize("content", ["{", '{"by_class": 3}', "[" * 20_000])
def test_export_names_a_damaged_summary(copy: Path, tmp_path: Path, content: str) -> None:
    (fold_of(copy) / "validation" / "summary.json").write_text(content)
    common = ("--workspace", copy / "ws")
    autoseg("export", copy / NAME, tmp_path / "model.zip", *common).refused("summary.json")
    assert not (tmp_path / "model.zip").exists()


def test_an_exported_model_predicts_what_the_fold_does(copy: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.zip"
    assert autoseg("export", copy / NAME, model, "--licence", "CC0", "--workspace", copy / "ws").status == 0
    scan = copy / NAME / "imagesTr" / "case_00_0000.nii.gz"
    assert autoseg("predict", scan, tmp_path / "a.nii.gz", "--model", model).status == 0
    assert predict(copy, scan, tmp_path / "b.nii.gz").status == 0
    assert np.array_equal(read_image(tmp_path / "a.nii.gz").array, read_image(tmp_path / "b.nii.gz").array)
    autoseg("export", copy / NAME, tmp_path / "model.tar", "--workspace", copy / "ws").refused("model.tar", ".zip")
    (tmp_path / "cut.zip").write_bytes(model.read_bytes()[:500])
    autoseg("predict", scan, tmp_path / "c.nii.gz", "--model", tmp_path / "cut.zip").refused("cut.zip", "zip")


def test_onnx_files_are_exported_to_a_folder_that_says_how_they_are_used(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    common = ("--onnx", "--licence", "CC0", "--workspace", copy / "ws")
    autoseg("export", copy / NAME, tmp_path / "model.zip", *common).refused("model.zip", "written to a folder")
    answer = autoseg("export", copy / NAME, tmp_path / "files", *common)
    assert answer.status == 0 and answer.out.split() == [str(tmp_path / "files")]
    assert json.loads((tmp_path / "files" / "onnx.json").read_text())["licence"] == "CC0"
    assert (tmp_path / "files" / "3d_fullres_fold_0.onnx").is_file()


@pytest.mark.parametrize("command", ["verify", "explain"])
def test_a_device_that_cannot_be_is_refused_even_where_nothing_is_computed(
    tiny_dataset: Callable[..., Path], command: str
) -> None:
    autoseg(command, tiny_dataset(cases=1), "--device", "nonsense").refused("Device 'nonsense' is not known")


@pytest.mark.parametrize("name", ["plan-and-preprocess", "run"])
def test_a_terminated_command_says_so(name: str, tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root = tiny_dataset(cases=40, shape=(24, 64, 64))
    command = [sys.executable, "-m", "autoseg", name, str(root), "--workspace", str(tmp_path / "ws")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [*command, "--workers", "2"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(1.5)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert re.search("(Terminated|Interrupted); what was finished is kept", errors)


def test_verify_finds_the_broken_case_and_says_so_by_its_status(tiny_dataset: Callable[..., Path]) -> None:
    root = tiny_dataset(cases=3)
    assert autoseg("verify", root, "--workers", 1).status == 0
    truncate(root / IMAGE)
    answer = autoseg("verify", root, "--workers", 1)
    assert answer.status == 1
    assert "case_01" in answer.out


def test_broken_dataset_json_is_refused(tiny_dataset: Callable[..., Path]) -> None:
    root = tiny_dataset(cases=2)
    (root / "dataset.json").write_text('{"labels": ')
    autoseg("plan-and-preprocess", root).refused("dataset.json", "line 1")


# ---- a workspace or disk that cannot be written


def test_an_unwritable_workspace_is_refused_before_any_work(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")  # permissions would not stop root
    answer = autoseg("plan-and-preprocess", tiny_dataset(cases=2), "--workspace", blocked)
    answer.refused(blocked, "cannot be written", "a file is where a folder is needed")
    assert blocked.read_text() == "a file where a folder should be"


def test_a_read_only_folder_is_named(
    tiny_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_dataset(cases=2)
    fail_writes(monkeypatch, errno.EACCES)
    autoseg("plan-and-preprocess", root, "--workspace", tmp_path / "ws").refused("ws", "permission")


def test_a_full_disk_while_preprocessing_leaves_nothing_half_written(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "ws" / NAME / "preprocessed")
    fail_writes(monkeypatch, errno.ENOSPC, after=6)
    words = ("plan-and-preprocess", copy / NAME, "--keep-plan", "--workspace", copy / "ws", "--workers", 1)
    autoseg(*words).refused("the disk is full", "preprocessed")
    assert not leftovers(copy)
    monkeypatch.undo()
    assert autoseg(*words).status == 0


def test_a_full_disk_while_training_leaves_the_finished_model_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (fold_of(copy) / "checkpoint.safetensors").read_bytes()
    fail_writes(monkeypatch, errno.ENOSPC)
    train(copy, "--continue", "--steps", 6).refused("the disk is full", "fold_0")
    assert (fold_of(copy) / "checkpoint.safetensors").read_bytes() == before
    assert not leftovers(copy)


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried to allocate 2 GiB.", "[x.cpp:1] DefaultCPUAllocator: can't allocate memory"]
)
def test_torch_without_memory_is_one_sentence(copy: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def hungry(*_: object, **__: object) -> None:
        raise RuntimeError(f"{words}\nand a long story")

    monkeypatch.setattr("autoseg.stages.train", hungry)
    answer = train(copy, "--continue")
    answer.refused("Not enough memory", words, "--gpu-memory")
    assert "long story" not in answer.errors


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int, *, after: int = 0) -> None:
    """Every rename of a finished file fails with `code`, as on a full or forbidden disk, after so many that work."""
    real, calls = os.replace, 0

    def replace_or_fail(source: Any, target: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        real(source, target, **options)

    monkeypatch.setattr(os, "replace", replace_or_fail)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
def test_a_file_that_may_not_grow_ends_the_command_with_a_sentence(copy: Path) -> None:
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    words = ("train-fold", copy / NAME, "3d_fullres", "1", "--workspace", copy / "ws", "--workers", "0")
    command = [sys.executable, "-m", "autoseg", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert "fold_1" in done.stderr and "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fold_of(copy).parent / "fold_1" / "checkpoint.safetensors").exists()
    assert not leftovers(copy)


# ---- damaged artefacts


def test_a_damaged_store_names_the_case(copy: Path) -> None:
    (damaged,) = (copy / "ws" / NAME / "preprocessed").rglob("case_01.image.b2nd")
    truncate(damaged)
    train(copy, fold="1").refused("case_01", damaged.name)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ('{"version": 99}', "version 99"),
        ("[]", "version"),
    ],
)
def test_a_damaged_plan_or_one_of_another_version_is_refused(copy: Path, text: str, named: str) -> None:
    (copy / "ws" / NAME / "plan.json").write_text(text)
    train(copy, "--continue").refused("plan.json", named)
    autoseg("explain", copy / NAME, "--workspace", copy / "ws").refused("plan.json", named)


def test_a_plan_edited_to_nonsense_names_the_value(copy: Path) -> None:
    path = copy / "ws" / NAME / "plan.json"
    content = json.loads(path.read_text())
    content["configurations"][0]["patch_size"] = [7, 16, 16]
    path.write_text(json.dumps(content))
    train(copy, fold="1").refused("plan.json", "patch_size", "divisible by [2, 2, 2]")


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def damage_checkpoint(path: Path, how: str, trap: Path) -> None:
    if how == "truncated":
        truncate(path)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a flipped byte":
        content = bytearray(path.read_bytes())
        content[-1000] ^= 0xFF
        path.write_bytes(bytes(content))
    elif how == "a pickle":
        path.write_bytes(pickle.dumps(Evil(trap)))
    elif how == "a torch file":
        import torch

        torch.save({"weights": torch.zeros(3), "evil": Evil(trap)}, path)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "a pickle", "a torch file", "missing"])
def test_a_checkpoint_that_is_none_is_refused_and_runs_no_code(copy: Path, tmp_path: Path, how: str) -> None:
    trap = tmp_path / "trap"
    damage_checkpoint(fold_of(copy) / "checkpoint.safetensors", how, trap)
    answer = autoseg("predict", copy / NAME / "imagesTr", tmp_path / "out", "--model", fold_of(copy))
    answer.refused("checkpoint.safetensors" if how != "missing" else "fold_0")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["truncated", "a pickle"])
def test_a_damaged_resume_file_is_refused_and_runs_no_code(copy: Path, tmp_path: Path, how: str) -> None:
    trap = tmp_path / "trap"
    damage_checkpoint(fold_of(copy) / "resume.safetensors", how, trap)
    train(copy, "--continue", "--steps", 5).refused("resume.safetensors")
    assert not trap.exists()


# ---- training again


def test_training_over_a_trained_fold_needs_continue(finished: Path) -> None:
    train(finished).refused("--continue")


def test_continuing_what_was_never_begun_is_refused(finished: Path) -> None:
    train(finished, "--continue", fold="2").refused("--continue")


def test_a_stop_signal_ends_with_a_valid_model_and_says_so(copy: Path) -> None:
    words = ("train-fold", copy / NAME, "3d_fullres", "3", "--workspace", copy / "ws", "--workers", "0", "--time", "5m")
    process = subprocess.Popen(
        [sys.executable, "-m", "autoseg", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    history = copy / "ws" / NAME / "models" / "3d_fullres" / "fold_3" / "history.csv"
    wait_until(lambda: history.exists(), process)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "--continue" in errors and "Traceback" not in errors
    model = history.parent
    answer = autoseg("predict", copy / NAME / IMAGE, copy / "one.nii.gz", "--model", model)
    assert answer.status == 0, answer.errors


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- prediction: one bad case never costs the others


@pytest.mark.parametrize("what", ["a truncated file", "an empty file", "a NaN", "a 4D file"])
def test_one_bad_image_is_named_and_the_others_are_predicted(finished: Path, tmp_path: Path, what: str) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(finished / NAME / "imagesTr", images)
    bad = images / "case_01_0000.nii.gz"
    BREAK[what][1](bad)
    answer = predict(finished, images, out)
    answer.complained(1, "case_01")
    assert answer.errors.count("error:") == 1
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"case_0{i}.nii.gz" for i in (0, 2, 3, 4)]
    assert not leftovers(tmp_path)


def test_where_nothing_could_be_predicted_the_status_is_refused(finished: Path, tmp_path: Path) -> None:
    bad = tmp_path / "case_01_0000.nii.gz"
    bad.write_bytes(b"")
    predict(finished, bad, tmp_path / "out.nii.gz").refused("case_01")
    assert not (tmp_path / "out.nii.gz").exists()


def test_an_unwritable_output_is_refused(finished: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way")
    predict(finished, finished / NAME / "imagesTr", blocked / "out").refused("blocked")


def test_skip_existing_and_parts_share_the_work(finished: Path, tmp_path: Path) -> None:
    images, out = finished / NAME / "imagesTr", tmp_path / "out"
    first = predict(finished, images, out, "--part", "1/2")
    assert first.status == 0 and len(list(out.glob("*.nii.gz"))) == 3
    second = predict(finished, images, out, "--skip-existing", "--no-mirroring", "--step-size", "1.0")
    assert second.status == 0
    assert "2 cases predicted" in second.out and "3 were there already" in second.out
    predict(finished, images, out, "--step-size", "0").refused("step")


def test_a_model_that_is_not_there_is_refused(finished: Path, tmp_path: Path) -> None:
    answer = autoseg("predict", finished / NAME / "imagesTr", tmp_path / "out", "--model", tmp_path / "nowhere")
    answer.refused("nowhere")


def test_what_only_super_resolving_models_can_do_is_refused_for_others(finished: Path, tmp_path: Path) -> None:
    images, out = finished / NAME / "imagesTr", tmp_path / "out"
    predict(finished, images, out, "--image").refused("3d_fullres", "no image head")
    predict(finished, images, out, "--output-spacing", "1,1,1").refused("no output spacing")
    predict(finished, images, out, "--output-spacing", "1,1").refused("--output-spacing 1,1", "3 numbers")
    predict(finished, images, out, "--output-spacing", "1,1,1", "--native").refused("--native")
    assert not out.exists()


# ---- evaluation


def test_evaluate_compares_images(finished: Path, tmp_path: Path) -> None:
    images, scores = finished / NAME / "imagesTr", tmp_path / "scores.json"
    answer = autoseg("evaluate", images, images, "--images", "--json", scores, "--workers", 1)
    assert answer.status == 0, answer.errors
    assert "SSIM  1.000" in answer.out
    assert json.loads(scores.read_text())["images"]["mean"]["ssim"]["mean"] == pytest.approx(1.0)


def test_evaluate_prints_a_table_and_writes_json(finished: Path, tmp_path: Path) -> None:
    labels = finished / NAME / "labelsTr"
    scores = tmp_path / "scores.json"
    answer = autoseg("evaluate", labels, labels, "--json", scores, "--workers", 1)
    assert answer.status == 0, answer.errors
    assert "ball" in answer.out and "1.000" in answer.out
    assert json.loads(scores.read_text())["by_class"]["core"]["dice"]["mean"] == 1.0


def test_evaluate_names_what_is_missing_and_scores_the_rest(finished: Path, tmp_path: Path) -> None:
    predictions = Path(shutil.copytree(finished / NAME / "labelsTr", tmp_path / "predictions"))
    (predictions / "case_02.nii.gz").unlink()
    answer = autoseg("evaluate", predictions, finished / NAME / "labelsTr", "--workers", 1)
    answer.complained(1, "case_02")
    assert "ball" in answer.out
    autoseg("evaluate", tmp_path / "nowhere", predictions).refused("nowhere")


# ---- what cannot happen


def test_quiet_leaves_results_and_errors_alone(finished: Path, tmp_path: Path) -> None:
    answer = predict(finished, finished / NAME / IMAGE, tmp_path / "out.nii.gz", "--quiet")
    assert answer.status == 0 and answer.errors == ""


def test_a_bug_is_said_to_be_one_and_shown_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import autoseg.experiment_planning.verify as module

    def broken(*_args: object, **_options: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(module, "verify_dataset", broken)
    for words, shown in (((), False), (("-vv",), True)):
        result = CliRunner().invoke(app, ["verify", str(tmp_path), *words])
        assert result.exit_code == 70
        assert "surprise" in result.stderr
        assert ("Traceback" in result.stderr) is shown
