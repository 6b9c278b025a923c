"""Atomic files: what is written is whole or not there (temporary file, flush, rename)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autoseg.errors import AutosegError, StorageError

PARTIAL = ".partial"  # marks a file that is being written; never read, removed by the next writer


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it fails.

    `durable` waits until the content is on the disk, so that not even a power failure leaves a file that is empty:
    milliseconds, which count where a file is small, one of thousands, and has a checksum that tells.
    The temporary name keeps the endings of `path` (`CASE.nii.gz`), because image writers choose the format by it.
    Raises StorageError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}{PARTIAL}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes when it fails.

    A folder that is there is replaced. Raises StorageError where it cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}{PARTIAL}.{path.name}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left half-written anywhere under `folder`; living ones keep theirs."""
    for path in folder.rglob(f".*{PARTIAL}.*"):
        writer = path.name[1:].partition(".")[0]
        if not (writer.isdigit() and _is_alive(int(writer))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return process != os.getpid()


def storage_error(path: Path, error: OSError) -> StorageError:
    """The sentence for an operating-system error met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: the disk is full; free some space or choose another --workspace.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path}: no permission to write here; choose another --workspace or output folder.")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return StorageError(f"{path}: cannot be written, a file is where a folder is needed; choose another folder.")
    return StorageError(f"{path}: cannot be written ({error.strerror or error}).")


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` to `path` atomically (UTF-8); `durable` as in `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, *, error: Callable[[str], AutosegError], what: str, remedy: str = "") -> Any:
    """The content of a JSON file; `error` (a class of AutosegError) is raised, naming `what` and the position.

    `remedy` says what to do about a damaged file.

    >>> read_json(Path("plan.json"), error=PlanError, what="plan")
    """
    end = f"; {remedy}." if remedy else "."
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise error(f"{path}: there is no such {what}.") from missing
    except json.JSONDecodeError as broken:
        raise error(
            f"{path}: the {what} is not valid JSON (line {broken.lineno}, column {broken.colno}: {broken.msg}){end}"
        ) from broken
    except RecursionError as broken:
        raise error(f"{path}: the {what} is nested too deeply{end}") from broken
    except UnicodeDecodeError as broken:
        raise error(f"{path}: the {what} is not a text file{end}") from broken
    except OSError as unreadable:
        raise error(f"{path}: the {what} cannot be read ({unreadable.strerror}).") from unreadable
