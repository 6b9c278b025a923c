"""Exported models: portable, checked, and nothing in them leads out of their folder."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import save_fold, small_plan

import autoseg
from autoseg.errors import CheckpointError, StorageError
from autoseg.image import Grid, Image, write_image
from autoseg.inference.package import MANIFEST, export_model
from autoseg.inference.predictor import load_model
from autoseg.workspace import Workspace

NAME = "3d_fullres"
SCAN = Image(np.random.default_rng(0).normal(size=(1, 12, 20, 18)).astype(np.float32), Grid((12, 20, 18), (1.5, 1, 1)))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two trained folds."""
    place = Workspace(tmp_path / "ws")
    for fold in ("0", "1"):
        save_fold(small_plan(), place.root / "models", NAME, fold, seed=int(fold))
    return place


def rewrite(path: Path, change: Callable[[dict[str, bytes]], object], method: int = zipfile.ZIP_STORED) -> None:
    """Write a zip anew after `change` was made to its content."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("name", ["model.zip", "model"])
def test_an_exported_model_predicts_what_its_folds_predict_wherever_it_is_taken(tmp_path, workspace, name):
    expected = load_model(workspace.fold(NAME, "0").parent, "cpu").predict(SCAN).array
    export_model(workspace, NAME, tmp_path / name, licence="CC0")
    elsewhere = tmp_path / "elsewhere" / name
    elsewhere.parent.mkdir()
    shutil.move(tmp_path / name, elsewhere)
    shutil.rmtree(workspace.root)
    model = load_model(elsewhere, "cpu")
    assert model.folds == ("0", "1")
    assert np.array_equal(model.predict(SCAN).array, expected)


@pytest.mark.parametrize("name", ["model.zip", "model"])
def test_python_predicts_a_file_an_image_and_an_array_as_the_readme_says(tmp_path, workspace, name):
    export_model(workspace, NAME, tmp_path / name)
    write_image(SCAN, tmp_path / "scan.nii.gz")
    model = autoseg.load_model(str(tmp_path / name), device="cpu")
    labels = model.predict(str(tmp_path / "scan.nii.gz"))
    assert labels.grid == SCAN.grid and len(np.unique(labels.array)) > 1
    for again in (
        model.predict(SCAN),
        model.predict(SCAN.array, SCAN.grid.spacing),
        model.predict(SCAN.array[0], (1.5, 1, 1)),
    ):
        assert np.array_equal(again.array, labels.array)


def test_a_cascade_brings_its_first_stage_along(tmp_path):
    place = Workspace(tmp_path / "ws")
    for stage in ("3d_lowres", "3d_cascade"):
        save_fold(small_plan(), place.root / "models", stage, "0")
    export_model(place, "3d_cascade", tmp_path / "model.zip")
    model = load_model(tmp_path / "model.zip", "cpu")
    assert model.configuration.name == "3d_cascade"
    assert model.previous is not None and model.previous.configuration.name == "3d_lowres"


def test_the_manifest_says_where_the_model_comes_from(tmp_path, workspace):
    export_model(workspace, NAME, tmp_path / "model", folds=["1"], licence="CC-BY 4.0")
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert manifest["licence"] == "CC-BY 4.0"
    assert manifest["provenance"]["plan"] == small_plan().id
    assert [member["fold"] for member in manifest["provenance"]["members"]] == ["1"]
    described = json.loads((tmp_path / "model" / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "a": 1, "b": 2}


def test_the_same_model_gives_the_same_bytes(tmp_path, workspace):
    first = export_model(workspace, NAME, tmp_path / "a.zip").read_bytes()
    os.utime(workspace.fold(NAME, "0") / "checkpoint.safetensors")
    assert export_model(workspace, NAME, tmp_path / "b.zip").read_bytes() == first


def test_nothing_is_overwritten(tmp_path, workspace):
    (tmp_path / "model.zip").write_text("mine")
    with pytest.raises(StorageError, match="model.zip: is there already"):
        export_model(workspace, NAME, tmp_path / "model.zip")
    assert (tmp_path / "model.zip").read_text() == "mine"


def test_there_must_be_a_finished_fold(tmp_path):
    with pytest.raises(CheckpointError, match=r"no fold is finished; run `autoseg train-fold DATASET 3d_fullres 0`"):
        export_model(Workspace(tmp_path), NAME, tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()


def flip_a_byte(content: dict[str, bytes]) -> None:
    name = next(name for name in content if name.endswith(".safetensors"))
    data = bytearray(content[name])
    data[-1] ^= 1
    content[name] = bytes(data)


def lead_out(content: dict[str, bytes]) -> None:
    content["../evil.txt"] = b"out"


def list_a_way_out(content: dict[str, bytes]) -> None:
    manifest = json.loads(content[MANIFEST])
    manifest["files"]["models/../../evil.txt"] = {"sha256": "0", "bytes": 3}
    content[MANIFEST] = json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip_a_byte, "is not what was exported"),
        (lead_out, "'../evil.txt' leads out of the model's folder"),
        (list_a_way_out, "leads out of the model's folder"),
        (lambda content: content.pop(f"models/{NAME}/fold_1/checkpoint.safetensors"), "is missing"),
        (lambda content: content.pop(MANIFEST), "no model.json"),
        (lambda content: content.update({MANIFEST: b"{"}), "not a sound zip file|cannot be read"),
        (lambda content: content.update({MANIFEST: b'{"format": "other 9"}'}), "expected 'autoseg model 1'"),
    ],
)
def test_a_zip_that_was_tampered_with_is_refused_and_nothing_is_written(tmp_path, workspace, damage, sentence):
    export_model(workspace, NAME, tmp_path / "model.zip")
    rewrite(tmp_path / "model.zip", damage)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=sentence):
        load_model(tmp_path / "model.zip", "cpu")
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_was_packed_again_and_damaged_on_the_way_is_refused(tmp_path, workspace, method):
    path = export_model(workspace, NAME, tmp_path / "model.zip")
    rewrite(path, lambda content: None, method)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"models/{NAME}/fold_0/checkpoint.safetensors").header_offset
    data = bytearray(path.read_bytes())
    data[start + 2000 : start + 6000] = bytes(byte ^ 255 for byte in data[start + 2000 : start + 6000])
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a sound zip file|cannot be unpacked"):
        load_model(path, "cpu")


@pytest.mark.parametrize(
    "manifest", ["[" * 100_000, '{"format": "autoseg model 1", "files": {"models/x": {"sha256": "0", "bytes": 1e999}}}']
)
def test_a_folder_with_a_manifest_of_nonsense_is_refused(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match="get the model again"):
        load_model(tmp_path, "cpu")


def test_a_changed_file_in_an_exported_folder_is_refused_by_name(tmp_path, workspace):
    export_model(workspace, NAME, tmp_path / "model")
    target = tmp_path / "model" / "models" / NAME / "fold_0" / "checkpoint.safetensors"
    os.truncate(target, target.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"fold_0/checkpoint\.safetensors: its content is not what was exported"):
        load_model(tmp_path / "model", "cpu")


def test_links_are_not_followed_out_of_an_exported_folder(tmp_path, workspace):
    export_model(workspace, NAME, tmp_path / "model")
    target = tmp_path / "model" / "models" / NAME / "fold_0" / "checkpoint.safetensors"
    moved = shutil.move(target, tmp_path / "outside.safetensors")
    target.symlink_to(moved)
    with pytest.raises(CheckpointError, match="missing from the model"):
        load_model(tmp_path / "model", "cpu")
