"""Mean validation Dice of fold 0 after 1, 5 and 30 minutes of training, by recipe; the plan is made for each budget.

python benchmarks/training.py ../shared/data/Dataset004_Hippocampus [--minutes 1 5 30] [--recipes adamw sgd]

Everything runs on the command line as users type it: plan-and-preprocess with --fold-time, then train-fold, which
scores the held-out cases. "last weights" is the Dice of the optimiser's own weights, which the averaged ones replace.
Run it with nothing else on the machine: the budget is wall-clock time. Each run adds a row to the JSON file given with
--json, so that long runs may be spread over days.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from measure import bytes_text, machine, markdown_table, measure

from autoseg.checkpoint import Checkpoint, load_tensors
from autoseg.stages import load_plan, validate
from autoseg.training.loop import RESUME_FORMAT
from autoseg.training.settings import RECIPES
from autoseg.workspace import CHECKPOINT, RESUME

HEADER = ("minutes", "recipe", "base width", "batch", "mirrored", "steps", "s/step", "Dice", "last weights", "memory")


def main() -> None:
    """Train, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 30])
    parser.add_argument("--recipes", nargs="+", default=["adamw"])
    parser.add_argument("--mirroring", choices=("planned", "on", "off"), default="planned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file that collects the rows of several runs")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())
    for minutes in options.minutes:
        for recipe in options.recipes:
            rows.append(_train(options, minutes=minutes, recipe=recipe))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")

    print(machine())
    print(f"{options.dataset.name}, {options.configuration}, fold {options.fold}\n")
    print(markdown_table(HEADER, [[row[name] for name in HEADER] for row in rows]))


def _train(options: argparse.Namespace, *, minutes: float, recipe: str) -> dict[str, Any]:
    """One plan, one training, one row."""
    autoseg = [sys.executable, "-m", "autoseg"]
    with tempfile.TemporaryDirectory() as folder:
        common = ["--workspace", folder, "--quiet"]
        fold_time = ["--fold-time", f"{round(minutes * 60)}s"]
        chosen = ["--configurations", options.configuration]
        measure([*autoseg, "plan-and-preprocess", options.dataset, *chosen, *fold_time, *common])
        workspace = Path(folder) / options.dataset.name
        plan = json.loads((workspace / "plan.json").read_text())
        (configuration,) = [c for c in plan["configurations"] if c["name"] == options.configuration]
        configuration["training"]["recipe"] = recipe
        if options.mirroring != "planned":
            configuration["training"]["mirror_axes"] = [0, 1, 2] if options.mirroring == "on" else []
        (workspace / "plan.json").write_text(json.dumps(plan))
        command = [*autoseg, "train-fold", options.dataset, options.configuration, options.fold]
        run = measure([*command, "--time", f"{round(minutes * 60)}s", "--seed", str(options.seed), *common])
        trained = workspace / "models" / options.configuration / f"fold_{options.fold}"
        last = (trained / "history.csv").read_text().splitlines()[-1].split(",")
        summary = json.loads((trained / "validation" / "summary.json").read_text())
        unaveraged = _score_last_weights(options, Path(folder)) if RECIPES[recipe].ema else None
    steps, seconds = int(last[0]), float(last[1])
    by_class = _dice_by_class(summary)
    return {
        "minutes": minutes,
        "recipe": recipe,
        "base width": configuration["architecture"]["features"][0],
        "batch": configuration["batch_size"],
        "mirrored": "yes" if configuration["training"]["mirror_axes"] else "no",
        "steps": steps,
        "s/step": f"{seconds / steps:.3f}",
        "Dice": f"{mean(by_class.values()):.4f}",
        "last weights": "" if unaveraged is None else f"{unaveraged:.4f}",
        "by class": ", ".join(f"{name} {value:.3f}" for name, value in by_class.items()),
        "memory": bytes_text(run.peak_bytes),
    }


def _score_last_weights(options: argparse.Namespace, workspace: Path) -> float:
    """Mean Dice with the optimiser's own weights in place of the averaged ones, which are overwritten."""
    plan, place = load_plan(options.dataset, workspace)
    folder = place.fold(options.configuration, options.fold)
    tensors, _ = load_tensors(folder / RESUME, RESUME_FORMAT)
    prefix = "now/network/"
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    replace(Checkpoint.load(folder / CHECKPOINT), weights=weights).save(folder / CHECKPOINT)
    validate(options.dataset, plan, options.configuration, options.fold, workspace=place)
    return mean(_dice_by_class(json.loads((folder / "validation" / "summary.json").read_text())).values())


def _dice_by_class(summary: dict[str, Any]) -> dict[str, float]:
    return {name: entry["dice"]["mean"] for name, entry in summary["by_class"].items()}


if __name__ == "__main__":
    main()
