"""The errors a user can meet: one sentence each, printed by the command line without a traceback.

AutosegError
├── DatasetError      the raw dataset, one of its cases or an input image is not usable
├── PlanError         a plan, a fold file or an option does not fit
├── CheckpointError   a model file is missing, damaged or of another version
├── PredictionError   a case could not be predicted or evaluated
├── StorageError      the workspace or an output folder cannot be read or written
└── WorkerError       a worker process died or ran out of memory
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutosegError(Exception):
    """A sentence that says what is wrong, where, what was expected and found, and what to do."""


class DatasetError(AutosegError):
    """The raw dataset, one of its cases, or an input image is not usable."""


class PlanError(AutosegError):
    """A plan, a fold file or an option does not fit."""


class CheckpointError(AutosegError):
    """A model file is missing, damaged, or of another version."""


class PredictionError(AutosegError):
    """A case could not be predicted or evaluated."""


class StorageError(AutosegError):
    """The workspace or an output folder cannot be read or written (permissions, full disk, damaged store)."""


class WorkerError(AutosegError):
    """A worker process died, ran out of memory or could not be started; names its case, the cause and its memory."""


def unknown_choice(what: str, given: object, valid: Iterable[str]) -> str:
    """The sentence for a name that is not among `valid`: lists them and the nearest one."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"{what} '{given}' is not known; choose one of {', '.join(names)}.{hint}"


def listed(values: Iterable[object], most: int = 10) -> str:
    """The values in a row; of many the first, and how many more there are."""
    names = [str(value) for value in values]
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
