"""Scores of every case -> `Evaluation`: means with bootstrap intervals, `summary.json`, a table.

The JSON holds no NaN: what has no value (both masks empty, or an infinite distance because one is) is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.files import write_json
from autoseg.inference.scoring import ImageScores, Scores
from autoseg.metrics import IMAGE_METRICS, METRICS, Metric

RESAMPLES = 2000  # bootstrap samples of the cases
CONFIDENCE = 0.95
SEED = 0  # the same scores give the same intervals
TABLE_COLUMNS = ("dice", "iou", "nsd", "hd95", "assd", "volume_error_ml", "volume_error_ratio")


@dataclass(frozen=True)
class Statistic:
    """One score over the cases in which it is defined and finite."""

    mean: float
    """nan where there is no such case."""
    low: float
    """Lower end of the 95 % bootstrap interval of the mean."""
    high: float
    """Upper end."""
    median: float
    cases: int
    """Cases that count."""
    infinite: int = 0
    """Cases left out because one of the two masks is empty and the distance infinite."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of predictions."""

    classes: tuple[str, ...]
    """Classes or regions, without background and ignore."""
    cases: dict[str, Scores]
    """By case, class and metric; nan where both masks are empty, inf for distances to an empty mask."""
    by_class: dict[str, dict[str, Statistic]]
    """By class and metric."""
    mean: dict[str, Statistic]
    """By metric: the mean over the classes of their means over the cases (nnU-Net's foreground mean)."""
    failed: dict[str, str]
    """Cases that could not be scored, with the sentence that says why."""
    missing: tuple[str, ...]
    """References without a prediction."""
    extra: tuple[str, ...]
    """Predictions without a reference."""
    tolerance_mm: float
    """Tolerance of NSD."""
    note: str = ""
    """What a reader of the scores must know."""
    images: dict[str, ImageScores] = field(default_factory=dict)
    """Of super-resolved images, by case and metric; nan where there is nothing to compare, inf where they are equal."""
    brought: dict[str, str] = field(default_factory=dict)
    """Cases whose prediction lay on another grid than its reference, with that grid; scored on the reference's."""

    @property
    def image_mean(self) -> dict[str, Statistic]:
        """Of super-resolved images, by metric; empty without them."""
        draws = _resampled_counts(len(self.images))
        values = {name: [[scores[name]] for scores in self.images.values()] for name in IMAGE_METRICS}
        return {name: _statistic(np.array(column), draws) for name, column in values.items() if column}

    @property
    def complete(self) -> bool:
        """Whether every reference has a scored prediction and every prediction a reference."""
        return not (self.failed or self.missing or self.extra)

    def ranking(self, metric: str = "dice") -> tuple[str, ...]:
        """Cases from best to worst mean score over their classes; cases with nothing to score are left out."""
        scores = {case: _mean([scores[name][metric] for name in scores]) for case, scores in self.cases.items()}
        ranked = [case for case in scores if not math.isnan(scores[case])]
        sign = -1 if METRICS[metric].better == "higher" else 1
        return tuple(sorted(ranked, key=lambda case: (sign * scores[case], case)))

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        content = {
            "note": self.note,
            "metrics": _descriptions(METRICS),
            "nsd_tolerance_mm": self.tolerance_mm,
            "confidence": CONFIDENCE,
            "mean": {metric: vars(statistic) for metric, statistic in self.mean.items()},
            "by_class": {
                name: {metric: vars(statistic) for metric, statistic in row.items()}
                for name, row in self.by_class.items()
            },
            "cases": self.cases,
            "failed": self.failed,
            "missing": list(self.missing),
            "extra": list(self.extra),
        }
        if self.brought:
            content["brought_to_the_reference_grid"] = self.brought
        if self.images:
            mean = {metric: vars(statistic) for metric, statistic in self.image_mean.items()}
            content["images"] = {"metrics": _descriptions(IMAGE_METRICS), "mean": mean, "cases": self.images}
        cleaned: dict[str, Any] = _finite(content)
        return cleaned

    def save(self, path: Path) -> None:
        """Write `summary.json`, atomically."""
        write_json(path, self.to_json())

    def table(self) -> str:
        """Means with their intervals, two lines for each class, then those of the images, as plain text."""
        rows = [(name, self.by_class[name]) for name in self.classes]
        if len(rows) > 1:
            rows.append(("mean", self.mean))
        if not rows and not self.images and self.note:
            return self.note
        tables = [_table(rows, self.tolerance_mm)] if rows or not self.images else []
        tables += [_image_table(self.image_mean)] if self.images else []
        return "\n\n".join([*tables, *([self._brought_line()] if self.brought else [])])

    def _brought_line(self) -> str:
        case, grid = next(iter(self.brought.items()))
        return (
            f"Scored on the references' grids; {len(self.brought)} of {len(self.cases or self.images)} predictions lie "
            f"on others and were brought there, such as {case} ({grid})."
        )

    def problems(self) -> tuple[str, ...]:
        """One sentence for each case that was not scored."""
        sentences = list(self.failed.values())
        sentences += [f"Case {case}: there is no prediction for this reference." for case in self.missing]
        sentences += [f"Case {case}: there is no reference for this prediction." for case in self.extra]
        return tuple(sentences)


def statistics(
    cases: Mapping[str, Scores], classes: Sequence[str]
) -> tuple[dict[str, dict[str, Statistic]], dict[str, Statistic]]:
    """Statistics by class and metric, and over all classes by metric."""
    by_class: dict[str, dict[str, Statistic]] = {name: {} for name in classes}
    mean: dict[str, Statistic] = {}
    draws = _resampled_counts(len(cases))
    for metric in METRICS:
        values = np.array([[scores[name][metric] for name in classes] for scores in cases.values()])
        values = values.reshape(len(cases), len(classes))
        for column, name in enumerate(classes):
            by_class[name][metric] = _statistic(values[:, [column]], draws)
        mean[metric] = _statistic(values, draws)
    return by_class, mean


def _resampled_counts(cases: int) -> NDArray[np.float64]:
    """How often each case is drawn in each bootstrap sample, `(RESAMPLES, cases)`."""
    if not cases:
        return np.zeros((RESAMPLES, 0))
    draws = np.random.default_rng(SEED).multinomial(cases, [1 / cases] * cases, size=RESAMPLES)
    return draws.astype(np.float64)


def _statistic(values: NDArray[np.float64], draws: NDArray[np.float64]) -> Statistic:
    """The mean over classes of the mean over cases of `(cases, classes)`, with its percentile bootstrap interval.

    Cases are drawn as a whole, with all their classes (Efron and Tibshirani 1993, chapter 13).
    """
    finite = np.isfinite(values)
    infinite = int(np.isinf(values).any(axis=1).sum())
    if not finite.any():
        return Statistic(math.nan, math.nan, math.nan, math.nan, 0, infinite)
    filled = np.where(finite, values, 0.0)
    mean = _mean([float(filled[:, k].sum() / finite[:, k].sum()) for k in range(values.shape[1]) if finite[:, k].any()])
    with np.errstate(invalid="ignore"):  # a sample may hold no case with this class
        sampled = (draws @ filled) / (draws @ finite)
    weight = np.isfinite(sampled)
    kept = weight.any(axis=1)
    means = np.where(weight, sampled, 0.0).sum(axis=1)[kept] / weight.sum(axis=1)[kept]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    per_case = [_mean(row[ok].tolist()) for row, ok in zip(values, finite, strict=True) if ok.any()]
    return Statistic(mean, float(low), float(high), float(np.median(per_case)), len(per_case), infinite)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _finite(content: Any) -> Any:
    """The same content with None for what JSON has no literal for."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content


def _table(rows: Sequence[tuple[str, Mapping[str, Statistic]]], tolerance_mm: float) -> str:
    header = ["", "cases"]
    for metric in TABLE_COLUMNS:
        unit = METRICS[metric].unit
        title = f"{METRICS[metric].title} {tolerance_mm:g} mm" if metric == "nsd" else METRICS[metric].title
        header.append(f"{title} [{unit}]" if unit else title)
    lines = [header]
    for name, row in rows:
        lines.append([name, str(row["dice"].cases), *[_number(row[metric].mean) for metric in TABLE_COLUMNS]])
        lines.append(["", "", *[_interval(row[metric]) for metric in TABLE_COLUMNS]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(line, widths, strict=True)] for line in lines)
    ]
    feet = [f"Below each mean: its {CONFIDENCE:.0%} bootstrap interval over the cases."]
    without = [f"{name} {row['hd95'].infinite}" for name, row in rows[:-1] or rows if row["hd95"].infinite]
    if without:
        feet.append(f"Cases without HD95 and ASSD, since prediction or reference is empty: {', '.join(without)}.")
    return "\n".join([*(text.rstrip() for text in texts), *feet])


def _descriptions(metrics: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    return {name: {"title": m.title, "unit": m.unit, "better": m.better} for name, m in metrics.items()}


def _image_table(mean: Mapping[str, Statistic]) -> str:
    """One line for each score of the images, its interval behind it."""
    lines = ["Super-resolved images:"]
    for name, metric in IMAGE_METRICS.items():
        statistic = mean[name]
        unit = f" {metric.unit}" if metric.unit else ""
        interval = _interval(statistic)
        lines.append(
            f"{metric.title}  {_number(statistic.mean)}{unit}  {f'({interval})' if interval else ''}, "
            f"{statistic.cases} cases".replace("  ,", ",")
        )
    return "\n".join(lines)


def _interval(statistic: Statistic) -> str:
    return "" if math.isnan(statistic.mean) else f"{_number(statistic.low)}..{_number(statistic.high)}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
