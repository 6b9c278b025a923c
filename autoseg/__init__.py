"""autoseg: self-configuring segmentation of medical images.

>>> model = autoseg.load_model("model.zip")
>>> labels = model.predict("scan.nii.gz")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoseg.inference.predictor import Model

__version__ = "0.1.0"

# In a clone the stage folders stand beside this one. Without this line `import autoseg.training` would fail wherever
# the repository's root comes first on sys.path (`python -m pytest`, `python -c`) and hides the installed package.
_clone = Path(__file__).resolve().parent.parent
if (_clone / "setup.py").is_file() and (_clone / "experiment_planning").is_dir():
    __path__.append(str(_clone))


def load_model(path: str | Path, *, device: str = "auto") -> Model:
    """A trained model, ready to predict: an exported folder or zip, `models/CONFIGURATION`, or one fold.

    Raises CheckpointError where there is no sound model at `path`.
    """
    from autoseg.inference.predictor import load_model as load

    return load(Path(path), device=device)
