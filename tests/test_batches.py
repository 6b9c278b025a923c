"""Batches: the same whatever prepares them, and errors that arrive where they are taken."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import TWO_CLASSES, preprocessed, sr_configuration, store_of, tiny_configuration, tiny_plan

from autoseg.errors import StorageError, WorkerError
from autoseg.plan import TrainingSettings
from autoseg.preprocessing.store import Store
from autoseg.training.batches import Batch, Samples, batches
from autoseg.training.samples import Sample
from autoseg.training.sampling import read_patch


@pytest.fixture
def samples(tiny_dataset, tmp_path: Path) -> Samples:  # type: ignore[no-untyped-def]
    plan = tiny_plan()
    workspace = preprocessed(tiny_dataset(cases=4), plan, tmp_path / "workspace")
    (settings,) = plan.configurations
    store = Store(workspace.store(settings.preprocessing))
    return Samples(store, store.cases(), settings, plan.labels, seed=3)


def take(samples: Samples, count: int, *, first_step: int = 0, workers: int = 0) -> list[Batch]:
    stream = batches(samples, batch_size=2, first_step=first_step, workers=workers)
    with contextlib.closing(stream):  # type: ignore[type-var]
        return list(itertools.islice(stream, count))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.image, b.image)
        and torch.equal(a.label, b.label)
        and a.grid == b.grid
        and (a.truth is b.truth is None or torch.equal(a.truth, b.truth))  # type: ignore[arg-type]
        for a, b in zip(first, second, strict=True)
    )


def test_batches_are_patches_of_the_plan(samples: Samples) -> None:
    (batch,) = take(samples, 1)
    assert batch.image.shape == (2, 1, 8, 12, 12) and batch.image.dtype == torch.float32
    assert batch.label.shape == (2, 1, 8, 12, 12) and batch.label.dtype == torch.int16
    assert set(batch.label.unique().tolist()) <= {0, 1, 2}


def test_batches_differ_from_step_to_step_and_from_seed_to_seed(samples: Samples) -> None:
    first, second = take(samples, 2)
    assert not torch.equal(first.image, second.image)
    samples.seed = 4
    assert not torch.equal(take(samples, 1)[0].image, first.image)


def test_going_on_in_the_middle_gives_the_batches_of_an_undisturbed_run(samples: Samples) -> None:
    assert same(take(samples, 3, first_step=4), take(samples, 7)[4:])


def test_two_processes_prepare_the_batches_of_the_thread_also_from_the_middle_on(samples: Samples) -> None:
    assert same(take(samples, 6, first_step=4, workers=2), take(samples, 6, first_step=4))


def test_fine_truth_and_its_grid_come_from_processes_as_from_the_thread(tiny_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plan = tiny_plan(sr_configuration(sr_range=(1.5, 3.0), patch_size=(4, 12, 12)))
    workspace = preprocessed(tiny_dataset(cases=3), plan, tmp_path / "workspace")
    (settings,) = plan.configurations
    store = Store(workspace.store(settings.preprocessing))
    samples = Samples(store, store.cases(), settings, plan.labels, seed=3)
    expected = take(samples, 4, first_step=198)
    assert len({batch.grid for batch in expected}) >= 3 and all(batch.truth is not None for batch in expected)
    assert same(take(samples, 4, first_step=198, workers=1), expected)
    assert same(take(samples, 2, first_step=200), expected[2:])


def test_what_else_was_drawn_before_changes_no_batch(samples: Samples) -> None:
    expected = take(samples, 2)
    np.random.random(17)
    torch.rand(5)
    _ = samples[99, 1]
    assert same(take(samples, 2), expected)


def test_samples_travel_to_a_worker_also_after_they_have_been_read(samples: Samples) -> None:
    expected = samples[0, 0]  # opens files
    sample = pickle.loads(pickle.dumps(samples))[0, 0]
    assert torch.equal(sample.image, expected.image) and torch.equal(sample.label, expected.label)
    assert len(pickle.dumps(samples)) < 50_000  # the settings and the records of the cases, no voxels


def corner_samples(tmp_path: Path, *, augment: bool) -> Samples:
    """A volume much larger than the patch with one structure, a block in its very corner."""
    label = np.zeros((30, 40, 40), np.int16)
    label[:3, -3:, :3] = 1
    settings = tiny_configuration(training=TrainingSettings(mirror_axes=()))
    return Samples(store_of(tmp_path, {"a": label}), ["a"], settings, TWO_CLASSES, seed=0, augment=augment)


def test_a_structure_in_the_corner_of_a_large_image_is_trained_on(tmp_path: Path) -> None:
    samples = corner_samples(tmp_path, augment=True)
    shows = [bool((samples[step, 1].label == 1).any()) for step in range(40)]
    assert np.mean(shows) > 0.8  # a rotation or a scaling may push it out


def test_a_patch_that_is_neither_rotated_nor_scaled_is_the_one_that_was_drawn(tmp_path: Path) -> None:
    samples = corner_samples(tmp_path, augment=True)
    exact = 0
    for step in range(40):
        patch = samples.sampler.draw(np.random.default_rng((0, step, 0)), index=0, size=samples.patch_size)
        drawn = read_patch(samples.sampler.entries["a"], "label", patch.start, samples.patch_size)
        exact += np.array_equal(samples[step, 0].label.numpy(), drawn)
    assert exact >= 20


def test_without_augmentation_a_patch_is_cut_out_unchanged(samples: Samples, tmp_path: Path) -> None:
    plain = corner_samples(tmp_path, augment=False)
    for step in range(5):
        sample = plain[step, 1]
        assert torch.equal(sample.image, sample.label.float())
        assert (sample.label == 1).any()


def test_preparing_takes_one_thread_and_leaves_the_others_to_the_optimiser(samples: Samples) -> None:
    seen: dict[str, int] = {}
    original = Samples.__getitem__

    def spy(self: Samples, position: tuple[int, int]) -> Sample:
        sample = original(self, position)
        seen["preparing"] = torch.get_num_threads()
        return sample

    def optimise() -> None:  # a fresh thread: torch has not looked up its number of threads yet
        torch.set_num_threads(2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Samples, "__getitem__", spy)
            take(samples, 1)
        seen["optimising"] = torch.get_num_threads()

    def later() -> None:
        seen["later"] = torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        for work in (optimise, later):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == {"preparing": 1, "optimising": 2, "later": 2}


def damage_one_case(samples: Samples) -> str:
    (case, entry) = next(iter(samples.sampler.entries.items()))
    path = entry.folder / entry.arrays["image"].file
    path.write_bytes(path.read_bytes()[:-10])
    return case


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_case_is_named_where_its_batch_is_taken(samples: Samples, workers: int) -> None:
    case = damage_one_case(samples)
    with pytest.raises(StorageError) as caught:
        take(samples, 50, workers=workers)
    assert str(caught.value).startswith(f"Case {case}: the preprocessed file")
    assert "\n" not in str(caught.value)


def test_a_thread_ends_when_its_batches_are_not_wanted_any_more(samples: Samples) -> None:
    take(samples, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def worker_processes() -> set[int]:
    """The spawned processes that this one started."""
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def test_a_process_outlives_ctrl_c_and_its_death_is_a_sentence(samples: Samples) -> None:
    expected = take(samples, 13)
    before = worker_processes()
    stream = batches(samples, batch_size=2, first_step=0, workers=1)
    with contextlib.closing(stream):  # type: ignore[type-var]
        assert same([next(stream)], expected[:1])
        (worker,) = worker_processes() - before
        os.kill(worker, signal.SIGINT)  # as a terminal does, to every process of the group
        assert same(list(itertools.islice(stream, 12)), expected[1:])
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)  # the optimiser's own work goes on undisturbed until it asks for the next batch
        with pytest.raises(WorkerError, match="prepares patches died .*SIGKILL.*fewer --workers") as caught:
            for _ in range(20):
                next(stream)
    assert "\n" not in str(caught.value)
    assert not worker_processes() - before
