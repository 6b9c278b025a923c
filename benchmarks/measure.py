"""What every benchmark shares: the machine in one line, a command's seconds and peak memory, a markdown table.

Memory is summed over the process and all its descendants, sampled every 50 ms (less often where
that would cost time). On Linux it is PSS (shared pages are
divided among those that share them, so nothing is counted twice), elsewhere RSS; the measurement says which.
Needs psutil: `pip install -c constraints.txt '.[benchmarks]'`.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

SAMPLE_SECONDS = 0.05
MEMORY_KIND = "PSS" if sys.platform == "linux" else "RSS"


@dataclass(frozen=True)
class Measurement:
    """What one command, or the median of its repeats, took."""

    seconds: float
    """Wall-clock time."""
    peak_bytes: int
    """Highest memory summed over the process and its descendants."""
    returncode: int = 0
    output: str = ""
    """Standard output and error of the (last) run."""


class PeakMemory:
    """Samples the memory of a process tree while the block runs; `.peak_bytes` afterwards.

    >>> with PeakMemory() as memory:
    ...     work()
    >>> memory.peak_bytes
    """

    def __init__(self, pid: int | None = None) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            began = time.perf_counter()
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._process))
            # reading the page tables of a big process takes a while: never more than 2 % of one core
            if self._stop.wait(max(SAMPLE_SECONDS, 50 * (time.perf_counter() - began))):
                return


def tree_bytes(process: psutil.Process) -> int:
    """Memory of a process and its descendants now, in bytes (0 when it is gone)."""
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(map(_process_bytes, tree))


def _process_bytes(process: psutil.Process) -> int:
    try:
        if MEMORY_KIND == "PSS":
            return int(process.memory_full_info().pss)
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0


def measure(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    check: bool = True,
) -> Measurement:
    """Run a command to its end; `environment` is added to this one. With `check`, RuntimeError where it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **(environment or {})},
        )
        with PeakMemory(process.pid) as memory:
            returncode = process.wait()
            seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read().decode(errors="replace")
    if check and returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {returncode}:\n{text[-3000:]}")
    return Measurement(seconds, memory.peak_bytes, returncode, text)


def measure_repeated(
    command: Sequence[str | Path],
    *,
    repeats: int = 3,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Measurement:
    """Median time and median peak of `repeats` runs, after none that is thrown away."""
    return median([measure(command, environment=environment, folder=folder) for _ in range(repeats)])


def median(measurements: Sequence[Measurement]) -> Measurement:
    """Median time and median peak; the other values of the last."""
    last = measurements[-1]
    return Measurement(
        statistics.median(m.seconds for m in measurements),
        int(statistics.median(m.peak_bytes for m in measurements)),
        last.returncode,
        last.output,
    )


def machine() -> str:
    """One line: processor, cores, memory, GPU, system, and the versions that decide speed."""
    memory_gib = psutil.virtual_memory().total / 2**30
    parts = [
        f"{_processor()}, {cores()} cores, {memory_gib:.0f} GiB",
        *_gpus(),
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        *(f"{name} {version}" for name, version in versions(sys.executable, ("torch", "numpy")).items()),
    ]
    return "; ".join(parts)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [f"{line.strip()}" for line in listed.stdout.splitlines()] if listed.returncode == 0 else []


def versions(python: str | Path, packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of `packages` in the environment of `python`; those that are not there are left out."""
    script = (
        "import sys, importlib.metadata as m\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    listed = subprocess.run([str(python), "-c", script, *packages], capture_output=True, text=True, check=True)
    return dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())


def peer_line(nnunet_python: Path) -> str:
    """The peer in one line: `nnunetv2 2.8.1, torch 2.13.0+cpu`."""
    found = versions(nnunet_python, ("nnunetv2", "torch", "batchgeneratorsv2"))
    return ", ".join(f"{name} {version}" for name, version in found.items())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds_text(seconds: float) -> str:
    """`0.31 s`, `42 s`, `18 min`: three figures at most."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def bytes_text(size: int) -> str:
    """`310 MB`, `1.70 GB` (powers of ten)."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
