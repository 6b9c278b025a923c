"""Does a run lose anything when it is killed? N kills at random moments, then the weights bit by bit.

python benchmarks/kills.py --kills 20
python benchmarks/kills.py ../shared/data/Dataset004_Hippocampus --configurations 2d,3d_fullres --steps 40 --kills 20

The process group of `autoseg run --steps ...` gets SIGKILL, workers and all, at a moment drawn from the length of an
undisturbed run, and the same command is started again: planning, preprocessing, forks, folds, predictions, the choice
and the export are all hit. A run that comes to its end is compared with the undisturbed one, and the next begins
afresh. Without a dataset the embedded synthetic one is taken. The plan is made for a GPU that is not there, so that
nothing in it is timed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measure import machine, markdown_table

from autoseg.checkpoint import Checkpoint
from autoseg.inference.selection import Selection
from autoseg.workspace import CHECKPOINT, Workspace


@dataclass
class Runs:
    """The command that is killed, and what became of it."""

    dataset: Path
    command: list[str]
    kills: list[str] = field(default_factory=list)
    """What was being done, kill by kill."""
    lost: list[str] = field(default_factory=list)
    """Sentences about what did not survive."""

    def start(self, workspace: Path, seconds: float | None) -> bool:
        """Run, until it ends or is killed after `seconds`; whether it ended by itself. RuntimeError where it failed."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [*self.command, "--workspace", str(workspace)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            lines = output.read().splitlines()
        if process.returncode == -signal.SIGKILL:
            parts = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
            self.kills.append(parts[-1] if parts else "starting")
            return False
        if process.returncode:
            raise RuntimeError("\n".join(lines[-5:]))
        return True


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--configurations", default="2d,3d_fullres")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--gpu-memory", default="300MB")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the workspaces here [default: a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        dataset = options.dataset.resolve() if options.dataset else synthetic(folder)
        command = [
            sys.executable, "-m", "autoseg", "run", str(dataset), "--steps", str(options.steps), "--workers", "2",
            "--configurations", options.configurations, "--gpu-memory", options.gpu_memory,
        ]  # fmt: skip
        runs = Runs(dataset, command)
        began = time.monotonic()
        runs.start(folder / "undisturbed", None)
        length = time.monotonic() - began
        disturb(runs, folder, length, count=options.kills, draw=random.Random(options.seed))
        print(machine())
        print(f"{dataset.name}, {options.configurations}, {options.steps} steps a fold; undisturbed {length:.0f} s\n")
        print(table(runs))
        print(f"\nsurvived {options.kills - len(runs.lost)} of {options.kills}")
        for sentence in runs.lost:
            print(f"- {sentence}")


def synthetic(folder: Path) -> Path:
    """The dataset of `autoseg demo`, with cases enough for comparisons."""
    from autoseg.demo import NAME, write_synthetic_dataset

    return write_synthetic_dataset(folder / NAME, cases=30, test_cases=0, shape=(12, 40, 40))


def disturb(runs: Runs, folder: Path, length: float, *, count: int, draw: random.Random) -> None:
    """Kill `count` times; whatever comes to its end is compared and begun afresh, the last one too."""
    workspace = folder / "disturbed"
    shutil.rmtree(workspace, ignore_errors=True)
    pending = 0
    while len(runs.kills) < count or pending:
        before = len(runs.kills)
        seconds = draw.uniform(0.2, length) if before < count else None
        try:
            ended = runs.start(workspace, seconds)
        except RuntimeError as error:
            if not pending:
                raise
            runs.lost += [f"after a kill during '{what}': {error}" for what in runs.kills[before - pending :]]
            pending = 0
            shutil.rmtree(workspace, ignore_errors=True)
            continue
        pending += len(runs.kills) - before
        if ended:
            other = differences(
                Workspace.of(runs.dataset, folder / "undisturbed"), Workspace.of(runs.dataset, workspace)
            )
            if other and not pending:
                raise RuntimeError(f"two runs that nothing disturbed are not the same: {other}")
            if other:
                runs.lost += [f"{other} after kills during {', '.join(runs.kills[-pending:])}"] * pending
            pending = 0
            shutil.rmtree(workspace)


def differences(expected: Workspace, found: Workspace) -> str:
    """What is not the same to the bit: weights, who was dropped, what was chosen; empty where nothing differs."""
    files = {path.relative_to(expected.root) for path in expected.models.glob(f"*/fold_*/{CHECKPOINT}")}
    if files != {path.relative_to(found.root) for path in found.models.glob(f"*/fold_*/{CHECKPOINT}")}:
        return "other folds were trained"
    for path in sorted(files):
        one, other = Checkpoint.load(expected.root / path), Checkpoint.load(found.root / path)
        if one.weights.keys() != other.weights.keys():
            return f"{path}: other tensors"
        if not all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items()):
            return f"{path}: other weights"
    chosen = [Selection.load(place.selection) for place in (expected, found)]
    if chosen[0].chosen != chosen[1].chosen or chosen[0].scores != chosen[1].scores:
        return "another choice"
    return "" if found.model.with_suffix(".zip").is_file() and found.report.is_file() else "no model or no report"


def table(runs: Runs) -> str:
    """What was being done when it was killed, and how often."""
    kinds = Counter(what.partition(",")[0] if ", fold" not in what else "training " + what for what in runs.kills)
    return markdown_table(("killed during", "times"), sorted(kinds.items()))


if __name__ == "__main__":
    main()
