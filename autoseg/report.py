"""The artefacts of a workspace -> one self-contained HTML page: scores, choice, cases, training, cost, plan, dataset.

It shows what is there: before any training the dataset and the plan, afterwards curves, cross-validated scores and
pictures too. Nothing in it is fetched from anywhere; it prints, and follows the browser's dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg import __version__
from autoseg.charts import COLOURS, Line, Row, line_chart, row_chart
from autoseg.errors import PlanError
from autoseg.files import write_text
from autoseg.metrics import IMAGE_METRICS, METRICS
from autoseg.page import Html, Section, facts, folded, heading, legend, page, paragraph, picture, table, text
from autoseg.plan import Configuration, Decision, Plan
from autoseg.results import (
    FoldResult,
    Mean,
    Scores,
    case_means,
    column,
    joined_cases,
    mean_over_cases,
    read_results,
)
from autoseg.units import format_bytes, format_seconds
from autoseg.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.experiment_planning.fingerprint import Fingerprint
    from autoseg.inference.selection import Selection

MOST_PICTURE_BYTES = 2_700_000  # of all overlays together, before they grow by a third as text: a report is mailed
MOST_CASES_LISTED = 300
OPEN_DECISIONS = 12  # a longer list is folded, group by group
SHOWN_METRICS = ("dice", "nsd", "hd95", "assd", "volume_error_ml")
GROUPS = {  # the first word of a shared decision -> its group
    "budget": "Budget",
    "super_resolution": "Super-resolution",
    "configurations": "Which configurations",
    "first_choice": "Which configurations",
}
OTHER_GROUP = "Grid, intensities, mirroring"


@dataclass(frozen=True)
class Findings:
    """All that a report tells of."""

    plan: Plan
    place: Workspace
    fingerprint: Fingerprint | None
    results: Mapping[str, Sequence[FoldResult]]
    """By configuration; those without a trained fold are empty."""
    selection: Selection | None

    @property
    def chosen(self) -> tuple[str, ...]:
        """The configurations that the model is made of; before anything is chosen, those that are scored."""
        if self.selection is not None:
            return tuple(dict.fromkeys(member.configuration for member in self.selection.chosen.members))
        return tuple(self.scored)

    @property
    def scored(self) -> dict[str, Scores]:
        """Held-out scores by configuration, the chosen ones first where there are any."""
        cases = {name: joined_cases(folds) for name, folds in self.results.items()}
        first = () if self.selection is None else self.chosen
        return {name: cases[name] for name in sorted(cases, key=lambda name: name not in first) if cases[name]}

    @property
    def given_up(self) -> frozenset[str]:
        """Configurations that were trained no further, whose scores may be those of forks."""
        rungs = () if self.selection is None else self.selection.rungs
        return frozenset(name for rung in rungs for contender in rung.dropped for name in contender.split(" + "))

    @property
    def trained(self) -> dict[str, Sequence[FoldResult]]:
        """The configurations that have folds."""
        return {name: folds for name, folds in self.results.items() if folds}


def write_report(place: Workspace, output: Path | None = None) -> Path:
    """Write the report of a workspace; by default `report.html` in it.

    Raises PlanError where there is no plan, or an artefact cannot be read.
    """
    output = output or place.report
    if not place.plan.exists():
        raise PlanError(f"{place.plan}: there is no plan yet, so there is nothing to report.")
    found = _find(place)
    plan = found.plan
    sections = [
        Section("What was chosen, and why", _choice(found)),
        Section("Scores", _scores(found)),
        Section("Super-resolved images", _image_scores(found)),
        Section("Worst and median cases", _overlays(found)),
        Section("Training", _training(found)),
        Section("Run time and cost", _cost(found)),
        Section("Dataset", _dataset(found)),
        Section("Every decision, and its reason", _plan(found)),
    ]
    subtitle = f"autoseg {__version__} · plan {plan.id}" + (
        f" · fingerprint {plan.fingerprint}" if plan.fingerprint else ""
    )
    write_text(output, page(plan.dataset, subtitle, _tiles(found), sections))
    return output


def _find(place: Workspace) -> Findings:
    from autoseg.experiment_planning.fingerprint import Fingerprint

    plan = Plan.load(place.plan)
    selection = None
    if place.selection.exists():
        from autoseg.inference.selection import Selection

        selection = Selection.load(place.selection)
        if selection.plan != plan.id:  # of a plan before
            selection = None
    fingerprint = Fingerprint.load(place.fingerprint) if place.fingerprint.exists() else None
    return Findings(plan, place, fingerprint, read_results(plan, place), selection)


def _tiles(found: Findings) -> list[tuple[str, str]]:
    """The numbers that a reader wants first."""
    tiles = []
    if found.selection is not None and found.selection.scores:
        best = found.selection.score
        tiles.append((f"mean Dice ({best.low:.3f} to {best.high:.3f}), cross-validated", f"{best.dice:.3f}"))
        tiles.append(("chosen", best.candidate.name))
    elif found.scored:
        name, cases = next(iter(found.scored.items()))
        mean = _mean_dice(cases, found.plan)
        tiles.append((f"mean Dice ({mean.low:.3f} to {mean.high:.3f}), {name}, held-out cases", f"{mean.value:.3f}"))
    if found.fingerprint is not None:
        tiles.append(("training cases", f"{len(found.fingerprint.cases)}"))
        tiles.append(("structures", f"{len(found.plan.labels.names)}"))
    done = sum(len(folds) for folds in found.results.values())
    if done:
        tiles.append((f"folds trained, of {len(found.plan.configurations)} configurations", f"{done}"))
        seconds = sum(fold.seconds for folds in found.results.values() for fold in folds)
        tiles.append(("of training", format_seconds(seconds)))
    else:
        tiles.append(("configurations planned", f"{len(found.plan.configurations)}"))
    return tiles


# ---- what was chosen


def _choice(found: Findings) -> str:
    selection = found.selection
    if selection is None:
        return ""
    parts = []
    if selection.scores:
        best = selection.score
        parts.append(
            paragraph(
                Html(
                    f"<b>{text(best.candidate.name)}</b>: mean Dice {best.dice:.4f} ({best.low:.4f} to "
                    f"{best.high:.4f}) over {selection.cases} cases, each predicted by a fold that did not train on it."
                ),
                kind="lead",
            )
        )
        rows = [
            Row(
                score.candidate.name, (), score.dice, score.low, score.high, strong=score == best,
                note=f"{score.dice:.4f} ({score.low:.4f}–{score.high:.4f})",
            )
            for score in selection.scores
        ]  # fmt: skip
        parts.append(row_chart(rows, title="Every candidate: mean Dice with its 95 % interval over the cases"))
    else:
        names = " + ".join(member.configuration for member in selection.chosen.members)
        parts.append(paragraph(Html(f"<b>{text(names)}</b>"), kind="lead"))
    if selection.rungs:
        parts.append(_rungs(selection))
    if selection.calibration_error is not None:
        before, after = selection.calibration_error
        parts.append(
            paragraph(
                f"Expected calibration error of the probabilities: {before:.4f} before, {after:.4f} after dividing "
                f"logits by {selection.chosen.temperature:.3g}."
            )
        )
    return "".join(parts) + heading("The decisions") + _decisions(selection.decisions)


def _rungs(selection: Selection) -> str:
    """Where candidates were compared on the way, and who was trained no further."""
    parts = [
        heading("Successive halving"),
        paragraph(
            "Candidates were compared before all were trained to their end. One is dropped only where the whole "
            "interval of its paired difference from the leader, over the cases, lies below zero."
        ),
    ]
    for rung in selection.rungs:
        if not rung.decided:
            continue
        rows = [
            (
                standing.contender,
                "leads" if standing.contender == rung.leader
                else "dropped" if standing.dropped
                else f"goes on: {standing.spared}" if standing.spared else "goes on",
                f"{standing.dice:.4f}",
                "" if standing.contender == rung.leader
                else f"{standing.difference:+.4f} ({standing.low:+.4f} to {standing.high:+.4f})",
                format_seconds(standing.trained_seconds),
            )
            for standing in rung.standings
        ]  # fmt: skip
        leader = next((i for i, s in enumerate(rung.standings) if s.contender == rung.leader), None)
        header = ("Candidate", "", "Mean Dice", "Difference from the leader", "Trained")
        parts.append(paragraph(f"Rung {rung.number}: {rung.name}, {rung.cases} held-out cases", kind="sub"))
        parts.append(table(header, rows, words=2, strong=leader))
    return "".join(parts)


# ---- scores


def _scores(found: Findings) -> str:
    scored, names = found.scored, found.plan.labels.names
    if not scored:
        return ""
    rows: list[tuple[object, ...]] = []
    for name, cases in scored.items():
        means = [_mean_of(cases, names, metric) for metric in SHOWN_METRICS]
        count = sum(bool(fold.cases) for fold in found.results[name])
        rows.append(
            (
                Html(f"{text(name)} <small>trained no further</small>") if name in found.given_up else name,
                f"{count}",
                f"{len(cases)}",
                *(_interval(mean, m) for mean, m in zip(means, SHOWN_METRICS, strict=True)),
            )
        )
    header = ("Configuration", "Folds", "Cases", *map(_title, SHOWN_METRICS))
    parts = [
        paragraph(
            "Held-out cases: each is predicted by a fold that did not train on it. Means over the structures of their "
            "means over the cases, with 95 % bootstrap intervals over the cases; cases in which neither mask shows a "
            "structure do not count for it, and distances to an empty mask, which are infinite, are left out."
        ),
        table(header, rows),
    ]
    for name, cases in scored.items():
        body = _by_structure(cases, names) + _by_case(cases, names)
        parts.append(folded(name, body, note=_short(_mean_dice(cases, found.plan)), opened=name in found.chosen))
    failed = {case: why for folds in found.results.values() for fold in folds for case, why in fold.failed.items()}
    if failed:
        parts.append(heading("Cases that could not be scored") + facts(list(failed.items())))
    return "".join(parts)


def _by_structure(cases: Scores, names: Sequence[str]) -> str:
    rows: list[tuple[object, ...]] = []
    chart = []
    for name in names:
        means = {metric: mean_over_cases([column(cases, name, metric)]) for metric in SHOWN_METRICS}
        rows.append((name, f"{means['dice'].cases}", *(_interval(means[metric], metric) for metric in SHOWN_METRICS)))
        dice = column(cases, name, "dice")
        known = {case: float(d) for case, d in zip(cases, dice, strict=True) if math.isfinite(d)}
        worst = dict(sorted(known.items(), key=lambda item: item[1])[:1])
        mean = means["dice"]
        if known:
            chart.append(Row(name, tuple(known.values()), mean.value, mean.low, mean.high, _short(mean), worst))
    header = ("Structure", "Cases", *(_title(metric) for metric in SHOWN_METRICS))
    drawn = row_chart(
        chart, title="Dice of every held-out case, and the mean with its interval", ends=_dice_ends(chart)
    )
    return table(header, rows) + (drawn if chart else "")


def _by_case(cases: Scores, names: Sequence[str]) -> str:
    ranked = case_means(cases, "dice")
    rows = [
        (case, f"{mean:.4f}", *(_number(cases[case].get(name, {}).get("dice")) for name in names[:8]))
        for case, mean in list(ranked.items())[:MOST_CASES_LISTED]
    ]
    note = "the worst first" if len(ranked) <= MOST_CASES_LISTED else f"the {MOST_CASES_LISTED} worst of {len(ranked)}"
    body = table(("Case", "Mean", *names[:8]), rows)
    return folded("Dice case by case", body, note=note, screen_only=True) if rows else ""


def _dice_ends(rows: Sequence[Row]) -> tuple[float, float]:
    lowest = min((value for row in rows for value in row.values), default=0.0)
    return (max(0.0, math.floor(10 * lowest) / 10), 1.0)


def _image_scores(found: Findings) -> str:
    """PSNR and SSIM of super-resolved images over all folds that are there."""
    rows: list[tuple[object, ...]] = []
    charts = []
    for name, folds in found.results.items():
        cases = {case: scores for fold in folds for case, scores in fold.images.items()}
        if not cases:
            continue
        columns = {
            metric: np.array([np.nan if (s := row.get(metric)) is None else float(s) for row in cases.values()])
            for metric in IMAGE_METRICS
        }
        means = {metric: mean_over_cases([values]) for metric, values in columns.items()}
        count = sum(bool(fold.images) for fold in folds)
        rows.append((name, f"{count}", f"{len(cases)}", *(_cell(mean, 3) for mean in means.values())))
        charts.append(_dots(name, columns["psnr"], means["psnr"]))
    if not rows:
        return ""
    titles = [f"{m.title} [{m.unit}]" if m.unit else m.title for m in IMAGE_METRICS.values()]
    note = "Of held-out cases whose fine image is known, with the 95 % bootstrap interval over the cases."
    drawn = row_chart(charts, title="PSNR of every held-out case, and the mean with its interval", unit="dB")
    return paragraph(note) + table(("Configuration", "Folds", "Cases", *titles), rows) + drawn


def _dots(name: str, values: NDArray[np.float64], mean: Mean) -> Row:
    return Row(name, tuple(values[np.isfinite(values)].tolist()), mean.value, mean.low, mean.high, _short(mean, 2))


def _mean_of(cases: Scores, names: Sequence[str], metric: str) -> Mean:
    return mean_over_cases([column(cases, name, metric) for name in names])


def _mean_dice(cases: Scores, plan: Plan) -> Mean:
    return _mean_of(cases, plan.labels.names, "dice")


def _title(metric: str) -> str:
    how = METRICS[metric]
    return f"{how.title} [{how.unit}]" if how.unit else how.title


def _interval(mean: Mean, metric: str) -> Html:
    return _cell(mean, 4 if not METRICS[metric].unit else 2)


def _cell(mean: Mean, digits: int) -> Html:
    """The mean with its interval beneath it."""
    if not mean.cases:
        return Html("<small>nothing to score</small>")
    return Html(f"{mean.value:.{digits}f}<small>{mean.low:.{digits}f} to {mean.high:.{digits}f}</small>")


def _short(mean: Mean, digits: int = 3) -> str:
    if not mean.cases:
        return "nothing to score"
    return f"{mean.value:.{digits}f} ({mean.low:.{digits}f}–{mean.high:.{digits}f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# ---- cases


def _overlays(found: Findings) -> str:
    """The worst and the median case, first of all folds, then of each; what makes the file too large is left out."""
    if not found.scored:
        return ""
    room, parts, left_out = MOST_PICTURE_BYTES, [], 0
    for name in found.scored:
        shown, others = "", ""
        for drawn in _drawn_cases(name, found.results[name]):
            size = drawn.path.stat().st_size
            if size > room:
                left_out += 1
                continue
            room -= size
            one = picture(drawn.path.read_bytes(), drawn.caption)
            shown, others = (shown + one, others) if drawn.of_all_folds else (shown, others + one)
        rest = folded("The same of the other folds", others, screen_only=True) if others else ""
        if shown or rest:
            parts.append(folded(name, shown + rest, opened=name in found.chosen))
    if left_out:
        parts.append(paragraph(f"{left_out} more pictures are in the folders of the folds; the report is kept small."))
    return "".join(parts) or paragraph("No pictures were drawn.")


@dataclass(frozen=True)
class DrawnCase:
    """A picture of a held-out case."""

    path: Path
    caption: str
    of_all_folds: bool
    """Whether it stands for all folds: their worst case, or of their median cases the one in the middle."""


def _drawn_cases(name: str, folds: Sequence[FoldResult]) -> list[DrawnCase]:
    """The worst case and the median case of each fold, those that stand for all folds first."""
    drawn: list[DrawnCase] = []
    for rank in ("worst", "median"):
        ranked = [(_dice_of(rank, fold), fold) for fold in folds if rank in fold.pictures and fold.cases]
        ranked.sort(key=lambda one: one[0][1])
        first = 0 if rank == "worst" else (len(ranked) - 1) // 2
        for i, ((case, dice), fold) in enumerate(ranked):
            which = f": {case}, mean Dice {dice:.3f}" if rank == "worst" else ""
            caption = f"{name}, fold {fold.name}: the {rank} held-out case{which}"
            drawn.append(DrawnCase(fold.pictures[rank], caption, i == first))
    return sorted(drawn, key=lambda one: not one.of_all_folds)


def _dice_of(rank: str, fold: FoldResult) -> tuple[str, float]:
    ranked = list(case_means(fold.cases, "dice").items()) or [("", math.nan)]
    return ranked[0 if rank == "worst" else (len(ranked) - 1) // 2]


# ---- training, time and cost


def _training(found: Findings) -> str:
    parts = []
    for name, folds in found.trained.items():
        drawn = [fold for fold in folds if fold.rows]
        if not drawn:
            continue
        longest = max(row.seconds for fold in drawn for row in fold.rows)
        unit, length = ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)
        times = {fold.name: [row.seconds / length for row in fold.rows] for fold in drawn}
        loss = [
            Line(f"fold {fold.name}", times[fold.name], [row.loss for row in fold.rows], i % COLOURS)
            for i, fold in enumerate(drawn)
        ]
        dice = [
            Line(f"fold {fold.name}", times[fold.name], [row.dice for row in fold.rows], i % COLOURS)
            for i, fold in enumerate(drawn)
        ]
        charts = line_chart(loss, title="Training loss", x=unit, y="")
        if any(row.dice is not None for fold in drawn for row in fold.rows):
            charts += line_chart(dice, title="Dice on held-out patches (a trend, not a score)", x=unit, y="")
        parts.append(heading(name) + f'<div class="charts">{charts}</div>' + legend([line.name for line in loss]))
    return "".join(parts)


def _cost(found: Findings) -> str:
    if not found.trained:
        return ""
    rows: list[tuple[object, ...]] = []
    hours: dict[str, float] = {}
    for name, folds in found.trained.items():
        forecast = found.plan.forecasts.get(name)
        for fold in folds:
            device = str(fold.training.get("device", found.plan.budget.device))
            processes = int(fold.training.get("processes", 1))
            hours[device] = hours.get(device, 0.0) + processes * fold.seconds / 3600
            peak = fold.training.get("peak_memory_bytes")
            rows.append(
                (
                    name,
                    fold.name if fold.training.get("finished", True) else f"{fold.name} (not finished)",
                    device if processes == 1 else f"{processes} x {device}",
                    f"{fold.steps}",
                    format_seconds(fold.seconds),
                    f"{fold.seconds / fold.steps:.3g}" if fold.steps else "",
                    format_bytes(peak) if peak else "not measured",
                    format_bytes(forecast.memory_bytes) if forecast else "",
                )
            )
    header = ("Configuration", "Fold", "Device", "Steps", "Time", "Seconds a step", "Peak memory", "Forecast of a step")
    total = sum(fold.seconds for folds in found.trained.values() for fold in folds)
    spent = ", ".join(f"{value:.2f} device hours on {device}" for device, value in hours.items())
    sizes = [
        (what, format_bytes(size))
        for what, path in (
            ("Preprocessed cases", found.place.root / "preprocessed"),
            ("Trained folds with their held-out predictions", found.place.models),
            ("Exported model", found.place.model.with_suffix(".zip")),
        )
        if (size := _size_of(path))
    ]
    note = (
        f"{format_seconds(total)} of training in all: {spent}. Planning, preprocessing and the prediction of held-out "
        "cases are not in it. The peak on a CPU is that of the whole process. Energy was not measured."
    )
    return paragraph(note) + table(header, rows, words=3) + heading("On the disk") + facts(sizes)


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---- the dataset


def _dataset(found: Findings) -> str:
    plan, seen = found.plan, found.fingerprint
    pairs: list[tuple[str, object]] = [
        ("Channels", ", ".join(plan.channels)),
        ("Labels", ", ".join(plan.labels.names) or "none"),
    ]
    if seen is None:
        return facts(pairs)
    pairs += [
        ("Cases", f"{len(seen.cases)}"),
        ("Median image", f"{_sizes(seen.median_shape)} voxels of {_sizes(seen.median_spacing)} mm (z, y, x)"),
        ("Anisotropy", f"{seen.anisotropy:g} (coarsest by finest median spacing)"),
        ("Cut away", f"{seen.cropped_share:.0%} of the median case, because its border is zero"),
        ("Left/right pairs", ", ".join(f"{p.left} and {p.right}" for p in seen.mirrored_pairs) or "none"),
    ]
    if seen.dropped_cases:
        pairs.append(("Left out", ", ".join(seen.dropped_cases)))
    return facts(pairs) + _fingerprint_charts(seen) + _structures(seen) + _case_table(seen)


def _fingerprint_charts(seen: Fingerprint) -> str:
    axes = [axis for axis in range(3) if seen.dimensions == 3 or any(case.shape[axis] > 1 for case in seen.cases)]
    shapes = [_spread("zyx"[axis], [case.shape[axis] for case in seen.cases]) for axis in axes]
    spacings = [_spread("zyx"[axis], [case.spacing[axis] for case in seen.cases]) for axis in axes]
    scale, unit = (1000, "ml") if seen.dimensions == 3 else (1, "mm²")
    volumes = [
        _spread(
            structure.name,
            [case.class_voxels[i] * math.prod(case.spacing) / scale for case in seen.cases if case.class_voxels[i]],
        )
        for i, structure in enumerate(seen.classes)
        if structure.cases
    ]
    parts = [
        row_chart(shapes, title="Size of each case after cropping", unit="voxels"),
        row_chart(spacings, title="Spacing of each case", unit="mm"),
    ]
    if volumes:
        what = "Volume" if seen.dimensions == 3 else "Area"
        parts.append(
            row_chart(volumes, title=f"{what} of each structure in each case that shows it", unit=unit, log=True)
        )
    for number, channel in enumerate(seen.channels):
        rows = [
            Row(structure.name, (), s.median, s.percentile_00_5, s.percentile_99_5, f"{s.mean:.4g} ± {s.std:.3g}")
            for structure in seen.classes
            if number < len(structure.intensities)
            for s in [structure.intensities[number]]
        ]
        if rows:
            parts.append(
                row_chart(rows, title=f"Intensities in {channel}: median, 0.5 % to 99.5 %; mean ± std at the right")
            )
    return "".join(parts)


def _spread(name: str, values: Sequence[float]) -> Row:
    median = float(np.median(values))
    return Row(
        name, tuple(float(v) for v in values), median, note=f"{median:.4g} ({min(values):.4g}–{max(values):.4g})"
    )


def _structures(seen: Fingerprint) -> str:
    rows = [
        (c.name, f"{c.cases}", f"{c.frequency:.2%}", f"{c.median_volume_mm3:g}", f"{c.median_components:g}")
        for c in seen.classes
    ]
    unit = "mm³" if seen.dimensions == 3 else "mm²"
    header = ("Structure", "Cases", "Share of voxels", f"Median size [{unit}]", "Median components")
    return table(header, rows) if rows else ""


def _case_table(seen: Fingerprint) -> str:
    rows = [
        (case.identifier, _sizes(case.size_before_cropping), _sizes(case.shape), _sizes(case.spacing), case.orientation)
        for case in seen.cases[:MOST_CASES_LISTED]
    ]
    header = ("Case", "Size (z, y, x)", "Cropped", "Spacing [mm]", "Orientation of the file")
    rest = len(seen.cases) - len(rows)
    note = f"{rest} more are in fingerprint.json" if rest else ""
    return folded("Every case", table(header, rows, words=len(header)), note=note, screen_only=True)


# ---- the plan


def _plan(found: Findings) -> str:
    plan = found.plan
    own = {c.name: [d for d in plan.decisions if d.name.startswith(f"{c.name}.")] for c in plan.configurations}
    shared = [d for d in plan.decisions if not any(d in decisions for decisions in own.values())]
    parts = [
        paragraph(
            Html(
                f"{_kind('fixed')} never changes; {_kind('rule')} follows from the dataset and the budget; "
                f"{_kind('empirical')} was decided by cross-validation."
            )
        ),
        heading("The dataset and the budget"),
    ]
    if len(shared) <= OPEN_DECISIONS:
        parts.append(_decisions(shared))
    else:
        groups: dict[str, list[Decision]] = {}
        for decision in shared:
            groups.setdefault(GROUPS.get(decision.name.split(".")[0], OTHER_GROUP), []).append(decision)
        parts += [folded(name, _decisions(some), note=f"{len(some)} decisions") for name, some in groups.items()]
    for configuration in plan.configurations:
        name = configuration.name
        body = _configuration(plan, configuration) + _decisions(own[name], prefix=f"{name}.")
        alone = len(plan.configurations) == 1
        parts.append(folded(f"Configuration {name}", body, note=_brief(configuration), opened=alone))
    return "".join(parts)


def _brief(c: Configuration) -> str:
    return f"{c.topology}, patch {_sizes(c.patch_size)}, batch {c.batch_size}"


def _configuration(plan: Plan, c: Configuration) -> str:
    """The network stage by stage, and what it was forecast to cost."""
    a = c.architecture
    stages = [
        (f"{i + 1}", f"{features}", _sizes(stride), _sizes(kernel), f"{convolutions}")
        for i, (features, stride, kernel, convolutions) in enumerate(
            zip(a.features, a.strides, a.kernels, a.encoder_convs, strict=True)
        )
    ]
    pairs: list[tuple[str, object]] = [
        ("Patch, batch", f"{_sizes(c.patch_size)} voxels (z, y, x), {c.batch_size}"),
        ("Grid", f"{_spacing(c)} mm; the median image has {_sizes(c.median_shape)} voxels"),
    ]
    if a.context != "none":
        pairs.append(
            ("Slices", f"{a.context_slices} are seen to label the middle one ({a.context}), axis {c.view_axis}")
        )
    if c.super_resolves:
        pairs.append(
            ("Super-resolution", f"{_sizes(c.sr_scale)} times as fine; fine truth: {c.sr_source}; head: {a.head}")
        )
    if c.previous_stage:
        pairs.append(("Previous stage", c.previous_stage))
    forecast = plan.forecasts.get(c.name)
    if forecast is not None:
        pairs += [
            ("Memory of a step", format_bytes(forecast.memory_bytes)),
            ("Time of a fold", format_seconds(forecast.fold_seconds) if forecast.fold_seconds else "not known"),
            ("Parameters", f"{forecast.parameters / 1e6:.2f} M"),
        ]
    header = ("Stage", "Features", "Stride", "Kernel", "Convolutions")
    return facts(pairs) + table(header, stages)


def _spacing(c: Configuration) -> str:
    return " × ".join("as it is" if s is None else f"{s:.4g}" for s in c.preprocessing.spacing)


def _decisions(decisions: Sequence[Decision], *, prefix: str = "") -> str:
    if not decisions:
        return paragraph("Nothing was decided.")
    rows = "".join(
        f"<tr><td><code>{text(d.name.removeprefix(prefix))}</code></td>"
        f'<td class="value">{text(_value(d.value, d.name))}</td><td>{_kind(d.kind)}</td>'
        f'<td class="because">{text(d.because)}</td></tr>'
        for d in decisions
    )
    head = "<tr><th>What</th><th>Value</th><th>Kind</th><th>Because</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _kind(kind: str) -> Html:
    return Html(f'<span class="kind {text(kind)}">{text(kind)}</span>')


def _value(value: Any, name: str = "") -> str:
    """A decision's value as a reader writes it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        units = {"_bytes": format_bytes, "_seconds": format_seconds}
        written = next((way for ending, way in units.items() if name.endswith(ending)), None)
        return written(value) if written else f"{value:.6g}" if isinstance(value, float) else f"{value}"
    if isinstance(value, Mapping):
        entries = ((str(key), entry) for key, entry in value.items() if entry is not None)
        return "; ".join(f"{key.replace('_', ' ')} {_value(entry, key)}" for key, entry in entries)
    if isinstance(value, list | tuple):
        is_size = len(value) == 3 and "ax" not in name and all(type(v) in (int, float) for v in value)
        return _sizes(value) if is_size else ", ".join(_value(entry) for entry in value) or "none"
    return str(value)


def _sizes(values: Sequence[float]) -> str:
    return " × ".join(f"{v:.6g}" for v in values)
