"""Case identifiers -> `folds.json` (the form of nnU-Net's splits_final.json): which cases each fold holds out."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.errors import PlanError
from autoseg.files import read_json, write_json

logger = logging.getLogger(__name__)

FOLDS = 5
SEED = 12345  # nnU-Net's, so that its folds and ours are the same
ALL = "all"  # the fold that trains on every case
REPEATED_SHARE = 0.2  # of the name prefixes that have several cases, from which on these look like patients
REMEDY = "correct it, or delete it and run `autoseg plan-and-preprocess` again to have folds made"
MOST_OF_A_PATIENT = 20  # cases with one prefix; more than that is rather a site or a study


@dataclass(frozen=True)
class Fold:
    """The cases of one fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def id(self) -> str:
        """Hash of the training cases: a model is held to the cases that it never saw."""
        return hashlib.sha256("\n".join(self.train).encode()).hexdigest()[:12]


def make_folds(
    cases: Sequence[str],
    *,
    groups: Mapping[str, str] | None = None,
    shows: Mapping[str, Collection[str]] | None = None,
) -> list[Fold]:
    """Five shuffled folds as nnU-Net makes them; as many as there are cases where these are fewer than five.

    Cases of one group (`groups`: case -> patient; a case without an entry is a group of its own) are held out
    together. Where a class that at least five groups show (`shows`: case -> its classes) would be missing from the
    held-out part of some fold, cases are divided so that it is in all of them. Raises PlanError for a single case or
    group, which cannot be held out.
    """
    names = sorted(cases)
    belongs = [(groups or {}).get(name, name) for name in names]
    count = len(set(belongs))
    if count < 2:
        what = "groups" if count < len(names) else "cases"
        instead = "give other groups" if count < len(names) else "train fold 'all' instead"
        raise PlanError(f"Folds need at least two {what}, got {count}; {instead}.")
    folds = min(FOLDS, count)
    divided = _divide(names, belongs, [""] * len(names), folds)
    if shows:
        scarce = _scarce_classes(names, belongs, shows, divided)
        if scarce:
            logger.info("Folds are stratified by %s, which few cases show.", ", ".join(scarce))
            strata = [next((name for name in scarce if name in shows.get(case, ())), "") for case in names]
            divided = _divide(names, belongs, strata, folds)
    return [Fold(tuple(names[i] for i in train), tuple(names[i] for i in validation)) for train, validation in divided]


def _divide(
    names: Sequence[str], belongs: Sequence[str], strata: Sequence[str], folds: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Positions of the training and held-out cases of each fold: nnU-Net's where nothing asks for others."""
    from sklearn.model_selection import KFold, StratifiedGroupKFold

    if len(set(strata)) == 1 and len(set(belongs)) == len(names):
        return list(KFold(n_splits=folds, shuffle=True, random_state=SEED).split(names))
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a stratum smaller than the number of folds: it is done as told
        return list(splitter.split(names, strata, belongs))


def _scarce_classes(
    names: Sequence[str],
    belongs: Sequence[str],
    shows: Mapping[str, Collection[str]],
    divided: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[str]:
    """Classes that enough groups show for every fold to hold one out, but not every fold does; the rarest first."""
    having: dict[str, set[str]] = {}
    for name, group in zip(names, belongs, strict=True):
        for shown in shows.get(name, ()):
            having.setdefault(shown, set()).add(group)
    missing = [
        shown
        for shown, with_it in having.items()
        if len(with_it) >= len(divided)
        and any(not any(shown in shows.get(names[i], ()) for i in validation) for _, validation in divided)
    ]
    return sorted(missing, key=lambda shown: (len(having[shown]), shown))


def read_groups(path: Path, cases: Sequence[str]) -> dict[str, str]:
    """Case -> group from a JSON file: the object itself, or its entry "groups". Raises PlanError.

    Every named case must be among `cases`; cases that are not named are groups of their own.
    """
    content = read_json(path, error=PlanError, what="file of groups")
    entry = content.get("groups", content) if isinstance(content, dict) else content
    if not isinstance(entry, dict) or not all(isinstance(group, str | int) for group in entry.values()):
        raise PlanError(f'{path}: expected an object of case: patient, such as {{"scan_01": "p1", "scan_02": "p1"}}.')
    unknown = sorted(set(entry) - set(cases))
    if unknown:
        raise PlanError(f"{path}: groups names cases that the dataset does not have: {', '.join(unknown[:5])}.")
    return {case: str(group) for case, group in entry.items()}


def groups_by_prefix(cases: Sequence[str]) -> dict[str, str]:
    """Case -> its name without the last part: `patient001_frame12` belongs to `patient001`."""
    return {case: re.sub(r"[_.-][^_.-]+$", "", case) for case in cases}


def look_like_repeated_patients(cases: Sequence[str]) -> bool:
    """Whether the names suggest that many patients have several cases: a few each, and enough patients for folds."""
    sizes = sorted(Counter(groups_by_prefix(cases).values()).values())
    several = sum(size > 1 for size in sizes)
    return len(sizes) >= FOLDS and several >= REPEATED_SHARE * len(sizes) and sizes[-1] <= MOST_OF_A_PATIENT


def load_folds(path: Path, cases: Sequence[str]) -> list[Fold]:
    """Read `folds.json` or nnU-Net's `splits_final.json` and hold it against the cases there are. Raises PlanError."""
    content = read_json(path, error=PlanError, what="fold file", remedy=REMEDY)
    form = 'a list of {"train": [cases], "val": [cases]}'
    if not isinstance(content, list) or not content:
        found = "an empty list" if content == [] else "an object" if isinstance(content, dict) else repr(content)
        raise PlanError(f"{path}: expected {form}, got {found}; {REMEDY}.")
    folds = []
    for i, entry in enumerate(content):
        if not isinstance(entry, dict) or set(entry) != {"train", "val"} or not all(map(_is_names, entry.values())):
            raise PlanError(f"{path}: fold {i} is not of the form {form}; {REMEDY}.")
        fold = Fold(tuple(entry["train"]), tuple(entry["val"]))
        problem = _problem(fold, set(cases))
        if problem:
            raise PlanError(f"{path}: fold {i} {problem}; {REMEDY}.")
        folds.append(fold)
    unused = sorted(set(cases).difference(*(fold.train + fold.validation for fold in folds)))
    if unused:
        logger.warning("%s: %d cases are in no fold: %s; %s.", path, len(unused), _some(unused), REMEDY)
    held_out = Counter(case for fold in folds for case in fold.validation)
    repeated = sorted(case for case, times in held_out.items() if times > 1)
    if repeated:
        logger.warning("%s: several folds hold out %s; these cases count as often.", path, _some(repeated))
    return folds


def _problem(fold: Fold, known: Collection[str]) -> str | None:
    """What is wrong with a fold of these cases, as the end of a sentence."""
    unknown = sorted({*fold.train, *fold.validation}.difference(known))
    if unknown:
        return f"names cases that are not there (renamed, left out, or not preprocessed): {_some(unknown)}"
    both = sorted(set(fold.train) & set(fold.validation))
    if both:
        return f"both trains on and holds out {_some(both)}"
    for names in (fold.train, fold.validation):
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            return f"names {_some(twice)} twice"
    return None if fold.train else "has no training cases"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_names(entry: object) -> bool:
    return isinstance(entry, list) and all(isinstance(name, str) for name in entry)


def load_or_make_folds(path: Path, cases: Sequence[str]) -> list[Fold]:
    """The folds in `path`, checked against `cases`; made and written there where the file does not exist."""
    if path.exists():
        return load_folds(path, cases)
    folds = make_folds(cases)
    write_folds(path, folds)
    return folds


def write_folds(path: Path, folds: Sequence[Fold]) -> None:
    """Write folds in the form of nnU-Net's splits_final.json, atomically."""
    write_json(path, [{"train": list(fold.train), "val": list(fold.validation)} for fold in folds])


def select_fold(folds: Sequence[Fold], name: str, cases: Sequence[str]) -> Fold:
    """The fold called "0", "1", ... or `all` (every case trains, none is held out). Raises PlanError."""
    if name == ALL:
        return Fold(tuple(sorted(cases)), ())
    if name not in map(str, range(len(folds))):
        raise PlanError(f"Fold '{name}' is not there; choose one of 0 to {len(folds) - 1}, or all.")
    return folds[int(name)]
