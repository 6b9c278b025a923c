"""A function and a list of cases -> their results, from a pool of spawned worker processes or from a Ray cluster.

Workers are fresh interpreters (never forks): they import only what the function needs, and never the script that was
started, so an unguarded script and an interactive session work too. They stay alive between two calls, so that one
command starts them once. A worker that dies is named at once with its case, its cause and its memory; the other
cases go on. Workers end as soon as this process does, however it ends.

What travels on the pipes is pickled, as in `multiprocessing`: both ends are processes of this command. No file is ever
read that way.

`Executor` is what is the same for this machine and for a cluster (`autoseg.cluster`): `EXECUTORS` names the two.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from autoseg.errors import AutosegError, PlanError, WorkerError, unknown_choice

Item = TypeVar("Item")
Result = TypeVar("Result")

Results = Generator[tuple[int, Result | Exception], None, None]

HEADER = struct.Struct(">cQ")  # a message on a pipe: what it is, its length in bytes, then the message
FUNCTION, ITEM, ANSWER, READY = b"F", b"I", b"A", b"R"
# signals that a terminal or a scheduler sends to all processes of a command: the one that waits for the workers decides
BOOT = (
    "import signal; [signal.signal(end, signal.SIG_IGN) for end in (signal.SIGINT, signal.SIGTERM)]; "
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); "
    "from autoseg.executor import serve; serve()"
)
STOP_SECONDS = 1.0  # between two questions whether to stop
NICE = 10  # workers give way to the process that waits for them: what it does itself is what everything else waits for
# one thread a worker: the pool already uses every core it was given
ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLOSC_NTHREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


@dataclass(frozen=True)
class Needs:
    """What one call takes of a machine."""

    cores: int = 1
    gpus: int = 0
    memory_bytes: int = 0
    """0: not known."""
    threads: int = 0
    """Of torch, which decide how sums are rounded; 0: the function does without torch."""


@dataclass(frozen=True)
class Files:
    """What calls read and write on the disk, for machines that do not see it; patterns of whole paths, as of glob."""

    roots: tuple[Path, ...]
    """Folders that every path lies in; where they are not seen, a machine has copies of them."""
    reads: Callable[[Any], Sequence[str]]
    """Of an item."""
    writes: Callable[[Any], Sequence[str]]
    """Of an item; no two items that are worked on at the same time share one."""


class Executor(Protocol):
    """Where many calls of one function are done."""

    def places(self, device: str, needs: Needs) -> tuple[str, ...]:
        """The device of each call that can be done at the same time; none where all are best done in this process.

        `device` is what the user asked for. Raises PlanError where not one call has what it needs.
        """

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        names: Sequence[str],
        needs: Needs,
        files: Files,
        stop: Callable[[], bool] = lambda: False,
    ) -> Results[Result]:
        """As `map_cases`; when `stop` says yes, asked once a second, it ends early."""

    def machines(self) -> int:
        """How many work."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Processes of this machine.

    Trainings are done one after another in this process: one takes the whole GPU or all cores, so two at a time would
    each take twice as long. Where there are several GPUs each has a training of its own.
    """

    workers: int = 1
    beside: bool = False
    """Whether this process works beside them."""

    def places(self, device: str, needs: Needs) -> tuple[str, ...]:
        """One GPU each, where there are several and none was chosen."""
        if device not in ("auto", "cuda"):
            return ()
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(f"cuda:{number}" for number in range(found)) if found > 1 else ()

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        names: Sequence[str],
        needs: Needs,
        files: Files,
        stop: Callable[[], bool] = lambda: False,
    ) -> Results[Result]:
        """As `map_cases`, by as many processes as there are `workers`; of GPUs by as many as there are items."""
        workers = len(items) if needs.gpus else self.workers
        beside = self.beside or needs.gpus > 0
        call = functools.partial(with_threads, needs.threads, function) if needs.threads else function
        return map_cases(call, items, workers=workers, names=names, beside=beside, stop=stop)

    def machines(self) -> int:
        """This one."""
        return 1

    def close(self) -> None:
        """The workers end with this process."""


def _local(address: str) -> None:
    if address:
        raise PlanError(f"--executor local takes no address, got {address}; use --executor ray://{address}.")


def _ray(address: str) -> Executor:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent anywhere unasked
    from autoseg.cluster import RayExecutor

    return RayExecutor.connect(address or os.environ.get("RAY_ADDRESS", ""))


EXECUTORS: dict[str, Callable[[str], Executor | None]] = {"local": _local, "ray": _ray}


def with_threads(threads: int, function: Callable[[Item], Result], item: Item) -> Result:
    """`function(item)` by that many threads of torch in a process of its own: sums are rounded as they are here."""
    import torch

    torch.get_num_threads()  # torch's first look-up would undo what is set before it
    torch.set_num_threads(threads)
    return function(item)


@contextlib.contextmanager
def executor_of(text: str) -> Iterator[Executor | None]:
    """What `--executor` names: `ray` or `ray://ADDRESS`, or `local`, which is None.

    Whoever is given None takes a `LocalExecutor` with as many workers as suit what it does. Raises PlanError where the
    cluster is not there.
    """
    _, _, address = text.partition("://")
    executor = EXECUTORS[known_executor(text)](address)
    try:
        yield executor
    finally:
        if executor is not None:
            executor.close()


def known_executor(text: str) -> str:
    """The key of EXECUTORS that `--executor` names. Raises PlanError where there is none."""
    name = text.partition("://")[0]
    if name not in EXECUTORS:
        raise PlanError(unknown_choice("--executor", text, EXECUTORS))
    return name


def map_cases(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    names: Sequence[str],
    beside: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Results[Result]:
    """`(index, function(item))` for every item, in the order in which they are done.

    An exception takes the place of its case's result, and so does a WorkerError where the worker died; the other
    cases go on. `names` are the items' names in such sentences. At most `3 * workers` results wait or are worked on
    at any time. With `workers` of 0 or 1 everything runs in this process, unless that works `beside` them. `function`
    must be importable (a function of a module, or a `functools.partial` of one). Closing the generator, and Ctrl-C
    while it waits, end the busy workers; who may leave the loop early takes
    `with contextlib.closing(map_cases(...)) as results`. So does `stop`, which worker processes are watched with.
    """
    if workers <= 1 and not beside:
        for index, item in enumerate(items):
            yield index, _call(function, item, names[index])
        return
    call = _pickle_function(function)
    yield from _Run(call, items, names).results(max(1, min(workers, len(names))), stop)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * 10**9
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def start_workers(workers: int) -> None:
    """Start the workers of a later `map_cases` now, so that they start while this process does other things."""
    if workers > 1:
        with _lock:
            missing = workers - len(_idle)
        for worker in [_Worker() for _ in range(missing)]:
            _release(worker)


def stop_workers(*, keep: int = 0) -> None:
    """End the workers that wait for the next call, but for `keep` of them; their memory is freed."""
    with _lock:
        workers, _idle[:] = _idle[keep:], _idle[:keep]
    for worker in workers:
        worker.end()


_idle: list[_Worker] = []
_lock = threading.Lock()
atexit.register(stop_workers)


def _acquire() -> _Worker:
    """A worker that waits, if one is alive, or a new one."""
    while True:
        with _lock:
            if not _idle:
                break
            worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.end()
    return _Worker()


def _release(worker: _Worker) -> None:
    with _lock:
        _idle.append(worker)


def _call(function: Callable[[Item], Result], item: Item, name: str) -> Result | Exception:
    try:
        return function(item)
    except MemoryError as error:
        return _out_of_memory(name, error)
    except Exception as error:
        return error


def _out_of_memory(name: str, error: BaseException) -> WorkerError:
    detail = f" ({error})" if str(error) else ""
    return WorkerError(f"Case {name}: not enough memory{detail}; use fewer --workers or a machine with more memory.")


def _pickle_function(function: Callable[..., Any]) -> bytes:
    inner = getattr(function, "func", function)
    if getattr(inner, "__module__", None) == "__main__":
        raise AutosegError(
            f"{getattr(inner, '__name__', inner)} is defined in the script that was started, where worker processes "
            "cannot find it; move it to a module that can be imported, or use workers=1."
        )
    return pickle.dumps(function)


class _Run:
    """One call of `map_cases`: a thread for each worker feeds it with items and passes on what comes back."""

    def __init__(self, call: bytes, items: Iterable[Any], names: Sequence[str]) -> None:
        self.call = call
        self.items = enumerate(items)
        self.names = names
        self.lock = threading.Lock()
        self.busy: set[_Worker] = set()
        self.stopped = False

    def results(self, workers: int, stop: Callable[[], bool] | None) -> Iterator[tuple[int, Any]]:
        """Yield what the threads put into the queue until each of them has said that it is done, or until `stop`."""
        self.done: queue.Queue[tuple[int, Any] | BaseException | None] = queue.Queue(maxsize=2 * workers)
        threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            running = workers
            while running and not (stop is not None and stop()):
                try:
                    entry = self.done.get(timeout=None if stop is None else STOP_SECONDS)
                except queue.Empty:
                    continue
                if entry is None:
                    running -= 1
                elif isinstance(entry, BaseException):
                    raise entry
                else:
                    yield entry
        finally:
            self._stop(threads)

    def _stop(self, threads: list[threading.Thread]) -> None:
        with self.lock:
            self.stopped = True
            for worker in self.busy:
                worker.kill()
        while any(thread.is_alive() for thread in threads):
            with contextlib.suppress(queue.Empty):
                self.done.get(timeout=0.02)

    def _feed(self) -> None:
        worker: _Worker | None = None
        try:
            while (entry := self._next()) is not None:
                index, item = entry
                message = pickle.dumps(item)
                worker = worker or self._enter(_acquire())
                try:
                    answer = worker.ask(message, self.names[index])
                except (EOFError, OSError):
                    if self.stopped:
                        return
                    answer = worker.obituary(self.names[index])
                    self._leave(worker)
                    worker = None
                self.done.put((index, answer))
        except BaseException as error:
            if not self.stopped:
                self.done.put(error)
        finally:
            if worker is not None:
                self._leave(worker)
            self.done.put(None)

    def _enter(self, worker: _Worker) -> _Worker:
        with self.lock:
            self.busy.add(worker)
            if self.stopped:
                worker.kill()
        worker.begin(self.call)
        return worker

    def _leave(self, worker: _Worker) -> None:
        with self.lock:
            self.busy.discard(worker)
        if worker.healthy and not worker.killed:  # it may have been killed just after its answer
            _release(worker)
        else:
            worker.end()

    def _next(self) -> tuple[int, Any] | None:
        with self.lock:
            return None if self.stopped else next(self.items, None)


class RemoteTraceback(Exception):
    """The traceback of an exception as it was in the worker; shown as the exception's cause."""

    def __str__(self) -> str:
        return f"in a worker process:\n{self.args[0]}"


class _Worker:
    """A process that answers items, and its pipes. Unhealthy while a question is not answered."""

    def __init__(self) -> None:
        environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
        self.parent_memory = _peak_resident_bytes()
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.peak_memory = 0
        self.healthy = True
        self.killed = False
        self.ready = False
        with contextlib.suppress(OSError):  # died at once: `begin` will tell
            _pipe(self.process.stdin).write(json.dumps([str(entry) for entry in sys.path]).encode() + b"\n")
            _pipe(self.process.stdin).flush()

    def begin(self, call: bytes) -> None:
        """Wait until the process has started and hand it the function. Raises WorkerError where it cannot start."""
        try:
            if not self.ready:
                _receive(_pipe(self.process.stdout))
                self.ready = True
            _send(_pipe(self.process.stdin), FUNCTION, call)
        except (EOFError, OSError) as error:
            self.healthy = False
            status = self.end()
            raise WorkerError(
                f"A worker process could not be started: {sys.executable} ended with status {status}; "
                "its error is printed above. Use --workers 1 to go on without worker processes."
            ) from error

    def ask(self, item: bytes, name: str) -> Any:
        """The function's result for a pickled item, or the exception that it raised. EOFError where the worker died."""
        self.healthy = False
        _send(_pipe(self.process.stdin), ITEM, item)
        _, answer = _receive(_pipe(self.process.stdout))
        self.healthy = True
        return unpickled_answer(answer, name)

    def kill(self) -> None:
        """End the process at once, in the midst of its case."""
        self.killed = True
        self.process.kill()

    def end(self) -> int:
        """Close the pipes, wait for the process and give its exit status back (negative: a signal)."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                _pipe(stream).close()
        if self.process.returncode is None and hasattr(os, "wait4"):
            with contextlib.suppress(ChildProcessError):
                _, status, usage = os.wait4(self.process.pid, 0)
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_memory = usage.ru_maxrss * _RU_MAXRSS_BYTES
        return self.process.wait()

    def obituary(self, name: str) -> WorkerError:
        """The sentence for a worker that died at a case: the case, the cause, its memory."""
        self.healthy = False
        status = self.end()
        cause = f"exit status {status}"
        if status < 0:
            cause = f"signal {signal.Signals(-status).name}"
        if status == -9:
            cause += ", which the system sends when memory runs out"
        memory = "its memory is not known"
        if self.peak_memory > self.parent_memory:
            memory = f"it had used up to {self.peak_memory / 1e9:.2f} GB of memory"
        elif self.peak_memory:  # Linux hands the peak of the parent on to its children
            memory = f"it had used less than {self.peak_memory / 1e9:.2f} GB of memory"
        return WorkerError(
            f"Case {name}: its worker process died ({cause}; {memory}); use fewer --workers or leave the case out."
        )


_RU_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RU_MAXRSS_BYTES


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _send(stream: IO[bytes], kind: bytes, message: bytes) -> None:
    stream.write(HEADER.pack(kind, len(message)))
    stream.write(message)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[bytes, bytes]:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    kind, length = HEADER.unpack(header)
    message = stream.read(length)
    if len(message) < length:
        raise EOFError
    return kind, message


def serve() -> None:
    """What a worker does: call the function that came last with each item, answer, until the input ends.

    The input is read by a thread of its own, so that the end of the parent ends this process in the midst of a case.
    """
    if hasattr(os, "nice"):
        os.nice(NICE)
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    inbox: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(_receive(questions))
        except (EOFError, OSError, ValueError):
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent had nothing to ask and is gone: `read` ends this process
        _send(answers, READY, b"")
    call = b""
    function: Callable[[Any], Any] | None = None
    while True:
        kind, message = inbox.get()
        if kind == FUNCTION:
            call, function = message, None
            continue
        try:
            function = function or pickle.loads(call)
            answer = pickle.dumps((function(pickle.loads(message)), None))
        except Exception as error:
            answer = _pickle_error(error)
        _send(answers, ANSWER, answer)


def pickled_call(function: Callable[[Any], Any], item: Any) -> bytes:
    """What `unpickled_answer` gives back elsewhere: the function's result, or the exception that it raised."""
    try:
        return pickle.dumps((function(item), None))
    except Exception as error:
        return _pickle_error(error)


def unpickled_answer(answer: bytes, name: str) -> Any:
    """The result or, in its place, the exception of a `pickled_call`."""
    value, trace = pickle.loads(answer)
    if trace is None:
        return value
    if isinstance(value, MemoryError):
        return _out_of_memory(name, value)
    value.__cause__ = RemoteTraceback(trace)
    return value


def _pickle_error(error: Exception) -> bytes:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        message = pickle.dumps((error, trace))
        pickle.loads(message)  # an exception whose constructor takes other arguments fails here
    except Exception:
        message = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return message
