"""The process pool: results, errors, dying workers, and no orphans."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autoseg import executor
from autoseg.errors import AutosegError, DatasetError, WorkerError
from autoseg.executor import map_cases, start_workers, stop_workers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def no_worker_is_left():
    yield
    stop_workers()


def double(number: int) -> int:
    return 2 * number


def process_id(_: object) -> int:
    time.sleep(0.05)
    return os.getpid()


def misbehave(how: str) -> object:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(7)
    if how == "memory":
        raise MemoryError("cannot allocate 40 GB")
    if how == "sentence":
        raise DatasetError("Case liver_03: broken.")
    if how == "bug":
        return 1 / 0
    if how == "cannot travel":
        return lambda: None
    if how == "prints":
        print("noise on the standard output", flush=True)
        os.write(1, b"more noise\n")
    if how == "grows":
        assert b"x" * 300_000_000
        os.kill(os.getpid(), signal.SIGKILL)
    return how


def loaded_modules(_: object) -> set[str]:
    return set(sys.modules)


def thread_settings(_: object) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_every_item_gets_its_own_result():
    results = dict(map_cases(double, range(20), workers=2, names=[str(i) for i in range(20)]))
    assert results == {i: 2 * i for i in range(20)}


@pytest.mark.parametrize("workers", [0, 1])
def test_one_worker_runs_in_this_process(workers):
    assert dict(map_cases(process_id, [0], workers=workers, names=["a"])) == {0: os.getpid()}


def test_one_worker_runs_beside_a_process_that_has_other_work():
    ((_, worker),) = map_cases(process_id, [0], workers=1, names=["a"], beside=True)
    assert worker != os.getpid()


def test_some_workers_may_be_kept_when_the_others_end():
    first = {worker for _, worker in map_cases(process_id, range(8), workers=2, names=list("abcdefgh"))}
    stop_workers(keep=1)
    ((_, kept),) = map_cases(process_id, [0], workers=1, names=["a"], beside=True)
    assert kept in first


def test_workers_are_reused_by_the_next_call():
    stop_workers()
    first = {pid for _, pid in map_cases(process_id, range(6), workers=2, names=list("abcdef"))}
    second = {pid for _, pid in map_cases(process_id, range(6), workers=2, names=list("abcdef"))}
    assert len(first) == 2 and os.getpid() not in first
    assert second == first


def test_workers_started_ahead_are_the_ones_that_work():
    stop_workers()
    start_workers(2)
    ahead = {worker.process.pid for worker in executor._idle}
    assert {pid for _, pid in map_cases(process_id, range(6), workers=2, names=list("abcdef"))} == ahead


def test_no_worker_is_started_for_no_items():
    stop_workers()
    assert list(map_cases(double, [], workers=2, names=[])) == []
    assert not executor._idle


def test_a_worker_that_died_while_it_waited_is_replaced():
    start_workers(2)
    for worker in executor._idle:
        worker.process.kill()
        worker.process.wait()
    assert dict(map_cases(double, range(4), workers=2, names=list("abcd"))) == {i: 2 * i for i in range(4)}


def test_an_error_in_the_loop_ends_the_workers_when_the_generator_is_closed():
    stop_workers()
    with (
        pytest.raises(KeyboardInterrupt),
        contextlib.closing(map_cases(process_id, range(50), workers=2, names=["a"] * 50)) as results,
    ):
        for _ in results:
            raise KeyboardInterrupt
    assert not [t for t in threading.enumerate() if "_feed" in t.name]


def test_a_dead_worker_is_named_with_case_cause_and_memory_and_the_others_go_on():
    items = ["a", "dies", "b", "exits", "c", "d"]
    began = time.monotonic()
    results = dict(map_cases(misbehave, items, workers=2, names=[f"case_{item}" for item in items]))
    assert time.monotonic() - began < 20
    assert {results[i] for i in (0, 2, 4, 5)} == {"a", "b", "c", "d"}
    assert isinstance(results[1], WorkerError) and isinstance(results[3], WorkerError)
    assert "case_dies" in str(results[1]) and "SIGKILL" in str(results[1]) and "GB of memory" in str(results[1])
    assert "case_exits" in str(results[3]) and "exit status 7" in str(results[3])


def test_the_memory_of_a_dead_worker_is_its_peak():
    code = (
        "from test_executor import misbehave; from autoseg.executor import map_cases\n"
        "print(dict(map_cases(misbehave, ['grows', 'a'], workers=2, names=['x', 'y']))[0])"
    )
    answer = run_python("-c", code)
    assert re.search(r"(up to|less than) 0\.3\d GB", answer), answer


def test_out_of_memory_in_a_worker_is_a_sentence_naming_the_case():
    for workers in (1, 2):
        results = dict(map_cases(misbehave, ["memory", "a"], workers=workers, names=["lung_7", "a"]))
        assert isinstance(results[0], WorkerError)
        assert "lung_7" in str(results[0]) and "memory" in str(results[0])
        assert results[1] == "a"


def test_exceptions_come_back_in_place_of_results():
    results = dict(map_cases(misbehave, ["sentence", "bug", "cannot travel", "a"], workers=2, names=list("abcd")))
    assert isinstance(results[0], DatasetError) and str(results[0]) == "Case liver_03: broken."
    assert isinstance(results[1], ZeroDivisionError) and "1 / 0" in str(results[1].__cause__)
    assert isinstance(results[2], Exception)
    assert results[3] == "a"


def is_told_to_end(item: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    return item


def test_a_signal_to_all_processes_of_a_command_kills_no_case_under_way():
    assert dict(map_cases(is_told_to_end, range(2), workers=2, names=["a", "b"])) == {0: 0, 1: 1}


def test_an_item_that_cannot_be_sent_stops_with_its_error():
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        list(map_cases(double, [lambda: None, 1], workers=2, names=["a", "b"]))


def test_a_worker_that_is_killed_just_after_its_answer_serves_nobody_else(monkeypatch):
    stop_workers()
    worker, receive = executor._Worker(), executor._receive
    worker.begin(executor._pickle_function(double))

    def answered_then_killed(stream):
        answer = receive(stream)
        worker.kill()
        return answer

    monkeypatch.setattr(executor, "_receive", answered_then_killed)
    assert worker.ask(pickle.dumps(2), "a") == 4
    executor._Run(b"", [], [])._leave(worker)
    assert executor._idle == []


def test_what_a_function_prints_does_not_harm_the_answers():
    assert dict(map_cases(misbehave, ["prints"] * 3, workers=2, names=["a"] * 3)) == dict(enumerate(["prints"] * 3))


def test_workers_do_not_import_torch():
    stop_workers()
    for _, modules in map_cases(loaded_modules, range(2), workers=2, names=["a", "b"]):
        assert "torch" not in modules


def test_workers_use_one_thread_each():
    assert {value for _, value in map_cases(thread_settings, range(4), workers=2, names=list("abcd"))} == {"1"}


def test_items_are_taken_as_they_are_needed():
    taken = []

    def lazily():
        for i in range(100):
            taken.append(i)
            yield i

    results = map_cases(double, lazily(), workers=2, names=[str(i) for i in range(100)])
    next(results)
    time.sleep(0.5)
    assert len(taken) < 12
    results.close()


def test_leaving_the_loop_early_ends_the_busy_workers():
    stop_workers()
    for _, _result in map_cases(process_id, range(50), workers=2, names=[str(i) for i in range(50)]):
        break
    assert all(worker.healthy for worker in executor._idle)
    assert dict(map_cases(double, range(4), workers=2, names=list("abcd"))) == {i: 2 * i for i in range(4)}


def run_python(*arguments: str, stdin: str | None = None) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, input=stdin, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


UNGUARDED = """
import pathlib
from test_executor import double
from autoseg.executor import map_cases
with open("started", "a") as record:
    record.write("x")
print(sorted(map_cases(double, range(4), workers=2, names=list("abcd"))))
"""


def test_an_unguarded_script_works_and_is_not_run_again_by_the_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(UNGUARDED)
    assert run_python(str(tmp_path / "script.py")) == "[(0, 0), (1, 2), (2, 4), (3, 6)]\n"
    assert (tmp_path / "started").read_text() == "x"


def test_a_session_without_a_file_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_python("-c", UNGUARDED) == "[(0, 0), (1, 2), (2, 4), (3, 6)]\n"
    assert run_python("-", stdin=UNGUARDED) == "[(0, 0), (1, 2), (2, 4), (3, 6)]\n"


def test_a_function_of_the_started_script_is_refused_in_a_sentence():
    def here(_: object) -> None: ...

    here.__module__ = "__main__"
    with pytest.raises(AutosegError, match="defined in the script that was started"):
        list(map_cases(here, [1], workers=2, names=["a"]))


SLOW = """
import time, sys
from test_executor import process_id_then_sleep
from autoseg.executor import map_cases
for _ in map_cases(process_id_then_sleep, [sys.argv[1]] * 4, workers=2, names=list("abcd")):
    pass
"""


def process_id_then_sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(how, tmp_path):
    script, seen = tmp_path / "slow.py", tmp_path / "seen"
    script.write_text(SLOW)
    seen.mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(seen)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # a shell that started the tests in the background has told them to ignore Ctrl-C
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: len(list(seen.iterdir())) == 2)
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # Ctrl-C in a terminal goes to the workers too
    else:
        parent.send_signal(how)
    parent.wait(timeout=10)
    wait_until(lambda: not any(is_alive(int(entry.name)) for entry in seen.iterdir()))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in 20 seconds"
        time.sleep(0.05)


def test_processes_are_ended_when_it_is_time_to_stop(tmp_path: Path) -> None:
    begun = time.monotonic()
    results = map_cases(
        time.sleep, [60.0, 60.0], workers=2, names=["a", "b"], stop=lambda: time.monotonic() > begun + 1
    )
    assert list(results) == [] and time.monotonic() - begun < 40
