"""Two processes that train one fold together are one process with a batch twice as large."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import NAME, TWO_CLASSES, preprocessed, store_of, tiny_configuration, tiny_plan
from two_processes import IMAGE_AND_LABELS, LABELS, STEPS, loss_and_gradients, train

from autoseg.checkpoint import Checkpoint, load_tensors
from autoseg.errors import CheckpointError, PlanError
from autoseg.plan import Plan
from autoseg.training import loop
from autoseg.training.distributed import ALONE, World, joined
from autoseg.training.loop import RESUME_FORMAT
from autoseg.workspace import CHECKPOINT, CURVE, HISTORY, RESUME, SUMMARY, Workspace

BATCH = 2  # of each process
SHAPE = (6, 12, 12)
ROOT = Path(__file__).parents[1]


def torchrun(*words: object) -> list[str]:
    """The command line that starts two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]


def environment() -> dict[str, str]:
    """One thread each; `autoseg` is found where it is not installed, too."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), *sys.path)))}


def start(folder: Path, rank: int, *, port: int) -> subprocess.Popen[str]:
    """One of two processes, as torchrun starts them; it would take seconds to start itself."""
    told = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": 2,
        "RANK": rank,
    }
    told |= {"LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "two_processes.py"), str(folder)],
        env={**environment(), **{name: str(value) for name, value in told.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plan_of_batch(size: int) -> Plan:
    return tiny_plan(tiny_configuration(batch_size=size))


def a_batch(name: str) -> dict[str, torch.Tensor]:
    """Random logits and labels; of the ignore label one half of the batch has much, the other little."""
    random = torch.Generator().manual_seed(0)
    if name not in LABELS:
        fine = tuple(round(n * s) for n, s in zip(SHAPE, IMAGE_AND_LABELS.sr_scale, strict=True))
        logits = torch.randn(2 * BATCH, TWO_CLASSES.output_channels + 1, *fine, generator=random)
        image = torch.randn(2 * BATCH, 1, *SHAPE, generator=random)
        truth = torch.randn(2 * BATCH, 1, *fine, generator=random) * torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1, 1, 1)
        label = torch.randint(0, 3, (2 * BATCH, 1, *fine), generator=random)
        return {"logits": logits, "label": label, "truth": truth, "image": image}
    labels = LABELS[name]
    label = torch.randint(0, 3, (2 * BATCH, 1, *SHAPE), generator=random)
    if labels.ignore is not None:
        label[:BATCH, :, 1:] = labels.ignore
    label[BATCH:, :, :, 6:] = 0  # the halves differ in their structures too
    return {"logits": torch.randn(2 * BATCH, labels.output_channels, *SHAPE, generator=random), "label": label}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made: losses, a training `whole`, one that was stopped and `resumed`; and `alone`."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "batches").mkdir()
    for name in (*LABELS, "super-resolution"):
        save_file(a_batch(name), folder / "batches" / name)
    plan = plan_of_batch(BATCH)
    plan.save(folder / "plan.json")
    random = np.random.default_rng(0)
    shapes = {name: random.integers(0, 2, (10, 14, 14)) * 2 for name in "abcdef"}
    store_of(folder / "alone" / "preprocessed" / plan.configurations[0].preprocessing.store_id, shapes)
    for name in ("whole", "resumed"):
        shutil.copytree(folder / "alone", folder / name)
    port = free_port()
    two = [start(folder, rank, port=port) for rank in (0, 1)]
    said = [process.communicate()[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], "\n".join(said)
    train(plan_of_batch(2 * BATCH), Workspace(folder / "alone"))
    return folder


def rows(workspace: Path) -> list[dict[str, str]]:
    """Of the history of fold 0: one for each step of so short a training."""
    with open(Workspace(workspace).fold(NAME, "0") / HISTORY, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def losses(workspace: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(workspace)]


def state(workspace: Path) -> dict[str, torch.Tensor]:
    return load_tensors(Workspace(workspace).fold(NAME, "0") / RESUME, RESUME_FORMAT)[0]


@pytest.mark.parametrize("name", [*LABELS, "super-resolution"])
def test_a_loss_and_its_gradients_are_those_of_the_batches_of_all_processes(folder: Path, name: str) -> None:
    whole = loss_and_gradients(a_batch(name), name)
    assert len(whole) > 1
    for rank in (0, 1):
        together = load_file(folder / f"{name} {rank}")
        assert together.keys() == whole.keys()
        for what, value in whole.items():
            torch.testing.assert_close(together[what], value, atol=1e-6, rtol=1e-5)


def test_the_loss_curve_is_that_of_one_process_with_the_double_batch(folder: Path) -> None:
    alone, together = losses(folder / "alone"), losses(folder / "whole")
    assert len(alone) == len(together) == STEPS and alone[-1] < alone[0]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_online_dice_counts_the_patches_of_all_processes(folder: Path) -> None:
    alone, together = (float(rows(folder / name)[-1]["dice"]) for name in ("alone", "whole"))
    assert 0 < alone < 1 and together == pytest.approx(alone, abs=5e-3)


def test_only_the_first_process_writes(folder: Path) -> None:
    saved = (folder / "saved.txt").read_text().split("\n")
    assert {line.split()[1] for line in saved if line} == {"0"}
    assert saved.count("whole 0") == 1
    written = {path.name for path in Workspace(folder / "whole").fold(NAME, "0").iterdir()}
    assert written == {CHECKPOINT, RESUME, HISTORY, CURVE}
    assert Checkpoint.load(Workspace(folder / "whole").fold(NAME, "0") / CHECKPOINT).summary["steps"] == STEPS


def test_a_stopped_training_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    whole, resumed = state(folder / "whole"), state(folder / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(folder / "whole") == losses(folder / "resumed")


def test_a_training_goes_on_with_as_many_processes_only(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "copy")
    with pytest.raises(CheckpointError, match="had processes 2, now it is 1"):
        train(plan_of_batch(BATCH), Workspace(tmp_path / "copy"), resume=True, steps=STEPS + 5)


def test_a_process_that_dies_ends_the_others_with_a_sentence(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    dataset, plan = tiny_dataset(cases=5), plan_of_batch(BATCH)
    place = Workspace.of(dataset, tmp_path / "workspace")
    preprocessed(dataset, plan, place.root)
    plan.save(place.plan)
    words = ("-m", "autoseg", "train-fold", dataset, NAME, 0, "--workspace", tmp_path / "workspace", "--steps", 10**5)
    with subprocess.Popen(
        torchrun(*words, "--time", "20s", "--device", "cpu"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
    ) as run:  # fmt: skip
        history = place.fold(NAME, "0") / HISTORY
        while not history.exists() and run.poll() is None:
            time.sleep(0.05)
        if run.poll() is None:
            os.kill(_process_of_rank(run.pid, 1), signal.SIGKILL)
        _, said = run.communicate(timeout=30)
    assert run.returncode != 0
    assert "error: Another process of this training died" in said and "should not happen" not in said, said


def test_what_several_processes_train_one_of_them_predicts_and_scores(
    tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    dataset, plan = tiny_dataset(cases=5), plan_of_batch(BATCH)
    place = Workspace.of(dataset, tmp_path / "workspace")
    preprocessed(dataset, plan, place.root)
    plan.save(place.plan)
    words = ("-m", "autoseg", "train-fold", dataset, NAME, 0, "--workspace", tmp_path / "workspace", "--steps", 3)
    run = subprocess.run(torchrun(*words, "--device", "cpu"), env=environment(), capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" steps in ") == 1, run.stdout
    fold = place.fold(NAME, "0")
    (case,) = json.loads((fold / "validation" / SUMMARY).read_text())["cases"]
    assert (fold / "validation" / f"{case}.nii.gz").is_file()


def _process_of_rank(parent: int, rank: int) -> int:
    """The process that a torchrun started as so many-th."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"torchrun {parent} has no process of rank {rank}")


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = World(rank=3, size=4, local_rank=1, local_size=2)
    assert second.device(torch.device("cuda")) == torch.device("cuda", 1)
    assert second.device(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.device(torch.device("cuda", 5)) == torch.device("cuda", 5)
    with pytest.raises(PlanError, match="cuda:0 cannot be shared by 4 processes"):
        second.device(torch.device("cuda:0"))
    with pytest.raises(PlanError, match="started 4 processes, but torch sees 2 GPUs; use --nproc-per-node 2"):
        replace(second, local_size=4).device(torch.device("cuda"))


@pytest.mark.parametrize("variables", [{}, {"RANK": "1", "WORLD_SIZE": "2"}], ids=["none", "of a scheduler"])
def test_who_was_not_started_by_torchrun_is_alone(variables: dict[str, str]) -> None:
    with joined(variables, "cpu") as world:
        assert world == ALONE


def test_processes_share_the_cores_for_preparing_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.training.batches.available_cores", lambda: 16)
    assert loop.default_workers() == 12 and loop.default_workers(2) == 6 and loop.default_workers(4) == 0
