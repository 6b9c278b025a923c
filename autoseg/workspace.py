"""Where the artefacts of a dataset are: every path under the workspace is made here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from autoseg.plan import PreprocessingSettings

DEFAULT_WORKSPACE = "autoseg_workspace"

# in a workspace, and in an exported model: models/<configuration>/fold_K/
MODELS = "models"
SELECTION = "selection.json"  # what cross-validation chose

# in a fold's folder
CHECKPOINT = "checkpoint.safetensors"  # the weights to predict with
RESUME = "resume.safetensors"  # where the training stands
HISTORY = "history.csv"
CURVE = "curve.png"
VALIDATION = "validation"  # held-out predictions, scores, pictures

# in the folder `validation`
SUMMARY = "summary.json"  # every score
SCORED = "checkpoint"  # its key of the checkpoint that was scored: not by time, since clocks can jump back
PICTURES = "pictures"  # best.png, median.png, worst.png


@dataclass(frozen=True)
class Workspace:
    """`<workspace>/<dataset name>/`: the artefacts of one dataset."""

    root: Path

    @classmethod
    def of(cls, dataset: Path, workspace: Path | None = None) -> Workspace:
        """The workspace of a dataset folder; by default `autoseg_workspace/` beside the dataset."""
        dataset = Path(dataset).resolve()
        parent = Path(workspace).resolve() if workspace else dataset.parent / DEFAULT_WORKSPACE
        return cls(parent / dataset.name)

    @property
    def fingerprint(self) -> Path:
        """`fingerprint.json`."""
        return self.root / "fingerprint.json"

    @property
    def plan(self) -> Path:
        """`plan.json`."""
        return self.root / "plan.json"

    @property
    def folds(self) -> Path:
        """`folds.json`: for each fold the training and validation cases (the form of nnU-Net's splits_final.json)."""
        return self.root / "folds.json"

    @property
    def lock(self) -> Path:
        """`run.lock`: held by who plans, preprocesses or runs everything."""
        return self.root / "run.lock"

    def fold_lock(self, configuration: str, fold: str) -> Path:
        """`locks/<configuration>_fold_K`: held by who trains the fold."""
        return self.root / "locks" / f"{configuration}_fold_{re.sub(r'[^A-Za-z0-9]', '_', fold)}"

    @property
    def models(self) -> Path:
        """`models/`."""
        return self.root / MODELS

    @property
    def selection(self) -> Path:
        """`selection.json`."""
        return self.root / SELECTION

    @property
    def report(self) -> Path:
        """`report.html`."""
        return self.root / "report.html"

    @property
    def model(self) -> Path:
        """`model/`: the exported model; `model.zip` holds the same."""
        return self.root / "model"

    def store(self, settings: PreprocessingSettings) -> Path:
        """`preprocessed/<store id>/`."""
        return self.root / "preprocessed" / settings.store_id

    def fold(self, configuration: str, fold: str) -> Path:
        """`models/<configuration>/fold_K/`; K is a number or `all`."""
        return self.models / configuration / f"fold_{fold}"
