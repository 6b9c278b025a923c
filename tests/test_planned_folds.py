"""Folds that a dataset asks for: patients and equal images share one; otherwise they are nnU-Net's, written later."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.experiment_planning.fingerprint import extract_fingerprint
from autoseg.experiment_planning.folds import plan_folds
from autoseg.training.folds import write_folds


def written(root: Path, path: Path, *, group_by: str | None = None) -> list[set[str]] | None:
    """The held-out cases of each fold, or None where nothing was written."""
    folds = plan_folds(root, extract_fingerprint(RawDataset.load(root), workers=1), path, group_by=group_by)
    if folds:
        write_folds(path, folds)
    return [set(fold["val"]) for fold in json.loads(path.read_text())] if path.exists() else None


def test_a_dataset_that_asks_for_nothing_gets_no_file(tiny_dataset, tmp_path):
    assert written(tiny_dataset(cases=6), tmp_path / "folds.json") is None


def test_cases_with_the_same_image_share_a_fold(tiny_dataset, tmp_path, caplog):
    root = tiny_dataset(cases=6)
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        original = (root / folder / f"case_01{ending}").read_bytes()
        (root / folder / f"case_04{ending}").write_bytes(original)
    with caplog.at_level(logging.WARNING):
        folds = written(root, tmp_path / "folds.json")
    assert folds is not None and all(("case_01" in fold) == ("case_04" in fold) for fold in folds)
    assert "case_01 and case_04 have the same image" in caplog.text


def test_the_groups_of_dataset_json_count(tiny_dataset, tmp_path):
    root = tiny_dataset(cases=6)
    description = json.loads((root / "dataset.json").read_text())
    description["groups"] = {"case_00": "a", "case_03": "a", "case_05": "a"}
    (root / "dataset.json").write_text(json.dumps(description))
    folds = written(root, tmp_path / "folds.json")
    assert folds is not None and [fold for fold in folds if "case_00" in fold][0] >= {"case_00", "case_03", "case_05"}


def test_a_file_of_groups_is_taken_and_never_over_folds_that_are_there(tiny_dataset, tmp_path):
    root, groups = tiny_dataset(cases=6), tmp_path / "patients.json"
    groups.write_text(json.dumps({"case_00": 1, "case_01": 1}))
    folds = written(root, tmp_path / "folds.json", group_by=str(groups))
    assert folds is not None and all(("case_00" in fold) == ("case_01" in fold) for fold in folds)
    assert written(root, tmp_path / "folds.json", group_by=str(groups)) == folds, "asked again, it is as it was asked"
    alone = next(case for case in ("case_02", "case_03", "case_04") if not any({case, "case_00"} <= f for f in folds))
    groups.write_text(json.dumps({"case_00": 1, alone: 1}))
    with pytest.raises(PlanError, match=r"folds\.json: the folds that are there part 1"):
        written(root, tmp_path / "folds.json", group_by=str(groups))
    assert written(root, tmp_path / "folds.json") == folds
