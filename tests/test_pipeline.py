"""`run`: from a raw dataset to a model that predicts, whatever interrupts it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_training import NAME, tiny_configuration, tiny_plan
from typer.testing import CliRunner

import autoseg.contest as contest
import autoseg.experiment_planning.planner as planner
from autoseg.checkpoint import load_tensors
from autoseg.cli import app
from autoseg.contest import Contest, Task
from autoseg.dataset import RawDataset
from autoseg.errors import PlanError, StorageError
from autoseg.experiment_planning.fingerprint import extract_fingerprint
from autoseg.files import write_json
from autoseg.forecast import Pace
from autoseg.image import read_image
from autoseg.inference.halving import LEAST_CASES
from autoseg.inference.predictor import load_model
from autoseg.inference.rungs import Length, Rung
from autoseg.inference.selection import Selection
from autoseg.locks import alone
from autoseg.pipeline import find_folds, run
from autoseg.plan import Plan, TrainingSettings
from autoseg.preprocessing.store import Store
from autoseg.stages import plan_and_preprocess
from autoseg.training.folds import Fold
from autoseg.training.loop import RESUME_FORMAT, Limits, Standing, read_standing
from autoseg.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4


def two_candidates(root: Path, steps: int = STEPS) -> Plan:
    """A 3D and a 2D configuration, so that there is something to choose."""
    dataset = RawDataset.load(root)
    training = TrainingSettings(steps=steps, mirror_axes=(2,))
    volume = tiny_configuration(training=training)
    flat = replace(tiny_configuration(patch_size=(1, 12, 12), training=training), name="2d")
    return replace(
        tiny_plan(volume),
        dataset=dataset.name,
        channels=dataset.channels,
        configurations=(volume, flat),
        fingerprint=extract_fingerprint(dataset, workers=1).id,
    )


@pytest.fixture
def dataset(tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny dataset, a planner that finds the two tiny candidates, and two folds: too few cases to drop anyone."""
    root = tiny_dataset(cases=6)
    plan = two_candidates(root)
    monkeypatch.setattr(planner, "plan_experiment", lambda *_, **__: plan)
    two_folds(root, tmp_path / "ws")
    return root


@pytest.fixture
def contested(tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The same with cases enough for comparisons, and steps enough for forks."""
    root = tiny_dataset(cases=2 * LEAST_CASES)
    plan = two_candidates(root, 8)
    monkeypatch.setattr(planner, "plan_experiment", lambda *_, **__: plan)
    monkeypatch.setattr(contest, "LEAST_STEPS", 2)
    two_folds(root, tmp_path / "ws")
    return root


def two_folds(root: Path, workspace: Path) -> None:
    names = [case.identifier for case in RawDataset.load(root).cases]
    half = len(names) // 2
    folds = [{"train": names[half:], "val": names[:half]}, {"train": names[:half], "val": names[half:]}]
    write_json(Workspace.of(root, workspace).folds, folds)


def weights(place: Workspace) -> dict[str, np.ndarray]:
    """The state of every training, by file and tensor."""
    found = {}
    for path in sorted(place.root.glob("models/*/fold_*/resume.safetensors")):
        tensors, _ = load_tensors(path, RESUME_FORMAT)
        for name, tensor in tensors.items():
            found[f"{path.parent.parent.name}/{path.parent.name}/{name}"] = tensor.numpy()
    return found


def test_one_call_gives_a_model_that_predicts_and_a_report(dataset, tmp_path):
    parts: list[str] = []
    outcome = run(dataset, workspace=tmp_path / "ws", device="cpu", on_part=parts.append)
    assert outcome.finished and outcome.selection is not None and outcome.selection.cases == 6
    assert [part for part in parts if "fold" in part] == [
        f"{NAME}, fold 0", f"{NAME}, fold 1", "2d, fold 0", "2d, fold 1"
    ]  # fmt: skip
    assert (outcome.workspace.root / "report.html").is_file()
    moved = Path(shutil.move(outcome.model, tmp_path / "anywhere.zip"))
    shutil.rmtree(outcome.workspace.root)
    scan = dataset / "imagesTr" / "case_00_0000.nii.gz"
    labels = load_model(moved, "cpu").predict(scan)
    assert labels.grid == read_image(scan).grid and set(np.unique(labels.array)) <= {0, 1, 2}


def test_a_second_run_has_nothing_to_do(dataset, tmp_path):
    first = run(dataset, workspace=tmp_path / "ws", device="cpu")
    before = weights(first.workspace)
    parts: list[str] = []
    again = run(dataset, workspace=tmp_path / "ws", device="cpu", on_part=parts.append)
    assert not any("fold" in part for part in parts)
    assert again.selection == first.selection
    assert all(np.array_equal(before[name], array) for name, array in weights(again.workspace).items())


def test_a_stopped_run_goes_on_where_it_was(dataset, tmp_path):
    steps = []
    stopped = run(
        dataset, workspace=tmp_path / "ws", device="cpu", on_step=lambda p: steps.append(p.step),
        stop=lambda: len(steps) >= STEPS + 2,
    )  # fmt: skip
    assert not stopped.finished and stopped.selection is None
    contest = Contest(stopped.plan, stopped.workspace, find_folds(stopped.plan, stopped.workspace))
    assert [row.task for row in contest.rows() if row.state == "done"] == [Task(NAME, "0")]
    assert run(dataset, workspace=tmp_path / "ws", device="cpu").finished
    straight = tmp_path / "straight"
    shutil.copy(
        stopped.workspace.folds,
        Workspace.of(dataset, straight).folds.parent.mkdir(parents=True) or Workspace.of(dataset, straight).folds,
    )
    expected = weights(run(dataset, workspace=straight, device="cpu").workspace)
    found = weights(stopped.workspace)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_an_ensemble_predicts_the_weighted_mean_of_its_members(dataset, tmp_path):
    outcome = run(dataset, workspace=tmp_path / "ws", device="cpu")
    content = json.loads((outcome.workspace.root / "model" / "selection.json").read_text())
    content["chosen"] = {
        "members": [{"configuration": NAME, "mirroring": False}, {"configuration": "2d", "mirroring": True}],
        "weights": [0.25, 0.75], "temperature": 1.0, "cleaning": {},
    }  # fmt: skip
    from autoseg.inference.package import export_model

    write_json(tmp_path / "selection.json", content)
    place = outcome.workspace
    export_model(place, [NAME, "2d"], tmp_path / "both.zip", selection=tmp_path / "selection.json")
    scan = dataset / "imagesTr" / "case_01_0000.nii.gz"
    models = place.root / "models"
    settings = load_model(models / NAME, "cpu").settings
    alone = [
        load_model(models / NAME, "cpu").predict_probabilities(scan, settings=replace(settings, mirroring=False)).array,
        load_model(models / "2d", "cpu").predict_probabilities(scan, settings=replace(settings, mirroring=True)).array,
    ]
    joined = load_model(tmp_path / "both.zip", "cpu").predict_probabilities(scan).array
    np.testing.assert_allclose(joined, 0.25 * alone[0] + 0.75 * alone[1], atol=2e-3)


def test_two_runs_never_work_in_one_workspace(dataset, tmp_path):
    seen = []

    def second(part: str) -> None:
        if not seen:
            seen.append(part)
            with pytest.raises(StorageError, match=rf"another run works here \(process {os.getpid()}\)"):
                run(dataset, workspace=tmp_path / "ws", device="cpu")

    assert run(dataset, workspace=tmp_path / "ws", device="cpu", on_part=second).finished


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import autoseg.experiment_planning.planner as planner
from autoseg.pipeline import run
from test_pipeline import two_candidates
root = Path(sys.argv[1])
plan = two_candidates(root, 8)
planner.plan_experiment = lambda *_, **__: plan
run(root, workspace=Path(sys.argv[2]), device="cpu", on_part=lambda part: print(part, flush=True))
"""


@pytest.mark.timeout(900)  # many starts, on a machine that may be busy
def test_hard_kills_lose_nothing_and_change_nothing(contested, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED.format(tests=str(ROOT / "tests")), str(contested), str(tmp_path / "ws")]
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(6):  # benchmarks/kills.py does it more often
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        try:
            process.wait(timeout=float(random.uniform(0.2, 3.0)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0:
            break
    assert kills
    outcome = run(contested, workspace=tmp_path / "ws", device="cpu")
    assert outcome.finished and not list(outcome.workspace.root.rglob("*.partial.*"))
    straight = Workspace.of(contested, tmp_path / "straight")
    straight.root.mkdir(parents=True)
    shutil.copy(outcome.workspace.folds, straight.folds)
    expected = weights(run(contested, workspace=tmp_path / "straight", device="cpu").workspace)
    found = weights(outcome.workspace)
    assert found.keys() == expected.keys() and (outcome.workspace.models / "rungs" / "0.json").is_file()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def spoil(monkeypatch: pytest.MonkeyPatch, configuration: str) -> None:
    """Let a configuration predict its held-out cases at random, whatever it has learned."""
    from autoseg import pipeline

    original = pipeline.validate

    def validate(dataset_root: Path, plan: Plan, name: str, fold: str, *, workspace: Workspace, **options: object):
        scores = original(dataset_root, plan, name, fold, workspace=workspace, **options)
        kept = Store(workspace.fold(name, fold) / "validation" / "probabilities")
        truth = Store(workspace.store(plan.configuration(name).preprocessing))
        for case in kept.cases():
            entry = kept.entry(case)
            label = truth.entry(case).read("label")[0]
            right = np.stack([label == k for k in range(3)]).astype(np.float16)
            answer = np.random.default_rng(0).permutation(right, axis=1) if name == configuration else right
            arrays = {array: answer for array in entry.arrays}
            kept.write(case, arrays, entry.geometry, {}, source=entry.source)
        return scores

    monkeypatch.setattr(pipeline, "validate", validate)


def test_a_candidate_that_is_beaten_is_trained_no_further(contested, tmp_path, monkeypatch):
    spoil(monkeypatch, "2d")
    parts, states = [], []
    outcome = run(
        contested, workspace=tmp_path / "ws", device="cpu", on_part=parts.append,
        on_rows=lambda rows, running: states.append({f"{row.task}": row.state for row in rows}),
    )  # fmt: skip
    assert [part for part in parts if "fold" in part] == [
        f"{NAME}, fold 0, a part of its training", "2d, fold 0, a part of its training",
        "comparing 2 candidates: fold 0 at 25 % of its training", *[part for part in parts if "2d.dropped" in part],
        f"{NAME}, fold 0", f"{NAME}, fold 1",
    ]  # fmt: skip
    assert states[-1] == {
        f"{NAME}, fold 0": "done", f"{NAME}, fold 1": "done", "2d, fold 0": "dropped", "2d, fold 1": "dropped"
    }  # fmt: skip
    assert not outcome.workspace.fold("2d", "1").exists()
    content = json.loads(outcome.workspace.selection.read_text())
    (rung,) = content["rungs"]
    assert rung["leader"] == NAME and rung["cases"] == LEAST_CASES
    (loser,) = [standing for standing in rung["standings"] if standing["dropped"]]
    assert loser["contender"] == "2d" and loser["high"] < 0 and loser["trained_seconds"] > 0
    assert outcome.selection is not None and outcome.selection.cases == 2 * LEAST_CASES
    assert Selection.load(outcome.workspace.selection) == outcome.selection
    assert "2d.dropped" in outcome.workspace.report.read_text(encoding="utf-8")


def test_who_has_taken_few_steps_is_compared_after_a_whole_fold(contested, tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "LEAST_STEPS", 3)  # a fork of 8 steps takes 2
    spoil(monkeypatch, "2d")
    outcome = run(contested, workspace=tmp_path / "ws", device="cpu")
    assert outcome.selection is not None
    forks, fold_0 = outcome.selection.rungs
    assert forks.dropped == frozenset() and min(standing.high for standing in forks.standings) < 0
    assert fold_0.dropped == {"2d"}


def test_who_is_not_beaten_is_trained_to_the_end(contested, tmp_path, monkeypatch):
    spoil(monkeypatch, "nobody")
    outcome = run(contested, workspace=tmp_path / "ws", device="cpu")
    assert outcome.selection is not None and [rung.dropped for rung in outcome.selection.rungs] == [frozenset()] * 2
    found = weights(outcome.workspace)
    folds = [f"{name}/fold_{fold}" for name in ("2d", NAME) for fold in "01"]
    assert [int(found[f"{fold}/now/step"]) for fold in folds] == [8] * 4


class Killed(BaseException):
    """In the place of a kill."""


@pytest.mark.timeout(900)  # many starts, on a machine that may be busy
def test_a_run_that_ends_before_any_of_its_writes_goes_on_to_the_same_end(contested, tmp_path, monkeypatch):
    straight = Workspace.of(contested, tmp_path / "straight")
    two_folds(contested, tmp_path / "straight")
    expected = weights(run(contested, workspace=tmp_path / "straight", device="cpu").workspace)
    random, left, kills = np.random.default_rng(0), [0], 0
    replace_file = os.replace

    def write(source: Path, target: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", write)
    for _ in range(100):
        left[0] = int(random.integers(2, 60))
        try:
            outcome = run(contested, workspace=tmp_path / "ws", device="cpu")
            break
        except Killed:
            kills += 1
    assert kills > 3 and outcome.finished
    found = weights(outcome.workspace)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    chosen, rungs = (
        [getattr(Selection.load(place.selection), part) for place in (straight, outcome.workspace)]
        for part in ("chosen", "rungs")
    )
    assert chosen[0] == chosen[1] and [rung.dropped for rung in rungs[0]] == [rung.dropped for rung in rungs[1]]


def test_a_run_that_was_stopped_before_its_first_step_may_be_planned_otherwise_the_next_time(
    dataset, tmp_path, monkeypatch
):
    asked = iter([False])  # before the fold; then in its training, before the first step
    assert not run(dataset, workspace=tmp_path / "ws", device="cpu", stop=lambda: next(asked, True)).finished
    place = Workspace.of(dataset, tmp_path / "ws")
    (begun,) = place.models.glob("*/fold_0/resume.safetensors")
    assert not (begun.parent / "checkpoint.safetensors").exists()
    plan = two_candidates(dataset, STEPS - 1)
    monkeypatch.setattr(planner, "plan_experiment", lambda *_, **__: plan)
    asked = itertools.chain([False] * STEPS, itertools.repeat(True))
    memory = plan.budget.gpu_memory_bytes + 1  # something else is asked for
    run(dataset, workspace=tmp_path / "ws", gpu_memory_bytes=memory, device="cpu", stop=lambda: next(asked))
    assert read_standing(begun.parent).plan == plan.id and (begun.parent / "checkpoint.safetensors").exists()


def test_more_steps_leave_ended_folds_as_they_are_and_say_so_and_too_few_for_the_forks_are_refused(
    tmp_path, monkeypatch, caplog
):
    plan, place = tiny_plan(replace(tiny_configuration(), name="a")), Workspace(tmp_path)
    plan = replace(plan, configurations=(*plan.configurations, replace(plan.configurations[0], name="b")))
    folds = tuple(Fold(("x",), tuple("abcdefg")) for _ in range(2))
    Rung(0, plan.id, 0.25, ("0",), {"a": Length(steps=25), "b": Length(steps=25)}).save(place)
    ended = Standing(plan.id, Limits(100, None), 1.0, True, folds[0].id)
    monkeypatch.setattr(Contest, "_standing", lambda self, task: ended if task == Task("a", "0") else None)
    monkeypatch.setattr(Contest, "_is_scored", lambda self, task, standing: True)
    Contest(plan, place, folds, 100).require_length()
    assert not caplog.records
    Contest(plan, place, folds, 200).require_length()
    assert "--steps 200 holds for the folds that are left" in caplog.text and "a, fold 0 (100 steps)" in caplog.text
    with pytest.raises(PlanError, match="have 25 steps, so whole folds need more than 25"):
        Contest(plan, place, folds, 25).require_length()


def test_a_fork_that_predicts_few_cases_takes_them_from_everywhere_and_each_draw_holds_the_smaller_ones(tmp_path):
    plan, place = tiny_plan(), Workspace(tmp_path)
    names = tuple(f"{site}_{number:02d}" for site in ("berlin", "zurich") for number in range(50))
    Rung(0, plan.id, 0.25, ("0",), {NAME: Length(seconds=30.0)}).save(place)
    contest, draws = Contest(plan, place, (Fold(("x",), names),) * 2, timed=True), []
    for seconds in (0.1, 1.0, 2.0):
        pace = Pace(plan)
        pace.predicted(NAME, 1, seconds, mirroring=False)
        draws.append(contest.fork_cases(Task(NAME, "0"), pace))
    everything, many, few = draws
    assert everything is None and len(many) == 30 and len(few) == 15 and set(few) < set(many)
    assert {name.partition("_")[0] for name in few} == {"berlin", "zurich"}


def test_a_fold_that_holds_nothing_out_is_refused_before_anything_is_trained(dataset, tmp_path):
    path = Workspace.of(dataset, tmp_path / "ws").folds
    first, second = json.loads(path.read_text())
    write_json(path, [first, {"train": sorted(second["train"] + second["val"]), "val": []}])
    with pytest.raises(PlanError, match=r"folds\.json: fold 1 holds out no case"):
        run(dataset, workspace=tmp_path / "ws", device="cpu")
    assert not (Workspace.of(dataset, tmp_path / "ws")).models.exists()


def test_of_more_that_is_planned_only_the_candidates_that_are_asked_for_are_trained(contested, tmp_path):
    rows = []
    outcome = run(
        contested,
        workspace=tmp_path / "ws",
        configurations=["2d"],
        device="cpu",
        on_rows=lambda now, _: rows.append(now),
    )
    assert {row.task.configuration for now in rows for row in now} == {"2d"}
    assert {path.parent.name for path in outcome.workspace.models.glob("*/fold_*")} == {"2d"}
    assert outcome.selection is not None and not outcome.selection.rungs
    everything = run(contested, workspace=tmp_path / "ws", device="cpu")
    assert everything.selection is not None and len(everything.selection.scores) > len(outcome.selection.scores)


def test_a_plan_that_is_there_is_run_as_it_is(tiny_dataset, tmp_path, caplog):
    dataset = tiny_dataset(cases=3)
    place = Workspace.of(dataset, tmp_path / "ws")
    made = plan_and_preprocess(dataset, workspace=tmp_path / "ws", gpu_memory_bytes=10**9, fold_seconds=60.0).plan
    edited = replace(made, configurations=tuple(replace(c, batch_size=c.batch_size + 1) for c in made.configurations))
    edited.save(place.plan)
    run(dataset, workspace=tmp_path / "ws", device="cpu", stop=lambda: True)
    assert Plan.load(place.plan) == edited
    run(dataset, workspace=tmp_path / "ws", gpu_memory_bytes=2 * 10**9, device="cpu", stop=lambda: True)
    assert Plan.load(place.plan).budget.gpu_memory_bytes == 2 * 10**9, "something else was asked for"
    edited.save(place.plan)
    with caplog.at_level(logging.WARNING):
        run(dataset, workspace=tmp_path / "ws", seconds=3 * 3600.0, device="cpu", stop=lambda: True)
    assert Plan.load(place.plan) == edited and "was made for folds of 1 min" in caplog.text
    place.plan.write_text("{}")
    for seconds in (None, 60.0):
        with pytest.raises(PlanError, match=r"plan\.json: plan version None cannot be read"):
            run(dataset, workspace=tmp_path / "ws", seconds=seconds, device="cpu", stop=lambda: True)
    assert place.plan.read_text() == "{}", "what somebody wrote is not written over"


def test_the_time_is_divided_over_the_folds_that_are_left(dataset, tmp_path):
    now, seconds = [0.0], []

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    from autoseg import pipeline

    original = pipeline.train

    def watched(*args, **options):
        seconds.append(options["seconds"])
        return original(*args, **{**options, "seconds": None, "steps": 2})

    pipeline.train = watched
    try:
        run(dataset, workspace=tmp_path / "ws", device="cpu", seconds=400.0, clock=clock)
    finally:
        pipeline.train = original
    assert len(seconds) == 4 and 80 < seconds[0] < 100


def test_a_dry_run_plans_and_shows_the_tasks_and_does_nothing_else(contested, tmp_path):
    words = ["run", str(contested), "--workspace", str(tmp_path / "ws"), "--workers", "1", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert "preprocess" in lines[1] and "choose, export, report" in lines[-2]
    assert sum("2d, fold" in line for line in lines) == 3  # the fork and two folds
    place = Workspace.of(contested, tmp_path / "ws")
    assert place.plan.exists() and not place.models.exists() and not (place.root / "preprocessed").exists()
    printed = CliRunner().invoke(app, [*words, "--print-commands", "--steps", "8"]).stdout.splitlines()
    assert [line.split()[1] for line in printed] == ["plan-and-preprocess", *["train-fold"] * 4, "run"]
    assert not place.models.exists()


def test_a_dry_run_refuses_what_the_run_would(contested, tmp_path):
    words = ["run", str(contested), "--workspace", str(tmp_path / "ws"), "--workers", "1", "--device", "cpu"]
    assert CliRunner().invoke(app, [*words, "--dry-run"]).exit_code == 0
    unknown = tmp_path / "folds.json"
    unknown.write_text(json.dumps([{"train": ["case_00"], "val": ["nobody"]}]))
    names = [case.identifier for case in RawDataset.load(contested).cases]
    idle = tmp_path / "idle.json"
    idle.write_text(json.dumps([{"train": names[1:], "val": names[:1]}, {"train": names, "val": []}]))
    for options, sentence in (
        (["--folds", str(unknown)], "nobody"),
        (["--group-by", str(tmp_path / "none.json")], "none.json"),
        (["--executor", "cluster"], "--executor"),
        (["--folds", str(idle)], "fold 1 holds out no case"),
    ):
        for shown in ("--dry-run", "--print-commands"):
            refused = CliRunner().invoke(app, [*words, shown, *options])
            assert refused.exit_code == 2 and sentence in refused.stderr, refused.output


def test_printed_commands_go_on_with_a_fork_that_was_begun(contested, tmp_path):
    steps = itertools.count()
    run(contested, workspace=tmp_path / "ws", device="cpu", steps=8, stop=lambda: next(steps) > 2)
    words = ["run", str(contested), "--workspace", str(tmp_path / "ws"), "--workers", "1", "--device", "cpu"]
    printed = CliRunner().invoke(app, [*words, "--print-commands", "--steps", "8"]).stdout.splitlines()
    (begun,) = (line for line in printed if "--continue" in line)
    assert "3d_fullres 0 --continue --steps 8" in begun
    trained = CliRunner().invoke(app, shlex.split(begun)[1:])
    assert trained.exit_code == 0, trained.output
    standing = read_standing(Workspace.of(contested, tmp_path / "ws").fold("3d_fullres", "0"))
    assert standing is not None and standing.finished and standing.limits == Limits(8, None)


def test_the_licence_stays_until_another_is_given_and_other_seeds_are_told(dataset, tmp_path, caplog):
    for licence, expected in (("CC-BY 4.0", "CC-BY 4.0"), (None, "CC-BY 4.0"), ("CC0", "CC0")):
        outcome = run(dataset, workspace=tmp_path / "ws", device="cpu", licence=licence)
        manifest = json.loads((outcome.workspace.model / "model.json").read_text())
        assert manifest["licence"] == expected
    assert "--seed" not in caplog.text
    run(dataset, workspace=tmp_path / "ws", device="cpu", seed=5)
    assert "--seed 5 holds for the folds that are left" in caplog.text and "3d_fullres, fold 0 (seed 0)" in caplog.text


def test_a_dry_run_beside_a_run_changes_nothing_and_is_not_in_its_way(contested, tmp_path):
    words = ["run", str(contested), "--workspace", str(tmp_path / "ws"), "--workers", "1", "--device", "cpu"]
    assert CliRunner().invoke(app, [*words, "--dry-run"]).exit_code == 0
    place = Workspace.of(contested, tmp_path / "ws")
    edited = place.plan.read_text() + "\n"  # by hand
    place.plan.write_text(edited)
    with alone(place.lock, what="a run"):
        shown = CliRunner().invoke(app, [*words, "--dry-run", "--gpu-memory", "4GB"])
        assert shown.exit_code == 0 and "choose, export, report" in shown.stdout, shown.output
        assert CliRunner().invoke(app, [*words, "--print-commands"]).exit_code == 2, "that one keeps what it plans"
    assert place.plan.read_text() == edited


def test_a_training_that_was_begun_with_another_seed_is_refused_before_anything_is_trained(contested, tmp_path):
    steps = itertools.count()
    run(contested, workspace=tmp_path / "ws", device="cpu", steps=8, stop=lambda: next(steps) > 2)
    with pytest.raises(PlanError, match=r"fold_0: this training was begun with --seed 0, now it is 3"):
        run(contested, workspace=tmp_path / "ws", device="cpu", steps=8, seed=3, stop=lambda: True)
