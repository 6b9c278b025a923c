"""Held-out probabilities of contenders on the way -> a decided `Rung`: who leads, and who is trained no further.

Successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016) with a doubt in favour of the candidate: it is not
the worse half that is dropped but who is beaten beyond noise, and whoever may still win goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoseg.dataset import RawDataset
from autoseg.inference.chosen import Member
from autoseg.inference.rungs import Contender, Rung, Standing, total_seconds
from autoseg.inference.selection import equal_parts, find_held_out, score_candidates
from autoseg.plan import Plan
from autoseg.workspace import Workspace

FORK_SHARE = 0.25
"""Of a fold's training that the first rung gives to everybody. A fork spends half of it on a decay that is thrown away,
an eighth of a fold; a second fork, at half of a fold, would throw away another quarter of each survivor's fold, as much
as it saves where every second one is dropped there. So whole folds are the further rungs: nothing of them is lost."""
LEAST_GROWTH = 1.25  # a training that goes on from a fork is at least so many times as long as that was
LEAST_CASES = 6  # below, even differences that all have one sign happen by chance more often than once in 20 times
LEARNED_DICE = 0.3
"""Mean Dice that the best of some forks must have: networks that have learned next to nothing differ beyond noise too,
but that says nothing of what they become."""

LEAST_STEPS = 500
"""Optimiser steps below which a fork is not dropped. Slices take several steps in the time of one of a volume, so they
lead while both are new; what a network of volumes becomes shows later (`benchmarks/halving.py`)."""


def judge(
    rung: Rung,
    contenders: Sequence[Contender],
    *,
    dataset: RawDataset,
    plan: Plan,
    workspace: Workspace,
    keep: Mapping[str, str] | None = None,
    trained_seconds: Mapping[str, float],
    workers: int = 1,
) -> Rung:
    """The rung, decided: a contender is dropped where the interval of its difference from the leader is below zero.

    Not on fewer than LEAST_CASES cases, and not among forks of which the best has less than LEARNED_DICE.
    Contenders are scored on the held-out cases of the rung's folds that all of them have predicted, without mirroring;
    several members as their mean. Those in `keep` are not dropped, for a reason each. `trained_seconds` are by
    configuration. Raises PlanError where there is no such case.
    """
    configurations = [name for contender in contenders for name in contender.members]
    cases = find_held_out(dataset, configurations, workspace, folds=rung.folds)
    answers = {
        contender.name: equal_parts(tuple(Member(name, False) for name in contender.members))
        for contender in contenders
    }
    table = score_candidates(cases, list(answers.values()), plan.labels, workers=workers)
    leader = max(answers, key=lambda name: table.mean(answers[name]))
    spared = dict(keep or {})
    if len(cases) < LEAST_CASES:
        spared = dict.fromkeys(answers, f"there are fewer than {LEAST_CASES} cases")
    elif rung.forks and table.mean(answers[leader]) < LEARNED_DICE:
        spared = dict.fromkeys(answers, f"the best fork has a mean Dice below {LEARNED_DICE:g}")
    standings = []
    for contender in contenders:
        name = contender.name
        gain, low, high = table.difference(answers[name], answers[leader]) if name != leader else (0.0, 0.0, 0.0)
        standings.append(
            Standing(
                contender=name,
                dice=table.mean(answers[name]),
                difference=gain,
                low=low,
                high=high,
                dropped=high < 0 and name not in spared,
                trained_seconds=round(total_seconds(contender, trained_seconds), 3),
                spared=spared.get(name, "") if high < 0 else "",
            )
        )
    standings.sort(key=lambda standing: -standing.dice)
    return replace(rung, cases=len(cases), leader=leader, standings=tuple(standings))
