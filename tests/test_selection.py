"""What cross-validation decides: made-up held-out probabilities whose best use is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_models import REGIONS, small_plan

from autoseg.dataset import Case, RawDataset
from autoseg.errors import PlanError
from autoseg.files import write_json
from autoseg.image import Grid, Image, write_image
from autoseg.inference.chosen import Member
from autoseg.inference.selection import (
    Candidate,
    Selection,
    Table,
    calibration_error,
    choose_ensemble,
    equal_parts,
    select,
    settle_weights,
    single,
    weighted,
)
from autoseg.plan import Decision, Plan
from autoseg.preprocessing.case import CaseGeometry
from autoseg.preprocessing.store import Store
from autoseg.workspace import Workspace

SHAPE = (10, 16, 16)
GRID = Grid(SHAPE, (2.0, 1.0, 1.0))
CROP = ((1, 10), (0, 16), (2, 16))
NETWORK = (9, 16, 14)
CASES = 12

Make = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def truth_of(case: int) -> np.ndarray:
    """A ball of class 1 with a core of class 2."""
    generator = np.random.default_rng(case)
    z, y, x = np.indices(SHAPE)
    centre = (5, *generator.uniform(6, 10, 2))
    distance = np.sqrt((2 * (z - centre[0])) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
    return (distance < 5).astype(np.int16) + (distance < 3)


def sure(truth: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Probabilities (K, Z, Y, X) that are right everywhere."""
    onehot = np.stack([truth == k for k in range(3)]).astype(np.float32)
    return onehot * confidence + (1 - onehot) * (1 - confidence) / 2


def wrong_in(share: float, *, seed: int) -> Make:
    """Right but for a random share of the voxels, which are taken for the next class."""

    def make(generator: np.random.Generator, truth: np.ndarray) -> np.ndarray:
        own = np.random.default_rng((seed, int(generator.integers(10**6))))
        flip = own.random(truth.shape) < share
        answer = sure(np.where(flip, (truth + own.integers(1, 3, truth.shape)) % 3, truth))
        answer *= own.uniform(0.9, 1.1, answer.shape)  # no two are as sure of themselves
        return answer / answer.sum(axis=0)

    return make


class Trained:
    """A dataset, and stores of held-out probabilities as `train-fold` leaves them."""

    def __init__(self, root: Path, configurations: dict[str, dict[str, Make]], *, plan: Plan | None = None) -> None:
        self.plan = plan or small_plan()
        base = self.plan.configurations[0]
        self.plan = replace(self.plan, configurations=tuple(replace(base, name=name) for name in configurations))
        self.names, self.workspace = list(configurations), Workspace(root / "ws")
        self.folds = [[f"case_{i:02d}" for i in range(CASES) if i % 2 == fold] for fold in (0, 1)]
        write_json(
            self.workspace.folds, [{"train": self.folds[1 - k], "val": names} for k, names in enumerate(self.folds)]
        )
        cases = []
        for i in range(CASES):
            name, truth = f"case_{i:02d}", truth_of(i)
            label = root / f"{name}.nii.gz"
            write_image(Image(truth[None], GRID), label)
            cases.append(Case(name, (label,), label))
            for configuration, ways in configurations.items():
                folder = self.workspace.fold(configuration, str(i % 2)) / "validation" / "probabilities"
                seen = truth[tuple(slice(*side) for side in CROP)]
                arrays = {way: make(np.random.default_rng(i), seen).astype(np.float16) for way, make in ways.items()}
                Store(folder).write(name, arrays, CaseGeometry(GRID, (0, 1, 2), (False,) * 3, CROP, NETWORK), {})
        self.dataset = RawDataset(root, "Dataset999_Small", ("MRI",), self.plan.labels, ".nii.gz", tuple(cases))

    def select(self, **options: int) -> Selection:
        return select(self.dataset, self.plan, self.names, workspace=self.workspace, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_best_single_configuration_wins_where_an_ensemble_adds_only_noise(tmp_path, workers):
    good, bad = wrong_in(0.02, seed=1), wrong_in(0.6, seed=2)
    chosen = Trained(tmp_path, {"good": {"plain": good}, "bad": {"plain": bad}}).select(workers=workers)
    assert chosen.chosen.members == (Member("good", False),) and chosen.chosen.weights == (1.0,)
    dice = {score.candidate.name: score.dice for score in chosen.scores}
    assert dice["good"] > 0.9 > 0.5 > dice["bad"]
    assert chosen.cases == CASES


def test_an_ensemble_wins_where_its_members_err_in_different_places(tmp_path):
    makes = {f"m{seed}": {"plain": wrong_in(0.25, seed=seed)} for seed in range(3)}
    chosen = Trained(tmp_path, makes).select()
    assert len(chosen.chosen.members) == 3
    best_single = max(score.dice for score in chosen.scores if len(score.candidate.members) == 1)
    assert chosen.scores[0].dice > best_single
    assert any(d.name == "ensemble" and "beyond noise" in d.because for d in chosen.decisions)
    weights = next(d for d in chosen.decisions if d.name == "ensemble.weights")
    assert weights.value == chosen.chosen.weights == (1 / 3,) * 3 and "equal ones stay" in weights.because


@pytest.mark.parametrize("gain", [0.0, 0.02])
def test_members_count_alike_unless_other_weights_are_better_beyond_noise(gain):
    members, random = tuple(Member(name, False) for name in "abc"), np.random.default_rng(0)
    equal, *others = candidates = weighted(members)
    assert equal.weights == (1 / 3,) * 3 and [c.name for c in others][:2] == ["2 x a + b + c", "a + 2 x b + c"]
    assert len(set(candidates)) == 7 and all(sum(c.weights) == pytest.approx(1) for c in candidates)
    dice = {c: random.uniform(0.8, 0.9, (CASES, 2)) + gain * (c.name == "2 x a + b + c") for c in candidates}
    dice = {c: 0.85 + 0.2 * (d - 0.85) for c, d in dice.items()} if gain else dice
    table = Table(("ball", "core"), dice)
    best = max(others, key=table.mean)
    assert table.mean(best) > table.mean(equal)  # of six one is always higher
    chosen, because = settle_weights(members, table)
    assert chosen == (best if gain else equal) and best.name in because
    assert ("equal ones stay" in because) == (not gain)


def test_mirroring_is_on_only_where_it_gains(tmp_path):
    plain = wrong_in(0.3, seed=1)
    makes = {
        "gains": {"plain": plain, "mirrored": wrong_in(0.02, seed=2)},
        "does_not": {"plain": plain, "mirrored": plain},
    }
    decisions = {d.name: d.value for d in Trained(tmp_path, makes).select().decisions}
    assert decisions["gains.mirroring"] is True and decisions["does_not.mirroring"] is False


def test_islands_are_removed_where_the_structure_is_one_piece(tmp_path):
    def with_islands(generator: np.random.Generator, truth: np.ndarray) -> np.ndarray:
        answer = truth.copy()
        answer[0, :2, :2] = 1  # far from the ball
        return sure(answer)

    chosen = Trained(tmp_path, {"a": {"plain": with_islands}}).select()
    assert chosen.chosen.cleaning["a"].largest_only or chosen.chosen.cleaning["a"].smallest_mm3 > 8
    assert "b" not in chosen.chosen.cleaning


def test_specks_in_cases_that_lack_the_structure_are_removed_too(tmp_path, monkeypatch):
    whole = truth_of

    def lacking(case: int) -> np.ndarray:
        return whole(case) if case < CASES // 2 else np.minimum(whole(case), 1)  # no core

    def with_specks(generator: np.random.Generator, truth: np.ndarray) -> np.ndarray:
        answer = truth.copy()
        if not (truth == 2).any():
            answer[0, :2, :2] = 2
        return sure(answer)

    monkeypatch.setattr("test_selection.truth_of", lacking)
    chosen = Trained(tmp_path, {"a": {"plain": with_specks}}).select()
    assert chosen.chosen.cleaning["b"].smallest_mm3 > 8 and chosen.score.by_class["b"] == pytest.approx(0.5)


def test_who_sees_a_structure_where_there_is_none_is_worse_though_the_other_has_no_score_there():
    inventive, sober, random = single("inventive", False), single("sober", False), np.random.default_rng(0)
    present = random.uniform(0.75, 0.85, (20, 1))
    table = Table(
        ("tumour",),
        {
            inventive: np.concatenate([present + 0.001, np.zeros((20, 1))]),
            sober: np.concatenate([present, np.full((20, 1), np.nan)]),
        },
    )
    gain, low, _ = table.difference(sober, inventive)
    assert gain == pytest.approx(table.mean(sober) - table.mean(inventive)) and gain > 0.3 and low > 0


@pytest.mark.parametrize("count", [1, 6])
def test_the_best_of_many_ensembles_must_be_better_than_the_best_of_one(count):
    random, best = np.random.default_rng(0), single("a", False)
    gains = random.normal(0.01, 0.018, (CASES, 1))  # by itself just beyond noise
    ensembles = [equal_parts((Member("a", False), Member(f"b{i}", False))) for i in range(count)]
    dice = {ensemble: np.full((CASES, 1), 0.8) for ensemble in ensembles}
    table = Table(("ball",), {**dice, best: np.full((CASES, 1), 0.8), ensembles[0]: 0.8 + gains})
    for ensemble in ensembles:
        table.dice |= {other: table.dice[ensemble] - 0.01 for other in weighted(ensemble.members)[1:]}
    decisions: list[Decision] = []
    assert choose_ensemble(best, ensembles, table, decisions) == (ensembles[0] if count == 1 else best)
    assert f"the best of {count} ensembles" in decisions[-1].because


def test_overconfident_probabilities_are_cooled_down(tmp_path):
    def overconfident(generator: np.random.Generator, truth: np.ndarray) -> np.ndarray:
        sharp = wrong_in(0.15, seed=3)(generator, truth) ** 3
        return sharp / sharp.sum(axis=0)

    selection = Trained(tmp_path, {"a": {"plain": overconfident}}).select()
    before, after = selection.calibration_error
    assert selection.chosen.temperature > 1.2 and after < before / 2


def test_regions_are_scored_as_regions(tmp_path):
    def regions(generator: np.random.Generator, truth: np.ndarray) -> np.ndarray:
        return np.stack([np.where(truth > 0, 0.9, 0.1), np.where(truth > 1, 0.8, 0.2)])

    selection = Trained(tmp_path, {"a": {"plain": regions}}, plan=small_plan(labels=REGIONS)).select()
    assert selection.scores[0].by_class == {"whole": pytest.approx(1, abs=0.1), "core": pytest.approx(1, abs=0.1)}


def test_a_selection_is_read_as_it_was_written(tmp_path):
    selection = Trained(tmp_path, {"a": {"plain": wrong_in(0.1, seed=1)}}).select()
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    content = json.loads((tmp_path / "selection.json").read_text())
    (tmp_path / "selection.json").write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(PlanError, match=r"selection\.json: selection version 1 cannot be read, .* choose again"):
        Selection.load(tmp_path / "selection.json")


def test_without_a_case_that_all_predicted_there_is_nothing_to_choose(tmp_path):
    trained = Trained(tmp_path, {"a": {"plain": wrong_in(0.1, seed=1)}})
    with pytest.raises(PlanError, match="no case is predicted by all of a, b"):
        select(trained.dataset, trained.plan, ["a", "b"], workspace=trained.workspace)


def test_the_calibration_error_of_a_known_table():
    # 80 % sure and right in 6 of 10: off by 0.2; 60 % sure and right in 6 of 10: not off
    probabilities = np.array([[0.2, 0.8]] * 10 + [[0.4, 0.6]] * 10)
    truth = np.array(([1] * 6 + [0] * 4) * 2)
    assert calibration_error(probabilities, truth, regions=False) == pytest.approx(0.1)


def test_an_ensemble_is_named_by_its_members_and_weights():
    members = (Member("3d_fullres", True), Member("2d", False))
    assert Candidate(members, (2 / 3, 1 / 3)).name == "2 x 3d_fullres (mirrored) + 2d"
