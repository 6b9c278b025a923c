"""Folds that planning writes: nnU-Net's, unless patients, equal images or rare classes ask for others."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.experiment_planning.fingerprint import Fingerprint, extract_fingerprint, uniform_fingerprint
from autoseg.experiment_planning.folds import plan_folds
from autoseg.labels import Labels
from autoseg.training.folds import Fold, load_folds, make_folds, write_folds


def fingerprint_of(root: Path) -> Fingerprint:
    return extract_fingerprint(RawDataset.load(root), workers=1)


def names_of(fingerprint: Fingerprint) -> list[str]:
    return [case.identifier for case in fingerprint.cases]


def together(folds: list[Fold], *cases: str) -> bool:
    """Whether these cases are never parted."""
    return all(set(cases) <= set(fold.train) or set(cases) <= set(fold.validation) for fold in folds)


def describe(root: Path, **entries: object) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_dataset_that_asks_for_nothing_gets_the_folds_of_nnunet(tiny_dataset, tmp_path):
    root = tiny_dataset(cases=6)
    found = fingerprint_of(root)
    assert plan_folds(root, found, tmp_path / "folds.json") == make_folds(names_of(found))


def test_a_single_case_has_no_folds(tiny_dataset, tmp_path):
    root = tiny_dataset(cases=1)
    assert plan_folds(root, fingerprint_of(root), tmp_path / "folds.json") == []


def copy_case(root: Path, source: str, target: str) -> None:
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (root / folder / f"{target}{ending}").write_bytes((root / folder / f"{source}{ending}").read_bytes())


def test_cases_with_the_same_image_share_a_fold(tiny_dataset, tmp_path, caplog):
    root = tiny_dataset(cases=6)
    copy_case(root, "case_01", "case_04")
    with caplog.at_level(logging.WARNING):
        folds = plan_folds(root, fingerprint_of(root), tmp_path / "folds.json")
    assert together(folds, "case_01", "case_04")
    assert "case_01 and case_04 have the same image" in caplog.text


CHECKSUMS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=2, max_size=24)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHECKSUMS)
def test_neither_equal_images_nor_patients_straddle_a_fold(tmp_path_factory, cases):
    root = tmp_path_factory.mktemp("dataset")
    plain = uniform_fingerprint(
        "D", shape=(8, 8, 8), spacing=(1, 1, 1), cases=len(cases), labels=Labels(("a",), ((1,),))
    )
    found = replace(
        plain,
        cases=tuple(replace(case, image_checksum=crc) for case, (crc, _) in zip(plain.cases, cases, strict=True)),
    )
    patients = {name: f"p{p}" for name, (_, p) in zip(names_of(found), cases, strict=True)}
    (root / "dataset.json").write_text(json.dumps({"groups": patients}))
    for fold in plan_folds(root, found, root / "folds.json"):
        for key in (patients, {c.identifier: c.image_checksum for c in found.cases}):
            assert not {key[case] for case in fold.train} & {key[case] for case in fold.validation}


def test_a_class_that_few_cases_show_is_in_every_held_out_part(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    labels = Labels(("organ", "tumour"), ((1,), (2,)))
    plain = uniform_fingerprint("D", shape=(8, 8, 8), spacing=(1, 1, 1), cases=40, labels=labels)
    rare = {case for fold in make_folds(names_of(plain))[:2] for case in fold.validation[:3]}
    cases = tuple(replace(case, class_voxels=(9, 9 * (case.identifier in rare))) for case in plain.cases)
    folds = plan_folds(tmp_path, replace(plain, cases=cases), tmp_path / "folds.json")
    assert all(rare & set(fold.validation) for fold in folds)


def test_the_groups_of_dataset_json_count(tiny_dataset, tmp_path):
    root = tiny_dataset(cases=6)
    describe(root, groups={"case_00": "a", "case_03": "a", "case_05": "a"})
    assert together(plan_folds(root, fingerprint_of(root), tmp_path / "folds.json"), "case_00", "case_03", "case_05")


def test_names_that_look_like_patients_only_warn_and_the_option_groups_them(tmp_path, caplog):
    (tmp_path / "dataset.json").write_text("{}")
    plain = uniform_fingerprint("D", shape=(8, 8, 8), spacing=(1, 1, 1), cases=20, labels=Labels(("a",), ((1,),)))
    cases = tuple(replace(c, identifier=f"patient{i // 2:02d}_frame{i % 2}") for i, c in enumerate(plain.cases))
    found, path = replace(plain, cases=cases), tmp_path / "folds.json"
    with caplog.at_level(logging.WARNING):
        assert plan_folds(tmp_path, found, path) == make_folds(names_of(found))
    assert "--group-by prefix holds them together" in caplog.text
    caplog.clear()
    grouped = plan_folds(tmp_path, found, path, group_by="prefix")
    assert all(together(grouped, f"patient{i:02d}_frame0", f"patient{i:02d}_frame1") for i in range(10))
    assert not caplog.text


def test_a_file_of_groups_is_never_taken_over_folds_that_part_them(tiny_dataset, tmp_path):
    root, groups, path = tiny_dataset(cases=6), tmp_path / "patients.json", tmp_path / "folds.json"
    found = fingerprint_of(root)
    groups.write_text(json.dumps({"case_00": 1, "case_01": 1}))
    folds = plan_folds(root, found, path, group_by=str(groups))
    assert together(folds, "case_00", "case_01")
    write_folds(path, folds)
    assert plan_folds(root, found, path, group_by=str(groups)) == [], "asked again, it is as it was asked"
    alone = next(case for case in ("case_02", "case_03", "case_04") if not together(folds, case, "case_00"))
    groups.write_text(json.dumps({"case_00": 1, alone: 1}))
    with pytest.raises(PlanError, match=r"folds\.json: the folds that are there part 1"):
        plan_folds(root, found, path, group_by=str(groups))
    assert plan_folds(root, found, path) == []


def test_a_split_file_of_nnunet_is_taken_as_it_is(tiny_dataset, tmp_path, caplog):
    root = tiny_dataset(cases=4)
    copy_case(root, "case_01", "case_02")
    splits, names = tmp_path / "splits_final.json", ["case_00", "case_01", "case_02", "case_03"]
    given = [{"train": names[:2], "val": names[2:]}, {"train": names[2:], "val": names[:2]}]
    splits.write_text(json.dumps(given))
    with caplog.at_level(logging.WARNING):
        folds = plan_folds(root, fingerprint_of(root), tmp_path / "folds.json", given=splits)
    assert [{"train": list(fold.train), "val": list(fold.validation)} for fold in folds] == given
    assert "on both sides of a fold (case_01)" in caplog.text, "taken, but the user is told"


def test_another_split_file_is_refused_once_folds_are_trained(tiny_dataset, tmp_path):
    root, path, splits = tiny_dataset(cases=4), tmp_path / "folds.json", tmp_path / "splits_final.json"
    found = fingerprint_of(root)
    write_folds(path, make_folds(names_of(found)))
    write_folds(splits, make_folds(names_of(found))[::-1])
    with pytest.raises(PlanError, match="folds are trained by what it says, and .*splits_final.json says otherwise"):
        plan_folds(root, found, path, given=splits, trained=True)
    assert plan_folds(root, found, path, given=splits) == load_folds(splits, names_of(found))
    assert plan_folds(root, found, path, given=path, trained=True) == load_folds(path, names_of(found))


@pytest.fixture
def grown(tiny_dataset: Callable[..., Path], tmp_path: Path) -> tuple[Path, Fingerprint, Path]:
    """A dataset that has two cases more than when its folds were made: root, fingerprint of before, folds."""
    root, path = tiny_dataset(cases=6), tmp_path / "folds.json"
    before = fingerprint_of(root)
    write_folds(path, plan_folds(root, before, path))
    return tiny_dataset(cases=8), before, path


def test_folds_that_planning_made_are_made_anew_for_new_cases(grown):
    root, before, path = grown
    now = fingerprint_of(root)
    assert plan_folds(root, now, path, before=before) == make_folds(names_of(now))


@pytest.mark.parametrize("why", ["trained", "by hand"])
def test_folds_that_are_trained_by_or_made_by_hand_stay(grown, caplog, why):
    root, before, path = grown
    if why == "by hand":
        write_folds(path, load_folds(path, names_of(before))[::-1])
    caplog.clear()
    assert plan_folds(root, fingerprint_of(root), path, before=before, trained=why == "trained") == []
    assert "2 cases are in no fold: case_06, case_07" in caplog.text
