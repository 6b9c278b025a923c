"""What the command line shows: results on stdout; progress, notes and errors on stderr; and the signals that it minds.

Belongs to `autoseg.cli`: nothing else prints. rich is imported only where a bar is drawn.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoseg.contest import Row, Task
    from autoseg.training.loop import Progress

PLAIN_LINE_SECONDS = 30.0  # without a terminal a training says this often where it stands


class _Lines(logging.Handler):
    """Log records as lines on the stderr of the moment, which a progress bar may have replaced by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.shown.add(text)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{level}{text}", file=sys.stderr, flush=True)


class StopSignals:
    """Whether SIGINT or SIGTERM came; a second one interrupts at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._signal: int | None = None
        self.steps = True
        """Whether a training has begun, which ends after its step; what else is done is interrupted at once."""

    def __call__(self) -> bool:
        return self._signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._signal is not None or not self.steps:
            raise KeyboardInterrupt(number)
        self._signal = number
        self._note("Stopping after this step; the model is being saved. Once more stops at once.")

    @property
    def status(self) -> int:
        """Exit status by the shell's convention: 128 + number of the signal."""
        return 128 + (self._signal or signal.SIGINT)


class Screen:
    """Where a command's words go."""

    def __init__(self, *, verbose: int = 0, quiet: bool = False) -> None:
        self.verbose, self.quiet = verbose, quiet
        level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
        logger = logging.getLogger("autoseg")
        self._lines = _Lines()
        logger.handlers[:] = [self._lines]
        logger.setLevel(level)

    def say(self, text: str) -> None:
        """A result."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Something by the way; not shown with --quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def error(self, sentence: str) -> None:
        """What is wrong, unless it was shown when it happened."""
        if sentence not in self._lines.shown:
            print(f"error: {sentence}", file=sys.stderr, flush=True)

    def refuse(self, sentence: str, status: int) -> int:
        """Say why the command ends, and give `status` back; with -vv also where it happened."""
        self.error(sentence)
        if self.verbose >= 2 and sys.exc_info()[0] is not None:
            traceback.print_exc()
        return status

    @contextlib.contextmanager
    def stop_signals(self) -> Iterator[StopSignals]:
        """SIGINT and SIGTERM are noted instead of ending the process while the block runs."""
        stop = StopSignals(self.note)
        before = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def cases(self, doing: str) -> Iterator[Callable[[int, int], None] | None]:
        """A bar over cases: the callback takes how many are done and how many there are."""
        if not self._draws:
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:
            task = bars.add_task(doing, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def named_cases(self, doing: str) -> Iterator[Callable[[str, int, int], None] | None]:
        """The same for a callback that is also told the name of the case."""
        with self.cases(doing) as show:
            yield None if show is None else lambda case, done, total: show(done, total)

    @contextlib.contextmanager
    def training(self, doing: str) -> Iterator[Callable[[Progress], None] | None]:
        """A live bar of a training with the time left; without a terminal a line now and then."""
        if self.quiet:
            yield None
            return
        if not self._draws:
            yield _PlainTraining(self.note, doing)
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Bars(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:
            task = bars.add_task(doing, total=1.0, text="")
            yield lambda progress: bars.update(task, completed=progress.fraction, text=_training_text(progress))

    @contextlib.contextmanager
    def experiment(self) -> Iterator[RunLines]:
        """What a whole run tells of itself: on a terminal a live table of its folds, else lines."""
        if not self._draws:
            yield RunLines(self.note)
            return
        from rich.console import Console
        from rich.live import Live

        shown = RunTable(self.note)
        with Live(get_renderable=shown.draw, console=Console(stderr=True), redirect_stdout=False, refresh_per_second=2):
            yield shown

    @property
    def _draws(self) -> bool:
        return not self.quiet and sys.stderr.isatty()


class _PlainTraining:
    """Lines about a training for a log file."""

    def __init__(self, note: Callable[[str], None], doing: str) -> None:
        self._note, self._doing = note, doing
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= PLAIN_LINE_SECONDS or progress.fraction >= 1.0:
            self._last = time.monotonic()
            self._note(f"{self._doing}: {100 * progress.fraction:.0f} %, {_training_text(progress)}")


class RunLines:
    """A run in lines: each part as it begins, a training now and then, a score as soon as it is there."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._scored: set[Task] = set()
        self._training = _PlainTraining(note, "training")

    def part(self, text: str) -> None:
        """Something begins."""
        self._note(f"{text} ...")

    def step(self, progress: Progress) -> None:
        """A training took a step."""
        self._training(progress)

    def rows(self, rows: Sequence[Row], running: Collection[Task]) -> None:
        """How every fold stands, and which are trained now."""
        if running:
            self._training = _PlainTraining(self._note, "; ".join(sorted(map(str, running))))
        for row in rows:
            if row.state == "done" and row.dice is not None and row.task not in self._scored:
                self._note(f"{row.task}: mean Dice {row.dice:.4f} of the held-out cases")
                self._scored.add(row.task)


class RunTable(RunLines):
    """A run as a table: a line for each configuration, a column for each fold, and below what is being done."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(note)
        self._began = time.monotonic()
        self._rows: Sequence[Row] = ()
        self._running: Collection[Task] = ()
        self._part = ""
        self._progress: Progress | None = None

    def part(self, text: str) -> None:
        self._part, self._progress = text, None

    def step(self, progress: Progress) -> None:
        self._progress = progress

    def rows(self, rows: Sequence[Row], running: Collection[Task]) -> None:
        self._rows, self._running, self._progress = rows, running, None

    def draw(self) -> RenderableType:
        """The table of this moment."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", *(f"fold {fold}" for fold in dict.fromkeys(row.task.fold for row in self._rows)))
        for name in dict.fromkeys(row.task.configuration for row in self._rows):
            table.add_row(name, *(self._cell(row) for row in self._rows if row.task.configuration == name))
        return Group(*([table] if self._rows else []), *map(Text, self._below()))

    def _cell(self, row: Row) -> str:
        score = "" if row.dice is None else f"{row.dice:.4f}"
        if row.task in self._running and row.state != "done":
            if self._progress is None:  # not yet begun, or in a process of its own, maybe on another machine
                return "[bold]at work"
            share = self._progress.fraction
            return f"[bold]{'predicting' if share >= 1 else f'{share:.0%}'}"
        return {"done": f"[green]{score}", "fork": f"[dim]({score})", "dropped": f"[dim]dropped {score}"}.get(
            row.state, "[dim]waiting"
        )

    def _below(self) -> list[str]:
        from autoseg.units import format_seconds

        now = self._part if self._progress is None else f"{self._part}: {_training_text(self._progress)}"
        counts = [(state, sum(row.state == state for row in self._rows)) for state in ("done", "dropped")]
        left = len(self._rows) - sum(count for _, count in counts)
        done = ", ".join(f"{count} {state}" for state, count in (*counts, ("left", left)))
        spent = format_seconds(time.monotonic() - self._began)
        return [now, f"folds: {done}; {spent} so far" if self._rows else f"{spent} so far"]


def _training_text(progress: Progress) -> str:
    from autoseg.units import format_seconds

    dice = "" if progress.dice is None else f", patch Dice {progress.dice:.3f}"
    of = f"/{progress.steps}" if progress.steps else ""
    return f"step {progress.step}{of}, loss {progress.loss:.3f}{dice}, {format_seconds(progress.seconds_left)} left"
