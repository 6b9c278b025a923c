"""A raw dataset folder in nnU-Net v2 layout -> `RawDataset`: its channels, labels and cases. Never written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.errors import DatasetError
from autoseg.files import read_json
from autoseg.image import Image
from autoseg.labels import Labels

DATASET_JSON = "dataset.json"


@dataclass(frozen=True)
class Case:
    """One patient or scan: the files of its channels and, in training data, of its label."""

    identifier: str
    images: tuple[Path, ...]
    """One file for each channel; a single file where it holds all channels (RGB), or a DICOM folder."""
    label: Path | None = None


@dataclass(frozen=True)
class RawDataset:
    """What `dataset.json` says, and where the files of each case are."""

    root: Path
    name: str
    channels: tuple[str, ...]
    """Channel names in order ("CT", "T1", ...); they choose the normalisation."""
    labels: Labels
    file_ending: str
    cases: tuple[Case, ...]
    """The training cases, sorted by identifier."""
    test_cases: tuple[Case, ...] = ()
    """Cases of imagesTs, with their labels where labelsTs has them."""

    @classmethod
    def load(cls, root: Path) -> RawDataset:
        """Read `root/dataset.json` and list the cases; no image is opened.

        Raises DatasetError where dataset.json is missing or wrong, or a case lacks a channel or its label.
        """
        raise NotImplementedError


def read_case(case: Case, dataset: RawDataset) -> tuple[Image, Image | None]:
    """The image of a case, all channels stacked `(C, Z, Y, X)` float32, and its label `(1, Z, Y, X)` integer or None.

    Every check that needs the voxels is made here, so that planning, preprocessing and verify refuse the same things
    with the same sentence. Raises DatasetError naming the case and the file: geometry of channels and label differ,
    NaN or Inf, fractional or unknown label values, wrong number of channels.
    """
    raise NotImplementedError
