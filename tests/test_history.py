"""history.csv and curve.png."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoseg.errors import CheckpointError
from autoseg.training.history import History, Row, draw_curve

ROWS = [
    Row(10, 1.5, 0.25, 3e-3, 0.51234, 0.7, (0.8, 0.6)),
    Row(20, 3.0, 0.5, 3e-3, -0.25, None, (None, None)),
    Row(40, 6.25, 1.0, 0.0, -0.75, 0.9, (0.9, None)),
]


def history(folder: Path, *, rows: list[Row] | None = None) -> History:
    made = History(folder / "history.csv", ("ball", "core, inner"))
    for row in ROWS if rows is None else rows:
        made.append(row)
    return made


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    history(tmp_path)
    again = history(tmp_path / "elsewhere", rows=[])
    again.path = tmp_path / "history.csv"
    again.load(until_step=1000)
    assert again.rows == ROWS


def test_the_file_has_a_row_for_each_and_names_the_structures(tmp_path: Path) -> None:
    history(tmp_path)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == 'step,seconds,progress,learning_rate,loss,dice,dice_ball,"dice_core, inner"'
    assert lines[2] == "20,3.00,0.50000,3.000e-03,-0.25000,,,"
    assert len(lines) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_rows_after_the_step_of_a_resumed_training_are_cut_off(tmp_path: Path) -> None:
    history(tmp_path)
    again = History(tmp_path / "history.csv", ("ball", "core, inner"))
    again.load(until_step=25)
    assert again.rows == ROWS[:2]
    again.write()
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3


def test_without_a_file_there_are_no_rows(tmp_path: Path) -> None:
    made = History(tmp_path / "history.csv", ("ball",))
    made.load(until_step=5)
    assert made.rows == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"step,seconds\n1,2\n",
        b"\xff\xfe\x00",
        b"step,seconds,progress,learning_rate,loss,dice,dice_ball\n1,2,3\n",
        b"step,seconds,progress,learning_rate,loss,dice,dice_ball\n1,x,3,4,5,6,7\n",
        b"step,seconds,progress,learning_rate,loss,dice,dice_ball\n1,\x00\n",
        b"step,seconds,progress,learning_rate,loss,dice,dice_ball\n1,2.0,0.5,1e-3,0.5\n",
        b"step,seconds,progress,learning_rate,loss,dice,dice_ball\n1,2.0,0.5,1e-3,0.5,0.5\n",
    ],
)
def test_another_or_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.csv"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"history.csv: not the history of this training \(.+\); delete it"):
        History(path, ("ball",)).load(until_step=100)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_curve_is_drawn_however_short_the_training_was(tmp_path: Path, count: int) -> None:
    draw_curve(history(tmp_path, rows=ROWS[:count]), tmp_path / "curve.png", title="Tiny: 3d_fullres, fold 0")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_the_programs_own_plots_alone(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcParams["backend"] = "svg"
        draw_curve(history(tmp_path), tmp_path / "curve.png", title="")
        assert matplotlib.rcParams["backend"] == "svg"
