"""Case identifiers -> `folds.json` (the form of nnU-Net's splits_final.json): which cases each fold holds out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.errors import PlanError
from autoseg.files import read_json, write_json

logger = logging.getLogger(__name__)

FOLDS = 5
SEED = 12345  # nnU-Net's, so that its folds and ours are the same
ALL = "all"  # the fold that trains on every case


@dataclass(frozen=True)
class Fold:
    """The cases of one fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def make_folds(cases: Sequence[str]) -> list[Fold]:
    """Five shuffled folds as nnU-Net makes them; as many as there are cases where these are fewer than five.

    Raises PlanError for a single case, which cannot be held out.
    """
    from sklearn.model_selection import KFold

    names = sorted(cases)
    if len(names) < 2:
        raise PlanError(f"Folds need at least two cases, got {len(names)}; train fold 'all' instead.")
    splitter = KFold(n_splits=min(FOLDS, len(names)), shuffle=True, random_state=SEED)
    return [
        Fold(tuple(names[i] for i in train), tuple(names[i] for i in validation))
        for train, validation in splitter.split(names)
    ]


def load_folds(path: Path, cases: Sequence[str]) -> list[Fold]:
    """Read `folds.json` or nnU-Net's `splits_final.json` and hold it against the cases there are. Raises PlanError."""
    content = read_json(path, error=PlanError, what="fold file", remedy="correct it, or delete it to have folds made")
    known = set(cases)
    form = 'a list of {"train": [cases], "val": [cases]}'
    if not isinstance(content, list) or not content:
        found = "an empty list" if content == [] else "an object" if isinstance(content, dict) else repr(content)
        raise PlanError(f"{path}: expected {form}, got {found}; correct the file, or delete it to have folds made.")
    folds = []
    for i, entry in enumerate(content):
        if not isinstance(entry, dict) or set(entry) != {"train", "val"} or not all(map(_is_names, entry.values())):
            raise PlanError(f"{path}: fold {i} is not of the form {form}.")
        train, validation = tuple(entry["train"]), tuple(entry["val"])
        unknown = sorted({*train, *validation} - known)
        if unknown:
            raise PlanError(
                f"{path}: fold {i} names cases that the store does not have: {', '.join(unknown[:5])}; "
                "preprocess them, correct the file, or delete it to have folds made."
            )
        both = sorted(set(train) & set(validation))
        if both:
            raise PlanError(f"{path}: fold {i} both trains on and holds out {', '.join(both[:5])}.")
        if not train:
            raise PlanError(f"{path}: fold {i} has no training cases.")
        folds.append(Fold(train, validation))
    unused = sorted(known.difference(*(fold.train + fold.validation for fold in folds)))
    if unused:
        logger.warning("%s: %d cases are in no fold: %s", path, len(unused), ", ".join(unused[:5]))
    return folds


def _is_names(entry: object) -> bool:
    return isinstance(entry, list) and all(isinstance(name, str) for name in entry)


def load_or_make_folds(path: Path, cases: Sequence[str]) -> list[Fold]:
    """The folds in `path`, checked against `cases`; made and written there where the file does not exist."""
    if path.exists():
        return load_folds(path, cases)
    folds = make_folds(cases)
    write_json(path, [{"train": list(fold.train), "val": list(fold.validation)} for fold in folds])
    return folds


def select_fold(folds: Sequence[Fold], name: str, cases: Sequence[str]) -> Fold:
    """The fold called "0", "1", ... or `all` (every case trains, none is held out). Raises PlanError."""
    if name == ALL:
        return Fold(tuple(sorted(cases)), ())
    if name not in map(str, range(len(folds))):
        raise PlanError(f"Fold '{name}' is not there; choose one of 0 to {len(folds) - 1}, or all.")
    return folds[int(name)]
