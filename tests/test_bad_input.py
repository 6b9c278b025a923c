"""What users, disks and clocks do wrong: one sentence, the right exit status, nothing lost; afterwards it goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_dataset
from test_cli import NAME, Answer, autoseg, fold_of, leftovers, small_plan

from autoseg.checkpoint import checkpoint_id
from autoseg.dataset import RawDataset
from autoseg.errors import CheckpointError
from autoseg.experiment_planning.fingerprint import extract_fingerprint
from autoseg.files import storage_error, write_json
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.locks import alone
from autoseg.plan import Plan
from autoseg.stages import is_of_split, require_folds, validate
from autoseg.training.folds import load_folds
from autoseg.workspace import SCORED, Workspace

CASES = [f"case_{i:02d}" for i in range(6)]
CONFIGURATION = "3d_fullres"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny dataset, its workspace `ws` and a trained fold; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    root = tiny_dataset.__wrapped__(folder)(cases=len(CASES))  # type: ignore[attr-defined]  # behind the fixture
    small_plan(root).save(folder / "ws" / NAME / "plan.json")
    write_json(folder / "ws" / NAME / "folds.json", [split(CASES[3:]), split(CASES[:3])])
    preprocess(folder)
    assert train(folder).status == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may break; the times of its files are kept, as the store looks at them."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def place(copy: Path) -> Workspace:
    """The workspace in it."""
    return Workspace(copy / "ws" / NAME)


@pytest.fixture
def disk(tmp_path: Path, finished: Path) -> Iterator[Disk]:
    """A disk of 8 MB with a copy of `finished`; the test is skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # arrays of the store may be open still


class Disk:
    """A small file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, *, leaving: int) -> None:
        """Write a file that leaves so many bytes free."""
        status = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(b"x" * (status.f_bavail * status.f_frsize - leaving))

    def make_room(self) -> None:
        (self.folder / "filler").unlink()

    def forbid_writing(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)


def split(held_out: list[str]) -> dict[str, list[str]]:
    return {"train": [case for case in CASES if case not in held_out], "val": held_out}


def preprocess(folder: Path, *words: object, workers: int = 1) -> Answer:
    common = ("--keep-plan", "--workers", workers, "--workspace", folder / "ws")
    return autoseg("plan-and-preprocess", folder / NAME, *common, *words)


def train(folder: Path, *words: object, fold: str = "0") -> Answer:
    common = ("--workers", 0, "--workspace", folder / "ws")
    return autoseg("train-fold", folder / NAME, CONFIGURATION, fold, *common, *words)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- plans and folds


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("batch_size", 10**6, "a step of batch 1000000 with patch [8, 16, 16] needs at least"),
        ("batch_size", 10**12, "voxels"),
        ("batch_size", -2, "batch_size must be at least 1"),
        ("batch_size", "two", "batch_size must be of type int, got 'two'"),
        ("patch_size", [8, -16, 16], "patch_size [8, -16, 16] must be divisible"),
        ("patch_size", [7, 16, 16], "must be divisible by [2, 2, 2], the product of the strides"),
        ("previous_stage", "3d_lowres", "previous_stage '3d_lowres' is not a configuration of this plan"),
        ("previous_stage", "", "previous_stage '' is not a configuration of this plan"),
        ("median_shape", [-1, 0, 3], "median_shape must be three numbers of voxels"),
        ("architecture.features", [10**9, 10**9], "features and kernels may be up to"),
        ("architecture.encoder_convs", [10**9, 1], "features and kernels may be up to"),
        ("preprocessing.spacing", [float("nan"), 1.0, 1.0], "spacing must be positive"),
        ("preprocessing.spacing", [1e-320, 1.0, 1.0], "spacing must be positive"),
        ("training.image_losses", [""], "image loss '' is not known"),
        ("training.seconds", float("inf"), "steps and seconds must not be negative"),
    ],
)
def test_a_plan_edited_into_nonsense_is_refused_and_nothing_is_changed(copy, place, key, value, named):
    content = json.loads(place.plan.read_text())
    target = content["configurations"][0]
    *path, last = key.split(".")
    for part in path:
        target = target[part]
    target[last] = value
    place.plan.write_text(json.dumps(content))
    before = content_of(place.root)
    train(copy, fold="1").refused(named)
    assert content_of(place.root) == before


def test_labels_of_a_plan_that_do_not_fit_together_are_those_of_another_dataset(copy, place):
    content = json.loads(place.plan.read_text())
    content["labels"]["values"] = [[1]]
    place.plan.write_text(json.dumps(content))
    train(copy, fold="1").refused("belongs to another dataset (its labels: ball 1; of", "ball 1, core 2")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("not json", "not valid JSON"),
        (json.dumps([{"train": CASES[:3], "val": ["nobody"]}]), "names cases that are not there"),
        (json.dumps([{"train": CASES[:3], "val": CASES[2:]}]), "both trains on and holds out case_02"),
        (json.dumps([split(CASES[:3])]), "Fold '1' is not there"),
        (json.dumps([None, None]), "is not of the form"),
    ],
)
def test_a_wrong_fold_file_is_refused_and_training_begins_once_it_is_right(copy, place, content, named):
    good = place.folds.read_text()
    place.folds.write_text(content)
    train(copy, fold="1").refused(named)
    assert not place.fold(CONFIGURATION, "1").exists()
    place.folds.write_text(good)
    assert train(copy, fold="1").status == 0


def test_a_split_file_is_taken_beside_a_plan_that_is_kept(copy, place, tmp_path):
    shutil.rmtree(place.models)
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([split(CASES[:1]), split(CASES[1:])]))
    assert preprocess(copy, "--folds", splits).status == 0
    assert json.loads(place.folds.read_text()) == json.loads(splits.read_text())
    splits.write_text("[]")
    preprocess(copy, "--folds", splits).refused("splits_final.json", "got an empty list")


def test_a_model_is_never_scored_on_cases_that_it_was_trained_on(copy, place):
    plan, before = Plan.load(place.plan), place.folds.read_text()
    assert is_of_split(plan, CONFIGURATION, "0", workspace=place)
    place.folds.write_text(json.dumps([split(CASES[:3]), split(CASES[3:])]))
    assert not is_of_split(plan, CONFIGURATION, "0", workspace=place)
    with pytest.raises(CheckpointError, match="this fold was trained on other cases than .*folds.json names now"):
        validate(copy / NAME, plan, CONFIGURATION, "0", workspace=place)
    train(copy, "--continue").refused("this training had other cases than fold 0")
    place.folds.write_text(before)
    assert validate(copy / NAME, plan, CONFIGURATION, "0", workspace=place) is not None


def test_folds_that_were_deleted_are_made_as_planning_makes_them(copy, place):
    twin = copy / NAME / "imagesTr" / "case_04_0000.nii.gz"
    twin.write_bytes((copy / NAME / "imagesTr" / "case_01_0000.nii.gz").read_bytes())
    extract_fingerprint(RawDataset.load(copy / NAME), workers=1).save(place.fingerprint)
    place.folds.unlink()
    require_folds(copy / NAME, workspace=place)
    twins = {"case_01", "case_04"}
    for fold in load_folds(place.folds, CASES):
        assert twins <= {*fold.train} or twins <= {*fold.validation}


# ---- other datasets, and cases that are gone


def test_a_workspace_of_a_dataset_of_the_same_name_is_not_trained_on(copy, tmp_path):
    other = tiny_dataset.__wrapped__(tmp_path / "other")(cases=len(CASES), seed=9)  # type: ignore[attr-defined]
    answer = autoseg("train-fold", other, CONFIGURATION, "1", "--workers", 0, "--workspace", copy / "ws")
    answer.refused("the files of 6 cases are not those that were preprocessed", "run `autoseg plan-and-preprocess`")


def test_a_case_that_was_removed_is_named_and_the_run_goes_on_when_it_is_back(copy, place):
    files = [copy / NAME / "imagesTr" / "case_05_0000.nii.gz", copy / NAME / "labelsTr" / "case_05.nii.gz"]
    kept = [Path(shutil.move(path, copy / path.name)) for path in files]
    train(copy, fold="1").refused("case_05 (gone)")
    assert preprocess(copy).status == 0
    train(copy, fold="1").refused("folds.json: fold 0 names cases that are not there", "case_05")
    for path, where in zip(kept, files, strict=True):
        shutil.move(path, where)
    assert preprocess(copy).status == 0
    assert train(copy, fold="1").status == 0
    assert place.fold(CONFIGURATION, "1").is_dir()


def test_a_spacing_that_no_memory_holds_names_the_case_and_the_grid(copy, tmp_path):
    (tmp_path / "in").mkdir()
    scan = read_image(copy / NAME / "imagesTr" / "case_00_0000.nii.gz")
    grid = Grid(scan.shape, (1000.0, 1000.0, 1000.0))
    write_image(Image(scan.array, grid), tmp_path / "in" / "metres_0000.nii.gz")
    shutil.copy(copy / NAME / "imagesTr" / "case_01_0000.nii.gz", tmp_path / "in")
    answer = autoseg("predict", tmp_path / "in", tmp_path / "out", "--model", fold_of(copy), "--workers", 0)
    answer.complained(
        1, "Case metres: 12x16x14 voxels of 1000x1000x1000 mm become 6000x16000x14000 voxels of", "correct"
    )
    assert (tmp_path / "out" / "case_01.nii.gz").is_file()


# ---- disks


@pytest.mark.parametrize("leaving", [0, 10_000, 60_000])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_while_preprocessing(disk, leaving, workers):
    store = disk.folder / "ws" / NAME / "preprocessed"
    whole = content_of(store)
    shutil.rmtree(store)
    disk.fill(leaving=leaving)
    preprocess(disk.folder, workers=workers).refused(
        f"error: {disk.folder / 'ws'}", "the disk is full; free some space"
    )
    assert not leftovers(disk.folder)
    disk.make_room()
    assert preprocess(disk.folder).status == 0
    assert content_of(store).keys() == whole.keys()


@pytest.mark.parametrize("leaving", [0, 20_000, 100_000])
def test_a_disk_that_fills_up_while_training(disk, leaving):
    place = Workspace(disk.folder / "ws" / NAME)
    model = content_of(place.fold(CONFIGURATION, "0"))
    disk.fill(leaving=leaving)
    train(disk.folder, fold="1").refused("the disk is full", "fold_1")
    assert not leftovers(disk.folder) and content_of(place.fold(CONFIGURATION, "0")) == model
    disk.make_room()
    go_on = ["--continue"] if (place.fold(CONFIGURATION, "1") / "resume.safetensors").exists() else []
    assert train(disk.folder, *go_on, fold="1").status == 0


def test_a_disk_that_fills_up_while_predicting_held_out_cases_fails_no_case_for_good(copy, place, monkeypatch):
    validation = place.fold(CONFIGURATION, "0") / "validation"
    shutil.rmtree(validation)

    def full(image: Image, path: Path) -> None:
        if path.name.startswith(CASES[4]):
            raise storage_error(path, OSError(errno.ENOSPC, "No space left on device"))
        write_image(image, path)

    with monkeypatch.context() as patched:
        patched.setattr("autoseg.inference.crossval.write_image", full)
        train(copy, "--continue").refused(f"{CASES[4]}.nii.gz: the disk is full")
    assert not (validation / "summary.json").exists() and (validation / f"{CASES[3]}.nii.gz").is_file()
    assert train(copy, "--continue").status == 0
    assert json.loads((validation / "summary.json").read_text())["failed"] == {}


def test_a_disk_that_fills_up_while_exporting_reporting_and_predicting(disk):
    common = ("--workspace", disk.folder / "ws")
    root, report = disk.folder / NAME, Workspace(disk.folder / "ws" / NAME).report
    report.write_text("of before")
    disk.fill(leaving=4_000)
    for output in ("model.zip", "model"):
        autoseg("export", root, disk.folder / output, *common).refused("the disk is full")
        assert not (disk.folder / output).exists()
    autoseg("report", root, *common).refused("report.html: the disk is full")
    assert report.read_text() == "of before"
    predicted = autoseg("predict", root / "imagesTr", disk.folder / "out", "--model", fold_of(disk.folder))
    predicted.complained(1 if any((disk.folder / "out").iterdir()) else 2, "the disk is probably full")
    assert not leftovers(disk.folder)
    disk.make_room()
    assert autoseg("export", root, disk.folder / "model.zip", *common).status == 0
    assert autoseg("report", root, *common).status == 0


def test_a_workspace_that_may_not_be_written_is_refused_and_read_all_the_same(disk, tmp_path):
    disk.forbid_writing()
    common = ("--workspace", disk.folder / "ws")
    root = disk.folder / NAME
    preprocess(disk.folder).refused(f"{disk.folder / 'ws' / NAME}: no permission to write here")
    train(disk.folder, fold="1").refused("no permission to write here")
    autoseg("run", root, *common).refused("no permission to write here")
    autoseg("report", root, *common).refused("no permission to write here")
    assert autoseg("report", root, tmp_path / "report.html", *common).status == 0
    assert autoseg("explain", root, *common).status == 0


@pytest.mark.parametrize("command", [("plan-and-preprocess",), ("run",)])
def test_a_workspace_that_is_a_file_is_refused(finished, tmp_path, command):
    (tmp_path / "ws").write_text("mine")
    answer = autoseg(*command, finished / NAME, "--workspace", tmp_path / "ws")
    answer.refused(tmp_path / "ws" / NAME, "a file is where a folder is needed")
    assert (tmp_path / "ws").read_text() == "mine"


# ---- two at once, and the clock


HOLDER = """
import sys
from pathlib import Path
from autoseg.locks import alone
with alone(Path(sys.argv[1]), what="held"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_who_comes_second_into_a_workspace_is_told_by_whom_it_is_used(copy, place):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLDER, str(place.lock)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        for answer in (preprocess(copy), autoseg("run", copy / NAME, "--workspace", copy / "ws")):
            answer.refused(f"{place.root}: another run works here (process {first.pid})")
        first.communicate("")
    assert preprocess(copy).status == 0


def test_one_fold_is_trained_by_one_process_at_a_time(copy, place, monkeypatch):
    monkeypatch.setattr("autoseg.stages.LOCK_TRIES", 1)
    with alone(place.fold_lock(CONFIGURATION, "1"), what="held"):
        train(copy, fold="1").refused(f"{CONFIGURATION}, fold 1: another training works on it (process {os.getpid()})")
        assert not place.fold(CONFIGURATION, "1").exists()
    assert train(copy, fold="1").status == 0


def test_what_was_scored_is_known_by_content_so_clocks_may_jump(copy, place):
    folder = place.fold(CONFIGURATION, "0")
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert summary[SCORED] == checkpoint_id(folder / "checkpoint.safetensors")
    scored = (folder / "validation" / "summary.json").read_bytes()
    os.utime(folder / "validation" / "summary.json", (0, 0))  # written in 1970, before the checkpoint
    assert autoseg("report", copy / NAME, "--workspace", copy / "ws").status == 0
    assert train(copy, "--continue", "--steps", 6).status == 0
    again = json.loads((folder / "validation" / "summary.json").read_text())
    assert again[SCORED] == checkpoint_id(folder / "checkpoint.safetensors") != summary[SCORED]
    assert (folder / "validation" / "summary.json").read_bytes() != scored


# ---- models from elsewhere


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.zip"
    assert autoseg("export", finished / NAME, path, "--workspace", finished / "ws").status == 0
    return path


Files = dict[str, bytes]
WEIGHTS = f"models/{CONFIGURATION}/fold_0/checkpoint.safetensors"


def listing(files: Files, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the list of files in the manifest."""
    manifest = json.loads(files["model.json"])
    change(manifest["files"])
    files["model.json"] = json.dumps(manifest).encode()


def entry(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def wrong_checksum(files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:-1] + bytes([files[WEIGHTS][-1] ^ 1])


def way_out(files: Files) -> None:
    files["../evil"] = b"x"


def absolute_name(files: Files) -> None:
    files["/etc/evil"] = b"x"


def listed_way_out(files: Files) -> None:
    listing(files, lambda listed: listed.update({"models/../../evil": entry(b"x")}))


def bomb(files: Files) -> None:
    files["models/bomb"] = bytes(32 * 2**20)
    listing(files, lambda listed: listed.update({"models/bomb": entry(files["models/bomb"])}))


def bomb_of_a_manifest(files: Files) -> None:
    files["model.json"] = b" " * (32 * 2**20)


def claim_of_a_petabyte(files: Files) -> None:
    files["models/more"] = b"x"
    listing(files, lambda listed: listed.update({"models/more": {"sha256": "0", "bytes": 10**15}}))


def no_weights(files: Files) -> None:
    del files[WEIGHTS]
    listing(files, lambda listed: listed.pop(WEIGHTS))


def damaged_weights_with_their_checksum(files: Files) -> None:
    files[WEIGHTS] = b"x" * 1000
    listing(files, lambda listed: listed.update({WEIGHTS: entry(files[WEIGHTS])}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (wrong_checksum, "is not what was exported (SHA-256)"),
        (way_out, "'../evil' leads out of the model's folder"),
        (absolute_name, "'/etc/evil' leads out of the model's folder"),
        (listed_way_out, "leads out of the model's folder"),
        (bomb, "would unpack to"),
        (bomb_of_a_manifest, "holds no model.json"),
        (claim_of_a_petabyte, "would unpack to"),
        (no_weights, "model.json lists no weights"),
        (damaged_weights_with_their_checksum, "this is not a sound safetensors file"),
    ],
)
def test_a_zip_that_is_no_good_is_refused_by_its_own_name(exported, finished, tmp_path, damage, named):
    with zipfile.ZipFile(exported) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    damage(files)
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name twice
        for name, content in files.items():
            archive.writestr(name, content)
    refused_as_a_model(path, finished, tmp_path, named)


def refused_as_a_model(path: Path, finished: Path, tmp_path: Path, named: str) -> None:
    scan = finished / NAME / "imagesTr" / "case_00_0000.nii.gz"
    autoseg("predict", scan, tmp_path / "out.nii.gz", "--model", path).refused(path, named)
    assert sorted(tmp_path.iterdir()) == [path], "nothing was written"


@pytest.mark.parametrize("kept", [0, 100, -200])
def test_a_zip_that_was_cut_off_is_refused(exported, finished, tmp_path, kept):
    path = tmp_path / "model.zip"
    path.write_bytes(exported.read_bytes()[:kept])
    refused_as_a_model(path, finished, tmp_path, "this is not a sound zip file")


def test_a_link_in_a_zip_is_not_followed(exported, finished, tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            info = zipfile.ZipInfo(name)
            if name == WEIGHTS:
                info.create_system, info.external_attr = 3, 0o120777 << 16
            archive.writestr(info, b"/etc/hostname" if name == WEIGHTS else source.read(name))
    refused_as_a_model(path, finished, tmp_path, f"{WEIGHTS} is missing or has another size")
