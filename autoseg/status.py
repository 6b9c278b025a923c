"""What a command does or raises -> its exit status; every error becomes one sentence on stderr."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from autoseg.screen import Screen

DONE, SOME_FAILED, REFUSED, BUG = 0, 1, 2, 70
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)  # as torch says it, in RuntimeErrors


def status_of(run: Callable[[], int], screen: Screen) -> int:
    """The exit status of a command; every error becomes a sentence on stderr."""
    from autoseg.errors import AutosegError
    from autoseg.files import storage_error

    try:
        with _terminated_by_signal():
            return run()
    except typer.Exit:
        raise
    except _Terminated:
        return screen.refuse("Terminated; what was finished is kept.", 128 + signal.SIGTERM)
    except AutosegError as error:
        return screen.refuse(str(error), REFUSED)
    except KeyboardInterrupt as interrupt:
        (number,) = interrupt.args or (signal.SIGINT,)
        return screen.refuse("Interrupted; what was finished is kept.", 128 + number)
    except BrokenPipeError:  # `autoseg explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        return screen.refuse(f"Not enough memory{detail}; use fewer --workers or a smaller --gpu-memory.", REFUSED)
    except OSError as error:
        return screen.refuse(str(storage_error(Path(error.filename or "?"), error)), REFUSED)
    except Exception as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
            detail = str(error).splitlines()[0]
            return screen.refuse(f"Not enough memory ({detail}); plan with a smaller --gpu-memory.", REFUSED)
        return screen.refuse(
            f"This should not happen, please report it: {type(error).__name__}: {error} (-vv shows where).", BUG
        )


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what is half-written is removed and the user is told."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(screen: Screen, sentences: tuple[str, ...], *, nothing: bool = False) -> int:
    """Print what failed; the exit status for it."""
    for sentence in sentences:
        screen.error(sentence)
    if not sentences:
        return DONE
    return REFUSED if nothing else SOME_FAILED
