"""Twelve broken datasets, and what is said about each: by `autoseg verify`, by planning, and by nnU-Net.

Each is a copy of one small synthetic dataset in which one thing is broken, most of them in one case. A dataset counts
as refused when the command ends with an error status, without a traceback, in a sentence that names the case (or the
file, where the whole dataset is broken).

python benchmarks/broken_datasets.py [--nnunet-python /path/to/python] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from measure import Measurement, machine, markdown_table, measure, peer_line

from autoseg.demo import write_synthetic_dataset
from autoseg.image import Image, read_image, to_itk

CASES = 4
BROKEN = "demo_001"
IMAGE, LABEL = f"imagesTr/{BROKEN}_0000.nii.gz", f"labelsTr/{BROKEN}.nii.gz"


@dataclass(frozen=True)
class Breakage:
    """One way to break a dataset."""

    name: str
    apply: Callable[[Path], None]
    """Breaks the dataset folder that it is given."""
    named: str = BROKEN
    """What the sentence must name."""


def main() -> None:
    """Build, ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, help="python of an environment that has nnunetv2")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="build the datasets here and keep them")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        whole = write_synthetic_dataset(folder / "raw/Dataset900_Whole", cases=CASES, test_cases=0)
        _check_whole(whole, folder)
        rows = []
        for number, breakage in enumerate(BREAKAGES, start=1):
            root = folder / f"raw/Dataset{900 + number}_Broken"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(whole, root)
            breakage.apply(root)
            rows.append(_row(breakage, root, folder, options.nnunet_python))
            print(" | ".join(rows[-1]), file=sys.stderr)  # it takes a while

    print(machine())
    if options.nnunet_python:
        print(f"peer: {peer_line(options.nnunet_python)}")
    header = ["dataset", "`autoseg verify`", "`autoseg plan-and-preprocess`", "in a sentence"]
    columns = len(header) + bool(options.nnunet_python)
    print(f"\n{sum(row[1] == row[2] == 'refused' for row in rows)} of {len(rows)} refused by both\n")
    print(markdown_table((header + ["nnU-Net"])[:columns], [row[:columns] for row in rows]))


def _check_whole(whole: Path, folder: Path) -> None:
    """The dataset that is broken in twelve ways must itself be sound."""
    measure([sys.executable, "-m", "autoseg", "verify", whole, "--workspace", folder / "workspace"])


def _row(breakage: Breakage, root: Path, folder: Path, nnunet_python: Path | None) -> list[str]:
    workspace = folder / "workspace"
    verified = _autoseg("verify", root, workspace)
    planned = _autoseg("plan-and-preprocess", root, workspace)
    sentence = _sentence(planned.output, breakage.named).replace(f"{root}/", "").replace("|", "/")
    peer = _peer(root, folder, nnunet_python) if nnunet_python else ""
    return [breakage.name, _verdict(verified, breakage), _verdict(planned, breakage), sentence, peer]


def _autoseg(command: str, root: Path, workspace: Path) -> Measurement:
    words = [sys.executable, "-m", "autoseg", command, root, "--workspace", workspace, "--workers", "2"]
    return measure(words, environment={"COLUMNS": "1000"}, check=False)


def _verdict(said: Measurement, breakage: Breakage) -> str:
    if "Traceback" in said.output:
        return "TRACEBACK"
    if said.returncode == 0:
        return "PASSED"
    return "refused" if _sentence(said.output, breakage.named) else "REFUSED WITHOUT NAMING IT"


def _sentence(output: str, named: str) -> str:
    """The last line that names the case."""
    lines = [" ".join(line.split()) for line in output.splitlines() if named in line]
    return lines[-1] if lines else ""


def _peer(root: Path, folder: Path, nnunet_python: Path) -> str:
    """What nnU-Net makes of it: its check, its fingerprint and its plan (not its preprocessing)."""
    places = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    environment = {name: str(folder / place) for name, place in places.items()}
    number = root.name.removeprefix("Dataset")[:3]
    script = nnunet_python.parent / "nnUNetv2_plan_and_preprocess"
    words = [script, "-d", number, "--verify_dataset_integrity", "--no_pp", "-npfp", "2"]
    said = measure(words, environment=environment, check=False)
    if "Traceback" in said.output:
        errors = [line for line in said.output.splitlines() if line and not line[0].isspace() and "Error" in line]
        return f"traceback ({errors[-1].split(':')[0] if errors else 'no reason'})"
    if said.returncode:
        return f"status {said.returncode}, no traceback"
    return "passes with a warning" if "warning: " in said.output.lower() else "passes in silence"


# ---- the twelve


def _write(image: Image, path: Path) -> None:
    """As any program would write it: `autoseg.image.write_image` refuses some of this."""
    sitk.WriteImage(to_itk(image), str(path), useCompression=True)


def _change(file: str, edit: Callable[[Image], Image]) -> Callable[[Path], None]:
    return lambda root: _write(edit(read_image(root / file)), root / file)


def _with_voxel(value: float) -> Callable[[Image], Image]:
    def edit(image: Image) -> Image:
        array = image.array.astype(np.float32)
        array[0, 5, 20:24, 20:24] = value
        return replace(image, array=array)

    return edit


def _unknown_label(image: Image) -> Image:
    array = image.array.astype(np.int16)
    array[0, 0, 0, 0] = 77
    return replace(image, array=array)


def _smaller(image: Image) -> Image:
    z, y, x = image.shape
    return Image(image.array[:, :, :-3], replace(image.grid, shape=(z, y - 3, x)))


def _other_direction(image: Image) -> Image:
    direction = tuple(
        tuple(-value if axis == 2 else value for axis, value in enumerate(r)) for r in image.grid.direction
    )
    return replace(image, grid=replace(image.grid, direction=direction))


def _truncate(root: Path) -> None:
    content = (root / IMAGE).read_bytes()
    (root / IMAGE).write_bytes(content[: len(content) * 2 // 3])


def _four_dimensional(root: Path) -> None:
    volume = sitk.ReadImage(str(root / IMAGE))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(root / IMAGE))


def _missing_channel(root: Path) -> None:
    for path in list((root / "imagesTr").iterdir()):
        if BROKEN not in path.name:
            shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))
    description = json.loads((root / "dataset.json").read_text())
    description["channel_names"]["1"] = "second"
    (root / "dataset.json").write_text(json.dumps(description))


def _no_foreground(root: Path) -> None:
    for path in (root / "labelsTr").iterdir():
        label = read_image(path)
        _write(replace(label, array=np.zeros_like(label.array)), path)


def _broken_description(root: Path) -> None:
    content = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(content[: len(content) // 2])


BREAKAGES = (
    Breakage("truncated .nii.gz", _truncate),
    Breakage("empty file", lambda root: (root / IMAGE).write_bytes(b"") and None),
    Breakage("NaN", _change(IMAGE, _with_voxel(np.nan))),
    Breakage("Inf", _change(IMAGE, _with_voxel(np.inf))),
    Breakage("unknown label", _change(LABEL, _unknown_label)),
    Breakage("fractional label", _change(LABEL, _with_voxel(0.5))),
    Breakage("other size", _change(LABEL, _smaller)),
    Breakage("other direction", _change(LABEL, _other_direction)),
    Breakage("4D", _four_dimensional),
    Breakage("missing channel", _missing_channel),
    Breakage("no foreground (in all cases)", _no_foreground),
    Breakage("broken dataset.json", _broken_description, named="dataset.json"),
)


if __name__ == "__main__":
    main()
