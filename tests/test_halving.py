"""Who is dropped at a rung, on made-up held-out probabilities; and what a run makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import special
from test_selection import CASES, Trained, wrong_in

from autoseg.contest import Contest, Task
from autoseg.errors import PlanError
from autoseg.inference.halving import LEARNED_DICE, LEAST_CASES, judge
from autoseg.inference.rungs import Contender, Length, Rung, find_contenders, find_views, read_rung
from autoseg.inference.selection import interval
from autoseg.training.folds import Fold


def rung_of(trained: Trained, *folds: str) -> Rung:
    return Rung(len(folds), trained.plan.id, 1.0, folds, {})


def judged(trained: Trained, *folds: str, **options: object) -> Rung:
    return judge(
        rung_of(trained, *folds), find_contenders(trained.plan),
        dataset=trained.dataset, plan=trained.plan, workspace=trained.workspace, trained_seconds={}, **options,
    )  # fmt: skip


def test_who_is_beaten_beyond_noise_is_dropped_and_who_may_still_win_is_not(tmp_path):
    makes = {"good": wrong_in(0.05, seed=1), "as_good": wrong_in(0.05, seed=2), "bad": wrong_in(0.5, seed=3)}
    rung = judged(Trained(tmp_path, {name: {"plain": make} for name, make in makes.items()}), "0")
    assert rung.decided and rung.cases == CASES // 2 and rung.dropped == {"bad"}
    by_name = {standing.contender: standing for standing in rung.standings}
    assert by_name["bad"].low <= by_name["bad"].difference <= by_name["bad"].high < 0
    assert by_name["bad"].difference == pytest.approx(by_name["bad"].dice - by_name[rung.leader].dice)
    assert [standing.dice for standing in rung.standings] == sorted(
        (standing.dice for standing in rung.standings), reverse=True
    )
    (decision,) = rung.decisions()
    assert decision.name == "bad.dropped" and f"the leader {rung.leader}" in decision.because


def test_who_has_nothing_left_to_train_is_kept(tmp_path):
    makes = {"good": {"plain": wrong_in(0.05, seed=1)}, "bad": {"plain": wrong_in(0.5, seed=3)}}
    spared = judged(Trained(tmp_path, makes), "0", keep={"bad": "it is new"})
    assert spared.dropped == frozenset() and [one.spared for one in spared.standings] == ["", "it is new"]


def test_a_handful_of_cases_drops_nobody(tmp_path):
    trained = Trained(tmp_path, {"good": {"plain": wrong_in(0.05, seed=1)}, "bad": {"plain": wrong_in(0.5, seed=3)}})
    few = replace(trained.dataset, cases=trained.dataset.cases[: 2 * (LEAST_CASES - 1)])
    trained.dataset = few
    rung = judged(trained, "0")
    assert rung.cases == LEAST_CASES - 1 and rung.dropped == frozenset()


def test_forks_that_have_learned_nothing_drop_nobody_but_whole_folds_do(tmp_path):
    makes = {"hopeless": {"plain": wrong_in(0.9, seed=1)}, "worse": {"plain": wrong_in(0.97, seed=3)}}
    trained = Trained(tmp_path, makes)
    options = {"dataset": trained.dataset, "plan": trained.plan, "workspace": trained.workspace, "trained_seconds": {}}
    whole = rung_of(trained, "0")
    forks = judge(replace(whole, share=0.25), find_contenders(trained.plan), **options)
    assert forks.standings[1].high < 0 and forks.standings[0].dice < LEARNED_DICE and not forks.dropped
    assert judge(whole, find_contenders(trained.plan), **options).dropped == {"worse"}


def test_views_are_judged_by_their_mean_and_live_and_die_together(tmp_path):
    names = [f"view_{axis}" for axis in range(3)]
    makes = {name: {"plain": wrong_in(0.3, seed=seed)} for seed, name in enumerate(names)}
    makes["volume"] = {"plain": wrong_in(0.26, seed=9)}
    trained = Trained(tmp_path, makes)
    views = [
        replace(trained.plan.configuration(name), topology="2.5d_stack", view_axis=axis)
        for axis, name in enumerate(names)
    ]
    trained.plan = replace(trained.plan, configurations=(*views, trained.plan.configuration("volume")))
    assert find_views(trained.plan.configurations) == [tuple(names)]
    assert [contender.members for contender in find_contenders(trained.plan)] == [tuple(names), ("volume",)]
    rung = judged(trained, "0")
    together = next(standing for standing in rung.standings if standing.contender != "volume")
    alone = judge(
        rung_of(trained, "0"), [Contender((names[0],)), Contender(("volume",))],
        dataset=trained.dataset, plan=trained.plan, workspace=trained.workspace, trained_seconds={},
    )  # fmt: skip
    assert together.dice > next(s.dice for s in alone.standings if s.contender == names[0]) + 0.05
    assert alone.dropped == {names[0]} and rung.dropped == {"volume"}  # each is worse, together they are better


def test_a_previous_stage_is_no_candidate_but_lives_with_the_next(tmp_path):
    trained = Trained(tmp_path, {name: {"plain": wrong_in(0.1, seed=1)} for name in ("low", "high", "full")})
    stages = [
        replace(trained.plan.configuration("low")),
        replace(trained.plan.configuration("high"), previous_stage="low"),
        trained.plan.configuration("full"),
    ]
    plan = replace(trained.plan, configurations=tuple(stages))
    assert [c.configurations for c in find_contenders(plan)] == [("low", "high"), ("full",)]
    contest = Contest(plan, trained.workspace, tuple(Fold(("a",), tuple("bcdefgh")) for _ in range(3)), steps=100)
    now = contest.round()
    assert now.rung is not None and now.rung.forks
    contest.begin_forks(now.rung, fold_seconds=None)
    now = contest.round()
    assert now.tasks == (Task("full", "0"), *(Task("low", fold) for fold in "012"))
    assert [now.forks(task) for task in now.tasks] == [True, False, False, False]


def test_a_rung_is_read_as_it_was_written_and_not_with_another_plan(tmp_path):
    trained = Trained(tmp_path, {"good": {"plain": wrong_in(0.05, seed=1)}, "bad": {"plain": wrong_in(0.5, seed=3)}})
    rung = replace(judged(trained, "0"), lengths={"good": Length(steps=3), "bad": Length(seconds=1.1)})
    rung.save(trained.workspace)
    assert read_rung(1, trained.plan, trained.workspace) == rung
    other = replace(trained.plan, dataset="another")
    assert read_rung(1, other, trained.workspace) is None
    path = trained.workspace.models / "rungs" / "1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(PlanError, match=r"1\.json.*colour"):
        read_rung(1, trained.plan, trained.workspace)


def test_a_share_of_a_length_is_a_step_at_least():
    assert Length(steps=100).share(0.25) == Length(steps=25)
    assert Length(steps=2).share(0.25) == Length(steps=1)
    assert Length(seconds=10.0).share(0.25) == Length(seconds=2.5)


def test_intervals_of_few_cases_are_as_wide_as_students():
    few = np.random.default_rng(0).normal(size=8)
    _, low, high = interval(lambda rows: float(few[rows].mean()), len(few))
    student = 2 * special.stdtrit(len(few) - 1, 0.975) * few.std(ddof=1) / np.sqrt(len(few))
    assert high - low == pytest.approx(student, rel=0.1)
