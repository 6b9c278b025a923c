"""How the time of a run is divided, with folds and clocks that are made up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import tiny_configuration, tiny_plan

import autoseg.contest as contest_module
from autoseg import pipeline
from autoseg.agenda import CHOOSE, PREPROCESS, agenda, commands
from autoseg.checkpoint import FORMAT, checkpoint_id, save_tensors
from autoseg.contest import Contest, Task
from autoseg.files import write_json
from autoseg.forecast import Pace, Work, fold_seconds, tiles, ways
from autoseg.inference.halving import FORK_SHARE
from autoseg.inference.rungs import Contender, Length, Rung, Standing
from autoseg.pipeline import Job, JobDone, run
from autoseg.plan import Forecast, Plan, TrainingSettings
from autoseg.stages import Planned
from autoseg.training.folds import Fold
from autoseg.training.loop import RESUME_FORMAT
from autoseg.workspace import CHECKPOINT, RESUME, SCORED, SUMMARY, Workspace

seconds = st.floats(0, 1e4)
works = st.builds(
    Work, share=st.floats(0.1, 1), credit=seconds, left=st.none() | seconds, beside=seconds, chance=st.floats(0.1, 1)
)


@given(left=st.floats(1, 1e6), waiting=st.lists(works, min_size=1))
def test_all_that_waits_ends_when_the_time_does(left, waiting):
    each = fold_seconds(left, waiting)
    spent = sum(w.chance * (w.beside + (w.left if w.left is not None else w.share * each - w.credit)) for w in waiting)
    if any(work.left is None for work in waiting):
        assert spent == pytest.approx(left, rel=1e-6, abs=1e-3)


def test_tiles_and_ways_are_those_of_a_prediction():
    from autoseg.inference.sliding_window import mirror_flips, tile_axis

    volume = replace(tiny_configuration(patch_size=(8, 12, 12)), median_shape=(30, 14, 40))
    axes = [tile_axis(n, patch=p) for n, p in zip(volume.median_shape, volume.patch_size, strict=True)]
    assert tiles(volume) == math.prod(len(axis.starts) for axis in axes)
    for axes in ((), (2,), (0, 1, 2)):
        settings = replace(volume, training=TrainingSettings(steps=1, mirror_axes=axes))
        assert ways(settings) == (1 + len(mirror_flips(axes)) if axes else 1)
        assert ways(settings, mirroring=False) == 1


def test_what_was_measured_takes_the_place_of_the_forecast():
    pace = Pace(plan_of(1))
    first = pace.predicting("c0", 10)
    pace.predicted("c0", 5, 50.0)
    assert pace.predicting("c0", 10) == pytest.approx(100.0) != pytest.approx(first)
    pace.predicted("c0", 5, 25.0)  # quicker once: the slowest counts
    assert pace.predicting("c0", 10) == pytest.approx(100.0)
    assert pace.predicting("c0", 20) == pytest.approx(200.0)


def plan_of(count: int) -> Plan:
    """So many candidates of the tiny size, which forecast 0.02 s a step."""
    first = tiny_configuration(training=TrainingSettings(steps=100, seconds=60.0, mirror_axes=(2,)))
    names = [f"c{i}" for i in range(count)]
    forecast = Forecast(10**6, 10**6, 10**6, 0.02, 60.0, 1000)
    return replace(
        tiny_plan(first),
        configurations=tuple(replace(first, name=name) for name in names),
        forecasts=dict.fromkeys(names, forecast),
    )


@dataclass
class Simulation:
    """A run whose trainings and predictions take time on its own clock alone."""

    root: Path
    plan: Plan
    starting: float
    predicting: float
    """Seconds of a fold's held-out cases."""
    beaten: dict[int, str] = field(default_factory=dict)
    """Number of the rung -> who is dropped there."""
    now: float = 0.0
    trained: dict[Task, float] = field(default_factory=dict)

    @property
    def place(self) -> Workspace:
        return Workspace(self.root / "Dataset001_Tiny")

    @property
    def folds(self) -> tuple[Fold, ...]:
        names = [f"case_{i:02d}" for i in range(50)]
        return tuple(Fold(tuple(n for n in names if n not in names[k::5]), tuple(names[k::5])) for k in range(5))

    def run_job(self, job: Job, **_: object) -> JobDone:
        folder = self.place.fold(job.configuration, job.fold)
        assert job.seconds is not None
        before = job.before.seconds if job.before is not None and job.before.seconds else 0.0
        self.now += self.starting + job.seconds - before / 2
        header = {
            "format": RESUME_FORMAT, "plan": self.plan.id, "limits": {"steps": None, "seconds": job.seconds},
            "elapsed": job.seconds, "finished": True, "cases": self.folds[int(job.fold)].id,
        }  # fmt: skip
        (folder / "validation").mkdir(parents=True, exist_ok=True)
        save_tensors(folder / CHECKPOINT, {"step": torch.tensor(1)}, {"format": FORMAT, "fork": job.is_fork})
        save_tensors(folder / RESUME, {"step": torch.tensor(1)}, header)
        cases = len(job.cases or self.folds[int(job.fold)].validation)
        took = self.predicting * (cases / 10) * (1 / 3 if job.is_fork else 1)
        self.now += took
        summary = {"mean": {"dice": {"mean": 0.5}}, SCORED: checkpoint_id(folder / CHECKPOINT)}
        write_json(folder / "validation" / SUMMARY, summary)
        self.trained[Task(job.configuration, job.fold)] = job.seconds
        return JobDone(job, True, self.starting, took)

    def judge(self, rung: Rung, contenders: list[Contender], **_: object) -> Rung:
        self.now += 1.0
        standings = [
            Standing(c.name, 0.5, 0.0, 0.0, 0.0, self.beaten.get(rung.number) == c.name, 0.0) for c in contenders
        ]
        return replace(rung, cases=10, leader=contenders[0].name, standings=tuple(standings))

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def run(self, monkeypatch: pytest.MonkeyPatch, total: float) -> float:
        planned = Planned(self.plan, self.place, tuple(c.name for c in self.plan.configurations))
        monkeypatch.setattr(pipeline, "workspace_of", lambda *_: self.place)
        monkeypatch.setattr(pipeline, "plan_and_preprocess", lambda *_, **__: self.wait(60.0) or planned)
        monkeypatch.setattr(pipeline, "find_folds", lambda *_, **__: self.folds)
        monkeypatch.setattr(pipeline, "run_job", self.run_job)
        monkeypatch.setattr(pipeline.RawDataset, "load", lambda *_: None)
        monkeypatch.setattr(pipeline, "_select", lambda *_, **__: self.wait(10.0))
        monkeypatch.setattr(pipeline, "_deliver", lambda *_, **__: self.wait(10.0))
        monkeypatch.setattr(contest_module, "is_of_split", lambda *_, **__: True)
        monkeypatch.setattr(contest_module, "judge", self.judge)
        began = self.now
        run(self.root, seconds=total, clock=lambda: self.now)
        return self.now - began


@pytest.mark.parametrize(
    ("candidates", "predicting", "beaten"),
    [(1, 5.0, {}), (1, 150.0, {}), (3, 40.0, {}), (3, 40.0, {0: "c1", 1: "c2"}), (2, 90.0, {2: "c1"})],
)
def test_a_run_ends_in_its_time_however_slow_its_predictions_are(tmp_path, monkeypatch, candidates, predicting, beaten):
    simulation = Simulation(tmp_path, plan_of(candidates), starting=8.0, predicting=predicting, beaten=beaten)
    total = 2700.0
    took = simulation.run(monkeypatch, total)
    assert 0.9 * total < took < 1.02 * total
    dropped = set(beaten.values())
    assert {task.configuration for task in simulation.trained if task.fold == "4"} == {
        c.name for c in simulation.plan.configurations if c.name not in dropped
    }


def test_the_time_of_who_is_dropped_goes_to_who_is_left(tmp_path, monkeypatch):
    every = Simulation(tmp_path / "every", plan_of(3), starting=5.0, predicting=10.0)
    every.run(monkeypatch, 2700.0)
    few = Simulation(tmp_path / "few", plan_of(3), starting=5.0, predicting=10.0, beaten={0: "c1", 1: "c2"})
    few.run(monkeypatch, 2700.0)
    assert few.trained[Task("c0", "4")] > 2 * every.trained[Task("c0", "4")]
    full = [every.trained[Task(name, fold)] for name in ("c0", "c1", "c2") for fold in "01234"]
    assert max(full) < 1.5 * min(full)  # without drops nobody is favoured


def test_a_run_that_is_started_again_counts_what_was_trained_before(tmp_path, monkeypatch):
    simulation = Simulation(tmp_path, plan_of(1), starting=5.0, predicting=10.0)
    ended = simulation.run_job

    def killed(job: Job, **options: object) -> JobDone:
        if job.fold == "3":
            raise KeyboardInterrupt
        return ended(job, **options)

    simulation.run_job = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        simulation.run(monkeypatch, 2000.0)
    spent = simulation.now
    simulation.run_job = ended  # type: ignore[method-assign]
    took = simulation.run(monkeypatch, 2000.0)
    assert took < 1.15 * (2000.0 - spent)
    assert simulation.trained[Task("c0", "4")] == pytest.approx(simulation.trained[Task("c0", "0")], rel=0.25)


def test_where_every_fold_has_its_budget_nothing_is_said_to_be_too_short():
    assert fold_seconds(-5.0, [Work(left=10.0, beside=3.0)]) == math.inf


def test_a_time_that_is_too_short_is_told(tmp_path, monkeypatch, caplog):
    simulation = Simulation(tmp_path, plan_of(1), starting=5.0, predicting=100.0)
    simulation.run(monkeypatch, 200.0)
    assert "the run ends later than was asked" in caplog.text
    assert min(simulation.trained.values()) == pipeline.LEAST_FOLD_SECONDS


def test_the_agenda_names_every_task_with_what_it_waits_for(tmp_path):
    simulation = Simulation(tmp_path, plan_of(2), starting=5.0, predicting=10.0)
    contest = Contest(simulation.plan, simulation.place, simulation.folds)
    found = agenda(contest, Pace(simulation.plan), fold_seconds=None, preprocessing=20.0)
    items = {item.name: item for item in found.items}
    order = list(items)
    assert order[0] == PREPROCESS and order[-1] == CHOOSE
    for item in found.items:
        assert all(order.index(name) < order.index(item.name) for name in item.after) and item.seconds > 0
    forks = ("c0, fold 0, 25 % of its training", "c1, fold 0, 25 % of its training")
    assert items["compare: fold 0 at 25 % of its training"].after == forks
    assert items["c1, fold 0"].after == ("compare: fold 0 at 25 % of its training",)
    assert items["compare: folds 0 to 3"].after == ("c0, fold 3", "c1, fold 3")
    assert items["c0, fold 1"].seconds > 60 > items["c0, fold 0, 25 % of its training"].seconds > 15
    assert found.least_seconds < 0.75 * found.most_seconds
    lines = found.table().splitlines()
    assert len(lines) == len(items) + 2 and "2, 3" in lines[4] and " to " in lines[-1]


def test_commands_of_what_was_begun_keep_its_time_and_bring_forks_to_that_of_a_whole_fold(tmp_path):
    simulation = Simulation(tmp_path, plan_of(2), starting=5.0, predicting=10.0)
    contest = Contest(simulation.plan, simulation.place, simulation.folds, timed=True)
    fork = {"c0": Length(seconds=100.0), "c1": Length(seconds=10.0)}
    Rung(0, simulation.plan.id, FORK_SHARE, ("0",), fork).save(simulation.place)
    for name, fold, limit in (("c0", "0", 100.0), ("c1", "0", 10.0), ("c1", "1", 300.0)):
        header = {
            "format": RESUME_FORMAT, "plan": simulation.plan.id, "limits": {"steps": None, "seconds": limit},
            "elapsed": 5.0, "finished": False, "cases": simulation.folds[int(fold)].id, "seed": 0,
        }  # fmt: skip
        folder = simulation.place.fold(name, fold)
        folder.mkdir(parents=True)
        save_tensors(folder / RESUME, {"step": torch.tensor(1)}, header)
        save_tensors(folder / CHECKPOINT, {"step": torch.tensor(1)}, {"format": FORMAT})
    lines = commands(contest, Path("D"), None, device="auto", seed=0)
    assert "autoseg train-fold D c0 0 --continue --time 125s" in lines, "longer than its fork"
    assert "autoseg train-fold D c1 0 --continue --time 60s" in lines, "the plan's time of a fold"
    assert "autoseg train-fold D c1 1 --continue" in lines and "autoseg train-fold D c0 1" in lines


def test_who_forks_a_few_steps_is_reckoned_with_a_whole_first_fold_and_not_dropped_before(tmp_path):
    quick = plan_of(2)
    slow = replace(quick, forecasts={name: replace(f, seconds_per_step=0.1) for name, f in quick.forecasts.items()})
    chances, least = {}, {}
    for name, plan in (("quick", quick), ("slow", slow)):
        simulation = Simulation(tmp_path / name, plan, starting=5.0, predicting=10.0)
        contest = Contest(plan, simulation.place, simulation.folds, timed=True)
        works = contest.works(Pace(plan))
        chances[name] = [work.chance for work in works if work.share == 1 - FORK_SHARE / 2]
        assert {work.chance for work in works if work.share == 1.0 and not work.left} == {0.5}  # folds 1 to 4
        least[name] = agenda(contest, Pace(plan), fold_seconds=60.0, preprocessing=0.0).least_seconds
    assert chances == {"quick": [0.5, 0.5], "slow": [1.0, 1.0]}
    assert least["slow"] > least["quick"] + 50


def test_the_commands_are_those_of_every_fold(tmp_path):
    simulation = Simulation(tmp_path, plan_of(2), starting=5.0, predicting=10.0)
    cascade = replace(simulation.plan.configuration("c0"), name="c0", previous_stage="c1")
    plan = replace(simulation.plan, configurations=(cascade, simulation.plan.configuration("c1")))
    contest = Contest(plan, simulation.place, simulation.folds, steps=30)
    lines = commands(contest, Path("data/My set"), Path("ws"), device="cpu", seed=3)
    end = "--steps 30 --seed 3 --workspace ws --device cpu"
    assert lines == [
        "autoseg plan-and-preprocess 'data/My set' --keep-plan --workspace ws",
        *(f"autoseg train-fold 'data/My set' c1 {fold} {end}" for fold in range(5)),
        *(f"autoseg train-fold 'data/My set' c0 {fold} {end}" for fold in range(5)),
        f"autoseg run 'data/My set' {end}",
    ]
    stage = replace(contest, asked=("c1",))
    assert [one.name for one in stage.contenders] == stage.configurations == ["c1"], "a stage may be asked for alone"
    only = Contest(plan_of(2), simulation.place, simulation.folds, steps=30, asked=("c1",))
    lines = commands(only, Path("D"), None, device="auto", seed=0, drop_cases=True, licence="CC0")
    assert lines[0] == "autoseg plan-and-preprocess D --keep-plan --drop-cases"
    assert lines[1:-1] == [f"autoseg train-fold D c1 {fold} --steps 30" for fold in range(5)]
    assert lines[-1] == "autoseg run D --configurations c1 --steps 30 --drop-cases --licence CC0"
