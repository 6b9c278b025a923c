"""Training progress -> `history.csv`, one row at regular steps of progress, and `curve.png`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.errors import CheckpointError
from autoseg.files import atomic_path, write_text


@dataclass(frozen=True)
class Row:
    """One row of history.csv."""

    step: int
    seconds: float
    """Training time so far."""
    progress: float
    """0 to 1."""
    learning_rate: float
    loss: float
    """Mean training loss since the row before."""
    dice: float | None
    """Online Dice on held-out patches, mean over the structures; None where it was not taken."""
    dice_by_class: tuple[float | None, ...]
    """The same for each structure; None where no patch shows it."""


class History:
    """The rows of one training; the file is rewritten whole, so it is never half a row.

    Without `writes` they are kept in memory alone: of several processes that train together one writes.
    """

    def __init__(self, path: Path, structures: Sequence[str], *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.structures = tuple(structures)
        self.rows: list[Row] = []
        self.loggers: list[Callable[[Row], None]] = []  # what is told of each row besides the file

    @property
    def columns(self) -> list[str]:
        """The header of the file."""
        fixed = ["step", "seconds", "progress", "learning_rate", "loss", "dice"]
        return [*fixed, *(f"dice_{name}" for name in self.structures)]

    def load(self, *, until_step: int) -> None:
        """Read the rows of an earlier run up to a step; what came after it is being trained again."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            try:
                if next(reader, None) != self.columns:
                    raise ValueError("other columns")
                rows = [_parse(cells, count=len(self.columns)) for cells in reader]
            except (ValueError, csv.Error) as error:
                raise CheckpointError(f"{self.path}: not the history of this training ({error}); delete it.") from error
        self.rows = [row for row in rows if row.step <= until_step]

    def append(self, row: Row) -> None:
        """Add a row, write the file and tell the loggers."""
        self.rows.append(row)
        self.write()
        for logger in self.loggers:
            logger(row)

    def write(self) -> None:
        """Write every row to the file, atomically."""
        if not self.writes:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            numbers = [f"{row.seconds:.2f}", f"{row.progress:.5f}", f"{row.learning_rate:.3e}", f"{row.loss:.5f}"]
            writer.writerow(
                [row.step, *numbers, *("" if d is None else f"{d:.4f}" for d in (row.dice, *row.dice_by_class))]
            )
        write_text(self.path, text.getvalue())


def _parse(cells: Sequence[str], *, count: int) -> Row:
    if len(cells) != count:
        raise ValueError(f"a row of {len(cells)} cells, expected {count}")
    step, seconds, progress, rate, loss = int(cells[0]), *map(float, cells[1:5])
    dice = [None if cell == "" else float(cell) for cell in cells[5:]]
    return Row(step, seconds, progress, rate, loss, dice[0], tuple(dice[1:]))


def draw_curve(history: History, path: Path, *, title: str) -> None:
    """Loss, online Dice and learning rate over the training, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot, whose backend and open figures are the caller's

    rows = history.rows
    minutes = [row.seconds / 60 for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.plot(minutes, [row.loss for row in rows], color="#0072b2", label="training loss")
    top.set_ylabel("loss")
    top.set_title(title)
    right = top.twinx()
    scored = [(m, row.dice) for m, row in zip(minutes, rows, strict=True) if row.dice is not None]
    right.plot([m for m, _ in scored], [d for _, d in scored], color="#d55e00", label="Dice on held-out patches")
    right.set_ylabel("Dice")
    right.set_ylim(0, 1)
    lines = [*top.get_lines(), *right.get_lines()]
    top.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    bottom.plot(minutes, [row.learning_rate for row in rows], color="#555555")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("minutes of training")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
