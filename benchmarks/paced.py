"""Trainings whose budget is time on a quiet machine: time a configuration's steps, then train so many of them.

What else runs beside the training that follows changes how long it takes, and nothing else. Used by the benchmarks
that compare many trainings.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measure import Measurement, measure

AUTOSEG = [sys.executable, "-m", "autoseg"]
PACE = "seconds_per_step.json"
PACE_SECONDS = 15.0  # of training that time a step


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, as they were timed, in a file."""

    path: Path

    @property
    def known(self) -> list[float]:
        """One for each time that it was timed."""
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def add(self, seconds: float) -> None:
        """Keep another."""
        self.path.write_text(json.dumps([*self.known, seconds]))

    def of(self, time_steps: Callable[[], None]) -> float:
        """The median of what was timed, which is done now if it was not."""
        if not self.known:
            time_steps()
        return median(self.known)


@dataclass(frozen=True)
class Training:
    """One fold of one configuration, planned in a workspace of its own or with others."""

    dataset: Path
    configuration: str
    fold: str
    workspace: Path

    @property
    def root(self) -> Path:
        """The dataset's folder in the workspace."""
        return self.workspace / self.dataset.name

    @property
    def folder(self) -> Path:
        """What the training writes."""
        return self.root / "models" / self.configuration / f"fold_{self.fold}"

    def plan(self, configurations: Sequence[str], seconds: float, *options: str) -> None:
        """plan-and-preprocess, unless the plan is there."""
        if not (self.root / "plan.json").exists():
            chosen = ["--configurations", ",".join(configurations), "--fold-time", f"{seconds:.0f}s"]
            measure([*AUTOSEG, "plan-and-preprocess", self.dataset, *chosen, *options, *self._common])

    def time_steps(self) -> None:
        """Add the seconds of a step, after the first third of a short training, to what is known."""
        from autoseg.stages import load_plan, train

        shutil.rmtree(self.folder, ignore_errors=True)
        plan, place = load_plan(self.dataset, self.workspace)
        seen: list[tuple[int, float]] = []
        train(
            plan,
            self.configuration,
            self.fold,
            workspace=place,
            seconds=PACE_SECONDS,
            on_step=lambda progress: seen.append((progress.step, progress.seconds)),
        )
        shutil.rmtree(self.folder)
        (step, began), (last, ended) = seen[len(seen) // 3], seen[-1]
        self._pace.add((ended - began) / (last - step))

    @property
    def pace(self) -> float:
        """Seconds of a step."""
        return self._pace.of(self.time_steps)

    def train(self, seconds: float, seed: int, *, steps: int | None = None) -> tuple[int, Measurement]:
        """Train anew for the steps that `seconds` allow, or for `steps`; how many, and what the command took."""
        steps = steps or round(seconds / self.pace)
        shutil.rmtree(self.folder, ignore_errors=True)
        return steps, self._train("--steps", str(steps), "--seed", str(seed))

    def _train(self, *options: str) -> Measurement:
        return measure([*AUTOSEG, "train-fold", self.dataset, self.configuration, self.fold, *options, *self._common])

    @property
    def _pace(self) -> Pace:
        return Pace(self.root / f"{self.configuration}_{PACE}")

    @property
    def _common(self) -> list[str]:
        return ["--workspace", str(self.workspace), "--quiet"]
