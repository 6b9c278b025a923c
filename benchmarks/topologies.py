"""2d, 2.5d_stack, 2.5d_reduce and 3d_fullres on a dataset of thick slices, each for the same time: which wins?

python benchmarks/topologies.py ../shared/data/Dataset010_SunnybrookLV --minutes 10 --json rows.json
python benchmarks/topologies.py --table rows.json

Each topology is planned for the budget, trained on one fold and scored on its held-out cases, with the commands that
users type. The planner's first choice is marked. The budget is time on a quiet machine: each configuration trains for
the steps that it takes in it (`--pace` times them in --folder, with nothing else on the machine; else it is done just
before the training). Rows are added to --json, so that long runs may be spread over days.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import bytes_text, machine, markdown_table
from paced import Training

from autoseg.plan import Plan

TOPOLOGIES = ("2d", "2.5d_stack", "2.5d_reduce", "3d_fullres")
PACE_ROUNDS = 3
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
    parser.add_argument("--folder", type=Path, help="keep plan, store and models here [default: a temporary folder]")
    parser.add_argument("--pace", action="store_true", help="plan in --folder and time the steps, no more")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this JSON file and end")
    options = parser.parse_args()

    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    if options.dataset is None:
        parser.error("a dataset is needed")
    if options.pace:
        if options.folder is None:
            parser.error("--pace needs --folder")
        for configuration in options.configurations * PACE_ROUNDS:  # in turns: the machine is never the same
            _planned(options, configuration, options.folder).time_steps()
        return
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


def _planned(options: argparse.Namespace, configuration: str, folder: Path) -> Training:
    """A fold of the configuration, planned with the others, so that the plan says which it would train first."""
    training = Training(options.dataset.resolve(), configuration, options.fold, folder)
    training.plan(TOPOLOGIES, 60 * options.minutes)
    return training


def _train(options: argparse.Namespace, configuration: str, seed: int) -> dict[str, Any]:
    """Plan, train, score: one row."""
    with tempfile.TemporaryDirectory() as temporary:
        training = _planned(options, configuration, options.folder or Path(temporary))
        steps, run = training.train(60 * options.minutes, seed)
        plan = Plan.load(training.root / "plan.json")
        summary = json.loads((training.folder / "validation" / "summary.json").read_text())
        pace = training.pace
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
        "s/step": f"{pace:.3f}",
        **{metric: summary["mean"][metric]["mean"] for metric in SCORES},
        "memory": bytes_text(run.peak_bytes),
    }


if __name__ == "__main__":
    main()
