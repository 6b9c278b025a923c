"""Options and arguments that several commands share: their names, values and help, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

# Optional[...] and not "... | None": typer reads these at run time, and on Python 3.10 too
DatasetArgument = Annotated[Path, typer.Argument(help="Raw dataset: a folder in nnU-Net v2 layout.", metavar="DATASET")]
WorkspaceOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--workspace",
        metavar="FOLDER",
        help="Where plan, preprocessed data and models go. [default: autoseg_workspace beside the dataset]",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
InputSpacingOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--input-spacing",
        metavar="Z,Y,X",
        help="Spacing in mm of the (thick) images expected in use: plan super-resolution. [default: the dataset's]",
    ),
]
OutputSpacingOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--output-spacing",
        metavar="Z,Y,X",
        help="Spacing in mm of the labels that are wanted: plan super-resolution. [default: the dataset's]",
    ),
]
ScaleOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--sr-scale",
        metavar="S[,Y,X]",
        help="Input by output spacing, along the slices or along (z, y, x): instead of one of the two.",
    ),
]
TaskOption = Annotated[
    str,
    typer.Option(
        "--task", metavar="TASK", help="What super-resolution answers: joint, segmentation or super_resolution."
    ),
]
DropCasesOption = Annotated[bool, typer.Option("--drop-cases", help="Leave broken cases out.")]
GroupByOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--group-by",
        metavar="FILE",
        help="Cases of one patient share a fold: a JSON of case: patient, or prefix: only the last part differs.",
    ),
]
FoldsOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--folds", metavar="FILE", help="Take these folds, such as nnU-Net's splits_final.json."),
]
WorkersOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--workers", metavar="N", min=0, help="Worker processes. [default: one for each core]"),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of weights, sampling and augmentation.")]
LogOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--log", metavar="NAME", help="Log to tensorboard or mlflow too; may be given twice. [default: history.csv]"
    ),
]
MlflowOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--mlflow-uri", metavar="URI", help="MLflow's store or server. [default: the file mlflow.db in the workspace]"
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option("--executor", metavar="WHERE", help="local, ray (started here) or ray://HOST:PORT, a Ray cluster."),
]
VerboseOption = Annotated[
    int, typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more; -vv says everything.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars and no notes; results and errors only.")]
