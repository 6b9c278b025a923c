"""A store -> batches of augmented patches, each a pure function of (seed, step), whatever prepares them."""

from __future__ import annotations

import os
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autoseg.errors import StorageError
from autoseg.labels import Labels
from autoseg.plan import Configuration
from autoseg.preprocessing.store import Store
from autoseg.training.augment import Augmentation, source_size
from autoseg.training.sampling import PatchSampler, read_patch
from autoseg.training.settings import PREFETCH_BATCHES


@dataclass(frozen=True)
class Batch:
    """What one optimiser step sees."""

    image: Tensor
    """(B, C, Z, Y, X) float32."""
    label: Tensor
    """(B, 1, Z, Y, X) int16, label values."""


FEW_CORES = 4  # up to so many, a thread prepares patches beside the optimiser; more cores afford processes
MOST_WORKERS = 12  # nnU-Net's default; a GPU rarely empties what so many prepare


def default_workers() -> int:
    """Processes that prepare patches on this machine; 0 (a thread) where cores are few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= FEW_CORES else min(MOST_WORKERS, cores - 2)


class Samples(Dataset[tuple[Tensor, Tensor]]):
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
        self.sampler = PatchSampler(store, cases, batch_size=configuration.batch_size)
        self.augment = augment
        self.seed = seed
        self.size = source_size(configuration) if augment else configuration.patch_size
        self.previous = {case: previous.entry(case) for case in self.sampler.cases} if previous else None
        self.augmentation = Augmentation(
            configuration, previous_labels=labels.foreground_values if previous is not None else ()
        )

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, index = position
        generator = np.random.default_rng((self.seed, step, index))
        patch = self.sampler.draw(generator, index=index, size=self.size)
        entry = self.sampler.entries[patch.case]
        image = read_patch(entry, "image", patch.start, self.size)
        label = read_patch(entry, "label", patch.start, self.size)
        if self.previous is not None:
            before = read_patch(self.previous[patch.case], "label", patch.start, self.size)
            label = np.concatenate((label, before))
        _seed_everything(int(generator.integers(2**31)))
        return self.augmentation(
            torch.from_numpy(np.ascontiguousarray(image, np.float32)),
            torch.from_numpy(np.ascontiguousarray(label, np.int16)),
            augment=self.augment,
        )


def _seed_everything(seed: int) -> None:
    """batchgeneratorsv2 draws from the global generators of torch and numpy, scikit-image from Python's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _collate(samples: list[tuple[Tensor, Tensor]]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.stack(labels))


def batches(samples: Samples, *, batch_size: int, first_step: int, workers: int) -> Iterator[Batch]:
    """Batches for step `first_step`, `first_step` + 1, ... without end; close the iterator to stop preparing.

    With `workers=0` a thread of this process prepares them (no second copy of torch in memory, no start-up: the
    choice for few cores); otherwise that many spawned processes. Raises StorageError where a worker dies.
    """
    return (
        _from_thread(samples, batch_size, first_step)
        if workers == 0
        else _from_processes(samples, batch_size, first_step, workers)
    )


def _from_thread(samples: Samples, batch_size: int, first_step: int) -> Iterator[Batch]:
    ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH_BATCHES)
    closed = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread alone: the other threads belong to the optimiser
        step = first_step
        try:
            while not closed.is_set():
                put(_collate([samples[step, index] for index in range(batch_size)]))
                step += 1
        except BaseException as error:  # handed over: it is raised where the batch is taken
            put(error)

    thread = threading.Thread(target=prepare, name="batches", daemon=True)
    thread.start()
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

    def __init__(self, batch_size: int, first_step: int) -> None:
        self.batch_size, self.first_step = batch_size, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            yield [(step, index) for index in range(self.batch_size)]
            step += 1


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _from_processes(samples: Samples, batch_size: int, first_step: int, workers: int) -> Iterator[Batch]:
    loader: Any = DataLoader(
        samples,
        batch_sampler=_Positions(batch_size, first_step),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        multiprocessing_context="spawn",
        worker_init_fn=_one_thread,
        prefetch_factor=max(1, PREFETCH_BATCHES // workers),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise StorageError(f"A worker that prepares patches died ({error}); use fewer --workers.") from error
