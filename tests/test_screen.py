"""What a run shows of itself: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autoseg.contest import Row, Task
from autoseg.screen import RunLines, RunTable, Screen
from autoseg.training.loop import Progress

ROWS = [
    Row(Task("3d_fullres", "0"), "done", 0.8812),
    Row(Task("3d_fullres", "1"), "waiting"),
    Row(Task("2d", "0"), "dropped", 0.7123),
    Row(Task("2d", "1"), "dropped"),
]


def drawn(table: RunTable) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table.draw())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_what_runs_what_is_done_what_is_left_and_what_was_dropped():
    table = RunTable(lambda text: None)
    table.part("3d_fullres, fold 1")
    table.rows(ROWS, [ROWS[1].task])
    table.step(Progress(30, 100, 0.3, 12.0, 28.0, 0.4321, 0.65))
    lines = drawn(table).splitlines()
    assert "fold 0" in lines[1] and "fold 1" in lines[1]
    assert "3d_fullres" in lines[3] and "0.8812" in lines[3] and "30%" in lines[3]
    assert "2d" in lines[4] and "dropped 0.7123" in lines[4]
    assert "3d_fullres, fold 1: step 30/100, loss 0.432, patch Dice 0.650, 28 s left" in lines[6]
    assert "1 done, 2 dropped, 1 left" in lines[7]
    table.step(Progress(100, 100, 1.0, 40.0, 0.0, 0.4, 0.7))
    assert "predicting" in drawn(table)


def test_folds_that_are_trained_elsewhere_at_the_same_time_are_all_marked():
    table = RunTable(lambda text: None)
    rows = [Row(Task("3d_fullres", str(fold)), "waiting") for fold in range(3)]
    table.rows(rows, [rows[0].task, rows[2].task])
    (line,) = (line for line in drawn(table).splitlines() if "3d_fullres" in line)
    assert line.count("at work") == 2 and line.count("waiting") == 1


def test_the_table_takes_any_text_as_it_is():
    table = RunTable(lambda text: None)
    table.part("exporting to [/bold] and [red]")
    assert "exporting to [/bold] and [red]" in drawn(table)


def test_lines_tell_every_score_once():
    said: list[str] = []
    lines = RunLines(said.append)
    lines.part("3d_fullres, fold 0")
    for _ in range(2):
        lines.rows(ROWS, ())
    assert said == ["3d_fullres, fold 0 ...", "3d_fullres, fold 0: mean Dice 0.8812 of the held-out cases"]


@pytest.mark.parametrize("quiet", [True, False])
def test_without_a_terminal_there_are_lines_and_with_quiet_none(quiet, capsys):
    with Screen(quiet=quiet).experiment() as shown:
        assert not isinstance(shown, RunTable)
        shown.part("planning")
    assert ("planning ..." in capsys.readouterr().err) is not quiet


def test_on_a_terminal_there_is_a_live_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Screen().experiment() as shown:
        assert isinstance(shown, RunTable)
        shown.part("planning")
        shown.rows(ROWS, ())
    assert "3d_fullres" in capsys.readouterr().err
