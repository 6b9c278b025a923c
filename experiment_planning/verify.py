"""A raw dataset -> `VerifyReport`: is it sound, case by case; and a repaired copy of it where that is safe.

Errors are what planning and preprocessing refuse, in the same words (`autoseg.reading.read_case` makes those checks).
Warnings can be trained with, but somebody should have looked at them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import (
    CHANNEL_DIGITS,
    DATASET_JSON,
    TEST_IMAGES,
    TEST_LABELS,
    TRAINING_IMAGES,
    TRAINING_LABELS,
    Case,
    Listing,
    RawDataset,
    list_cases,
    main_image,
)
from autoseg.errors import DatasetError
from autoseg.executor import map_cases
from autoseg.experiment_planning.fingerprint import left_right_names
from autoseg.files import PARTIAL, read_json, storage_error, write_json
from autoseg.geometry import canonical_axes, orientation_code, turn_array
from autoseg.image import Image, image_ending, read_grid, read_image, write_image
from autoseg.reading import label_values, read_channels, read_label

log = logging.getLogger(__name__)

SPACING_FACTOR = 3.0  # from the median along an axis; within one protocol spacings differ by less than a factor of two
MAJORITY = 2 / 3  # of the cases that have to agree before the others are called different
FEWEST_TO_COMPARE = 3  # cases; of two that differ nobody can say which is odd

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Problem:
    """One finding."""

    case: str
    """Identifier of the case, `imagesTs/CASE` for a test case; empty for the dataset as a whole."""
    severity: str
    """`error`: refused by planning (a test case: by prediction); `warning`: usable."""
    sentence: str
    """What is wrong, where, expected, got, what to do."""
    fixable: bool = False
    """Whether `fix_dataset` repairs it."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_dataset` found."""

    dataset: str
    """Path of the dataset."""
    cases: tuple[str, ...]
    """Every training case that was looked at."""
    test_cases: tuple[str, ...]
    """Every case of imagesTs that was looked at."""
    problems: tuple[Problem, ...]
    """Errors before warnings, those of the dataset before those of cases."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What planning or, for test cases, prediction refuses."""
        return tuple(problem for problem in self.problems if problem.severity == ERROR)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What can be used but should be looked at."""
        return tuple(problem for problem in self.problems if problem.severity == WARNING)

    @property
    def broken_cases(self) -> tuple[str, ...]:
        """Cases with an error, sorted: what `--drop-cases` would leave out."""
        return tuple(sorted({problem.case for problem in self.errors if problem.case}))

    @property
    def sound(self) -> bool:
        """Whether planning accepts the dataset."""
        return not self.errors

    def table(self) -> str:
        """Plain text: one line a problem, then one line that sums up."""
        rows = [(p.severity, p.case or "(dataset)", p.sentence) for p in self.problems]
        width = max((len(case) for _, case, _ in rows), default=0)
        lines = [f"{severity:<7}  {case:<{width}}  {sentence}" for severity, case, sentence in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many cases, errors, warnings, and what can be repaired."""
        looked = _count(len(self.cases), "training case")
        if self.test_cases:
            looked += f", {_count(len(self.test_cases), 'test case')}"
        found = f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}"
        fixable = sum(problem.fixable for problem in self.problems)
        after = " once the errors are corrected" if self.errors else ""
        repair = f"; {fixable} can be repaired with --fix OUT{after}" if fixable else ""
        return f"{Path(self.dataset).name}: {looked}: {found}{repair}."

    def to_json(self) -> dict[str, Any]:
        """The report as JSON content."""
        return {
            "dataset": self.dataset,
            "sound": self.sound,
            "cases": list(self.cases),
            "test_cases": list(self.test_cases),
            "problems": [asdict(problem) for problem in self.problems],
        }


def verify_dataset(dataset_root: Path, *, workers: int) -> VerifyReport:
    """Look at every case of a raw dataset, training and test; nothing is written.

    A dataset.json that cannot be used is an error of the report like any other. Raises DatasetError only where there
    is no such folder.
    """
    root = Path(dataset_root)
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such dataset folder.")
    try:
        listing = list_cases(root)
    except DatasetError as unusable:
        return VerifyReport(str(root), (), (), (Problem("", ERROR, str(unusable)),))
    dataset = listing.dataset
    findings = list(_examine_all(dataset, workers=workers))
    training = [finding for finding in findings if not finding.test]
    problems = [
        *_listing_problems(listing),
        *(problem for finding in findings for problem in finding.problems),
        *_foreground_problems(dataset, training),
        *_numbering_problems(dataset),
        *_duplicates(findings),
        *_spacing_outliers(training),
        *_orientation_outliers(training),
        *_swapped_sides(dataset, training),
    ]
    problems.sort(key=lambda problem: (problem.severity != ERROR, problem.case != "", problem.case))
    return VerifyReport(
        str(root),
        tuple(sorted([*(case.identifier for case in dataset.cases), *listing.problems])),
        tuple(sorted([*(case.identifier for case in dataset.test_cases), *listing.incomplete_tests])),
        tuple(problems),
    )


# ---- one case, in a worker


@dataclass(frozen=True)
class Finding:
    """What a worker says about one case."""

    case: str
    """Its name in the report, see `Problem.case`."""
    test: bool
    """Whether it is a case of imagesTs."""
    problems: tuple[Problem, ...]
    readable: bool = False
    """Whether image and label could be used; the fields below are filled only then."""
    content: str = ""
    """Hash of the image's voxels and shape."""
    spacing: tuple[float, ...] = ()
    """(z, y, x) in mm, in canonical orientation."""
    orientation: str = ""
    """`geometry.orientation_code` of the file."""
    planar: bool = False
    """Whether the file is a 2D image, whose direction says nothing."""
    constant: bool = False
    """Whether every channel has the same value everywhere."""
    values: tuple[int, ...] = ()
    """Label values that occur."""
    sides: tuple[tuple[float, ...] | None, ...] = ()
    """For each left/right pair of names: centroid of left minus that of right, canonical (z, y, x), in voxels."""


def _examine_all(dataset: RawDataset, *, workers: int) -> Iterator[Finding]:
    jobs = [(case, False) for case in dataset.cases] + [(case, True) for case in dataset.test_cases]
    names = [_named(case, test) for case, test in jobs]
    found: dict[int, Finding] = {}
    for index, result in map_cases(partial(examine_case, dataset=dataset), jobs, workers=workers, names=names):
        if isinstance(result, Exception):
            result = Finding(names[index], jobs[index][1], (Problem(names[index], ERROR, str(result)),))
        found[index] = result
    return (found[index] for index in sorted(found))


def examine_case(job: tuple[Case, bool], *, dataset: RawDataset) -> Finding:
    """Read one case (and whether it is a test case) and say what is wrong with it; never raises DatasetError."""
    case, test = job
    name = _named(case, test)
    errors: list[str] = []
    notes: list[str] = []
    image, label = _read_both(case, dataset, errors, notes)
    problems = [Problem(name, ERROR, sentence) for sentence in errors]
    problems += [Problem(name, WARNING, f"{sentence}.", fixable=True) for sentence in notes]
    if errors or image is None:
        return Finding(name, test, tuple(problems))
    for number, channel in _channels(image, dataset):
        if channel.min() == channel.max():
            sentence = f"channel {number} ({dataset.channels[number]}) has the same value {channel.min():g} everywhere."
            problems.append(Problem(name, WARNING, sentence))
    values = () if label is None else tuple(label_values(label.array))
    if label is not None and not set(values) & set(dataset.labels.foreground_values):
        sentence = f"{case.label}: the label has no foreground voxel; check that this is meant."
        problems.append(Problem(name, WARNING, sentence))
    permutation, _ = canonical_axes(image.grid.direction)
    return Finding(
        name,
        test,
        tuple(problems),
        readable=True,
        content=_hash(image),
        spacing=tuple(image.grid.spacing[axis] for axis in permutation),
        orientation=orientation_code(image.grid.direction),
        planar=image.grid.dimensions == 2,
        constant=all(channel.min() == channel.max() for channel in image.array),
        values=values,
        sides=() if label is None else _sides(label, dataset),
    )


def _channels(image: Image, dataset: RawDataset) -> Iterator[tuple[int, NDArray[Any]]]:
    """Every channel (Z, Y, X) with its number, those on grids of their own too."""
    own = [number for number in range(len(dataset.channels)) if number not in dataset.reference_channels]
    yield from zip(own, image.array, strict=True)
    for number, reference in zip(dataset.reference_channels, image.references, strict=True):
        yield number, reference.array[0]


def _named(case: Case, test: bool) -> str:
    return f"{TEST_IMAGES}/{case.identifier}" if test else case.identifier


def _read_both(
    case: Case, dataset: RawDataset, errors: list[str], notes: list[str]
) -> tuple[Image | None, Image | None]:
    """Image and label; a broken image does not keep the label from being looked at."""
    image = label = None
    try:
        image = read_channels(case, dataset, notes)
    except DatasetError as error:
        errors.append(str(error))
    if case.label is None:
        return image, None
    try:
        label = read_label(case, image.grid if image else _grid_of_header(case, dataset), dataset, notes)
    except DatasetError as error:
        errors.append(str(error))
    return image, label


def _grid_of_header(case: Case, dataset: RawDataset) -> Any:
    try:
        return read_grid(main_image(case, dataset))
    except DatasetError:
        return None


def _hash(image: Image) -> str:
    digest = hashlib.blake2b(repr(image.array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image.array).data)
    return digest.hexdigest()


def _sides(label: Image, dataset: RawDataset) -> tuple[tuple[float, ...] | None, ...]:
    turned = turn_array(label.array, *canonical_axes(label.grid.direction))[0]
    pairs = left_right_names(dataset.labels.names)
    centres = {name: _centre(dataset.labels.mask(turned, name)) for pair in pairs for name in pair}
    sides: list[tuple[float, ...] | None] = []
    for left, right in pairs:
        a, b = centres[left], centres[right]
        sides.append(None if a is None or b is None else tuple(float(d) for d in a - b))
    return tuple(sides)


def _centre(mask: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Centroid (z, y, x) in voxels, from the mask's projections: indices of a whole volume would take 24 bytes each."""
    counts = [mask.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    total = counts[0].sum()
    return np.array([count @ np.arange(len(count)) / total for count in counts]) if total else None


# ---- the dataset as a whole


def _listing_problems(listing: Listing) -> Iterator[Problem]:
    for identifier, found in listing.problems.items():
        yield from (Problem(identifier, ERROR, f"{_capital(sentence)}.") for sentence in found)
    for identifier, found in listing.incomplete_tests.items():
        yield from (Problem(f"{TEST_IMAGES}/{identifier}", ERROR, f"{_capital(sentence)}.") for sentence in found)
    for path in listing.stray_files:
        yield Problem("", WARNING, f"{path} belongs to no case; it is not used.")
    count = len(listing.dataset.cases) + len(listing.problems)
    if listing.announced is not None and listing.announced != count:
        sentence = f'"numTraining" in {DATASET_JSON} is {listing.announced}, but there are {count} training cases.'
        yield Problem("", WARNING, sentence, fixable=True)


def _foreground_problems(dataset: RawDataset, findings: Sequence[Finding]) -> Iterator[Problem]:
    readable = [finding for finding in findings if finding.readable]
    if not readable:
        return
    if not dataset.labels.names:
        if all(finding.constant for finding in readable):
            yield Problem("", ERROR, "Every image has the same value everywhere; there is nothing to learn.")
        return
    occurring = {value for finding in readable for value in finding.values}
    if not occurring & set(dataset.labels.foreground_values):
        names = ", ".join(finding.case for finding in readable)
        yield Problem("", ERROR, f"No label of any case has a foreground voxel ({names}); check {TRAINING_LABELS}.")
        return
    for name, group in zip(dataset.labels.names, dataset.labels.values, strict=True):
        if not occurring & set(group):
            values = ", ".join(str(value) for value in group)
            sentence = f'label "{name}" ({values}) occurs in no case; remove it from {DATASET_JSON} or add cases.'
            yield Problem("", WARNING, sentence)


def _numbering_problems(dataset: RawDataset) -> Iterator[Problem]:
    mapping = consecutive_values(dataset)
    if any(old != new for old, new in mapping.items()):
        used = ", ".join(str(value) for value in dataset.labels.known_values)
        sentence = f"label values {used} are not consecutive; nnU-Net and other programs expect 0, 1, 2, ..."
        yield Problem("", WARNING, sentence, fixable=True)


def _duplicates(findings: Sequence[Finding]) -> Iterator[Problem]:
    first: dict[str, Finding] = {}
    for finding in findings:
        if not finding.readable:
            continue
        earlier = first.setdefault(finding.content, finding)
        if earlier is not finding:
            sentence = (
                f"the image is the same as that of case {earlier.case}; scores would flatter a model that saw it."
            )
            yield Problem(finding.case, WARNING, sentence)


def _spacing_outliers(findings: Sequence[Finding]) -> Iterator[Problem]:
    readable = [finding for finding in findings if finding.readable]
    if len(readable) < FEWEST_TO_COMPARE:
        return
    median = np.median([finding.spacing for finding in readable], axis=0)
    for finding in readable:
        factor = np.asarray(finding.spacing) / median
        if factor.max() >= SPACING_FACTOR or factor.min() <= 1 / SPACING_FACTOR:
            spacing, usual = _millimetres(finding.spacing), _millimetres(median)
            sentence = f"spacing {spacing} is far from the median {usual}; check the header."
            yield Problem(finding.case, WARNING, sentence)


def _orientation_outliers(findings: Sequence[Finding]) -> Iterator[Problem]:
    volumes = [finding for finding in findings if finding.readable and not finding.planar]
    usual = _majority(finding.orientation for finding in volumes)
    for finding in volumes:
        if usual is not None and finding.orientation != usual:
            sentence = (
                f"orientation {finding.orientation} differs from {usual} of most cases; harmless if the direction in "
                "the file is right (autoseg turns every case), otherwise the case is flipped."
            )
            yield Problem(finding.case, WARNING, sentence)


def _swapped_sides(dataset: RawDataset, findings: Sequence[Finding]) -> Iterator[Problem]:
    """Cases in which left and right structures lie the other way round than in most cases."""
    for number, (left, right) in enumerate(left_right_names(dataset.labels.names)):
        sides = {f.case: np.array(f.sides[number]) for f in findings if f.readable and f.sides[number] is not None}
        if not sides:
            continue
        axis = int(np.argmax(np.median(np.abs(list(sides.values())), axis=0)))
        signs = {case: bool(side[axis] > 0) for case, side in sides.items()}
        usual = _majority(signs.values())
        for case, sign in signs.items():
            if usual is not None and sign != usual:
                sentence = (
                    f'"{left}" and "{right}" lie the other way round than in most cases; the label is swapped or the '
                    "image is flipped."
                )
                yield Problem(case, WARNING, sentence)


def _majority(values: Iterable[Any]) -> Any:
    """The value that most have; None where too few are there or too few agree."""
    counted = Counter(values)
    total = counted.total()
    if total < FEWEST_TO_COMPARE:
        return None
    value, count = counted.most_common(1)[0]
    return value if count >= MAJORITY * total else None


def _millimetres(spacing: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in spacing) + ") mm"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ---- the repaired copy


@dataclass(frozen=True)
class FixReport:
    """What `fix_dataset` did."""

    root: str
    """The repaired copy."""
    repairs: tuple[Problem, ...]
    """Every problem that was repaired; empty: there was none, and nothing was written."""
    remaining: tuple[Problem, ...]
    """Warnings that stay: nobody but the owner of the data can decide them."""


def fix_dataset(root: Path, out: Path, *, workers: int = 1) -> FixReport:
    """Write a repaired copy of the dataset `root` to the new or empty folder `out`; `root` is never written to.

    Repaired is what is safe: tiny differences of geometry (the header of the first channel is taken), whole numbers
    stored as floats, label values with gaps, `numTraining`. Raises DatasetError naming every problem that is not safe
    to repair, and StorageError where `out` cannot be written; then nothing is left in `out`.
    """
    root, out = Path(root), Path(out)
    _check_output(root, out)
    report = verify_dataset(root, workers=workers)
    if report.errors:
        named = "\n".join(f"  {f'Case {p.case}: ' if p.case else ''}{p.sentence}" for p in report.errors)
        raise DatasetError(f"{root}: cannot be repaired safely, so nothing is written:\n{named}")
    repairs = tuple(problem for problem in report.problems if problem.fixable)
    if repairs:
        _write_copy(root, out, {problem.case for problem in repairs}, workers=workers)
    return FixReport(str(out), repairs, tuple(problem for problem in report.problems if not problem.fixable))


def _check_output(root: Path, out: Path) -> None:
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise DatasetError(f"{out}: lies in the dataset {root}, which is never written to; choose another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: already exists and is not an empty folder; choose a new one for the repaired copy.")


def _write_copy(root: Path, out: Path, repaired: set[str], *, workers: int) -> None:
    dataset = RawDataset.load(root)
    unfinished = out.with_name(f".{os.getpid()}{PARTIAL}.{out.name}")
    jobs = [CopyJob(case, TRAINING_IMAGES, TRAINING_LABELS) for case in dataset.cases]
    jobs += [CopyJob(case, TEST_IMAGES, TEST_LABELS) for case in dataset.test_cases]
    copy = partial(copy_case, dataset=dataset, out=unfinished, repaired=frozenset(repaired))
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in {folder for job in jobs for folder in job.folders}:
            (unfinished / folder).mkdir(parents=True)
        names = [job.case.identifier for job in jobs]
        for _, result in map_cases(copy, jobs, workers=workers, names=names):
            if isinstance(result, Exception):
                raise result
        write_json(unfinished / DATASET_JSON, _repaired_description(dataset))
        os.replace(unfinished, out)
    except OSError as error:
        raise storage_error(out, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@dataclass(frozen=True)
class CopyJob:
    """One case and the folders of the copy that its files go to."""

    case: Case
    images: str
    labels: str

    @property
    def folders(self) -> tuple[str, ...]:
        """Those that files of this case go to."""
        return (self.images, self.labels) if self.case.label is not None else (self.images,)


def copy_case(job: CopyJob, *, dataset: RawDataset, out: Path, repaired: frozenset[str]) -> None:
    """Write one case to `out`; files that need no repair are copied byte for byte."""
    case, ending = job.case, dataset.file_ending
    mapping = consecutive_values(dataset)
    grid = read_grid(main_image(case, dataset))
    for number, path in enumerate(case.images):
        target = out / job.images / f"{case.identifier}_{number:0{CHANNEL_DIGITS}d}{ending}"
        if number in dataset.reference_channels or read_grid(path) == grid:
            _copy(path, target)
        else:
            write_image(Image(read_image(path).array, grid), target)
    if case.label is None:
        return
    target = out / job.labels / f"{case.identifier}{ending}"
    if case.identifier not in repaired and all(old == new for old, new in mapping.items()):
        _copy(case.label, target)
        return
    label = read_label(case, grid, dataset, [])
    table = np.zeros(max(mapping) + 1, dtype=np.uint8 if max(mapping.values()) < 256 else np.int16)
    for old, new in mapping.items():
        table[old] = new
    write_image(Image(table[label.array], grid), target)


def _copy(source: Path, target: Path) -> None:
    """A file as it is where the endings agree; otherwise (DICOM folder, other format) read and written."""
    if source.is_file() and image_ending(source) == image_ending(target):
        shutil.copyfile(source, target)
    else:
        write_image(read_image(source), target)


def consecutive_values(dataset: RawDataset) -> dict[int, int]:
    """Old label value -> new one, such that all values are 0, 1, 2, ... in the same order."""
    return {old: new for new, old in enumerate(dataset.labels.known_values)}


def _repaired_description(dataset: RawDataset) -> dict[str, Any]:
    """`dataset.json` of the copy: values renumbered, cases counted, explicit file lists replaced by the layout."""
    content = read_json(dataset.root / DATASET_JSON, error=DatasetError, what="dataset description")
    mapping = consecutive_values(dataset)
    described: Mapping[str, Any] = dataset.labels.to_json()
    content["labels"] = {
        name: [mapping[value] for value in entry] if isinstance(entry, list) else mapping[entry]
        for name, entry in described["labels"].items()
    }
    if "regions_class_order" in described:
        content["regions_class_order"] = [mapping.get(value, value) for value in described["regions_class_order"]]
    content["numTraining"] = len(dataset.cases)
    content.pop("dataset", None)
    return dict(content)
