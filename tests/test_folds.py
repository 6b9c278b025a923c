"""Folds: nnU-Net's where nothing else is given, and its split files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from autoseg.errors import PlanError
from autoseg.training.folds import (
    Fold,
    load_or_make_folds,
    look_like_repeated_patients,
    make_folds,
    read_groups,
    select_fold,
)

CASES = [f"case_{i:03d}" for i in range(12)]


def nnunet_folds(cases: list[str]) -> list[tuple[list[str], list[str]]]:
    """As nnU-Net 2 makes them (`generate_crossval_split`): KFold(5, shuffle, 12345) on the sorted identifiers."""
    names = sorted(cases)
    splitter = KFold(n_splits=5, shuffle=True, random_state=12345)
    return [
        (list(np.array(names)[train]), list(np.array(names)[validation])) for train, validation in splitter.split(names)
    ]


@settings(max_examples=25, deadline=None)
@given(st.sets(st.text("abcXYZ019_-", min_size=1, max_size=6), min_size=5, max_size=40), st.randoms())
def test_folds_are_those_of_nnunet_in_whatever_order_the_cases_come(cases: set[str], random: Any) -> None:
    names = list(cases)
    random.shuffle(names)
    assert [(list(fold.train), list(fold.validation)) for fold in make_folds(names)] == nnunet_folds(names)


def test_the_folds_of_twelve_cases_never_change() -> None:
    held_out = [[int(case[-3:]) for case in fold.validation] for fold in make_folds(CASES)]
    assert held_out == [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]  # by nnU-Net 2.8.1


@settings(deadline=None)
@given(st.integers(2, 60))
def test_every_case_is_held_out_once_and_never_trained_on_then(count: int) -> None:
    cases = [f"c{i}" for i in range(count)]
    folds = make_folds(cases)
    assert len(folds) == min(5, count)
    assert sorted(case for fold in folds for case in fold.validation) == sorted(cases)
    for fold in folds:
        assert sorted((*fold.train, *fold.validation)) == sorted(cases)


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_case_cannot_be_held_out(count: int) -> None:
    with pytest.raises(PlanError, match=f"Folds need at least two cases, got {count}; train fold 'all' instead"):
        make_folds(CASES[:count])


def test_folds_are_written_in_nnunets_form_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    made = load_or_make_folds(path, CASES)
    written = json.loads(path.read_text())
    assert [(fold["train"], fold["val"]) for fold in written] == nnunet_folds(CASES)
    assert load_or_make_folds(path, CASES) == made


def test_a_split_file_of_nnunet_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    path.write_text(json.dumps([{"train": CASES[:9], "val": CASES[9:]}, {"train": CASES[3:], "val": []}], indent=4))
    assert load_or_make_folds(path, CASES) == [
        Fold(tuple(CASES[:9]), tuple(CASES[9:])),
        Fold(tuple(CASES[3:]), ()),
    ]


FORM = r'a list of \{"train": \[cases\], "val": \[cases\]\}'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"train": [], "val": []}, f"expected {FORM}, got an object"),
        ([], f"expected {FORM}, got an empty list"),
        ([{"train": ["case_000"]}], f"fold 0 is not of the form {FORM}"),
        ([["case_000"]], f"fold 0 is not of the form {FORM}"),
        ([{"train": "case_000", "val": []}], f"fold 0 is not of the form {FORM}"),
        ([{"train": [1, 2], "val": []}], f"fold 0 is not of the form {FORM}"),
        ([{"train": None, "val": []}], f"fold 0 is not of the form {FORM}"),
        (
            [{"train": ["case_000"], "val": ["elsewhere", "x"]}],
            r"fold 0 names cases that are not there \(.*\): elsewhere, x; correct it, or delete it and run",
        ),
        (
            [{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[:3], "val": CASES[2:4]}],
            "fold 1 both trains on and holds out case_002",
        ),
        ([{"train": [], "val": CASES}], "fold 0 has no training cases"),
        ([{"train": [*CASES[:3], "case_001"], "val": CASES[3:]}], "fold 0 names case_001 twice"),
    ],
)
def test_a_wrong_split_file_is_refused_with_the_fold_and_what_is_wrong(
    tmp_path: Path, content: Any, sentence: str
) -> None:
    path = tmp_path / "folds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=f"^{path}: {sentence}"):
        load_or_make_folds(path, CASES)


def test_a_split_file_that_is_not_json_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    path.write_text('[\n{"train": [')
    with pytest.raises(PlanError, match=r"folds.json: the fold file is not valid JSON \(line 2.*delete it and run"):
        load_or_make_folds(path, CASES)


def test_cases_that_several_folds_hold_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folds.json"
    path.write_text(json.dumps([{"train": CASES[:9], "val": CASES[9:]}, {"train": CASES[:10], "val": CASES[10:]}]))
    assert len(load_or_make_folds(path, CASES)) == 2
    assert "several folds hold out case_010, case_011" in caplog.text and "case_009" not in caplog.text


def test_cases_that_no_fold_names_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folds.json"
    path.write_text(json.dumps([{"train": CASES[:9], "val": CASES[9:11]}]))
    load_or_make_folds(path, CASES)
    assert "case_011" in caplog.text


def test_a_fold_is_chosen_by_its_number_or_all() -> None:
    folds = make_folds(CASES)
    assert select_fold(folds, "3", CASES) == folds[3]
    assert select_fold(folds, "all", list(reversed(CASES))) == Fold(tuple(CASES), ())


@pytest.mark.parametrize("name", ["5", "-1", "", "every", "²", "01", "1.0"])
def test_a_fold_that_is_not_there_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(PlanError, match=f"Fold '{name}' is not there; choose one of 0 to 4, or all"):
        select_fold(make_folds(CASES), name, CASES)


# ---- patients, and classes that few cases show


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40))
def test_however_patients_and_classes_lie_no_fold_holds_nothing_out(cases: list[tuple[int, bool]]) -> None:
    names = [f"case_{i:02d}" for i in range(len(cases))]
    belongs = {name: f"p{patient}" for name, (patient, _) in zip(names, cases, strict=True)}
    shows = {name: {"rare"} if rare else set() for name, (_, rare) in zip(names, cases, strict=True)}
    if len(set(belongs.values())) > 1:
        assert all(fold.validation for fold in make_folds(names, groups=belongs, shows=shows))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=6, max_size=40).filter(lambda patients: len(set(patients)) > 1))
def test_no_patient_is_on_both_sides_of_a_fold(patients: list[int]) -> None:
    cases = [f"case_{i:02d}" for i in range(len(patients))]
    belongs = {case: f"p{patient}" for case, patient in zip(cases, patients, strict=True)}
    folds = make_folds(cases, groups=belongs)
    assert sorted(case for fold in folds for case in fold.validation) == cases
    for fold in folds:
        assert not {belongs[case] for case in fold.train} & {belongs[case] for case in fold.validation}


def test_groups_of_one_case_each_change_nothing() -> None:
    assert make_folds(CASES, groups={case: case for case in CASES}) == make_folds(CASES)


def test_a_class_that_few_cases_show_is_held_out_by_every_fold() -> None:
    cases = [f"case_{i:02d}" for i in range(50)]
    rare = {case for fold in make_folds(cases)[:2] for case in sorted(fold.validation)[:3]}  # of two folds alone
    shows = {case: {"liver", "tumour"} if case in rare else {"liver"} for case in cases}
    folds = make_folds(cases, shows=shows)
    assert all(rare & set(fold.validation) for fold in folds)
    common = {case: {"liver"} for case in cases}
    assert make_folds(cases, shows=common) == make_folds(cases)


@pytest.mark.parametrize(
    ("names", "repeated"),
    [
        ([f"patient{p:03d}_frame{f:02d}" for p in range(20) for f in (1, 12)], True),
        ([f"hippocampus_{i:03d}" for i in range(200)], False),
        ([f"site{s}_{i:03d}" for s in range(5) for i in range(40)], False),
        ([f"scan{i}" for i in range(30)], False),
    ],
)
def test_names_of_patients_with_several_cases_are_recognised(names: list[str], repeated: bool) -> None:
    assert look_like_repeated_patients(names) == repeated


def test_groups_are_read_from_an_object_or_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    for content in ({"case_000": "p1", "case_001": 7}, {"groups": {"case_000": "p1", "case_001": 7}}):
        path.write_text(json.dumps(content))
        assert read_groups(path, CASES) == {"case_000": "p1", "case_001": "7"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(["case_000"], "object of case: patient"), ({"case_999": "p1"}, "does not have: case_999")],
)
def test_groups_that_fit_no_case_are_refused(tmp_path: Path, content: Any, sentence: str) -> None:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=sentence):
        read_groups(path, CASES)
