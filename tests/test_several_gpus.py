"""A machine with several GPUs trains a fold on each; there are none here, so processors stand for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_forecast import Simulation, plan_of
from test_pipeline import two_candidates, two_folds, weights

import autoseg.experiment_planning.planner as planner
from autoseg import pipeline
from autoseg.contest import Contest
from autoseg.executor import LocalExecutor, Needs
from autoseg.forecast import Pace
from autoseg.pipeline import Job, run
from autoseg.workspace import Workspace


def test_each_gpu_takes_a_fold_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert LocalExecutor().places("auto", Needs()) == ("cuda:0", "cuda:1")
    assert LocalExecutor().places("cuda:1", Needs()) == LocalExecutor().places("cpu", Needs()) == ()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert LocalExecutor().places("auto", Needs()) == ()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs
def test_folds_that_are_trained_at_the_same_time_become_what_they_become_one_after_another(
    tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tiny_dataset(cases=6)
    plan = two_candidates(root)
    monkeypatch.setattr(planner, "plan_experiment", lambda *_, **__: plan)
    parts: dict[str, list[str]] = {"one": [], "two": []}
    for name, places in (("one", ()), ("two", ("cpu", "cpu"))):
        two_folds(root, tmp_path / name)
        monkeypatch.setattr(LocalExecutor, "places", lambda self, device, needs, places=places: places)
        run(root, workspace=tmp_path / name, device="cpu", workers=2, on_part=parts[name].append)
    assert "3d_fullres, fold 0; 3d_fullres, fold 1" in parts["two"] and "3d_fullres, fold 0" in parts["one"]
    one, two = (weights(Workspace.of(root, tmp_path / name)) for name in ("one", "two"))
    assert one and one.keys() == two.keys()
    assert not [name for name in one if not np.array_equal(one[name], two[name])]


def test_a_fold_with_a_gpu_of_its_own_has_processes_that_prepare_its_patches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulation = Simulation(tmp_path, plan_of(1), starting=5.0, predicting=10.0)
    contest = Contest(simulation.plan, simulation.place, simulation.folds, steps=30)
    form = Job(tmp_path, tmp_path, "", "")
    for gpus, device in ((1, "cuda"), (0, "cpu")):
        needs = Needs(pipeline.CORES_BESIDE_GPU, gpus)
        monkeypatch.setattr(pipeline, "needs_of", lambda *_, needs=needs: needs)
        monkeypatch.setattr(LocalExecutor, "places", lambda *_, device=device: (f"{device}:0", f"{device}:1"))
        jobs = pipeline._next_jobs(form, contest.round(), contest, Pace(simulation.plan), None, LocalExecutor())
        assert [job.device for job in jobs] == [f"{device}:0", f"{device}:1"]
        assert {job.loaders for job in jobs} == ({4} if gpus else {0}), "of a CPU the cores are for the network"
