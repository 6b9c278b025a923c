"""A model and a file, a folder or a DICOM series -> label files, one a case; a bad case never costs the others."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import glob
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoseg.dataset import Case
from autoseg.errors import AutosegError, PredictionError
from autoseg.executor import Executor, Files, Needs
from autoseg.files import PARTIAL, storage_error
from autoseg.image import PICTURE_ENDINGS, Image, Triple, image_ending, write_image
from autoseg.inference.answer_grid import check_spacing, require_any_scale
from autoseg.inference.predictor import CaseAnswer, Model, PredictionSettings, load_model
from autoseg.inference.sliding_window import MAX_RAM_BYTES
from autoseg.labels import Labels
from autoseg.preprocessing.case import CaseGeometry, PreprocessedCase

log = logging.getLogger(__name__)

CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")  # nnU-Net's CASE_0000
PROBABILITIES = "_probabilities"  # folder beside CASE.nii.gz: CASE_probabilities/0_background.nii.gz, ...
IMAGE = "_image"  # the super-resolved image beside CASE.nii.gz: CASE_image.nii.gz
DICOM_OUTPUT = ".nii.gz"

_Read = tuple[Image | None, PreprocessedCase]  # the image only where it is needed again


@dataclass(frozen=True)
class _Answer:
    """What is written of a case."""

    answer: CaseAnswer
    input: CaseGeometry
    """Of what the network read."""
    raw: Image | None
    """The image as it was read, where the super-resolved one is to have its units."""


@dataclass(frozen=True)
class PredictOptions:
    """What `autoseg predict` can be told."""

    probabilities: bool = False
    """Write a folder CASE_probabilities beside each label file: one .nii.gz (float32) for each class or region."""
    skip_existing: bool = False
    """Leave cases alone whose output is there."""
    mirroring: bool = True
    """Average over mirrored copies, along the axes that the plan allows."""
    step_size: float = 0.5
    """Step between tiles as a fraction of the tile, above 0 and at most 1."""
    part: tuple[int, int] = (1, 1)
    """(k, n): only the k-th of n equal shares of the cases, counted from 1, so that n machines can share the work."""
    max_ram_bytes: int = MAX_RAM_BYTES
    """What one case's logits and probabilities may take in memory before they are kept on disk."""
    image: bool = False
    """Write CASE_image beside each label file: the super-resolved image, float32."""
    native: bool = False
    """Bring the labels of a super-resolving model to the image's own grid."""
    output_spacing: Triple | None = None
    """Of the answer of an any-scale model, in mm along the axes (z, y, x) of the image's array."""
    workers: int = 1
    """0: one case after the other; 1 or more: the next case is read and the last one written meanwhile."""

    def __post_init__(self) -> None:
        k, n = self.part
        if not 1 <= k <= n:
            raise PredictionError(f"The part must be k/n with k from 1 to n, got {k}/{n}.")
        if self.native and self.output_spacing is not None:
            raise PredictionError(
                f"The labels cannot lie on the image's own grid and on one of {self.output_spacing} mm; choose one of "
                "`--native` and `--output-spacing`."
            )
        _ = self.prediction

    @property
    def prediction(self) -> PredictionSettings:
        """The settings of the model's own work. Raises PredictionError where the step size makes no sense."""
        return PredictionSettings(self.mirroring, self.step_size, self.max_ram_bytes)


@dataclass(frozen=True)
class PredictOutcome:
    """What became of each case."""

    done: tuple[str, ...]
    """Cases that were predicted and written."""
    failed: dict[str, str] = field(default_factory=dict)
    """Case -> the sentence that says why it could not be predicted."""
    skipped: tuple[str, ...] = ()
    """Cases whose output was there (`skip_existing`)."""


@dataclass(frozen=True)
class PredictTask:
    """One case and where its labels go."""

    case: Case
    output: Path
    """The label file."""
    problem: str | None = None
    """Why the case cannot be predicted, seen from the names of its files."""


@dataclass(frozen=True)
class ModelSource:
    """What `load_model` is told: plain values, with which another process loads the same model."""

    path: Path
    device: str = "auto"
    folds: tuple[str, ...] = ()


def predict_files(
    model: Model,
    input: Path | str,
    output: Path | str,
    *,
    options: PredictOptions | None = None,
    executor: Executor | None = None,
    source: ModelSource | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PredictOutcome:
    """Predict every case of `input` and write label files into `output`, a folder or, for one case, a file.

    `input` is an image file, a folder of them (CASE_0000.ext, CASE_0001.ext for several channels; CASE.ext too where
    the model has one channel) or a folder with one DICOM series. Volumes are written with the model's file ending,
    DICOM as .nii.gz. A model that predicts no labels writes the super-resolved image in their place, of pictures as
    .nii.gz.
    `progress(case, cases finished, cases in all)` is called after each case. A case that fails is noted with its
    sentence and the others go on. With an `executor` the cases are predicted wherever it does them, by the model's
    `source`. Raises PredictionError where `input` holds nothing to predict or the model cannot do
    what is asked for, and StorageError where `output` cannot be written at all.
    """
    options = options or PredictOptions()
    _check_abilities(model, options)
    if not model.predicts_labels:
        options = replace(options, image=False)  # it is the output itself
    tasks = find_tasks(Path(input), Path(output), model=model)
    k, n = options.part
    tasks = tasks[k - 1 :: n]
    skipped = tuple(
        t.case.identifier for t in tasks if options.skip_existing and is_done(t, model.plan.labels, options)
    )
    tasks = [task for task in tasks if task.case.identifier not in skipped]
    _check_writable(tasks)
    done, failed = [], {}
    if executor is None:
        answers = _predict_all(model, tasks, options)
    else:
        assert source is not None, "another process must know where the model is"
        answers = _predict_elsewhere(executor, source, tasks, options, root=Path(input))
    for number, (task, problem) in enumerate(answers, start=1):
        name = task.case.identifier
        if problem is None:
            done.append(name)
        else:
            failed[name] = problem
            log.error("%s", problem)
        if progress is not None:
            progress(name, number, len(tasks))
    return PredictOutcome(tuple(done), failed, skipped)


def find_tasks(input: Path, output: Path, *, model: Model) -> list[PredictTask]:
    """The cases of `input`, sorted by name, and where their labels go; no image is opened. Raises PredictionError."""
    found = _find_cases(input, len(model.plan.channels))
    if not found:
        raise PredictionError(
            f"{input}: nothing to predict; expected image files such as CASE_0000{model.plan.file_ending}, or a DICOM "
            "series."
        )
    if input.is_dir() and output.resolve() == input.resolve():
        raise PredictionError(
            f"{output}: the labels would overwrite the images or be taken for images the next time; give another "
            "output folder."
        )
    to_file = image_ending(output) is not None and not output.is_dir()
    if input.is_file() and not to_file and output.suffix[1:].isalpha() and not output.exists():
        raise PredictionError(f"{output}: not a known image format; give a file such as CASE.nii.gz, or a folder.")
    if to_file and len(found) > 1:
        raise PredictionError(f"{output}: is one file, but {input} holds {len(found)} cases; give a folder as output.")
    if to_file and not model.predicts_labels and _is_picture(output):
        raise PredictionError(
            f"{output}: the super-resolved image has fractions, which pictures do not hold; give a file such as "
            "CASE.nii.gz."
        )
    tasks = []
    holds_answer = model.predicts_labels or model.plan.file_ending.lower() not in PICTURE_ENDINGS
    for case, problem in found:
        ending = model.plan.file_ending if holds_answer and not case.images[0].is_dir() else DICOM_OUTPUT
        target = output if to_file else output / f"{case.identifier}{ending}"
        if target.resolve() in [path.resolve() for path in case.images]:
            raise PredictionError(f"{target}: the labels would overwrite the image; give another output folder.")
        tasks.append(PredictTask(case, target, problem))
    return tasks


def is_done(task: PredictTask, labels: Labels, options: PredictOptions) -> bool:
    """Whether everything that would be written for a case is there. The label file is written last."""
    wanted = probability_files(task.output, labels) if options.probabilities else []
    wanted += [image_file(task.output)] if options.image else []
    return all(path.is_file() for path in (task.output, *wanted))


def probability_files(output: Path, labels: Labels) -> list[Path]:
    """For each channel of the probabilities of the label file `output` the file it is written to."""
    names = labels.names if labels.has_regions else ("background", *labels.names)
    folder = output.with_name(_stem(output) + PROBABILITIES)
    safe = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    return [folder / f"{number}_{name}.nii.gz" for number, name in enumerate(safe)]


def image_file(output: Path) -> Path:
    """Where the super-resolved image goes that belongs to the label file `output`; pictures hold no floats."""
    ending = DICOM_OUTPUT if _is_picture(output) else image_ending(output) or DICOM_OUTPUT
    return output.with_name(_stem(output) + IMAGE + ending)


def _is_picture(path: Path) -> bool:
    return (image_ending(path) or "").lower() in PICTURE_ENDINGS


def _check_abilities(model: Model, options: PredictOptions) -> None:
    """Refuse what the model cannot do before anything is computed. Raises PredictionError."""
    if options.image or not model.predicts_labels:
        model.require_image_head()
    if options.output_spacing is not None:
        require_any_scale(model.configuration)
        check_spacing(options.output_spacing)
    if not model.predicts_labels and (options.probabilities or options.native):
        raise PredictionError(
            f"Configuration {model.configuration.name} was trained without labels: it writes the super-resolved image "
            "alone, so there is nothing for `--probabilities` and `--native`."
        )


# ---- which cases


def _find_cases(input: Path, channels: int) -> list[tuple[Case, str | None]]:
    if input.is_file():
        return [_single_file(input, channels)]
    if not input.is_dir():
        raise PredictionError(f"{input}: there is no such file or folder.")
    visible = sorted(path for path in input.iterdir() if not path.name.startswith(".") and PARTIAL not in path.name)
    images = [path for path in visible if path.is_file() and image_ending(path)]
    if images:
        return _group_channels(images, channels)
    if any(path.is_file() and path.suffix != ".json" for path in visible):
        return [(Case(input.resolve().name, (input,)), None)]  # a DICOM series: its files have any name
    return [(Case(path.name, (path,)), None) for path in visible if path.is_dir()]


def _single_file(path: Path, channels: int) -> tuple[Case, str | None]:
    name = CHANNEL_NAME.fullmatch(_stem(path))
    if image_ending(path) is None:
        raise PredictionError(f"{path}: not a known image format; give an image file, a folder or a DICOM series.")
    if name is None or int(name["channel"]) != 0:
        return Case(_stem(path), (path,)), None
    if channels == 1:
        return Case(name["case"], (path,)), None
    ending = path.name[len(_stem(path)) :]
    beside = [path.with_name(f"{name['case']}_{number:04d}{ending}") for number in range(channels)]
    return _group_channels([other for other in beside if other.is_file()], channels)[0]


def _group_channels(images: Sequence[Path], channels: int) -> list[tuple[Case, str | None]]:
    """Cases by the names of their files; nnU-Net's CASE_0000.ext, or CASE.ext."""
    groups: dict[str, dict[int | None, list[Path]]] = {}
    with_first = {m["case"] for m in map(CHANNEL_NAME.fullmatch, map(_stem, images)) if m and m["channel"] == "0000"}
    for path in images:
        name = CHANNEL_NAME.fullmatch(_stem(path))
        # scan_2019.nii.gz is channel 2019 of nothing: without a _0000 beside it the digits belong to the name
        numbered = name is not None and (name["case"] in with_first or channels > 1)
        case, number = (name["case"], int(name["channel"])) if name and numbered else (_stem(path), None)
        groups.setdefault(case, {}).setdefault(number, []).append(path)
    return [_one_case(identifier, groups[identifier], channels) for identifier in sorted(groups)]


def _one_case(identifier: str, files: dict[int | None, list[Path]], channels: int) -> tuple[Case, str | None]:
    every = [path for group in files.values() for path in group]
    case = Case(identifier, tuple(every))
    whole = len(every) == 1 and (None in files or (0 in files and image_ending(every[0]) in PICTURE_ENDINGS))
    if whole:
        return case, None
    numbers = [number for number in files if number is not None]
    if len(numbers) < len(every):
        names = ", ".join(path.name for path in every)
        return case, f"Case {identifier}: several files have this name ({names}), expected one for each channel."
    if sorted(numbers) != list(range(channels)):
        return case, (
            f"Case {identifier}: has the channels {sorted(numbers)} ({every[0].parent}), expected "
            f"{list(range(channels))}; give one file for each, {identifier}_0000 to {identifier}_{channels - 1:04d}."
        )
    return Case(identifier, tuple(files[number][0] for number in range(channels))), None


def _stem(path: Path) -> str:
    ending = image_ending(path)
    return path.name[: -len(ending)] if ending else path.name


# ---- one case after the other


def _predict_all(
    model: Model, tasks: Sequence[PredictTask], options: PredictOptions
) -> Iterator[tuple[PredictTask, str | None]]:
    """Each task, when it is finished, with the sentence of its problem or None."""
    if options.workers == 0:
        for task in tasks:
            yield task, _problem(task, functools.partial(_predict_one, model, task, options))
        return
    # three cases are alive at most: one is read, one predicted, one written
    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
        reading = [reader.submit(_read, model, task, options) for task in tasks[:1]]
        writing: tuple[PredictTask, Future[None]] | None = None
        for number, task in enumerate(tasks):
            read = reading.pop()
            concurrent.futures.wait([read])
            following = tasks[number + 1 : number + 2]
            reading += [reader.submit(_read, model, after, options) for after in following]
            answer: Future[_Answer] = Future()
            problem = _problem(task, functools.partial(_answer_into, answer, model, read, options))
            del read
            if writing is not None:
                yield writing[0], _problem(writing[0], writing[1].result)
                writing = None
            if problem is not None:
                yield task, problem
                continue
            writing = task, writer.submit(_write, model, task, answer.result(), options)
            del answer
        if writing is not None:
            yield writing[0], _problem(writing[0], writing[1].result)


def _predict_elsewhere(
    executor: Executor, source: ModelSource, tasks: Sequence[PredictTask], options: PredictOptions, *, root: Path
) -> Iterator[tuple[PredictTask, str | None]]:
    """Each task, when it is finished somewhere, with the sentence of its problem or None."""
    import torch

    from autoseg.device import resolve_device

    tasks = [replace(task, case=_absolute(task.case), output=task.output.resolve()) for task in tasks]
    source = replace(source, path=source.path.resolve())
    threads, gpus = torch.get_num_threads(), int(resolve_device(source.device).type == "cuda")
    needs = Needs(1 if gpus else threads, gpus, options.max_ram_bytes, threads)
    places = executor.places(source.device, needs)
    predict = functools.partial(
        predict_case, source=replace(source, device=(*places, source.device)[0]), options=options
    )
    root = root.resolve()
    roots = (root if root.is_dir() else root.parent, source.path.parent, *{task.output.parent for task in tasks})

    def reads(task: PredictTask) -> list[str]:
        paths = [*task.case.images, source.path]
        return [glob.escape(str(path)) + ("/**" if path.is_dir() else "") for path in paths]

    def writes(task: PredictTask) -> list[str]:
        probabilities = task.output.with_name(_stem(task.output) + PROBABILITIES)
        files = [glob.escape(str(path)) for path in (image_file(task.output), task.output)]
        return [f"{glob.escape(str(probabilities))}/*", *files]

    names = [task.case.identifier for task in tasks]
    results = executor.map(predict, tasks, names=names, needs=needs, files=Files(roots, reads, writes))
    with contextlib.closing(results):
        for index, result in results:
            yield tasks[index], str(result) if isinstance(result, Exception) else result


def _absolute(case: Case) -> Case:
    return replace(case, images=tuple(path.resolve() for path in case.images))


def predict_case(task: PredictTask, *, source: ModelSource, options: PredictOptions) -> str | None:
    """Predict and write one case; the sentence of its problem or None. Runs in any process."""
    return _problem(task, functools.partial(_predict_one, _loaded(source), task, options))


@functools.lru_cache(maxsize=1)
def _loaded(source: ModelSource) -> Model:
    """Of one case after the other in the same process."""
    return load_model(source.path, source.device, folds=source.folds)


def _predict_one(model: Model, task: PredictTask, options: PredictOptions) -> None:
    _write(model, task, _answer(model, _read(model, task, options), options), options)


def _answer_into(answer: Future[_Answer], model: Model, read: Future[_Read], options: PredictOptions) -> None:
    answer.set_result(_answer(model, read.result(), options))


def _read(model: Model, task: PredictTask, options: PredictOptions) -> _Read:
    if task.problem is not None:
        raise PredictionError(task.problem)
    image = model.check(model.read_case(task.case))
    case = model.preprocess(image)
    needed = model.needs_image or _writes_image(model, options)
    return (image if needed else None), case


def _answer(model: Model, read: _Read, options: PredictOptions) -> _Answer:
    image, case = read
    answer = model.answer(case, image=image, output_spacing=options.output_spacing, settings=options.prediction)
    return _Answer(answer, case.geometry, image if _writes_image(model, options) else None)


def _writes_image(model: Model, options: PredictOptions) -> bool:
    return options.image or not model.predicts_labels


def _write(model: Model, task: PredictTask, answer: _Answer, options: PredictOptions) -> None:
    """Write a case's files; the label file last, so that where it is, all are."""
    labels, limit = model.plan.labels, options.max_ram_bytes
    if answer.raw is not None:
        path = image_file(task.output) if model.predicts_labels else task.output
        write_image(model.export_super_resolved(answer.answer, answer.raw, max_ram_bytes=limit), path)
    if not model.predicts_labels:
        return
    given = answer.answer
    if options.native:
        given = model.brought_back(given, answer.input, settings=options.prediction)
    if options.probabilities:
        probabilities = model.probabilities_of(given, max_ram_bytes=limit)
        for channel, path in zip(probabilities.array, probability_files(task.output, labels), strict=True):
            write_image(Image(channel[None], probabilities.grid), path)
    write_image(model.labels_of(given), task.output)


def _problem(task: PredictTask, work: Callable[[], None]) -> str | None:
    """Do the work; the sentence to print where it fails. Whatever happens to one case, the others are predicted."""
    name = f"Case {task.case.identifier}"
    try:
        work()
    except AutosegError as error:
        sentence = str(error)
        return sentence if sentence.startswith(name) else f"{name}: {sentence}"
    except Exception as error:
        log.debug("%s", name, exc_info=True)
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return f"{name}: could not be predicted ({type(error).__name__}: {reason}); the other cases are not affected."
    return None


def _check_writable(tasks: Sequence[PredictTask]) -> None:
    """Refuse an output folder that cannot be written before anything is computed. Raises StorageError."""
    for folder in {task.output.parent for task in tasks}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise storage_error(folder, error) from error
