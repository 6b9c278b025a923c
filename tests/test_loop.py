"""The training of one fold: what it writes, how it stops, how it goes on, what it refuses."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import (
    IGNORING,
    NAME,
    REGIONS,
    TWO_CLASSES,
    preprocessed,
    sr_configuration,
    stack_configuration,
    store_of,
    tiny_configuration,
    tiny_plan,
    with_recipe,
)
from torch import Tensor

from autoseg.checkpoint import Checkpoint, load_tensors
from autoseg.errors import CheckpointError, PlanError, StorageError
from autoseg.labels import Labels
from autoseg.networks.upsampling import OutputGrid, interpolate
from autoseg.plan import Configuration, Plan, TrainingSettings
from autoseg.preprocessing.store import Store
from autoseg.training import loop
from autoseg.training.batches import Samples
from autoseg.training.history import History
from autoseg.training.loop import RESUME_FORMAT, Limits, OnlineDice, Progress, train_fold
from autoseg.training.schedule import DECAY_START
from autoseg.training.settings import RECIPES, SAVE_SECONDS, Recipe
from autoseg.training.step import build_training
from autoseg.workspace import CHECKPOINT, CURVE, HISTORY, RESUME, Workspace

STEPS = 10
PLATEAU = int(np.ceil(DECAY_START * STEPS))  # steps taken when the decay begins


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of so small a training is its picture: only the test that looks for it has it drawn."""
    if "curve" not in request.node.name:
        monkeypatch.setattr(loop, "draw_curve", lambda *_, **__: None)


@pytest.fixture
def plan() -> Plan:
    return tiny_plan()


@pytest.fixture
def workspace(tiny_dataset: Callable[..., Path], plan: Plan, tmp_path: Path) -> Workspace:
    return preprocessed(tiny_dataset(cases=5), plan, tmp_path / "workspace")


@pytest.fixture
def twin(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A second workspace with the same preprocessed cases."""
    shutil.copytree(workspace.root, tmp_path / "twin")
    return Workspace(tmp_path / "twin")


def train(plan: Plan, workspace: Workspace, **options: Any) -> loop.TrainedFold:
    settings = {"device": "cpu", "workers": 0, "steps": None if "seconds" in options else STEPS, **options}
    return train_fold(plan, NAME, settings.pop("fold", "0"), workspace=workspace, **settings)


def stop_after(steps: int) -> Callable[[], bool]:
    """Asked before each step, it says yes once so many are taken."""
    asked = itertools.count()
    return lambda: next(asked) >= steps


def saved(workspace: Workspace, fold: str = "0") -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_tensors(workspace.fold(NAME, fold) / RESUME, RESUME_FORMAT)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_weights(first: Workspace, second: Workspace) -> bool:
    models = [Checkpoint.load(place.fold(NAME, "0") / CHECKPOINT).weights for place in (first, second)]
    return identical(*map(dict, models)) and identical(saved(first)[0], saved(second)[0])  # type: ignore[arg-type]


class Clock:
    """Every look at it takes so long."""

    def __init__(self, tick: float) -> None:
        self.tick, self.now = tick, 1000.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


# ---- what it writes


def test_a_training_writes_a_model_its_state_its_history_and_a_curve(plan: Plan, workspace: Workspace) -> None:
    trained = train(plan, workspace)
    folder = workspace.fold(NAME, "0")
    assert sorted(path.name for path in folder.iterdir()) == sorted((CHECKPOINT, RESUME, HISTORY, CURVE))
    assert (trained.checkpoint, trained.steps, trained.finished) == (folder / CHECKPOINT, STEPS, True)
    checkpoint = Checkpoint.load(folder / CHECKPOINT)
    assert (checkpoint.plan, checkpoint.configuration, checkpoint.fold) == (plan, NAME, "0")
    assert checkpoint.summary["steps"] == STEPS and checkpoint.summary["finished"] is True
    history = History(folder / HISTORY, plan.labels.names)
    history.load(until_step=STEPS)
    assert [row.step for row in history.rows] == list(range(1, STEPS + 1))
    assert history.rows[-1].progress == 1 and history.rows[-1].dice is not None
    assert history.rows[-1].loss < history.rows[0].loss
    folds = json.loads(workspace.folds.read_text())
    assert len(folds) == 5 and folds[0]["val"]


def test_a_training_that_is_killed_at_its_curve_has_not_ended(
    plan: Plan, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw_curve", killed)
        with pytest.raises(KeyboardInterrupt):
            train(plan, workspace)
    standing = loop.read_standing(workspace.fold(NAME, "0"))
    assert standing is None or not standing.finished


@pytest.mark.parametrize("labels", [REGIONS, IGNORING], ids=["regions", "ignore"])
def test_regions_and_an_ignore_label_are_trained(tmp_path: Path, labels: Labels) -> None:
    plan, place = tiny_plan(labels=labels), Workspace(tmp_path)
    random = np.random.default_rng(0)
    cases = {name: random.integers(0, labels.known_values[-1] + 1, (10, 14, 14)) for name in "abcde"}
    store_of(place.store(plan.configurations[0].preprocessing), cases, labels)
    assert train(plan, place, steps=2).finished


def test_a_2d_network_is_trained_on_slices(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    plan = tiny_plan(tiny_configuration(patch_size=(1, 12, 12), batch_size=4))
    assert train(plan, preprocessed(tiny_dataset(), plan, tmp_path / "w"), steps=3).finished


def test_fold_all_trains_on_every_case(plan: Plan, workspace: Workspace) -> None:
    assert train(plan, workspace, fold="all", steps=2).checkpoint.parent.name == "fold_all"


def test_the_progress_that_is_shown_runs_from_nothing_to_all(plan: Plan, workspace: Workspace) -> None:
    shown: list[Progress] = []
    train(plan, workspace, on_step=shown.append, clock=Clock(1.0))
    assert [progress.step for progress in shown] == list(range(1, STEPS + 1))
    assert all(progress.steps == STEPS and np.isfinite(progress.loss) for progress in shown)
    assert shown[-1].fraction == 1 and shown[-1].seconds_left == 0 and shown[-1].dice is not None
    assert shown[4].seconds_left == pytest.approx(shown[4].seconds)


# ---- stopping and going on


@pytest.mark.parametrize("steps", [1, PLATEAU + 2])
def test_a_stop_signal_ends_with_a_valid_model(plan: Plan, workspace: Workspace, steps: int) -> None:
    trained = train(plan, workspace, stop=stop_after(steps))
    assert (trained.steps, trained.finished) == (steps, False)
    checkpoint = Checkpoint.load(trained.checkpoint)
    assert checkpoint.summary["finished"] is False
    with torch.inference_mode():
        (logits,) = checkpoint.build_network()(torch.randn(1, 1, 8, 12, 12))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("recipe", ["adamw", "sgd"])
@pytest.mark.parametrize("stops", [(0,), (3,), (PLATEAU + 2,), (2, PLATEAU - 1, 1)])
def test_a_resumed_training_is_bit_identical_to_an_undisturbed_one(
    plan: Plan, workspace: Workspace, twin: Workspace, recipe: str, stops: tuple[int, ...]
) -> None:
    plan = with_recipe(plan, recipe)
    train(plan, workspace)
    train(plan, twin, stop=stop_after(stops[0]))
    for steps in stops[1:]:
        train(plan, twin, stop=stop_after(steps), resume=True)
    train(plan, twin, resume=True)
    assert same_weights(workspace, twin)


def test_two_trainings_are_the_same_to_the_byte_whatever_prepares_the_patches(
    plan: Plan, workspace: Workspace, twin: Workspace
) -> None:
    train(plan, workspace, workers=1, clock=Clock(1.0))
    train(plan, twin, workers=2, clock=Clock(1.0))
    for file in (RESUME, HISTORY):
        first, second = ((place.fold(NAME, "0") / file).read_bytes() for place in (workspace, twin))
        assert first == second, file
    assert same_weights(workspace, twin)  # their file also says what memory the training took
    train(plan, twin, fold="1", workers=0, seed=1)
    train(plan, workspace, fold="1", workers=0)
    assert not identical(saved(workspace, "1")[0], saved(twin, "1")[0])


def columns(workspace: Workspace) -> list[tuple[float, ...]]:
    history = History(workspace.fold(NAME, "0") / HISTORY, TWO_CLASSES.names)
    history.load(until_step=10**6)
    return [(row.step, row.progress, row.learning_rate, row.loss) for row in history.rows]


def test_the_history_of_a_resumed_training_is_that_of_an_undisturbed_one(
    plan: Plan, workspace: Workspace, twin: Workspace
) -> None:
    train(plan, workspace)
    train(plan, twin, stop=stop_after(4))
    train(plan, twin, resume=True)
    assert columns(twin) == columns(workspace)


class Killed(BaseException):
    """Stands for what gives a process no time to save."""


def test_a_killed_training_goes_on_from_the_last_save_and_ends_bit_identical(
    plan: Plan, workspace: Workspace, twin: Workspace
) -> None:
    def kill(progress: Progress) -> None:
        if progress.step == PLATEAU + 2:
            raise Killed

    train(plan, workspace)
    with pytest.raises(Killed):
        train(plan, twin, clock=Clock(SAVE_SECONDS), on_step=kill)
    assert 0 < int(saved(twin)[0]["now/step"]) <= PLATEAU + 2
    train(plan, twin, resume=True)
    assert same_weights(workspace, twin)
    assert columns(twin) == columns(workspace)


def test_a_finished_training_is_left_as_it_is_when_continued(plan: Plan, workspace: Workspace) -> None:
    train(plan, workspace)
    before = saved(workspace)[0]
    assert train(plan, workspace, resume=True).finished
    assert identical(saved(workspace)[0], before)


@pytest.mark.parametrize("stopped", [PLATEAU + 2, STEPS])
def test_a_longer_budget_goes_on_from_before_the_decay(plan: Plan, workspace: Workspace, stopped: int) -> None:
    train(plan, workspace, stop=stop_after(stopped))
    plateau = part(saved(workspace)[0], "plateau/")
    assert int(plateau["step"]) == PLATEAU
    train(plan, workspace, steps=3 * STEPS, resume=True, stop=lambda: True)
    tensors, header = saved(workspace)
    assert identical(part(tensors, "now/"), plateau)
    assert header["limits"] == {"steps": 3 * STEPS, "seconds": None}
    assert columns(workspace)[-1][0] == PLATEAU
    trained = train(plan, workspace, steps=3 * STEPS, resume=True)
    assert (trained.steps, trained.finished) == (3 * STEPS, True)
    assert [row[0] for row in columns(workspace)] == list(range(1, 3 * STEPS + 1))


def test_a_longer_budget_before_the_decay_goes_on_from_where_it_stands(plan: Plan, workspace: Workspace) -> None:
    train(plan, workspace, stop=stop_after(PLATEAU - 1))
    steps: list[int] = []
    train(plan, workspace, steps=2 * STEPS, resume=True, on_step=lambda progress: steps.append(progress.step))
    assert steps == list(range(PLATEAU, 2 * STEPS + 1))


def test_a_training_that_goes_on_keeps_its_budget_where_none_is_given(plan: Plan, workspace: Workspace) -> None:
    train(plan, workspace, steps=2 * STEPS, stop=stop_after(3))
    assert train(plan, workspace, steps=None, resume=True).steps == 2 * STEPS
    assert plan.configurations[0].training.steps != 2 * STEPS


# ---- budgets


def test_time_ends_a_training_and_sets_its_pace(plan: Plan, workspace: Workspace) -> None:
    shown: list[Progress] = []
    trained = train(plan, workspace, seconds=60.0, clock=Clock(2.0), on_step=shown.append)
    assert trained.finished and 60 <= trained.seconds < 70
    assert [progress.fraction for progress in shown] == sorted(progress.fraction for progress in shown)
    assert all(p.steps is None and p.fraction == pytest.approx(min(1, p.seconds / 60)) for p in shown)
    rates = [row[2] for row in columns(workspace)]
    assert max(rates) == pytest.approx(RECIPES["adamw"].learning_rate) and rates[-1] < max(rates) / 3


def test_time_goes_on_counting_when_a_training_is_resumed(plan: Plan, workspace: Workspace) -> None:
    first = train(plan, workspace, seconds=60.0, clock=Clock(2.0), stop=stop_after(4))
    assert 0 < first.seconds < 40
    shown: list[Progress] = []
    second = train(plan, workspace, seconds=60.0, clock=Clock(2.0), resume=True, on_step=shown.append)
    assert shown[0].step == 5 and first.seconds < shown[0].seconds < first.seconds + 10
    assert second.finished and second.seconds < 70


@pytest.mark.parametrize(("seconds", "steps", "expected"), [(1e9, 3, 3), (4.0, 1000, 2)])
def test_of_two_limits_the_first_one_ends_the_training(
    plan: Plan, workspace: Workspace, seconds: float, steps: int, expected: int
) -> None:
    trained = train(plan, workspace, seconds=seconds, steps=steps, clock=Clock(2.0))
    assert trained.finished and trained.steps <= expected


def test_without_a_budget_the_plan_decides(plan: Plan, workspace: Workspace) -> None:
    assert train(plan, workspace, steps=None).steps == plan.configurations[0].training.steps


def test_progress_is_the_larger_share_of_steps_and_time() -> None:
    assert Limits(10, 100.0).progress(5, 20) == 0.5
    assert Limits(10, 100.0).progress(5, 80) == 0.8
    assert Limits(None, 100.0).progress(5, 300) == 1


@pytest.mark.parametrize("options", [{"steps": 0}, {"seconds": 0.0}, {"seconds": -5.0}, {"steps": 3, "seconds": 0.0}])
def test_a_budget_of_nothing_is_refused(plan: Plan, workspace: Workspace, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="3d_fullres needs a budget above zero: give --time or --steps"):
        train(plan, workspace, **options)


def test_a_plan_without_a_budget_asks_for_one(plan: Plan, workspace: Workspace) -> None:
    (only,) = plan.configurations
    bare = replace(plan, configurations=(replace(only, training=replace(only.training, steps=0)),))
    with pytest.raises(PlanError, match="3d_fullres needs a budget above zero: give --time or --steps"):
        train(bare, workspace, steps=None)


# ---- refusals


def test_a_training_that_is_there_is_not_overwritten(plan: Plan, workspace: Workspace) -> None:
    train(plan, workspace, steps=2)
    with pytest.raises(
        PlanError, match="fold_0: a training of this fold is there already; add --continue .* or delete"
    ):
        train(plan, workspace, steps=2)


def test_nothing_can_be_continued_where_nothing_is(plan: Plan, workspace: Workspace) -> None:
    with pytest.raises(CheckpointError, match="resume.safetensors: there is no training to continue; leave out"):
        train(plan, workspace, resume=True)


def test_another_seed_recipe_plan_or_split_cannot_continue_a_training(plan: Plan, workspace: Workspace) -> None:
    train(plan, workspace, stop=stop_after(1))
    (only,) = plan.configurations
    bigger = replace(plan, configurations=(replace(only, batch_size=3),))
    with pytest.raises(
        CheckpointError, match="this training had seed 0, now it is 7; continue with the same, or delete"
    ):
        train(plan, workspace, resume=True, seed=7)
    with pytest.raises(CheckpointError, match="this training had recipe adamw, now it is sgd"):
        train(plan, workspace, resume=True, recipe="sgd")
    with pytest.raises(CheckpointError, match=f"this training had plan {plan.id}, now it is {bigger.id}"):
        train(bigger, workspace, resume=True)
    folds = json.loads(workspace.folds.read_text())
    workspace.folds.write_text(json.dumps(list(reversed(folds))))
    with pytest.raises(CheckpointError, match="other cases than fold 0 of the folds has now; restore"):
        train(plan, workspace, resume=True)


def test_a_budget_that_is_spent_already_is_refused_and_the_model_stays(plan: Plan, workspace: Workspace) -> None:
    train(plan, workspace)
    before = saved(workspace)[0]
    with pytest.raises(PlanError, match=f"stands at step {PLATEAU} .*; ask for more --time or --steps"):
        train(plan, workspace, resume=True, steps=2)
    assert identical(saved(workspace)[0], before)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_state_is_refused_and_the_model_stays(plan: Plan, workspace: Workspace, damage: str) -> None:
    trained = train(plan, workspace, stop=stop_after(2))
    path = trained.checkpoint.with_name(RESUME)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-100] ^= 4
    path.write_bytes({"truncated": content[:-50], "flipped": content, "empty": b"", "foreign": b"PK\3\4"}[damage])
    with pytest.raises(CheckpointError, match="resume.safetensors: .*(sound|changed)"):
        train(plan, workspace, resume=True)
    Checkpoint.load(trained.checkpoint)


def test_unknown_recipes_folds_and_impossible_seeds_are_refused(plan: Plan, workspace: Workspace) -> None:
    with pytest.raises(PlanError, match="Recipe 'adam' is not known; choose one of .*Did you mean 'adamw'"):
        train(plan, workspace, recipe="adam")
    with pytest.raises(PlanError, match="Fold '9' is not there; choose one of 0 to 4, or all"):
        train(plan, workspace, fold="9")
    for seed in (-1, 2**63):
        with pytest.raises(PlanError, match=f"seed must be 0 or more.*got {seed}"):
            train(plan, workspace, seed=seed)
    assert not (workspace.root / "models").exists()


@pytest.mark.parametrize("fold", ["0", "all"])
def test_without_preprocessed_cases_the_way_there_is_said(plan: Plan, tmp_path: Path, fold: str) -> None:
    with pytest.raises(StorageError, match="no preprocessed case is there; run `autoseg plan-and-preprocess` first"):
        train(plan, Workspace(tmp_path), fold=fold)


WILD = Recipe("adamw", learning_rate=1e37, weight_decay=0.0, schedule="poly")


def test_a_training_that_diverges_is_refused_and_the_last_sound_state_stays(
    plan: Plan, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "wild", WILD)
    train(plan, workspace, recipe="wild", stop=stop_after(0))
    with pytest.raises(PlanError, match=r"fold_0: the training diverged at or before step \d+ .*look for extreme"):
        train(plan, workspace, recipe="wild", resume=True, clock=Clock(SAVE_SECONDS))
    checkpoint = Checkpoint.load(workspace.fold(NAME, "0") / CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.weights.values())


def test_a_diverged_training_is_not_saved_by_a_stop_signal(
    plan: Plan, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "wild", replace(WILD, ema=False))
    with pytest.raises(PlanError, match="the training diverged"):
        train(plan, workspace, recipe="wild", steps=100_000, stop=stop_after(6))
    assert not (workspace.fold(NAME, "0") / CHECKPOINT).exists()


def test_a_damaged_case_ends_the_training_with_its_name(plan: Plan, workspace: Workspace) -> None:
    store = Store(workspace.store(plan.configurations[0].preprocessing))
    for case in store.cases():
        path = store.folder / store.entry(case).arrays["image"].file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(StorageError, match="Case case_0.: the preprocessed file .* is damaged"):
        train(plan, workspace)


def test_who_gets_far_fewer_steps_than_were_forecast_is_told(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tiny_plan(tiny_configuration(training=TrainingSettings(steps=1000, seconds=60.0)))
    with caplog.at_level(logging.WARNING):
        train(plan, workspace, seconds=6.0, clock=Clock(1.0))
    assert re.search(r"[1-6] steps were taken where about 100 were forecast", caplog.text)


def test_files_that_were_cut_off_are_all_named_before_the_training_begins(plan: Plan, workspace: Workspace) -> None:
    store = Store(workspace.store(plan.configurations[0].preprocessing))
    for case in store.cases()[:2]:
        os.truncate(store.folder / store.entry(case).arrays["label"].file, 9)
    with pytest.raises(StorageError, match=r"2 cases .*case_00\.label\.b2nd.*case_01\.label\.b2nd"):
        train(plan, workspace)


# ---- cascade


@pytest.fixture
def cascade(workspace: Workspace, tmp_path: Path) -> tuple[Plan, Path]:
    """A plan with a previous stage, and a store of that stage's predictions for every case."""
    coarse = replace(tiny_configuration(), name="3d_lowres")
    plan = tiny_plan(tiny_configuration(previous_stage="3d_lowres"))
    plan = replace(plan, configurations=(*plan.configurations, coarse))
    store = Store(workspace.store(plan.configurations[0].preprocessing))
    for case in store.cases():
        label = store.entry(case).read("label")
        Store(tmp_path / "predicted").write(case, {"label": label}, store.entry(case).geometry, {})
    return plan, tmp_path / "predicted"


def test_a_cascade_trains_on_the_previous_stages_predictions(
    cascade: tuple[Plan, Path], workspace: Workspace, twin: Workspace
) -> None:
    plan, predicted = cascade
    assert train(plan, workspace, previous=predicted, steps=4).finished
    train(plan, twin, previous=predicted, steps=4, stop=stop_after(1))
    train(plan, twin, previous=predicted, steps=4, resume=True)
    assert same_weights(workspace, twin)


def test_a_cascade_without_its_predictions_is_refused(cascade: tuple[Plan, Path], workspace: Workspace) -> None:
    plan, predicted = cascade
    with pytest.raises(PlanError, match="3d_fullres needs the predictions of 3d_lowres"):
        train(plan, workspace)
    entry = Store(predicted).entry("case_02")
    Store(predicted).write("case_02", {"label": entry.read("label")[:, 1:]}, entry.geometry, {})
    with pytest.raises(
        StorageError, match=r"Case case_02: .*\(11, 16, 14\) voxels .* the image \(12, 16, 14\); delete"
    ):
        train(plan, workspace, previous=predicted)
    for case in ("case_01", "case_03"):
        Store(predicted).remove(case)
    with pytest.raises(PlanError, match=r"of 3d_lowres are missing for case_0\d, case_0\d \(2 of 5 cases\)"):
        train(plan, workspace, previous=predicted)
    with pytest.raises(PlanError, match="3d_fullres has no previous stage; leave out the predictions"):
        train(tiny_plan(), workspace, previous=predicted)


# ---- 2.5D and super-resolution

EIGHT_STEPS = TrainingSettings(steps=8)
TOPOLOGIES: dict[str, Configuration] = {
    "2.5d_stack": stack_configuration(),
    "2.5d_reduce": stack_configuration(context="reduce"),
    "2.5d_sagittal": stack_configuration(view_axis=2, patch_size=(1, 8, 12)),
    "3d_sr": sr_configuration(training=replace(EIGHT_STEPS, image_losses=("l1", "high_frequency"))),
    "3d_sr_any": sr_configuration(scale=(2.5, 1.0, 1.0), sr_range=(1.5, 3.0), training=EIGHT_STEPS),
    "2d_sr": sr_configuration(scale=(1.0, 1.5, 2.0), patch_size=(1, 8, 4), training=EIGHT_STEPS),
    "2.5d_stack_sr": sr_configuration(patch_size=(1, 12, 12), slices=3, training=EIGHT_STEPS),
    "self": sr_configuration(source="self", scale=(1.0, 2.0, 1.0), patch_size=(1, 4, 8), training=EIGHT_STEPS),
    "self, volumes": sr_configuration(source="self", patch_size=(4, 8, 8), training=EIGHT_STEPS),
    "image only": sr_configuration(segments=False, training=EIGHT_STEPS),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_trains_and_resumes_bit_identically(
    tiny_dataset: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    plan = tiny_plan(TOPOLOGIES[name])
    first = preprocessed(tiny_dataset(cases=5), plan, tmp_path / "workspace")
    shutil.copytree(first.root, tmp_path / "twin")
    second = Workspace(tmp_path / "twin")
    assert train(plan, first, steps=8).finished
    train(plan, second, steps=8, stop=stop_after(5))  # within the decay
    train(plan, second, steps=8, resume=True)
    assert same_weights(first, second)
    history = History(first.fold(NAME, "0") / HISTORY, TWO_CLASSES.names)
    history.load(until_step=8)
    losses = [row.loss for row in history.rows]
    assert sum(losses[-2:]) < sum(losses[:2])  # two: self-supervision sees other samples in every second step
    assert (history.rows[-1].dice is None) == (name == "image only")


def test_task_weights_are_saved_and_restored(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    plan = tiny_plan(TOPOLOGIES["3d_sr"])
    place = preprocessed(tiny_dataset(cases=5), plan, tmp_path / "workspace")
    train(plan, place, stop=stop_after(3))
    before = saved(place)[0]["now/loss/weights"]
    assert before.abs().min() > 0
    train(plan, place, resume=True, stop=lambda: True)
    assert torch.equal(saved(place)[0]["now/loss/weights"], before)
    assert not [key for key in Checkpoint.load(place.fold(NAME, "0") / CHECKPOINT).weights if "loss" in key]


def test_labels_that_are_finer_than_the_images_are_trained_on(tmp_path: Path) -> None:
    configuration = sr_configuration(source="paired", image=False, training=EIGHT_STEPS)
    plan, place = tiny_plan(configuration), Workspace(tmp_path)
    random = np.random.default_rng(0)
    images = {name: random.normal(size=(1, 8, 14, 14)).astype(np.float32) for name in "abcde"}
    labels = {name: (image[0].repeat(2, 0) > 0.5).astype(np.int16) for name, image in images.items()}
    store_of(place.store(configuration.preprocessing), labels, images=images)
    assert train(plan, place, steps=3).finished


def test_the_online_dice_is_taken_on_the_output_grid(tmp_path: Path) -> None:
    label = np.zeros((12, 12, 12), np.int16)
    label[4:8, 3:9, 3:9] = 1
    coarse = label[::2].astype(np.float32)[None]
    store = store_of(tmp_path, {"a": label}, images={"a": coarse})
    configuration = sr_configuration(source="paired", image=False)
    samples = Samples(store, ["a"], configuration, TWO_CLASSES, seed=0, augment=False)
    online = OnlineDice(samples, TWO_CLASSES, device=torch.device("cpu"), batch_size=2)
    state = build_training(configuration.architecture, TWO_CLASSES, RECIPES["sgd"], configuration=configuration)
    state.network = Oracle(TWO_CLASSES)  # type: ignore[assignment]
    assert online(state, precision=None) == (1.0, None)


# ---- online Dice


def online_samples(tmp_path: Path, labels: Labels, label: np.ndarray) -> Samples:
    store = store_of(tmp_path, {"a": label}, labels)
    return Samples(store, ["a"], tiny_configuration(labels=labels), labels, seed=0, augment=False)


class Oracle(torch.nn.Module):
    """Answers from the image, which repeats the label."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, image: Tensor, grid: OutputGrid | None = None, reference: Tensor | None = None) -> list[Tensor]:
        image = image if grid is None else interpolate(image, grid).round()
        masks = [torch.isin(image[:, 0], torch.tensor(values)) for values in self.labels.values]
        channels = masks if self.labels.has_regions else [image[:, 0] == 0, *masks]
        return [torch.stack(channels, 1).float() * 10 - 5]


@pytest.mark.parametrize("labels", [TWO_CLASSES, REGIONS, IGNORING])
def test_a_perfect_answer_has_an_online_dice_of_one_and_absent_structures_none(tmp_path: Path, labels: Labels) -> None:
    label = np.zeros((8, 12, 12), np.int16)
    label[2:5, 3:9, 3:9] = 1
    if labels.ignore is not None:
        label[6:] = labels.ignore
    samples = online_samples(tmp_path, labels, label)
    online = OnlineDice(samples, labels, device=torch.device("cpu"), batch_size=2)
    state = build_training(tiny_configuration(labels=labels).architecture, labels, RECIPES["sgd"])
    state.network = Oracle(labels)  # type: ignore[assignment]
    dice = online(state, precision=None)
    assert dice == (1.0, None)
    assert state.network.training


def test_the_held_out_patches_stay_within_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = online_samples(tmp_path, TWO_CLASSES, np.ones((8, 12, 12), np.int16))
    one = samples[0, 0].image.nbytes + samples[0, 0].label.nbytes
    monkeypatch.setattr(loop, "VALIDATION_BYTES", 3 * one + 5)
    online = OnlineDice(samples, TWO_CLASSES, device=torch.device("cpu"), batch_size=2)
    assert sum(len(batch.image) for batch in online.batches) == 3


def test_a_stop_before_the_first_step_leaves_no_model(plan: Plan, workspace: Workspace) -> None:
    trained = train(plan, workspace, stop=lambda: True)
    assert trained.steps == 0 and not trained.checkpoint.exists()
    assert train(plan, workspace, resume=True).checkpoint.exists()


def test_a_single_case_can_be_trained_on_but_not_held_out(
    tiny_dataset: Callable[..., Path], plan: Plan, tmp_path: Path
) -> None:
    alone = preprocessed(tiny_dataset(cases=1), plan, tmp_path / "alone")
    with pytest.raises(PlanError, match="Folds need at least two cases, got 1; train fold 'all' instead"):
        train(plan, alone)
    assert train(plan, alone, fold="all", steps=1).finished
