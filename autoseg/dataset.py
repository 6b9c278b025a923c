"""A raw dataset folder in nnU-Net v2 layout -> `RawDataset`: its channels, labels and cases. Never written to."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.errors import DatasetError, listed, unknown_choice
from autoseg.files import read_json
from autoseg.image import DETACHED_ENDINGS, FORMATS, PICTURE_ENDINGS
from autoseg.labels import Labels

log = logging.getLogger(__name__)

DATASET_JSON = "dataset.json"
TRAINING_IMAGES, TRAINING_LABELS = "imagesTr", "labelsTr"
TEST_IMAGES, TEST_LABELS = "imagesTs", "labelsTs"
CHANNEL_DIGITS = 4  # CASE_0000.nii.gz

LABEL_GRIDS = ("image", "own")
CHANNEL_GRIDS = ("image", "own")


@dataclass(frozen=True)
class Case:
    """One patient or scan: the files of its channels and, in training data, of its label."""

    identifier: str
    images: tuple[Path, ...]
    """One file for each channel; a single file where it holds all channels (RGB), or a DICOM folder."""
    label: Path | None = None


@dataclass(frozen=True)
class RawDataset:
    """What `dataset.json` says, and where the files of each case are."""

    root: Path
    name: str
    channels: tuple[str, ...]
    """Channel names in order ("CT", "T1", ...); they choose the normalisation."""
    labels: Labels
    """Without names where the dataset has no labels: then no case has one."""
    file_ending: str
    cases: tuple[Case, ...]
    """The training cases, sorted by identifier."""
    test_cases: tuple[Case, ...] = ()
    """Cases of imagesTs, with their labels where labelsTs has them."""
    label_grid: str = "image"
    """`image`: labels lie on the grid of their image; `own`: on a finer one over the same extent ("label_grid" of
    dataset.json)."""
    reference_channels: tuple[int, ...] = ()
    """Numbers of the channels that lie on grids of their own ("channel_grids" of dataset.json)."""

    @classmethod
    def load(cls, root: Path) -> RawDataset:
        """Read `root/dataset.json` and list the cases; no image is opened.

        Raises DatasetError where dataset.json is missing or wrong, or a case lacks a channel or its label: every such
        case is named.
        """
        listing = list_cases(Path(root))
        if listing.problems:
            raise DatasetError(_all_problems(listing))
        return listing.dataset


@dataclass(frozen=True)
class Listing:
    """The complete cases of a dataset folder, and what is wrong with the others."""

    dataset: RawDataset
    problems: dict[str, tuple[str, ...]]
    """Case identifier -> what is missing, for training cases that cannot be used."""
    stray_files: tuple[Path, ...]
    """Files in imagesTr and labelsTr that belong to no case."""
    incomplete_tests: dict[str, tuple[str, ...]]
    """The same as `problems` for imagesTs; those cases are left out."""
    announced: int | None
    """`numTraining` of dataset.json."""


def list_cases(root: Path) -> Listing:
    """What is in the dataset folder `root`, complete or not; no image is opened.

    Raises DatasetError where dataset.json is missing or wrong, or there is no training case at all.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such dataset folder.")
    content = read_json(root / DATASET_JSON, error=DatasetError, what="dataset description")
    if not isinstance(content, Mapping):
        raise DatasetError(f"{root / DATASET_JSON}: must be a JSON object, got {type(content).__name__}.")
    channels, ending = _channels(root, content), _file_ending(root, content)
    labels, label_grid = _labels(root, content), _label_grid(root, content)
    references = _reference_channels(root, content, channels, ending)
    labelled = bool(labels.names)
    if not labelled:
        _check_no_labels(root)
    if content.get("dataset") is not None:
        cases, problems, stray = _explicit_cases(root, content["dataset"], labelled=labelled)
    else:
        folders = (TRAINING_IMAGES, TRAINING_LABELS)
        cases, problems, stray = _folder_cases(root, folders, len(channels), ending, label_needed=labelled)
    if not cases and not problems:
        label_files = f" and {TRAINING_LABELS}/CASE{ending}" if labelled else ""
        raise DatasetError(
            f"{root}: no training case found; expected files such as {TRAINING_IMAGES}/CASE_0000{ending}{label_files}."
        )
    cases, unusable = _without_problems(cases, problems, len(channels), ending)
    tests: list[Case] = []
    test_problems: dict[str, tuple[str, ...]] = {}
    if (root / TEST_IMAGES).is_dir():
        tests, lacking, _ = _folder_cases(root, (TEST_IMAGES, TEST_LABELS), len(channels), ending, label_needed=False)
        tests, test_problems = _without_problems(tests, lacking, len(channels), ending)
        for identifier, found in test_problems.items():
            log.warning("Case %s of %s is left out: %s.", identifier, TEST_IMAGES, "; ".join(found))
    name = root.resolve().name
    dataset = RawDataset(root, name, channels, labels, ending, tuple(cases), tuple(tests), label_grid, references)
    announced = content.get("numTraining")
    return Listing(dataset, unusable, stray, test_problems, announced if isinstance(announced, int) else None)


def main_image(case: Case, dataset: RawDataset) -> Path:
    """The file of the first channel that is not a reference: its grid is the case's."""
    return next(path for number, path in enumerate(case.images) if number not in dataset.reference_channels)


def require_foreground(dataset: RawDataset, annotated: Iterable[str]) -> None:
    """Refuse a dataset none of whose cases shows any structure; `annotated` are the cases that do.

    Raises DatasetError naming the cases.
    """
    if any(True for _ in annotated):
        return
    names = listed(case.identifier for case in dataset.cases)
    raise DatasetError(
        f"{dataset.root}: no label of any case has a foreground voxel ({names}), expected some of the values "
        f"{listed(dataset.labels.foreground_values)}; check that {TRAINING_LABELS} holds the right files."
    )


# ---- dataset.json


def _channels(root: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in content else "modality"  # as older datasets say it
    names = content.get(key)
    expected = '"channel_names" must be an object such as {"0": "T1", "1": "T2"}'
    if not isinstance(names, Mapping) or not names:
        raise DatasetError(f"{root / DATASET_JSON}: {expected}, got {names!r}.")
    numbers = [str(number) for number in range(len(names))]
    if sorted(names, key=str) != sorted(numbers) or not all(isinstance(name, str) and name for name in names.values()):
        raise DatasetError(f"{root / DATASET_JSON}: {expected}, numbered from 0 without gaps, got {dict(names)!r}.")
    return tuple(names[number] for number in numbers)


def _file_ending(root: Path, content: Mapping[str, Any]) -> str:
    ending = content.get("file_ending")
    known = [name for name in FORMATS if name not in DETACHED_ENDINGS]
    if not isinstance(ending, str):
        raise DatasetError(f'{root / DATASET_JSON}: "file_ending" is missing; write one of {", ".join(known)}.')
    if ending.lower() not in known:
        raise DatasetError(f"{root / DATASET_JSON}: {unknown_choice('file_ending', ending, known)}")
    return ending


def _labels(root: Path, content: Mapping[str, Any]) -> Labels:
    try:
        return Labels.from_json(content.get("labels"), content.get("regions_class_order"))
    except DatasetError as error:
        raise DatasetError(f"{root / DATASET_JSON}: {str(error).removeprefix('dataset.json: ')}") from error


def _check_no_labels(root: Path) -> None:
    """Refuse files of labels of which nobody says what they mean. Raises DatasetError."""
    for folder in (TRAINING_LABELS, TEST_LABELS):
        names = _names(root / folder)
        if names:
            raise DatasetError(
                f'{root / DATASET_JSON}: "labels" names no structure, but {folder} holds {names[0]} (1 of {len(names)} '
                "files); name the structures, or take the folder away to train super-resolution of images alone."
            )


def _label_grid(root: Path, content: Mapping[str, Any]) -> str:
    which = content.get("label_grid", LABEL_GRIDS[0])
    if which not in LABEL_GRIDS:
        raise DatasetError(f"{root / DATASET_JSON}: {unknown_choice('label_grid', which, LABEL_GRIDS)}")
    return str(which)


def _reference_channels(
    root: Path, content: Mapping[str, Any], channels: Sequence[str], ending: str
) -> tuple[int, ...]:
    where, grids = root / DATASET_JSON, content.get("channel_grids", {})
    if not isinstance(grids, Mapping):
        raise DatasetError(f'{where}: "channel_grids" must be an object such as {{"1": "own"}}, got {grids!r}.')
    for number, which in grids.items():
        if number not in map(str, range(len(channels))):
            known = [str(known) for known in range(len(channels))]
            raise DatasetError(f"{where}: channel_grids: {unknown_choice('channel', number, known)}")
        if which not in CHANNEL_GRIDS:
            raise DatasetError(f"{where}: channel_grids: {unknown_choice('grid', str(which), CHANNEL_GRIDS)}")
    references = tuple(number for number in range(len(channels)) if grids.get(str(number)) == "own")
    if references and len(references) == len(channels):
        raise DatasetError(
            f'{where}: "channel_grids" gives every channel a grid of its own; leave at least one on "image", the grid '
            "that is segmented."
        )
    if references and ending.lower() in PICTURE_ENDINGS:
        raise DatasetError(
            f'{where}: "channel_grids" needs files that know their place in the world, {ending} does not; use .nii.gz.'
        )
    return references


# ---- files of the cases


def _folder_cases(
    root: Path, folders: tuple[str, str], channels: int, ending: str, *, label_needed: bool = True
) -> tuple[list[Case], dict[str, list[str]], tuple[Path, ...]]:
    """Cases by the names of their files: `CASE_0000.ending` in the first folder, `CASE.ending` in the second."""
    images, labels = root / folders[0], root / folders[1]
    if not images.is_dir():
        raise DatasetError(f"{images}: there is no such folder; it must hold the images, CASE_0000{ending}.")
    if label_needed and not labels.is_dir():
        raise DatasetError(
            f"{labels}: there is no such folder; it must hold the labels, CASE{ending}. For super-resolution of images "
            f'alone write "labels": {{}} in {DATASET_JSON}.'
        )
    found, stray = _channel_files(images, ending)
    label_files = {name.removesuffix(ending): labels / name for name in _names(labels) if name.endswith(ending)}
    cases, problems = [], {}
    for identifier in sorted(found):
        lacking, files = _channels_of(found[identifier], channels, ending, images / identifier)
        label = label_files.get(identifier)
        if label is None and label_needed:
            lacking.append(f"the label {labels / (identifier + ending)} is missing")
        if lacking:
            problems[identifier] = lacking
        cases.append(Case(identifier, files, label))
    stray += [labels / name for name in _names(labels) if not name.endswith(ending) and not name.endswith(".json")]
    stray += [path for identifier, path in label_files.items() if identifier not in found]
    return cases, problems, tuple(sorted(stray))


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def _channel_files(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Case -> channel number -> file, and the files that are named otherwise (JSON sidecars are nobody's)."""
    found: dict[str, dict[int, Path]] = {}
    stray = []
    for name in _names(folder):
        stem = name.removesuffix(ending)
        identifier, underscore, number = stem.rpartition("_")
        if stem != name and identifier and underscore and number.isdigit() and len(number) == CHANNEL_DIGITS:
            found.setdefault(identifier, {})[int(number)] = folder / name
        elif not name.endswith(".json"):
            stray.append(folder / name)
    return found, stray


def _channels_of(
    files: Mapping[int, Path], channels: int, ending: str, stem: Path
) -> tuple[list[str], tuple[Path, ...]]:
    """What is wrong with the channel files of one case, and the files in order of the channels."""
    problems = []
    whole_picture = ending.lower() in PICTURE_ENDINGS and set(files) == {0}  # one file may hold R, G and B
    if not whole_picture:
        for number in range(channels):
            if number not in files:
                problems.append(f"channel {number} is missing ({stem}_{number:0{CHANNEL_DIGITS}d}{ending})")
    for number in sorted(files):
        if number >= channels:
            problems.append(f"{files[number]} is channel {number}, but {DATASET_JSON} names only {channels}")
    return problems, tuple(files[number] for number in sorted(files))


def _explicit_cases(
    root: Path, listed: Any, *, labelled: bool
) -> tuple[list[Case], dict[str, list[str]], tuple[Path, ...]]:
    """Cases from the lists of `dataset.json`; their paths are relative to the dataset folder."""
    where = root / DATASET_JSON
    if not isinstance(listed, Mapping):
        raise DatasetError(f'{where}: "dataset" must be an object of case: {{"images": [...], "label": ...}}.')
    cases, problems = [], {}
    for identifier in sorted(listed):
        entry = listed[identifier]
        if not re.fullmatch(r"[^/\\:]+", identifier) or identifier.startswith("."):
            raise DatasetError(
                f"{where}: '{identifier}' cannot be the name of a case, because files are named after it; leave out "
                "slashes, colons and a leading dot."
            )
        images = entry.get("images") if isinstance(entry, Mapping) else None
        label = entry.get("label") if isinstance(entry, Mapping) else None
        paths = [*images, *([label] if labelled else [])] if isinstance(images, list) and images else []
        if not paths or not all(isinstance(path, str) for path in paths):
            expected = '"images": [one path for each channel]' + (', "label": path' if labelled else "")
            raise DatasetError(f"{where}: case {identifier} must be {{{expected}}}, got {entry!r}.")
        if not labelled and label is not None:
            raise DatasetError(
                f'{where}: case {identifier} has a label, but "labels" names no structure; name the structures, or '
                "leave the label out to train super-resolution of images alone."
            )
        files = [root / path for path in paths]
        lacking = [f"{path} is missing" for path in files if not path.exists()]
        if lacking:
            problems[str(identifier)] = lacking
        label_file = files.pop() if labelled else None
        cases.append(Case(str(identifier), tuple(files), label_file))
    return cases, problems, ()


def _without_problems(
    cases: Sequence[Case], problems: Mapping[str, Sequence[str]], channels: int, ending: str
) -> tuple[list[Case], dict[str, tuple[str, ...]]]:
    unusable = {identifier: tuple(found) for identifier, found in problems.items()}
    for case in cases:
        if len(case.images) not in (1, channels) and case.identifier not in unusable:
            unusable[case.identifier] = (f"{len(case.images)} image files, expected {channels}",)
    return [case for case in cases if case.identifier not in unusable], unusable


def _all_problems(listing: Listing) -> str:
    named = [f"case {identifier}: {', '.join(found)}" for identifier, found in listing.problems.items()]
    count = "1 case is" if len(named) == 1 else f"{len(named)} cases are"
    return (
        f"{listing.dataset.root}: {count} incomplete ({'; '.join(named)}); add the files, or plan without these cases "
        "with --drop-cases."
    )
