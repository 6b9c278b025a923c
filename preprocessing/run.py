"""Raw dataset + preprocessing settings -> one store of preprocessed cases for each of them.

Cases are worked on in parallel, one at a time in each worker, and read once for all stores. What is finished and
still up to date is skipped, so that an interrupted run goes on where it stood.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import Case, RawDataset
from autoseg.errors import AutosegError, DatasetError, StorageError
from autoseg.executor import Executor, Files, LocalExecutor, Needs
from autoseg.files import storage_error
from autoseg.labels import Labels
from autoseg.plan import PreprocessingSettings
from autoseg.preprocessing.case import find_geometry, preprocess_case
from autoseg.preprocessing.store import ANNOTATED, REFERENCE, Store, StoreEntry
from autoseg.reading import read_case
from autoseg.typed_json import to_json
from autoseg.workspace import Workspace

log = logging.getLogger(__name__)

MOST_COORDINATES = 10_000  # foreground voxels kept for each class and case: enough to draw patches from for a training
SEED = 1234
SLAB_VOXELS = 2**20  # searched for foreground at a time: a few MB


def preprocess(
    dataset: RawDataset,
    stores: Iterable[PreprocessingSettings],
    workspace: Workspace,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    drop_cases: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    beside: bool = False,
) -> bool:
    """Preprocess every training case for each of these settings; each names a store of the workspace.

    The cases are done by `workers` processes of this machine, or by an `executor` wherever it does them.
    `drop_cases` are left out. `progress(done, total)` is called after each case. `stop` is asked after each case; when
    it says yes, the rest is left undone. `beside`: in worker processes however few, because this one works too. Returns
    whether everything is there. Raises DatasetError naming every broken case at once; the sound ones are finished by
    then, so that a second run only does what is missing.
    """
    targets = [Target(workspace.store(settings), settings) for settings in stores]
    cases = [case for case in dataset.cases if case.identifier not in set(drop_cases)]
    for target in targets:
        _tidy(target, {case.identifier for case in cases})
    todo = [(case, missing) for case in cases if (missing := _missing(case, targets, dataset.labels))]
    log.info("preprocessing %d cases, %d are up to date", len(todo), len(cases) - len(todo))
    done = len(cases) - len(todo)
    broken: dict[str, Exception] = {}
    results = (executor or LocalExecutor(workers, beside=beside)).map(
        functools.partial(preprocess_and_store, dataset=_without_cases(dataset), labels=dataset.labels),
        todo,
        names=[case.identifier for case, _ in todo],
        needs=Needs(),
        files=Files((dataset.root, workspace.root), _files_read, _files_written),
    )
    with contextlib.closing(results):
        for index, result in results:
            if isinstance(result, StorageError):
                raise result  # a full disk or a forbidden folder hits every case alike
            if isinstance(result, AutosegError):
                broken[todo[index][0].identifier] = result
            elif isinstance(result, Exception):
                raise result
            done += 1
            if progress is not None:
                progress(done, len(cases))
            if stop():
                break
    if broken:
        raise DatasetError(_broken_cases(broken))
    return done == len(cases)


def _files_read(item: tuple[Case, tuple[Target, ...]]) -> list[str]:
    """The raw files of a case; of a DICOM series all in its folder."""
    case, _ = item
    paths = [*case.images, *((case.label,) if case.label else ())]
    return [glob.escape(str(path)) + ("/*" if path.is_dir() else "") for path in paths]


def _files_written(item: tuple[Case, tuple[Target, ...]]) -> list[str]:
    """The case's files in each store."""
    case, targets = item
    return [glob.escape(str(path)) for target in targets for path in Store(target.folder).files(case.identifier)]


def outdated_cases(
    dataset: RawDataset, settings: PreprocessingSettings, workspace: Workspace
) -> tuple[list[str], list[str]]:
    """Cases of a store whose raw files have changed since, and those that the dataset has no longer."""
    store, known = Store(workspace.store(settings)), {case.identifier: case for case in dataset.cases}
    stored = store.cases()
    changed = [
        name for name in stored if name in known and store.entry(name).source != _source(known[name], dataset.labels)
    ]
    return changed, [name for name in stored if name not in known]


@dataclass(frozen=True)
class Target:
    """One store to fill and the settings that it stands for."""

    folder: Path
    settings: PreprocessingSettings


def preprocess_and_store(item: tuple[Case, tuple[Target, ...]], *, dataset: RawDataset, labels: Labels) -> None:
    """Read one raw case and write it to each of the given stores. Runs in a worker process."""
    case, targets = item
    image, label = read_case(case, dataset)
    source = _source(case, labels)
    written: dict[tuple[Any, ...], StoreEntry] = {}
    for target in targets:
        store = Store(target.folder)
        try:
            geometry = find_geometry(image, target.settings, label)
            # slices left alone along z and slices resampled to the spacing they have are the same arrays
            how = target.settings
            content = (geometry, how.normalization, how.image_order, how.label_scale, how.reference)
            if content in written:
                store.link(written[content])
                continue
            done = preprocess_case(image, label, target.settings, labels, geometry=geometry)
        except DatasetError as error:
            raise DatasetError(f"Case {case.identifier}: {error}") from error
        arrays: dict[str, NDArray[Any]] = {"image": done.image}
        if done.reference is not None:
            arrays[REFERENCE] = done.reference
        foreground: dict[str, NDArray[np.int32]] = {}
        if done.label is not None:
            arrays["label"] = done.label
            foreground = sample_foreground(done.label, labels)
        written[content] = store.write(
            case.identifier, arrays, geometry, foreground, source=source, label_geometry=done.label_geometry
        )


def sample_foreground(label: NDArray[Any], labels: Labels) -> dict[str, NDArray[np.int32]]:
    """Voxels (N, 3) int32 (z, y, x) of each class or region in `label` (1, Z, Y, X), at most MOST_COORDINATES each.

    With an ignore label, "annotated" holds voxels that are not ignored. A fixed seed draws them.
    """
    volume = label[0]
    masks: dict[str, Callable[[NDArray[Any]], NDArray[np.bool_]]] = {
        name: functools.partial(labels.mask, name=name) for name in labels.names
    }
    if labels.ignore is not None:
        masks[ANNOTATED] = functools.partial(np.not_equal, labels.ignore)
    return {name: _sample(volume, mask) for name, mask in masks.items()}


def _sample(volume: NDArray[Any], mask: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> NDArray[np.int32]:
    """Voxels of `volume` (Z, Y, X) where `mask` holds; slab by slab, because a list of all of them may be huge."""
    _, height, width = volume.shape
    planes = max(1, SLAB_VOXELS // (height * width))
    slabs = [volume[z : z + planes] for z in range(0, len(volume), planes)]
    counts = [np.count_nonzero(mask(slab)) for slab in slabs]
    total = sum(counts)
    ranks = np.arange(total)
    if total > MOST_COORDINATES:
        ranks = np.sort(np.random.default_rng(SEED).choice(total, MOST_COORDINATES, replace=False))
    parts = [np.empty((0, 3), dtype=np.int32)]
    before = 0
    for index, (slab, count) in enumerate(zip(slabs, counts, strict=True)):
        first, end = np.searchsorted(ranks, [before, before + count])
        if end > first:
            chosen = np.flatnonzero(mask(slab))[ranks[first:end] - before]
            z, y, x = np.unravel_index(chosen, slab.shape)
            parts.append(np.stack([z + index * planes, y, x], axis=1).astype(np.int32))
        before += count
    return np.concatenate(parts)


def _tidy(target: Target, identifiers: set[str]) -> None:
    """Make the store's folder; remove what interrupted runs left and cases that the dataset has no longer."""
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(target.folder, error) from error
    store = Store(target.folder)
    store.remove_partial_files()
    for case in set(store.cases()) - identifiers:
        log.info("case %s is not in the dataset any more; it leaves the store %s", case, target.folder)
        store.remove(case)


def _missing(case: Case, targets: Sequence[Target], labels: Labels) -> tuple[Target, ...]:
    """The stores in which the case is not there, not sound or out of date."""
    source = _source(case, labels)
    return tuple(target for target in targets if not _is_current(Store(target.folder), case.identifier, source))


def _is_current(store: Store, case: str, source: str) -> bool:
    if not store.has(case):
        return False
    try:
        entry = store.entry(case)
        return entry.source == source and entry.is_whole()
    except StorageError:
        return False


def _source(case: Case, labels: Labels) -> str:
    """What the case is made from: its files with their sizes and times, and the meaning of the labels.

    The preprocessing settings need not be in it: they are the store's name.
    """
    parts: list[Any] = [to_json(labels)]
    for path in (*case.images, *((case.label,) if case.label else ())):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat() if file.exists() else None
            parts.append([file.name, status and status.st_size, status and status.st_mtime_ns])
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def _without_cases(dataset: RawDataset) -> RawDataset:
    """What a worker needs of the dataset; its list of cases would travel with each of them."""
    return replace(dataset, cases=(), test_cases=())


def _broken_cases(broken: dict[str, Exception]) -> str:
    sentences = "\n".join(f"  {error}" for _, error in sorted(broken.items()))
    return (
        f"{len(broken)} case{'s' if len(broken) > 1 else ''} cannot be used; repair the files, "
        f"or leave them out with --drop-cases:\n{sentences}"
    )
