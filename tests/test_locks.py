"""A lock: one process at a time, free again however its holder ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoseg.errors import StorageError
from autoseg.locks import alone

HOLDER = """
import sys, time
from pathlib import Path
from autoseg.locks import alone
with alone(Path(sys.argv[1]), what="held"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_comes_second_is_told_which_process_works_here(tmp_path: Path) -> None:
    path = tmp_path / "place" / "run.lock"
    with alone(path, what="The place is taken"):
        with (
            pytest.raises(StorageError, match=rf"^The place is taken \(process {os.getpid()}\); wait for its end"),
            alone(path, what="The place is taken"),
        ):
            pytest.fail("two hold one lock")
        assert path.read_text() == str(os.getpid()), "who is refused writes nothing"
    with alone(path, what="The place is taken"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=rf"held \(process {holder.pid}\)"), alone(path, what="held"):
            pytest.fail("it is held by another process")
        holder.send_signal(signal.SIGKILL)
    with alone(path, what="held"):
        assert path.read_text() == str(os.getpid())


def test_who_is_patient_gets_the_lock_when_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first = tmp_path / "run.lock", alone(tmp_path / "run.lock", what="held")
    first.__enter__()
    monkeypatch.setattr("time.sleep", lambda seconds: first.__exit__(None, None, None))  # its holder ends meanwhile
    with alone(path, what="held", tries=2):
        pass


def test_a_place_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(StorageError, match="a file is where a folder is needed"),
        alone(tmp_path / "file" / "run.lock", what="x"),
    ):
        pytest.fail("there is no lock")


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("autoseg.locks._lock", no_locks)
    with alone(tmp_path / "run.lock", what="x"):
        assert "cannot be locked (Operation not supported)" in caplog.text
