"""The artefacts of a workspace -> one self-contained HTML page: dataset, plan with its reasons, training, scores.

It shows what is there: before any training the dataset and the plan, afterwards curves, cross-validated scores and
pictures too. Nothing in it is fetched from anywhere; it prints, and follows the browser's dark mode.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoseg import __version__
from autoseg.errors import PlanError
from autoseg.files import read_json, write_text
from autoseg.plan import Configuration, Decision, Plan
from autoseg.units import format_bytes, format_seconds
from autoseg.workspace import HISTORY, PICTURES, SUMMARY, VALIDATION, Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autoseg.experiment_planning.fingerprint import Fingerprint

PICTURES_SHOWN = ("worst", "median")
MOST_PICTURE_BYTES = 3_000_000  # of all overlays together; a report is mailed
RESAMPLES = 2000  # of the bootstrap over cases
SEED = 0
STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.sub, figcaption { opacity: .75; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom-width: 2px; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.because { max-width: 40rem; }
code { background: var(--soft); padding: 0 .25rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; background: #fff; border-radius: 4px; }
nav a { margin-right: 1rem; }
@media print {
  body { max-width: none; margin: 0; font-size: 11px; }
  nav { display: none; }
  h2, figure, tr { break-inside: avoid; }
}
"""


@dataclass(frozen=True)
class FoldRecord:
    """What a trained fold left behind."""

    name: str
    steps: Sequence[int]
    minutes: Sequence[float]
    loss: Sequence[float]
    dice: Sequence[float | None]
    """Online Dice on held-out patches."""
    cases: Mapping[str, Mapping[str, float | None]]
    """Case -> structure -> Dice of the held-out prediction; empty where it is not scored yet."""
    pictures: Mapping[str, Path]
    """By rank: best, median, worst."""


def write_report(place: Workspace, output: Path | None = None) -> Path:
    """Write the report of a workspace; by default `report.html` in it. Raises PlanError where there is no plan."""
    output = output or place.report
    if not place.plan.exists():
        raise PlanError(f"{place.plan}: there is no plan yet, so there is nothing to report.")
    plan = Plan.load(place.plan)
    folds = {c.name: _folds(place, c.name) for c in plan.configurations}
    sections: list[tuple[str, str]] = [("Dataset", _dataset(plan, place))]
    scored = {name: found for name, found in folds.items() if any(fold.cases for fold in found)}
    if scored:
        sections.insert(0, ("Scores", _scores(plan, scored)))
        sections.append(("Worst and median cases", _overlays(scored)))
    trained = {name: found for name, found in folds.items() if found}
    if trained:
        sections.append(("Training", _training(trained)))
    selection = place.selection
    if selection.exists():
        chosen = read_json(selection, error=PlanError, what="selection")
        sections.insert(1, ("What was chosen, and why", _table_of_decisions(_decisions_of(chosen))))
    sections += [(c.name, _configuration(plan, c)) for c in plan.configurations]
    shared = [d for d in plan.decisions if d.name.split(".")[0] not in {c.name for c in plan.configurations}]
    sections.append(("Decisions about the dataset and the budget", _table_of_decisions(shared)))
    write_text(output, _page(plan, sections))
    return output


def _page(plan: Plan, sections: Sequence[tuple[str, str]]) -> str:
    links = " ".join(f'<a href="#s{i}">{_text(title)}</a>' for i, (title, _) in enumerate(sections))
    body = "\n".join(
        f'<section><h2 id="s{i}">{_text(title)}</h2>\n{part}</section>' for i, (title, part) in enumerate(sections)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>autoseg: {_text(plan.dataset)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{_text(plan.dataset)}</h1><p class="sub">autoseg {__version__}, plan {plan.id}</p>'
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


# ---- sections


def _dataset(plan: Plan, place: Workspace) -> str:
    facts = [("Channels", ", ".join(plan.channels)), ("Labels", ", ".join(plan.labels.names))]
    if not place.fingerprint.exists():
        return _facts(facts)
    from autoseg.experiment_planning.fingerprint import Fingerprint

    found = Fingerprint.load(place.fingerprint)
    facts += [
        ("Cases", f"{len(found.cases)}"),
        ("Median image", f"{_sizes(found.median_shape)} voxels of {_sizes(found.median_spacing)} mm (z, y, x)"),
        ("Anisotropy", f"{found.anisotropy:g}"),
        ("Left/right pairs", ", ".join(f"{p.left} and {p.right}" for p in found.mirrored_pairs) or "none"),
    ]
    if found.dropped_cases:
        facts.append(("Left out", ", ".join(found.dropped_cases)))
    rows = [
        (c.name, f"{c.cases}", f"{c.frequency:.2%}", f"{c.median_volume_mm3:g}", f"{c.median_components:g}")
        for c in found.classes
    ]
    header = ("Structure", "Cases", "Share of voxels", "Median volume [mm3]", "Median components")
    return (
        _facts(facts)
        + _table(header, rows)
        + _figure(_draw_dataset(found), "Shapes, spacings and volumes of the cases.")
    )


def _configuration(plan: Plan, c: Configuration) -> str:
    forecast = plan.forecasts.get(c.name)
    facts = [
        ("Patch, batch", f"{_sizes(c.patch_size)}, {c.batch_size}"),
        ("Network", f"{len(c.architecture.features)} stages, {', '.join(map(str, c.architecture.features))} features"),
    ]
    if forecast is not None:
        facts += [
            ("Memory of a step", format_bytes(forecast.memory_bytes)),
            ("Time of a fold", format_seconds(forecast.fold_seconds) if forecast.fold_seconds else "not known"),
            ("Parameters", f"{forecast.parameters / 1e6:.2f} M"),
        ]
    own = [d for d in plan.decisions if d.name.startswith(f"{c.name}.")]
    return _facts(facts) + _table_of_decisions(own, prefix=f"{c.name}.")


def _scores(plan: Plan, scored: Mapping[str, Sequence[FoldRecord]]) -> str:
    """Held-out Dice over all folds that are there, by structure, with bootstrap intervals over the cases."""
    rows = []
    for name, folds in scored.items():
        cases = {case: dice for fold in folds for case, dice in fold.cases.items()}
        cells = [_interval([case.get(structure) for case in cases.values()]) for structure in plan.labels.names]
        means = [_mean([case.get(structure) for case in cases.values()]) for structure in plan.labels.names]
        count = sum(bool(fold.cases) for fold in folds)
        rows.append((name, f"{count}", f"{len(cases)}", f"{_mean(means):.4f}", *cells))
    header = ("Configuration", "Folds", "Cases", "Mean Dice", *plan.labels.names)
    note = "<p>Dice of held-out cases, with the 95 % bootstrap interval of its mean over the cases.</p>"
    return note + _table(header, rows)


def _overlays(scored: Mapping[str, Sequence[FoldRecord]]) -> str:
    parts, spent = [], 0
    for name, folds in scored.items():
        for fold in folds:
            for rank in PICTURES_SHOWN:
                path = fold.pictures.get(rank)
                if path is None or spent + path.stat().st_size > MOST_PICTURE_BYTES:
                    continue
                spent += path.stat().st_size
                parts.append(_image(path.read_bytes(), f"{name}, fold {fold.name}: the {rank} held-out case"))
    return "".join(parts) or "<p>No pictures were drawn.</p>"


def _training(trained: Mapping[str, Sequence[FoldRecord]]) -> str:
    rows = [
        (name, fold.name, f"{fold.steps[-1]}", f"{fold.minutes[-1]:.1f}", f"{fold.loss[-1]:.4f}", _last(fold.dice))
        for name, folds in trained.items()
        for fold in folds
        if fold.steps
    ]
    total = sum(fold.minutes[-1] for folds in trained.values() for fold in folds if fold.minutes)
    header = ("Configuration", "Fold", "Steps", "Minutes", "Last loss", "Last patch Dice")
    note = f"<p>{format_seconds(60 * total)} of training in all.</p>"
    return note + _table(header, rows) + _figure(_draw_curves(trained), "Loss and online Dice of every fold.")


def _decisions_of(selection: Mapping[str, Any]) -> list[Decision]:
    return [Decision(d["name"], d["value"], d["kind"], d["because"]) for d in selection.get("decisions", [])]


# ---- what folds left behind


def _folds(place: Workspace, configuration: str) -> list[FoldRecord]:
    folder = place.fold(configuration, "0").parent
    return [found for path in sorted(folder.glob("fold_*")) if (found := _fold(path)) is not None]


def _fold(folder: Path) -> FoldRecord | None:
    import csv

    path = folder / HISTORY
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    summary = folder / VALIDATION / SUMMARY
    cases: dict[str, dict[str, float | None]] = {}
    if summary.is_file():
        content = read_json(summary, error=PlanError, what="summary of scores")
        cases = {
            case: {structure: row.get("dice") for structure, row in scores.items()}
            for case, scores in content.get("cases", {}).items()
        }
    pictures = {path.stem: path for path in (folder / VALIDATION / PICTURES).glob("*.png")}
    return FoldRecord(
        folder.name.removeprefix("fold_"),
        [int(row["step"]) for row in rows],
        [float(row["seconds"]) / 60 for row in rows],
        [float(row["loss"]) for row in rows],
        [float(row["dice"]) if row["dice"] else None for row in rows],
        cases,
        pictures,
    )


def _interval(values: Sequence[float | None]) -> str:
    known = np.array([v for v in values if v is not None], dtype=float)
    if not len(known):
        return "nothing to score"
    drawn = np.random.default_rng(SEED).integers(len(known), size=(RESAMPLES, len(known)))
    low, high = np.percentile(known[drawn].mean(axis=1), (2.5, 97.5))
    return f"{known.mean():.4f} ({low:.4f} to {high:.4f})"


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")


def _last(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{known[-1]:.4f}" if known else ""


# ---- figures


def _draw_dataset(found: Fingerprint) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        shapes, spacings, volumes = figure.subplots(1, 3)
        table = np.array([case.shape for case in found.cases], dtype=float)
        shapes.boxplot([table[:, axis] for axis in range(3)])
        shapes.set_xticks([1, 2, 3], ["z", "y", "x"])
        shapes.set_title("voxels")
        table = np.array([case.spacing for case in found.cases], dtype=float)
        spacings.boxplot([table[:, axis] for axis in range(3)])
        spacings.set_xticks([1, 2, 3], ["z", "y", "x"])
        spacings.set_title("spacing [mm]")
        names = [c.name for c in found.classes][:12]
        each = [
            [case.class_voxels[i] * float(np.prod(case.spacing)) / 1000 for case in found.cases if case.class_voxels[i]]
            for i in range(len(names))
        ]
        volumes.boxplot([values or [0.0] for values in each], orientation="horizontal")
        volumes.set_yticks(range(1, len(names) + 1), names)
        volumes.set_title("volume of a structure [ml]")

    return draw


def _draw_curves(trained: Mapping[str, Sequence[FoldRecord]]) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        loss, dice = figure.subplots(1, 2)
        for name, folds in trained.items():
            for fold in folds:
                label = f"{name}, fold {fold.name}"
                loss.plot(fold.minutes, fold.loss, label=label)
                shown = [(m, d) for m, d in zip(fold.minutes, fold.dice, strict=True) if d is not None]
                dice.plot([m for m, _ in shown], [d for _, d in shown], label=label)
        loss.set_title("training loss")
        dice.set_title("Dice on held-out patches")
        for axes in (loss, dice):
            axes.set_xlabel("minutes")
        dice.legend(fontsize="small")

    return draw


def _figure(draw: Callable[[Figure], None], caption: str) -> str:
    from matplotlib.figure import Figure as NewFigure  # without pyplot, whose open figures are the caller's

    figure = NewFigure(figsize=(11, 3.6), layout="constrained")
    draw(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    return _image(content.getvalue(), caption)


def _image(content: bytes, caption: str) -> str:
    data = base64.b64encode(content).decode()
    shown = _text(caption)
    return f'<figure><img alt="{shown}" src="data:image/png;base64,{data}"><figcaption>{shown}</figcaption></figure>'


# ---- HTML


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _sizes(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts) + "</table>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if i == 0 else ' class=n'}>{_text(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _table_of_decisions(decisions: Sequence[Decision], *, prefix: str = "") -> str:
    if not decisions:
        return "<p>Nothing was decided.</p>"
    rows = "".join(
        f"<tr><td><code>{_text(d.name.removeprefix(prefix))}</code></td><td>{_text(_value(d.value))}</td>"
        f'<td>{_text(d.kind)}</td><td class="because">{_text(d.because)}</td></tr>'
        for d in decisions
    )
    head = "<tr><th>What</th><th>Value</th><th>Kind</th><th>Because</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return " x ".join(_value(entry) for entry in value) if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
