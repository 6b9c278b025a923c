"""A fingerprint and groups of cases -> `folds.json`: nnU-Net's folds, or others where cases ask for them.

Cases of one patient, and cases with the same image, share a fold: else the held-out part would be known from training.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from autoseg.dataset import DATASET_JSON
from autoseg.errors import DatasetError, PlanError
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.files import read_json
from autoseg.training.folds import (
    Fold,
    groups_by_prefix,
    load_folds,
    look_like_repeated_patients,
    make_folds,
    read_groups,
)

log = logging.getLogger(__name__)

PREFIX = "prefix"  # groups by the names of the cases, without their last part
GROUPS = "groups"  # key of dataset.json


def plan_folds(
    root: Path,
    fingerprint: Fingerprint,
    path: Path,
    *,
    group_by: str | None = None,
    given: Path | None = None,
    before: Fingerprint | None = None,
    trained: bool = False,
) -> list[Fold]:
    """The folds to write to `path`; empty where those that are there stay, or where there is nothing to divide.

    `given` is a file of folds, taken as it is. `group_by` is a JSON file of case: patient, or "prefix"; without it the
    entry "groups" of the dataset.json in `root` counts. Folds that are there are kept, unless nothing is `trained` by
    them and they are what planning made for the fingerprint `before`. Raises PlanError, also where folds that are there
    do not fit the cases, or part the groups that are asked for.
    """
    names = [case.identifier for case in fingerprint.cases]
    if given is not None:
        return _given_folds(given, names, _groups(root, fingerprint, group_by), path, trained=trained)
    if path.exists() and (trained or not _made_by_planning(path, root, before, group_by)):
        groups = _groups(root, fingerprint, group_by)
        parted = _parted(load_folds(path, names), groups)
        if parted and group_by:
            raise PlanError(
                f"{path}: the folds that are there part {parted[0]} ({len(parted)} groups in all); delete the file, "
                "and the models that were trained with it, to have them grouped."
            )
        _warn_of(parted, path)
        return []
    return _make(root, fingerprint, group_by, warn=True)


def _make(root: Path, fingerprint: Fingerprint, group_by: str | None, *, warn: bool = False) -> list[Fold]:
    """The folds that these cases ask for; none where there are too few of them to hold one out."""
    names = [case.identifier for case in fingerprint.cases]
    groups = _groups(root, fingerprint, group_by, warn=warn)
    if len(set(groups.values())) < 2 and not group_by:
        return []
    classes = fingerprint.labels.names
    shows = {
        case.identifier: {name for name, voxels in zip(classes, case.class_voxels, strict=True) if voxels}
        for case in fingerprint.cases
    }
    return make_folds(names, groups=groups, shows=shows)


def _made_by_planning(path: Path, root: Path, before: Fingerprint | None, group_by: str | None) -> bool:
    """Whether the folds in `path` are those that planning makes of the cases there were `before`."""
    if before is None:
        return False
    with contextlib.suppress(PlanError):
        return load_folds(path, [case.identifier for case in before.cases]) == _make(root, before, group_by)
    return False


def _given_folds(
    given: Path, names: Sequence[str], groups: Mapping[str, str], path: Path, *, trained: bool
) -> list[Fold]:
    folds = load_folds(given, names)
    if trained and path.exists() and load_folds(path, names) != folds:
        raise PlanError(
            f"{path}: folds are trained by what it says, and {given} says otherwise; choose another --workspace."
        )
    _warn_of(_parted(folds, groups), given)
    return folds


def _parted(folds: Sequence[Fold], groups: Mapping[str, str]) -> list[str]:
    """The groups that are on both sides of some fold."""
    parted: set[str] = set()
    for fold in folds:
        parted |= {groups[case] for case in fold.train} & {groups[case] for case in fold.validation}
    return sorted(parted)


def _warn_of(parted: Sequence[str], path: Path) -> None:
    if parted:
        log.warning(
            "%s: cases of one patient, or with the same image, are on both sides of a fold (%s): its scores will be "
            "too good.",
            path,
            ", ".join(parted[:5]),
        )


def _groups(root: Path, fingerprint: Fingerprint, group_by: str | None, *, warn: bool = False) -> dict[str, str]:
    """The group of every case; `warn` of what the user should know about them."""
    names = [case.identifier for case in fingerprint.cases]
    if group_by == PREFIX:
        groups = groups_by_prefix(names)
    elif group_by:
        groups = read_groups(Path(group_by), [*names, *fingerprint.dropped_cases])
    else:
        groups = _listed_groups(root, names)
        if not groups and warn and look_like_repeated_patients(names):
            log.warning(
                "The names look like several cases of one patient (%s ...): folds may part them, and the scores be too "
                "good; --group-by prefix holds them together.",
                ", ".join(sorted(names)[:3]),
            )
    return _join_equal_images(groups, fingerprint, warn=warn)


def _listed_groups(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Those of dataset.json, which may name cases that are left out."""
    description = read_json(root / DATASET_JSON, error=DatasetError, what="dataset description")
    if GROUPS not in description:
        return {}
    listed = description[GROUPS] if isinstance(description[GROUPS], dict) else {}
    return read_groups(root / DATASET_JSON, [*names, *listed])


def _join_equal_images(groups: Mapping[str, str], fingerprint: Fingerprint, *, warn: bool) -> dict[str, str]:
    """The group of every case, with those that hold the same image made one."""
    joined = {case.identifier: groups.get(case.identifier, case.identifier) for case in fingerprint.cases}
    first: dict[int, str] = {}
    for case in fingerprint.cases:
        other = first.setdefault(case.image_checksum, case.identifier)
        here, there = joined[case.identifier], joined[other]
        if here != there and case.image_checksum:
            if warn:
                log.warning("Cases %s and %s have the same image; they share a fold.", other, case.identifier)
            joined = {name: there if group == here else group for name, group in joined.items()}
    return joined
