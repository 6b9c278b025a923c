"""A raw dataset folder in nnU-Net v2 layout -> `RawDataset`: its channels, labels and cases. Never written to."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError, unknown_choice
from autoseg.files import read_json
from autoseg.geometry import corner_distance, extent_distance, outer_faces, share_covered
from autoseg.image import DETACHED_ENDINGS, FORMATS, PICTURE_ENDINGS, Grid, Image, read_image
from autoseg.labels import Labels

log = logging.getLogger(__name__)

DATASET_JSON = "dataset.json"
TRAINING_IMAGES, TRAINING_LABELS = "imagesTr", "labelsTr"
TEST_IMAGES, TEST_LABELS = "imagesTs", "labelsTs"
CHANNEL_DIGITS = 4  # CASE_0000.nii.gz

SAME_PLACE_VOXELS = 1e-3
"""Corners of two grids that lie closer than this, in voxels, are the same: headers hold rounded numbers (NIfTI has
32-bit floats, and quaternions for directions)."""

NEAR_PLACE_VOXELS = 0.05
"""Up to here the grids of image and label count as one (half a voxel would be a voxel wrongly labelled); verify says
so and can repair it."""

SAME_EXTENT_VOXELS = 0.5
"""Labels on a grid of their own: how far its outer corners may lie from the image's, in voxels of the label."""

LABEL_GRIDS = ("image", "own")
CHANNEL_GRIDS = ("image", "own")

LEAST_OVERLAP = 0.5
"""Share of the image that a channel on a grid of its own must cover: less is a wrong header or another body part."""

FLOAT32_EXACT = 2**24  # whole numbers up to here keep their value as float32


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


def read_case(case: Case, dataset: RawDataset) -> tuple[Image, Image | None]:
    """The image of a case, all channels stacked `(C, Z, Y, X)` float32, and its label `(1, Z, Y, X)` int16 or None.

    The label is on the image's grid, or on its own where the dataset says so (`RawDataset.label_grid`). Every check
    that needs the voxels is made here, so that planning, preprocessing and verify refuse the same things with the same
    sentence. Raises DatasetError naming the case and the file: geometry of channels and label differ, NaN or Inf,
    fractional or unknown label values, wrong number of channels.
    """
    return read_case_noting(case, dataset)[:2]


def read_case_noting(case: Case, dataset: RawDataset) -> tuple[Image, Image | None, tuple[str, ...]]:
    """`read_case`, and what is not right but can be used: sentences without the name of the case."""
    notes: list[str] = []
    try:
        image = read_channels(case, dataset, notes)
        label = None if case.label is None else read_label(case, image.grid, dataset, notes)
    except DatasetError as error:
        raise DatasetError(f"Case {case.identifier}: {error}") from error
    return image, label, tuple(notes)


def main_image(case: Case, dataset: RawDataset) -> Path:
    """The file of the first channel that is not a reference: its grid is the case's."""
    return next(path for number, path in enumerate(case.images) if number not in dataset.reference_channels)


def require_foreground(dataset: RawDataset, annotated: Iterable[str]) -> None:
    """Refuse a dataset none of whose cases shows any structure; `annotated` are the cases that do.

    Raises DatasetError naming the cases.
    """
    if any(True for _ in annotated):
        return
    names = _some([case.identifier for case in dataset.cases])
    raise DatasetError(
        f"{dataset.root}: no label of any case has a foreground voxel ({names}), expected some of the values "
        f"{_listed(dataset.labels.foreground_values)}; check that {TRAINING_LABELS} holds the right files."
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


# ---- voxels of one case


def read_channels(case: Case, dataset: RawDataset, notes: list[str]) -> Image:
    """All channels (C, Z, Y, X) as float32 on the grid of the first; what is odd but usable is added to `notes`.

    Those that lie on grids of their own are `references` of the image. Raises DatasetError naming the file.
    """
    files, expected = case.images, len(dataset.channels)
    if len(files) not in (1, expected) or (dataset.reference_channels and len(files) != expected):
        raise DatasetError(f"{len(files)} image files, expected {expected} ({', '.join(dataset.channels)}).")
    references = [_read_reference(files[number], dataset) for number in dataset.reference_channels]
    files = tuple(path for number, path in enumerate(files) if number not in dataset.reference_channels)
    expected = len(files) if references else expected
    first = read_image(files[0])
    components = expected if len(files) == 1 else 1
    _check_components(files[0], first, components, dataset)
    stacked = np.empty((expected, *first.shape), dtype=np.float32)
    for number, path in enumerate(files):
        image = first if number == 0 else read_image(path)
        if number:
            _check_components(path, image, 1, dataset)
            _check_same_place(path, image.grid, files[0], first.grid, notes)
        _check_finite(path, image.array)
        with np.errstate(over="ignore"):
            stacked[number : number + image.channels] = image.array
        _check_finite(path, stacked[number : number + image.channels])
    for number, reference in zip(dataset.reference_channels, references, strict=True):
        check_overlap(first.grid, reference.grid, str(case.images[number]))
    return Image(stacked, first.grid, tuple(references))


def _read_reference(path: Path, dataset: RawDataset) -> Image:
    """A channel (1, Z, Y, X) float32 on its own grid."""
    image = read_image(path)
    _check_components(path, image, 1, dataset)
    _check_finite(path, image.array)
    with np.errstate(over="ignore"):
        array = image.array.astype(np.float32)
    _check_finite(path, array)
    return Image(array, image.grid)


def check_overlap(image: Grid, reference: Grid, name: str) -> None:
    """Refuse a reference that does not cover most of the image; `name` begins the sentence. Raises DatasetError."""
    share = share_covered(image, reference)
    if share >= LEAST_OVERLAP:
        return
    (first, last), (first_of_image, last_of_image) = outer_faces(reference), outer_faces(image)
    much = "does not overlap the image" if share == 0 else f"covers {share:.0%} of the image"
    raise DatasetError(
        f"{name}: the reference channel {much}, expected at least {LEAST_OVERLAP:.0%}: it lies from {_rounded(first)} "
        f"to {_rounded(last)} mm (z, y, x), the image from {_rounded(first_of_image)} to {_rounded(last_of_image)} mm; "
        "correct the header, or register both."
    )


def _check_components(path: Path, image: Image, expected: int, dataset: RawDataset) -> None:
    if image.channels != expected:
        raise DatasetError(
            f"{path}: has {image.channels} {'component' if image.channels == 1 else 'components'} a voxel, expected "
            f"{expected}; {DATASET_JSON} names the channels {', '.join(dataset.channels)}."
        )


def _check_finite(path: Path, array: NDArray[Any]) -> None:
    # one NaN or infinity makes the sum so, and the sum needs no mask in memory
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return
    nans, infinities = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nans or infinities:
        kinds = [f"{count} {kind}" for count, kind in ((nans, "NaN"), (infinities, "infinite")) if count]
        raise DatasetError(
            f"{path}: {' and '.join(kinds)} of {array.size} voxels; replace them by a value that makes sense for the "
            "image."
        )


def _check_same_place(path: Path, grid: Grid, reference_path: Path, reference: Grid, notes: list[str]) -> None:
    """Refuse a file whose voxels lie elsewhere than those of the case's first channel; note a tiny difference."""
    if grid.shape != reference.shape:
        raise DatasetError(
            f"{path}: size {grid.shape} voxels (z, y, x) differs from {reference.shape} of {reference_path.name}; "
            "resample one of them."
        )
    distance = corner_distance(reference, grid)
    if distance <= SAME_PLACE_VOXELS:
        return
    what, got, expected = _largest_difference(grid, reference)
    if distance > NEAR_PLACE_VOXELS:
        raise DatasetError(
            f"{path}: {what} {got} differs from {expected} of {reference_path.name} (corners {distance:.3g} voxels "
            "apart); correct the header or resample one of them."
        )
    notes.append(
        f"{path}: {what} {got} differs slightly from {expected} of {reference_path.name} (corners {distance:.2g} "
        "voxels apart); taken as equal"
    )


def _check_same_extent(path: Path, grid: Grid, reference_path: Path, reference: Grid) -> None:
    """Refuse a label on a grid of its own that covers another piece of the world than the image, or is coarser."""
    (first, last), (first_of_image, last_of_image) = outer_faces(grid), outer_faces(reference)
    if extent_distance(reference, grid) > SAME_EXTENT_VOXELS:
        raise DatasetError(
            f"{path}: the label covers {_rounded(first)} to {_rounded(last)} mm (z, y, x), the image "
            f"{reference_path.name} {_rounded(first_of_image)} to {_rounded(last_of_image)} mm; they must agree within "
            "half a voxel of the label: correct the header, or cut both to the same extent."
        )
    if any(size < expected for size, expected in zip(grid.shape, reference.shape, strict=True)):
        raise DatasetError(
            f"{path}: the label has {grid.shape} voxels (z, y, x), fewer than the {reference.shape} of "
            f"{reference_path.name}; a label on a grid of its own must be finer, so resample it to the image's grid."
        )


def _largest_difference(grid: Grid, reference: Grid) -> tuple[str, str, str]:
    """The part of the geometry that moves the corners most: its name, its value, the expected one."""
    extent = max(n * s for n, s in zip(reference.shape, reference.spacing, strict=True))
    spacing = np.abs(np.subtract(grid.spacing, reference.spacing)) * np.asarray(reference.shape)
    moved = {
        "spacing": float(spacing.max()),
        "origin": float(np.abs(np.subtract(grid.origin, reference.origin)).max()),
        "direction": float(np.abs(np.subtract(grid.direction, reference.direction)).max()) * extent,
    }
    what = max(moved, key=lambda name: moved[name])
    if what == "direction":
        return what, _rounded(np.ravel(grid.direction)), _rounded(np.ravel(reference.direction))
    unit = " mm"
    return what, _rounded(getattr(grid, what)) + unit, _rounded(getattr(reference, what)) + unit


def _rounded(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def read_label(case: Case, grid: Grid | None, dataset: RawDataset, notes: list[str]) -> Image:
    """The label (1, Z, Y, X) int16 on the image's `grid` (None: not to be compared); oddities are added to `notes`.

    Where the dataset's labels have grids of their own it stays on that, which must cover the extent of `grid`. Raises
    DatasetError naming the file.
    """
    assert case.label is not None
    path, known = case.label, dataset.labels.known_values
    label = read_image(path)
    if label.channels != 1:
        raise DatasetError(
            f"{path}: the label has {label.channels} components a voxel, expected 1; save it as one channel of "
            "integers."
        )
    own_grid = dataset.label_grid == "own"
    if grid is not None and own_grid:
        _check_same_extent(path, label.grid, main_image(case, dataset), grid)
    elif grid is not None:
        _check_same_place(path, label.grid, main_image(case, dataset), grid, notes)
    array = label.array
    if array.dtype.kind == "f":
        _check_finite(path, array)
        array = _whole_numbers(path, array)
        notes.append(f"{path}: the label holds whole numbers as {label.array.dtype}; taken as integers")
    values = label_values(array)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DatasetError(
            f"{path}: label value{'s' if len(unknown) > 1 else ''} {_listed(unknown)} "
            f"({_voxels(sum(values[value] for value in unknown))}) not in {DATASET_JSON}, expected {_listed(known)}; "
            "correct the label or name the value."
        )
    return Image(array.astype(np.int16), label.grid if own_grid or grid is None else grid)


def _whole_numbers(path: Path, array: NDArray[Any]) -> NDArray[np.int32]:
    whole = np.rint(array)
    fractional = array != whole
    if fractional.any():
        example = float(array[fractional][0])
        raise DatasetError(
            f"{path}: fractional label in {_voxels(int(fractional.sum()))} (such as {example:.6g}), expected whole "
            "numbers; it may have been resampled as an image: make the label again with nearest-neighbour or label "
            "interpolation."
        )
    return np.asarray(np.clip(whole, -FLOAT32_EXACT, FLOAT32_EXACT), dtype=np.int32)


def label_values(label: NDArray[Any]) -> dict[int, int]:
    """Each value of an integer label map (any shape) and its number of voxels, sorted by value."""
    lowest, highest = int(label.min(initial=0)), int(label.max(initial=0))
    if lowest < 0 or highest > np.iinfo(np.uint16).max:
        values, counts = np.unique(label, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    # counting in slabs: bincount takes eight bytes a voxel
    total = np.zeros(highest + 1, dtype=np.int64)
    for slab in label.reshape(-1, label.shape[-1] if label.ndim < 2 else label.shape[-1] * label.shape[-2]):
        total += np.bincount(slab, minlength=highest + 1)
    return {int(value): int(total[value]) for value in np.flatnonzero(total)}


def _voxels(count: int) -> str:
    return "1 voxel" if count == 1 else f"{count} voxels"


def _listed(values: Iterable[int]) -> str:
    return _some([str(value) for value in values])


def _some(names: Sequence[str], most: int = 10) -> str:
    """The names in a row; of a long list the first and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
