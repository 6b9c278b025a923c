"""A function and a list of items -> their results, as tasks of a Ray cluster (`--executor ray[://ADDRESS]`).

Ray chooses the machine of each task and starts its process. A task of a machine that was lost is done again elsewhere;
an error of the task itself is not tried twice. A machine that does not see this one's workspace and dataset gets copies
of what a task reads (again only what has changed), and what the task wrote comes back when it is done.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.metadata
import logging
import os
import platform
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from autoseg import __version__
from autoseg.errors import PlanError, WorkerError
from autoseg.executor import STOP_SECONDS, Files, Needs, Results, pickled_call, unpickled_answer, with_threads
from autoseg.extras import require_extra
from autoseg.files import PARTIAL, atomic_path, write_text

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PORT = 6379  # of a head node, where the address names none
ANSWER_SECONDS = 5.0  # in which the head node must take a connection
LOCAL, AUTO = "local", "auto"
PROBE_SECONDS = 60.0  # in which every node must start a process and say its versions
MOST_LOSSES = 3  # machines that one task may lose
PIECE_BYTES = 2**24  # of a file that is copied at once
COMPARED = ("numpy", "torch", "blosc2", "batchgeneratorsv2")  # packages that results depend on


@dataclass(frozen=True)
class Terms:
    """What a task is told besides its function and its item."""

    name: str
    threads: int
    """See `Needs`."""
    token: Path
    """A file with its own name in it: who finds it sees the workspace."""
    roots: tuple[Path, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    shelf: Any
    """The actor that reads and writes files for machines which do not see them."""


@dataclass(frozen=True)
class RayExecutor:
    """A Ray cluster that this process is a driver of."""

    ray: Any
    """The module."""
    copies: bool = False
    """Copy files to every machine, even where it sees the workspace."""

    @classmethod
    def connect(cls, address: str = "") -> RayExecutor:
        """Join the cluster whose head node has this address; without one, one is started here.

        Raises PlanError where Ray is not installed, where the address does not answer, and where a node has other
        versions than this process.
        """
        require_extra("ray", wanted_by="--executor ray")
        import ray

        # "local" starts one: without an address Ray would look for the last one of this machine, and wait for it for
        # minutes where that was killed
        named = address in ("", AUTO) or "://" in address  # as RAY_ADDRESS may be
        where = (address or LOCAL) if named else _checked(address)
        here = where == LOCAL
        try:
            ray.init(where, log_to_driver=False, include_dashboard=False if here else None, logging_level=logging.ERROR)
        except (RuntimeError, ConnectionError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            own = "" if here else f"; this machine must be one of its nodes (`ray start --address={where}`)"
            raise PlanError(
                f"--executor ray: the cluster {'on this machine' if here else where} cannot be joined ({reason}){own}, "
                "with the same Ray and Python."
            ) from error
        executor = cls(ray)
        try:
            executor.require_same_versions()
        except BaseException:
            ray.shutdown()
            raise
        return executor

    def require_same_versions(self) -> None:
        """Raises PlanError naming the nodes whose autoseg, or whose libraries, are not those of this process."""
        own = versions()
        probe = self.ray.remote(versions)
        asked = {node["NodeID"]: probe.options(**self._on(node["NodeID"])).remote() for node in self._nodes()}
        for node in self._nodes():
            where = node["NodeManagerAddress"]
            try:
                found = self.ray.get(asked[node["NodeID"]], timeout=PROBE_SECONDS)
            except self.ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise PlanError(
                    f"--executor ray: node {where} cannot run autoseg {__version__} ({reason}); install it there."
                ) from error
            other = [f"{name} {found.get(name)} (here {own[name]})" for name in own if found.get(name) != own[name]]
            if other:
                raise PlanError(f"--executor ray: node {where} has {', '.join(other)}; install the same everywhere.")

    def places(self, device: str, needs: Needs) -> tuple[str, ...]:
        """As many as the nodes have room for."""
        kind = "cuda" if needs.gpus else "cpu"
        wanted = self._wanted(needs)
        room = self._room(wanted)
        if not room:
            most = {name: max(node["Resources"].get(name, 0) for node in self._nodes()) for name in wanted}
            raise PlanError(
                f"--executor ray: no node has {_amounts(wanted)}; the most that one has is {_amounts(most)}."
            )
        return (kind,) * room

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
        """`(index, result or exception)` in the order in which tasks are done; see `Executor.map`."""
        if not items:
            return
        wanted = self._wanted(needs)
        task = self.ray.remote(run_task).options(
            num_cpus=wanted["CPU"], num_gpus=wanted["GPU"], memory=wanted["memory"] or None, max_retries=0
        )
        with self._shelf(files) as shelf, _token(files.roots[-1]) as token:
            if self.copies:
                token = token.with_name("is not there")

            def submit(index: int) -> Any:
                item = items[index]
                terms = Terms(
                    names[index], needs.threads, token, files.roots,
                    tuple(files.reads(item)), tuple(files.writes(item)), shelf,
                )  # fmt: skip
                return task.remote(function, item, terms)

            waiting = {submit(index): index for index in range(len(items))}
            lost = dict.fromkeys(range(len(items)), 0)
            told = False
            try:
                while waiting and not stop():
                    done, _ = self.ray.wait(list(waiting), timeout=STOP_SECONDS)
                    if not (done or told) and not self._room(wanted):
                        told = True
                        log.warning(
                            "--executor ray: no node with %s is left; %d tasks wait until one joins the cluster.",
                            _amounts(wanted), len(waiting),
                        )  # fmt: skip
                    for reference in done:
                        index = waiting.pop(reference)
                        try:
                            yield index, unpickled_answer(self.ray.get(reference), names[index])
                        except self.ray.exceptions.RayError as error:
                            lost[index] += 1
                            reason = str(error).strip().splitlines()[0]
                            if isinstance(error, self.ray.exceptions.RayTaskError) or lost[index] > MOST_LOSSES:
                                yield index, _given_up(names[index], reason, lost[index])
                                continue
                            log.warning("%s: its node was lost (%s); it is done again elsewhere.", names[index], reason)
                            waiting[submit(index)] = index
            finally:
                for reference in waiting:
                    self.ray.cancel(reference, force=True)
                if waiting:  # until they are gone: what they write somebody else may write next
                    self.ray.wait(list(waiting), num_returns=len(waiting), timeout=PROBE_SECONDS)

    def machines(self) -> int:
        """The nodes that are there."""
        return len(self._nodes())

    def close(self) -> None:
        """Remove what was copied, and leave the cluster."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            remove = self.ray.remote(remove_copies)
            self.ray.get(
                [remove.options(**self._on(node["NodeID"])).remote() for node in self._nodes()], timeout=PROBE_SECONDS
            )
        self.ray.shutdown()

    def _room(self, wanted: Mapping[str, Any]) -> int:
        """How many tasks that want so much the nodes can hold at the same time."""
        return sum(
            min(int(node["Resources"].get(name, 0) / amount) for name, amount in wanted.items() if amount)
            for node in self._nodes()
        )

    def _wanted(self, needs: Needs) -> dict[str, Any]:
        """A task's share of a node, as Ray names it; not more cores than any node has."""
        most = max(int(node["Resources"].get("CPU", 0)) for node in self._nodes())
        return {"CPU": max(1, min(needs.cores, most)), "GPU": needs.gpus, "memory": needs.memory_bytes}

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _on(self, node: str) -> dict[str, Any]:
        """Options of what is done on one node, beside its tasks."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}

    @contextlib.contextmanager
    def _shelf(self, files: Files) -> Iterator[Any]:
        here = self.ray.get_runtime_context().get_node_id()
        shelf = self.ray.remote(Shelf).options(**self._on(here)).remote(files.roots)
        try:
            yield shelf
        finally:
            self.ray.kill(shelf)


def _given_up(name: str, reason: str, times: int) -> WorkerError:
    return WorkerError(
        f"{name}: its process died {times} times on the cluster (the last time: {reason}); look at the memory of that "
        "node, or at its logs."
    )


def _checked(address: str) -> str:
    """HOST:PORT, of which something answers."""
    host, _, port = address.partition(":")
    if not host or (port and not port.isdigit()):
        raise PlanError(f"--executor ray://{address}: expected ray://HOST:PORT, such as ray://10.0.0.1:{PORT}.")
    try:
        socket.create_connection((host, int(port or PORT)), ANSWER_SECONDS).close()
    except OSError as error:
        raise PlanError(
            f"--executor ray://{address}: nothing answers there ({error.strerror or error}); give the address that "
            f"`ray start --head` has printed, such as ray://10.0.0.1:{PORT}."
        ) from error
    return f"{host}:{port or PORT}"


def _amounts(resources: Mapping[str, Any]) -> str:
    words = {"CPU": "cores", "GPU": "GPUs", "memory": "GB of memory"}
    shown = {name: amount / 1e9 if name == "memory" else amount for name, amount in resources.items() if amount}
    return ", ".join(f"{amount:.3g} {words[name]}" for name, amount in shown.items())


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[Path]:
    path = folder / f".seen_by_all_{uuid.uuid4().hex}"
    write_text(path, path.name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


# ---- on the nodes


def versions() -> dict[str, str]:
    """Of everything that results depend on, in this process."""
    found = {name: importlib.metadata.version(name) for name in COMPARED}
    return {"autoseg": __version__, "Python": platform.python_version(), **found}


def run_task(function: Callable[[Any], Any], item: Any, terms: Terms) -> bytes:
    """One call, in a process of a node; what it reads and writes lies in copies where the workspace is not seen."""
    call: Callable[[Any], Any] = functools.partial(_on_copies, function, terms=terms)
    with contextlib.suppress(OSError):
        if terms.token.read_text(encoding="utf-8") == terms.token.name:
            call = function
    return pickled_call(functools.partial(with_threads, terms.threads, call) if terms.threads else call, item)


def _on_copies(function: Callable[[Any], Any], item: Any, *, terms: Terms) -> Any:
    roots = {root: copies() / root.relative_to(root.anchor) for root in terms.roots}
    fetch(terms, roots)
    result = moved(moved(function, roots)(moved(item, roots)), {copy: root for root, copy in roots.items()})
    give(terms, roots)
    return result


def copies() -> Path:
    """Where this node keeps its copies while the driver is there."""
    import ray

    context = ray.get_runtime_context()
    return Path(tempfile.gettempdir()) / f"autoseg_{context.get_job_id()}_{context.get_node_id()[:8]}"


def remove_copies() -> None:
    """What is done on each node in the end."""
    shutil.rmtree(copies(), ignore_errors=True)


def moved(value: Any, roots: Mapping[Path, Path]) -> Any:
    """The same value with every path below one of `roots` (keys) moved to where that is now (values)."""
    again = functools.partial(moved, roots=roots)
    if isinstance(value, Path):
        root = next((root for root in roots if value.is_relative_to(root)), None)
        return value if root is None else roots[root] / value.relative_to(root)
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *map(again, value.args), **again(value.keywords))
    if isinstance(value, dict):
        return {key: again(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(again, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: again(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def moved_pattern(pattern: str, roots: Mapping[Path, Path]) -> str:
    """The same for a pattern of glob."""
    for root, copy in roots.items():
        if pattern.startswith(before := glob.escape(str(root))):
            return glob.escape(str(copy)) + pattern[len(before) :]
    raise AssertionError(f"{pattern} lies in none of {list(roots)}")


@dataclass(frozen=True)
class Known:
    """A file, as it is told from another version of itself."""

    path: Path
    size: int
    time_ns: int


def listed(patterns: Sequence[str]) -> list[Known]:
    """The whole files that match, the last written last: what says that others are complete is written after them."""
    found = []
    for path in {Path(name) for pattern in patterns for name in glob.glob(pattern, recursive=True)}:
        with contextlib.suppress(FileNotFoundError):  # another task has just removed it
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and PARTIAL not in path.name:
                found.append(Known(path, status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda known: (known.time_ns, known.path))


class Shelf:
    """An actor on the driver's node: its files, for nodes that do not see them. Nothing outside of `roots`."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)

    def listed(self, patterns: Sequence[str]) -> list[Known]:
        """The files that match."""
        return [known for known in listed(patterns) if self._is_inside(known.path)]

    def read(self, path: Path, offset: int) -> bytes:
        """A piece of a file."""
        assert self._is_inside(path)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)

    def append(self, path: Path, offset: int, piece: bytes) -> None:
        """Write a piece of a file that has another name until it is whole."""
        assert self._is_inside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(_unfinished(path), "r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(piece)

    def finish(self, known: Known) -> None:
        """Give a file its name."""
        assert self._is_inside(known.path)
        os.utime(_unfinished(known.path), ns=(known.time_ns, known.time_ns))
        os.replace(_unfinished(known.path), known.path)

    def remove(self, paths: Sequence[Path]) -> None:
        """Files that the task has removed from its copies."""
        for path in paths:
            assert self._is_inside(path)
            path.unlink(missing_ok=True)

    def _is_inside(self, path: Path) -> bool:
        return ".." not in path.parts and any(path.is_relative_to(root) for root in self.roots)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}{PARTIAL}.{path.name}")


def fetch(terms: Terms, roots: Mapping[Path, Path]) -> None:
    """Copy what a task reads, where it is not there already; remove what it would read and is there no longer."""
    import ray

    wanted = {moved(known.path, roots): known for known in ray.get(terms.shelf.listed.remote(terms.reads))}
    there = {known.path: known for known in listed([moved_pattern(pattern, roots) for pattern in terms.reads])}
    for path in there.keys() - wanted.keys():
        path.unlink(missing_ok=True)
    for path, known in wanted.items():
        if path in there and replace(there[path], path=known.path) == known:
            continue
        with atomic_path(path, durable=False) as temporary:
            with open(temporary, "wb") as file:
                while file.tell() < known.size:
                    file.write(ray.get(terms.shelf.read.remote(known.path, file.tell())))
            os.utime(temporary, ns=(known.time_ns, known.time_ns))
    for root in roots.values():
        root.mkdir(parents=True, exist_ok=True)


def give(terms: Terms, roots: Mapping[Path, Path]) -> None:
    """Bring back what a task has written; remove what it has removed."""
    import ray

    back = {copy: root for root, copy in roots.items()}
    before = {known.path: known for known in ray.get(terms.shelf.listed.remote(terms.writes))}
    made = listed([moved_pattern(pattern, roots) for pattern in terms.writes])
    for known in made:
        target = replace(known, path=moved(known.path, back))
        if before.pop(target.path, None) == target:
            continue
        with open(known.path, "rb") as file:
            offset = 0
            while (piece := file.read(PIECE_BYTES)) or not offset:
                ray.get(terms.shelf.append.remote(target.path, offset, piece))
                offset += max(1, len(piece))
        ray.get(terms.shelf.finish.remote(target))
    ray.get(terms.shelf.remove.remote(sorted(before)))
