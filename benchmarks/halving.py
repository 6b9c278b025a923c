"""Successive halving against training every candidate to its end: as good a choice in a part of the time?

python benchmarks/halving.py ../shared/data/Dataset004_Hippocampus --configurations 2d,2.5d_stack,3d_fullres \
    --minutes-per-fold 3 --share 0.6

Both arms begin with one plan and one store. `everything` does every line of `autoseg run --print-commands`, each fold
for the same time. `halving` is `autoseg run --time`, with --share of the time that the other took: what it saves of
candidates that it drops, the folds of those that are left train longer. Nothing else may run on the machine. The
choices are compared case by case, on what their folds held out. With --folder an interrupted benchmark goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import machine, markdown_table, measure

from autoseg.dataset import RawDataset
from autoseg.inference.selection import Candidate, Selection, Table, find_held_out, interval, score_candidates
from autoseg.plan import Plan
from autoseg.workspace import Workspace

AUTOSEG = [sys.executable, "-m", "autoseg"]
ARMS = ("halving", "everything")
HEADER = ("dataset", "arm", "choice", "mean Dice", "folds trained", "minutes", "share of the time", "difference")


@dataclass(frozen=True)
class Arm:
    """One way to come to a choice."""

    name: str
    dataset: Path
    workspace: Path

    @property
    def place(self) -> Workspace:
        """Its artefacts."""
        return Workspace.of(self.dataset, self.workspace)

    @property
    def seconds(self) -> float:
        """Of all its commands."""
        return sum(json.loads(self._times.read_text()).values()) if self._times.exists() else 0.0

    @property
    def _times(self) -> Path:
        return self.workspace / "seconds.json"

    def do(self, words: list[str]) -> None:
        """Run a command of autoseg once; its time is kept, however often the benchmark is started."""
        times = json.loads(self._times.read_text()) if self._times.exists() else {}
        key = shlex.join(words)
        if key not in times:
            if words[0] == "train-fold":  # what a killed benchmark has begun took time that nobody has noted
                shutil.rmtree(self.place.fold(words[2], words[3]), ignore_errors=True)
            times[key] = measure([*AUTOSEG, *words]).seconds
            self._times.write_text(json.dumps(times, indent=1))

    def choice(self) -> tuple[Selection, Table, Candidate]:
        """What was chosen, with its held-out Dice by case."""
        selection = Selection.load(self.place.selection)
        chosen = Candidate(selection.chosen.members, selection.chosen.weights)
        names = list(dict.fromkeys(member.configuration for member in chosen.members))
        cases = find_held_out(RawDataset.load(self.dataset), names, self.place)
        return selection, score_candidates(cases, [chosen], Plan.load(self.place.plan).labels, workers=2), chosen


def main() -> None:
    """Train both arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--configurations", default="2d,2.5d_stack,3d_fullres")
    parser.add_argument("--minutes-per-fold", type=float, default=3.0)
    parser.add_argument("--share", type=float, default=0.6, help="of the time of everything that halving is given")
    parser.add_argument("--folder", type=Path, help="keep everything here [default: a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        arms = [Arm(name, options.dataset.resolve(), folder / name) for name in ARMS]
        plan_once(arms, options.configurations, 60 * options.minutes_per_fold)
        halving, everything = arms
        for words in commands(everything):
            everything.do(words)
        given = ["--time", f"{options.share * everything.seconds:.0f}s"]
        halving.do(["run", str(halving.dataset), *given, "--workspace", str(halving.workspace)])
        print(machine())
        print(f"{options.minutes_per_fold:g} minutes a fold\n")
        print(table(halving, everything))


def plan_once(arms: list[Arm], configurations: str, fold_seconds: float) -> None:
    """One plan, one split and one store for all arms."""
    first = arms[0]
    if not first.place.plan.exists():
        budget = ["--fold-time", f"{fold_seconds:g}s", "--configurations", configurations]
        where = ["--workspace", str(first.workspace)]
        measure([*AUTOSEG, "plan-and-preprocess", str(first.dataset), *budget, *where])
    for arm in arms[1:]:
        if not arm.place.plan.exists():
            partial = arm.workspace.with_name(f"{arm.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name in ("fingerprint.json", "folds.json", "preprocessed", "plan.json"):
                source, target = first.place.root / name, partial / first.place.root.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            partial.rename(arm.workspace)


def commands(arm: Arm) -> list[list[str]]:
    """Every fold of every candidate, then the choice."""
    where = ["--workspace", str(arm.workspace)]
    printed = measure([*AUTOSEG, "run", str(arm.dataset), "--print-commands", *where]).output
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("autoseg ")]
    return [words[1:] for words in lines if words[1] != "plan-and-preprocess"]


def table(halving: Arm, everything: Arm) -> str:
    """A line for each arm; the difference is that of the first one's choice from the second one's."""
    found = {arm.name: arm.choice() for arm in (halving, everything)}
    pair = [scores.dice[chosen] for _, scores, chosen in found.values()]
    structures = np.nanmean(pair[0] - pair[1], axis=1)
    gain, low, high = interval(lambda rows: float(np.nanmean(structures[rows])), len(structures))
    rows = []
    for arm in (halving, everything):
        selection, scores, chosen = found[arm.name]
        best = selection.score
        share, difference = "100 %", ""
        if arm is halving:
            share = f"{100 * arm.seconds / everything.seconds:.0f} %"
            difference = f"{gain:+.4f} ({low:+.4f} to {high:+.4f})"
        dice = f"{scores.mean(chosen):.4f} ({best.low:.4f} to {best.high:.4f})"
        folds = len(list(arm.place.models.glob("*/fold_*/checkpoint.safetensors")))
        rows.append(
            (arm.dataset.name, arm.name, chosen.name, dice, folds, f"{arm.seconds / 60:.1f}", share, difference)
        )
    notes = [decision.because for decision in found["halving"][0].decisions if decision.name.endswith(".dropped")]
    return "\n".join((markdown_table(HEADER, rows), "", *(f"- {note}" for note in notes)))


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr)
