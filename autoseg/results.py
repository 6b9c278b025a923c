"""The folder of a trained fold -> what came of it: curves, held-out scores, pictures, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import PlanError
from autoseg.files import read_json
from autoseg.plan import Plan
from autoseg.workspace import CHECKPOINT, HISTORY, PICTURES, SUMMARY, VALIDATION, Workspace

if TYPE_CHECKING:
    from autoseg.training.history import Row

EVERY_CASE = "all"  # the fold that holds nothing out: its scores are no held-out ones
RESAMPLES = 2000  # of the bootstrap over cases
SEED = 0

Scores = Mapping[str, Mapping[str, Mapping[str, float | None]]]  # case -> structure -> metric -> score


@dataclass(frozen=True)
class FoldResult:
    """What a trained fold left behind."""

    name: str
    """"0" to "4", or "all"."""
    rows: Sequence[Row]
    """Of its history."""
    training: Mapping[str, Any]
    """What the checkpoint says of its training: steps, seconds, finished, device, peak_memory_bytes."""
    cases: Scores = field(default_factory=dict)
    """Of its held-out cases; empty where they are not scored."""
    images: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Case -> metric -> score of the super-resolved image, where the fine one is known."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Case -> why it could not be predicted or scored."""
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """By rank: best, median, worst."""

    @property
    def seconds(self) -> float:
        """Training time."""
        return float(self.training.get("seconds", self.rows[-1].seconds if self.rows else 0.0))

    @property
    def steps(self) -> int:
        """Steps trained."""
        return int(self.training.get("steps", self.rows[-1].step if self.rows else 0))


@dataclass(frozen=True)
class Mean:
    """A mean over cases, with its 95 % bootstrap interval; nan where no case has a value."""

    value: float
    low: float
    high: float
    cases: int
    """That have a value."""


def read_results(plan: Plan, place: Workspace) -> dict[str, list[FoldResult]]:
    """The folds of each configuration that are trained with this plan. Raises PlanError, CheckpointError."""
    found = {}
    for configuration in plan.configurations:
        folders = sorted(place.fold(configuration.name, "0").parent.glob("fold_*"))
        found[configuration.name] = [one for folder in folders if (one := _read_fold(folder, plan)) is not None]
    return found


def _read_fold(folder: Path, plan: Plan) -> FoldResult | None:
    from autoseg.checkpoint import FORMAT, read_header
    from autoseg.training.history import History

    training: dict[str, Any] = {}
    if (folder / CHECKPOINT).is_file():
        header = read_header(folder / CHECKPOINT, FORMAT)
        if Plan.from_json(header.get("plan"), where=str(folder / CHECKPOINT)).id != plan.id:
            return None
        training = dict(header.get("summary", {}))
    history = History(folder / HISTORY, plan.labels.names)
    history.load(until_step=2**62)
    if not history.rows and not training:
        return None
    name = folder.name.removeprefix("fold_")
    pictures = {path.stem: path for path in sorted((folder / VALIDATION / PICTURES).glob("*.png"))}
    summary = folder / VALIDATION / SUMMARY
    if name == EVERY_CASE or not summary.is_file():
        return FoldResult(name, history.rows, training)
    content = read_json(summary, error=PlanError, what="summary of scores", remedy="delete it and validate the fold")
    try:
        cases = {
            str(case): {str(s): dict(row) for s, row in scores.items()} for case, scores in content["cases"].items()
        }
        images = {str(case): dict(row) for case, row in content.get("images", {}).get("cases", {}).items()}
        failed = {str(case): str(why) for case, why in content.get("failed", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{summary}: this is not a summary of scores; delete it and validate the fold anew.") from error
    return FoldResult(name, history.rows, training, cases, images, failed, pictures)


def joined_cases(folds: Sequence[FoldResult]) -> dict[str, Mapping[str, Mapping[str, float | None]]]:
    """The held-out scores of all folds, sorted by case."""
    return dict(sorted((case, scores) for fold in folds for case, scores in fold.cases.items()))


def column(cases: Scores, structure: str, metric: str) -> NDArray[np.float64]:
    """A score of every case; nan where it has none."""
    values = [scores.get(structure, {}).get(metric) for scores in cases.values()]
    return np.array([np.nan if value is None else float(value) for value in values])


def case_means(cases: Scores, metric: str) -> dict[str, float]:
    """The mean over its structures of every case that has a value, the worst (lowest) first."""
    found = {}
    for case, scores in cases.items():
        known = [row[metric] for row in scores.values() if row.get(metric) is not None]
        if known:
            found[case] = float(np.mean(np.array(known, dtype=float)))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def mean_over_cases(columns: Sequence[NDArray[np.float64]]) -> Mean:
    """The mean over the columns (structures) of their means over the cases, with its bootstrap interval."""
    values = np.stack(columns, axis=1) if columns else np.empty((0, 0))
    known = np.isfinite(values)
    if not known.any():
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    count = len(values)
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    drawn = _mean_of_means(draws.astype(float), values, known)
    low, high = np.percentile(drawn[np.isfinite(drawn)], (2.5, 97.5))
    value = _mean_of_means(np.ones((1, count)), values, known)[0]
    return Mean(float(value), float(low), float(high), int(known.any(axis=1).sum()))


def _mean_of_means(
    weights: NDArray[np.float64], values: NDArray[np.float64], known: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """For each row of `weights` (draws, cases) the mean over columns of the weighted means of `values`."""
    sums, counts = weights @ np.where(known, values, 0.0), weights @ known.astype(float)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    there = np.isfinite(means)
    totals = np.where(there, means, 0.0).sum(axis=1)
    found: NDArray[np.float64] = np.divide(
        totals, there.sum(axis=1), out=np.full(len(totals), np.nan), where=there.any(axis=1)
    )
    return found
