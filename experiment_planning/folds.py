"""A fingerprint and groups of cases -> `folds.json`, where others than nnU-Net's folds are asked for.

Cases of one patient, and cases with the same image, share a fold: else the held-out part would be known from training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from autoseg.dataset import DATASET_JSON
from autoseg.errors import DatasetError, PlanError
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.files import read_json
from autoseg.training.folds import (
    FOLDS,
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


def plan_folds(root: Path, fingerprint: Fingerprint, path: Path, *, group_by: str | None = None) -> list[Fold]:
    """The folds to write to `path`, where patients, equal images or rare classes ask for others than nnU-Net's.

    Empty where nothing is to be written: nnU-Net's are left to the first training, and folds that are there are kept.
    `group_by` is a JSON file of case: patient, or "prefix"; without it the entry "groups" of the dataset.json in
    `root` counts. Raises PlanError, also where folds that are there part the groups that are asked for.
    """
    names = [case.identifier for case in fingerprint.cases]
    if path.exists() and not group_by:
        return []
    groups = _join_equal_images(_groups(root, names, group_by), fingerprint)
    alone = len(set(groups.values())) == len(names)
    if len(names) > 1 and not (alone and _every_class_is_common(fingerprint)):
        classes = fingerprint.labels.names
        shows = {
            case.identifier: {name for name, voxels in zip(classes, case.class_voxels, strict=True) if voxels}
            for case in fingerprint.cases
        }
        folds = make_folds(names, groups=groups, shows=shows)
        if not path.exists():
            return folds
        for fold in load_folds(path, names):
            parted = {groups[case] for case in fold.train} & {groups[case] for case in fold.validation}
            if parted:
                raise PlanError(
                    f"{path}: the folds that are there part {sorted(parted)[0]} ({len(parted)} groups in all); delete "
                    "the file, and the models that were trained with it, to have them grouped."
                )
    return []


def _groups(root: Path, names: list[str], group_by: str | None) -> dict[str, str]:
    if group_by == PREFIX:
        return groups_by_prefix(names)
    if group_by:
        return read_groups(Path(group_by), names)
    description = read_json(root / DATASET_JSON, error=DatasetError, what="dataset description")
    if GROUPS in description:
        listed = description[GROUPS] if isinstance(description[GROUPS], dict) else {}
        named = read_groups(root / DATASET_JSON, [*names, *listed])  # of cases that are left out, too
        return {case: group for case, group in named.items() if case in set(names)}
    if look_like_repeated_patients(names):
        log.warning(
            "The names look like several cases of one patient (%s ...): folds may part them, and the scores be too "
            "good; --group-by prefix holds them together.",
            ", ".join(sorted(names)[:3]),
        )
    return {}


def _join_equal_images(groups: Mapping[str, str], fingerprint: Fingerprint) -> dict[str, str]:
    """The group of every case, with those that hold the same image made one."""
    joined = {case.identifier: groups.get(case.identifier, case.identifier) for case in fingerprint.cases}
    first: dict[int, str] = {}
    for case in fingerprint.cases:
        other = first.setdefault(case.image_checksum, case.identifier)
        here, there = joined[case.identifier], joined[other]
        if here != there and case.image_checksum:
            log.warning("Cases %s and %s have the same image; they share a fold.", other, case.identifier)
            joined = {name: there if group == here else group for name, group in joined.items()}
    return joined


def _every_class_is_common(fingerprint: Fingerprint) -> bool:
    """Whether no held-out part can be without some class, because fewer cases lack it than a fold holds out."""
    return all(len(fingerprint.cases) - found.cases < len(fingerprint.cases) // FOLDS for found in fingerprint.classes)
