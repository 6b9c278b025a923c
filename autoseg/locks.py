"""A lock file: whoever holds it works alone. It is free again when its process ends, however that ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from autoseg.errors import StorageError
from autoseg.files import storage_error

log = logging.getLogger(__name__)

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # as systems say that another one holds it
LOCKED_BYTE = 2**30  # on Windows, where a locked byte cannot be read: far behind the name of the process


@contextlib.contextmanager
def alone(path: Path, *, what: str, tries: int = 1) -> Iterator[None]:
    """Hold the lock `path` while the block runs; `what` begins the sentence for who comes second.

    It is tried so many times, once a second. The file stays, with the number of the process that held it last. A file
    system without locks is warned of. Raises StorageError naming the process that holds it, or where the file cannot be
    written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed below, and what is open is what is locked)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    with file:
        try:
            _lock_within(file, tries)
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                owner = file.read().decode(errors="replace").strip() or "unknown"
                raise StorageError(
                    f"{what} (process {owner}); wait for its end, or choose another --workspace."
                ) from error
            log.warning("%s: cannot be locked (%s); see to it that only one run works here.", path, error.strerror)
        try:
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except OSError as error:
            raise storage_error(path, error) from error
        yield


def _lock_within(file: IO[bytes], tries: int) -> None:
    for left in reversed(range(tries)):
        try:
            return _lock(file)
        except OSError as error:
            if error.errno not in HELD or not left:
                raise
        time.sleep(1.0)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        os.lseek(file.fileno(), 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
