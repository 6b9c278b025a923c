"""Optional packages: what each extra of setup.py brings, and the sentence where it is not installed."""

from __future__ import annotations

import importlib.util

from autoseg.errors import PlanError

EXTRAS: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "ray": ("ray",),
}
"""For each extra the modules that must be there; none of them is imported before it is asked for."""


def require_extra(name: str, *, wanted_by: str) -> None:
    """Raises PlanError, naming what is missing and the command that installs it, where an extra is not installed.

    `wanted_by` (an option) begins the sentence. Imports nothing.
    """
    missing = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    if missing:
        raise PlanError(
            f"{wanted_by} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f'run `pip install "autoseg[{name}]"`.'
        )
