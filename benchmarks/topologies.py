"""2d, 2.5d_stack, 2.5d_reduce and 3d_fullres on a dataset of thick slices, each for the same time: which wins?

python benchmarks/topologies.py ../shared/data/Dataset010_SunnybrookLV --minutes 10 --json rows.json
python benchmarks/topologies.py --table rows.json

Each topology is planned for the budget, trained on one fold and scored on its held-out cases, with the commands that
users type. The planner's first choice is marked. Run it with nothing else on the machine: the budget is wall-clock
time. Rows are added to --json, so that long runs may be spread over days.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import bytes_text, machine, markdown_table, measure

from autoseg.plan import Plan

AUTOSEG = [sys.executable, "-m", "autoseg"]
TOPOLOGIES = ("2d", "2.5d_stack", "2.5d_reduce", "3d_fullres")
HEADER = ("configuration", "minutes", "seed", "patch", "batch", "width", "parameters", "steps", "s/step")
SCORES = {"dice": "Dice", "assd": "ASSD mm", "hd95": "HD95 mm", "nsd": "NSD"}


def main() -> None:
    """Train, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--configurations", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--fold", default="0")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="file that collects the rows of several runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this JSON file and end")
    options = parser.parse_args()

    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    if options.dataset is None:
        parser.error("a dataset is needed")
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for configuration in options.configurations:
        for seed in options.seeds:
            rows.append(_train(options, configuration, seed))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(machine())
    print(f"{options.dataset.name}, fold {options.fold}, {options.minutes:g} minutes each\n")
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a training; the planner's first choice has an asterisk, the best Dice is bold."""
    best = max(row["dice"] for row in rows)
    lines = []
    for row in rows:
        name = row["configuration"] + (" *" if row["configuration"] == row["first choice"] else "")
        scores = [f"{row[metric]:.3f}" for metric in SCORES]
        scores[0] = f"**{scores[0]}**" if row["dice"] == best else scores[0]
        lines.append([name, *(row[key] for key in HEADER[1:]), *scores, row["memory"]])
    note = "\\* the planner's first choice"
    return markdown_table((*HEADER, *SCORES.values(), "memory"), lines) + f"\n\n{note}"


def _train(options: argparse.Namespace, configuration: str, seed: int) -> dict[str, Any]:
    """Plan, train, score: one row."""
    seconds = f"{round(options.minutes * 60)}s"
    with tempfile.TemporaryDirectory() as folder:
        common = ["--workspace", folder, "--quiet"]
        # planned with the others, so that the plan says which of them it would train first
        chosen = ["--configurations", ",".join(TOPOLOGIES), "--fold-time", seconds]
        measure([*AUTOSEG, "plan-and-preprocess", options.dataset, *chosen, *common])
        command = [*AUTOSEG, "train-fold", options.dataset, configuration, options.fold, "--seed", str(seed)]
        run = measure([*command, "--time", seconds, *common])
        workspace = Path(folder) / options.dataset.name
        plan = Plan.load(workspace / "plan.json")
        trained = workspace / "models" / configuration / f"fold_{options.fold}"
        last = (trained / "history.csv").read_text().splitlines()[-1].split(",")
        summary = json.loads((trained / "validation" / "summary.json").read_text())
    steps, spent = int(last[0]), float(last[1])
    c = plan.configuration(configuration)
    return {
        "configuration": configuration,
        "first choice": next(d.value for d in plan.decisions if d.name == "first_choice"),
        "minutes": options.minutes,
        "seed": seed,
        "patch": "x".join(map(str, c.patch_size)),
        "batch": c.batch_size,
        "width": c.architecture.features[0],
        "parameters": f"{plan.forecasts[configuration].parameters / 1e6:.2f} M",
        "steps": steps,
        "s/step": f"{spent / steps:.3f}",
        **{metric: summary["mean"][metric]["mean"] for metric in SCORES},
        "memory": bytes_text(run.peak_bytes),
    }


if __name__ == "__main__":
    main()
