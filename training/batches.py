"""A store -> batches of augmented patches, each a pure function of (seed, step), whatever prepares them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.connection
import queue
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from autoseg.errors import AutosegError, PlanError, StorageError, WorkerError
from autoseg.executor import available_cores
from autoseg.labels import Labels
from autoseg.plan import Configuration, Shape, Vector
from autoseg.preprocessing.framed import FramedEntry
from autoseg.preprocessing.store import Store, StoreEntry
from autoseg.training.augment import Augmentation
from autoseg.training.samples import Place, Sample, build_source
from autoseg.training.sampling import PatchSampler
from autoseg.training.settings import CURRICULUM_STEPS, PREFETCH_BATCHES
from autoseg.training.shapes import Batch, at_scale

FEW_CORES = 4  # up to so many, a thread prepares patches beside the optimiser; more cores afford processes
DYING_SECONDS = 5.0  # a worker that has closed its connections is gone by then
SCALE_STREAM = 2**32 - 1  # in the place of the index in a batch: the random numbers of a step's scale
MOST_WORKERS = 12  # nnU-Net's default; a GPU rarely empties what so many prepare


def default_workers(trainings: int = 1, cores: int | None = None) -> int:
    """Processes that prepare patches for one of so many that share these cores; 0 (a thread) where they are few.

    `cores`: by default those of this machine.
    """
    cores = (cores or available_cores()) // trainings
    return 0 if cores <= FEW_CORES else min(MOST_WORKERS, cores - 2)


class Samples(Dataset[Sample]):
    """`samples[step, index]`: the patch at position `index` of the batch of `step`, augmented.

    Every random number comes from (seed, step, index), so neither the number of workers nor a resumed training
    changes what is trained on.
    """

    def __init__(
        self,
        store: Store,
        cases: Sequence[str],
        configuration: Configuration,
        labels: Labels,
        *,
        seed: int,
        augment: bool = True,
        previous: Store | None = None,
    ) -> None:
        if configuration.super_resolves and previous is not None:
            raise PlanError(f"Configuration {configuration.name} super-resolves, so it cannot have a previous stage.")
        self.configuration = configuration
        self.sampler = PatchSampler(
            store,
            cases,
            batch_size=configuration.batch_size,
            frames=configuration.frames(training=True),
            label_scale=configuration.preprocessing.label_scale,
        )
        self.augment = augment
        self.seed = seed
        self.patch_size = configuration.patch_size
        self.previous = _entries_beside(self.sampler.entries, previous) if previous is not None else None
        self.augmentation = Augmentation(configuration, previous_labels=labels.values if previous is not None else ())
        self.make = build_source(configuration, self.augmentation, augment=augment)

    def __getitem__(self, position: tuple[int, int]) -> Sample:
        step, index = position
        generator = np.random.default_rng((self.seed, step, index))

        draw = _Draw(self, generator, step, index)
        return self.make(draw, lambda: _seed_everything(int(generator.integers(2**31))), self.scale(step))

    def scale(self, step: int) -> Vector:
        """Input spacing / output spacing of a whole batch: as planned, or drawn for each step of any-scale training.

        That begins with whole numbers, which are easier (a curriculum); patches that are not augmented stay as planned.
        """
        limits = self.configuration.sr_range
        if limits is None or not self.augment:
            return self.configuration.sr_scale
        generator = np.random.default_rng((self.seed, step, SCALE_STREAM))
        whole = range(math.ceil(limits[0]), math.floor(limits[1]) + 1)
        if step < CURRICULUM_STEPS and whole:
            return at_scale(self.configuration, float(whole[int(generator.integers(len(whole)))]))
        return at_scale(self.configuration, float(generator.uniform(*limits)))


@dataclass(frozen=True)
class _Draw:
    """See `autoseg.training.samples.Draw`."""

    samples: Samples
    generator: np.random.Generator
    step: int
    index: int

    def __call__(self, size: Shape, *, frames: Sequence[Shape] | None = None) -> Place:
        sampler, beside = self.samples.sampler, self.samples.previous
        patch = sampler.draw(self.generator, index=self.index, size=size, frames=frames)
        previous = None if beside is None else FramedEntry(beside[patch.case], patch.frame)
        return Place(sampler.entry(patch.case, patch.frame), patch.start, previous)


def _entries_beside(entries: Mapping[str, StoreEntry], previous: Store) -> dict[str, StoreEntry]:
    """The previous stage's entries of the same cases. Raises StorageError where one lies on another grid."""
    found = {case: previous.entry(case) for case in entries}
    for case, entry in found.items():
        shape, expected = entry.arrays["label"].shape[1:], entries[case].shape
        if shape != expected:
            raise StorageError(
                f"Case {case}: the previous stage's prediction in {previous.folder} has {shape} voxels (z, y, x), the "
                f"image {expected}; delete that folder to have it made anew."
            )
    return found


def _seed_everything(seed: int) -> None:
    """batchgeneratorsv2 draws from the global generators of torch and numpy, scikit-image from Python's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the CPU's alone: `torch.manual_seed` takes 0.3 ms to tell every device


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one step as a batch."""
    grid = samples[0].grid
    assert all(sample.grid == grid for sample in samples), "a batch has one scale"
    truths = [sample.truth for sample in samples if sample.truth is not None]
    references = [sample.reference for sample in samples if sample.reference is not None]
    planes = [sample.plane for sample in samples if sample.plane is not None]
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.stack([sample.label for sample in samples]),
        torch.stack(truths) if truths else None,
        grid,
        torch.stack(references) if references else None,
        collate(planes) if planes else None,
    )


def batches(
    samples: Samples, *, batch_size: int, first_step: int, workers: int, first_index: int = 0
) -> Iterator[Batch]:
    """Batches for step `first_step`, `first_step` + 1, ... without end; close the iterator to stop preparing.

    Where a batch is shared by several processes, each has `batch_size` positions of it, from `first_index` on.

    With `workers=0` a thread of this process prepares them (no second copy of torch in memory, no start-up: the
    choice for few cores); otherwise that many spawned processes. Raises StorageError where a case cannot be read,
    WorkerError where a process dies.
    """
    indices = range(first_index, first_index + batch_size)
    if workers == 0:
        return _from_thread(samples, indices, first_step)
    return _from_processes(samples, indices, first_step, workers)


def _from_thread(samples: Samples, indices: Sequence[int], first_step: int) -> Iterator[Batch]:
    ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH_BATCHES)
    closed, limited = threading.Event(), threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def prepare() -> None:
        _compute_alone()
        limited.set()
        step = first_step
        try:
            while not closed.is_set():
                put(collate([samples[step, index] for index in indices]))
                step += 1
        except BaseException as error:  # handed over: it is raised where the batch is taken
            put(error)

    thread = threading.Thread(target=prepare, name="batches", daemon=True)
    threads = torch.get_num_threads()  # asked before: a thread's first look-up takes the number that was set last
    thread.start()
    limited.wait()
    torch.set_num_threads(threads)  # what later threads begin with, too
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


class _Positions:
    """The positions of each batch, from a step on."""

    def __init__(self, indices: Sequence[int], first_step: int) -> None:
        self.indices, self.first_step = indices, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            yield [(step, index) for index in self.indices]
            step += 1


def _compute_alone() -> None:
    """Let this thread compute by itself: the cores belong to the optimiser or to the other workers."""
    torch.get_num_threads()  # torch's first look-up would undo what is set before it
    torch.set_num_threads(1)


class _Guarded(Dataset[Sample | AutosegError]):
    """Samples, or the error in their place: a DataLoader would wrap a worker's traceback into the sentence."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, position: tuple[int, int]) -> Sample | AutosegError:
        try:
            return self.samples[position]
        except AutosegError as error:
            return error


def _collate_guarded(samples: list[Sample | AutosegError]) -> Batch | AutosegError:
    errors = [sample for sample in samples if isinstance(sample, AutosegError)]
    return errors[0] if errors else collate([sample for sample in samples if not isinstance(sample, AutosegError)])


def _begin_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the training ends its workers itself
    _compute_alone()


def _from_processes(samples: Samples, indices: Sequence[int], first_step: int, workers: int) -> Iterator[Batch]:
    loader: Any = DataLoader(
        _Guarded(samples),
        batch_sampler=_Positions(indices, first_step),
        num_workers=workers,
        collate_fn=_collate_guarded,
        multiprocessing_context="spawn",
        worker_init_fn=_begin_worker,
        prefetch_factor=max(1, PREFETCH_BATCHES // workers),
    )
    with _own_signals():
        stream: Any = iter(loader)
    try:
        while True:
            batch = next(stream)
            if isinstance(batch, AutosegError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"A process that prepares patches died ({_cause(stream)}); "
            "use fewer --workers or a machine with more memory."
        ) from error
    finally:
        del stream  # ends the workers


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Start workers so that they ignore Ctrl-C from their first moment on, and keep this process's signal handlers.

    A DataLoader sets one for dead children, which raises wherever the optimiser happens to be; without it a dead worker
    is noticed when its batch is asked for, a few seconds later.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, getattr(signal, "SIGCHLD", signal.SIGINT))}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _cause(stream: Any) -> str:
    """How the first dead worker of a DataLoader's iterator ended."""
    workers = getattr(stream, "_workers", ())
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=DYING_SECONDS)
    statuses = [worker.exitcode for worker in workers if worker.exitcode]
    if not statuses:
        return "cause unknown"
    status: int = statuses[0]
    if status == -signal.SIGKILL:
        return "signal SIGKILL, as when memory runs out"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
