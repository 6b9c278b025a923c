"""What `tests/test_ray.py` has the nodes of a cluster do."""

from __future__ import annotations

import time
from pathlib import Path

import ray

from autoseg.errors import DatasetError


def wait_for_go(path: Path) -> str:
    """Say in `path` that it has begun, wait for `go` beside it; the node that it was done on."""
    node: str = ray.get_runtime_context().get_node_id()
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{node}\n")
    while not path.with_name("go").exists():
        time.sleep(0.05)
    return node


def refuse(path: Path) -> None:
    """Count in `path` how often it is tried."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("tried\n")
    raise DatasetError(f"{path.name} is broken.")


def double(path: Path) -> Path:
    """A file beside `path` with its content twice; what else is there is removed."""
    output = path.with_suffix(".doubled")
    output.write_text(2 * path.read_text())
    path.with_suffix(".stale").unlink(missing_ok=True)
    return output
