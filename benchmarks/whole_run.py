"""Does `autoseg run --time` end in time, and with what? Minutes, and held-out Dice of the choice.

python benchmarks/whole_run.py ../shared/data/Dataset004_Hippocampus --time 45m [--folder kept]

Everything from planning to the report counts. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import machine, markdown_table, measure

from autoseg.inference.selection import Score, Selection
from autoseg.workspace import Workspace

HEADER = (
    "dataset",
    "time asked for",
    "took",
    "peak memory",
    "choice",
    "mean Dice",
    "best single configuration",
    "cases",
)


def main() -> None:
    """Run, print the table and what was decided."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--time", default="45m")
    parser.add_argument("--folder", type=Path, help="keep the workspace here [default: a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        command = [sys.executable, "-m", "autoseg", "run", options.dataset, "--time", options.time]
        took = measure([*command, "--workspace", folder])
        selection = Selection.load(Workspace.of(options.dataset.resolve(), folder).selection)
        single = next(score for score in selection.scores if len(score.candidate.members) == 1)
        row = (
            options.dataset.name,
            options.time,
            f"{took.seconds / 60:.1f} min",
            f"{took.peak_bytes / 1e9:.2f} GB",
            selection.score.candidate.name,
            shown(selection.score),
            f"{single.candidate.name} {shown(single)}",
            str(selection.cases),
        )
        print(f"{machine()}\n\n{markdown_table(HEADER, [row])}\n")
        for decision in selection.decisions:
            print(f"- {decision.name}: {decision.because}")


def shown(score: Score) -> str:
    """The mean over the cases, with its interval."""
    return f"{score.dice:.4f} ({score.low:.4f} to {score.high:.4f})"


if __name__ == "__main__":
    main()
