"""Export of 61 organs: seconds and peak memory of logits -> labels at full resolution, ours and nnU-Net's.

The logits are a real label map (61 organs and background), smoothed to soft boundaries, with noise, on a grid of
100 x 128 x 128; float16, as both pipelines hold them. Each export runs in a process of its own that reads the logits
from a file; time is that of the export alone, memory the peak of the whole process.

    python benchmarks/export.py --labels ../shared/data/ct_example/labels.nii.gz --nnunet-python /path/to/bin/python
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import Measurement, bytes_text, machine, markdown_table, measure, median, peer_line, seconds_text

NETWORK_SHAPE = (100, 128, 128)
DEFAULT_LABELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "ct_example" / "labels.nii.gz"

OURS = """
import json, sys, time
import numpy as np, torch
from autoseg.image import Grid
from autoseg.inference.export import export_labels
from autoseg.labels import Labels
from autoseg.preprocessing.case import CaseGeometry
logits_file, result_file, shape = sys.argv[1], sys.argv[2], tuple(json.loads(sys.argv[3]))
torch.set_num_threads(int(sys.argv[4]))
logits = torch.from_numpy(np.load(logits_file))
names = tuple(f"organ_{k}" for k in range(1, len(logits)))
labels = Labels(names, tuple((k,) for k in range(1, len(logits))))
crop = tuple((0, n) for n in shape)
geometry = CaseGeometry(Grid(shape), (0, 1, 2), (False, False, False), crop, tuple(logits.shape[1:]))
began = time.perf_counter()
image = export_labels(logits, geometry, labels)
print(json.dumps(time.perf_counter() - began))
np.save(result_file, image.array[0])
"""

PEER = """
import functools, json, sys, time
from types import SimpleNamespace
import numpy as np
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
logits_file, result_file, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
logits = np.load(logits_file)
labels = {"background": 0, **{f"organ_{k}": k for k in range(1, len(logits))}}
spacing = [n / m for n, m in zip(shape, logits.shape[1:])]
options = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}  # as its planner writes them
plans = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
configuration = SimpleNamespace(
    spacing=spacing, resampling_fn_probabilities=functools.partial(resample_data_or_seg_to_shape, **options))
properties = {"spacing": [1.0, 1.0, 1.0], "shape_after_cropping_and_before_resampling": shape,
    "shape_before_cropping": shape, "bbox_used_for_cropping": [[0, n] for n in shape]}
began = time.perf_counter()
result = convert_predicted_logits_to_segmentation_with_correct_shape(
    logits, plans, configuration, LabelManager(labels, None), properties, num_threads_torch=int(sys.argv[4]))
print(json.dumps(time.perf_counter() - began))
np.save(result_file, result)
"""


@dataclass(frozen=True)
class Export:
    """One row of the table."""

    tiles: int
    """How often the logits are repeated along each axis."""
    shape: tuple[int, int, int]
    """Output voxels (z, y, x)."""
    peer: bool
    """Whether nnU-Net is run; otherwise its memory is counted."""


EXPORTS = (
    Export(1, (200, 256, 256), peer=True),
    Export(1, (400, 512, 512), peer=False),
    Export(2, (400, 512, 512), peer=False),
)


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, default=DEFAULT_LABELS, help="label map to make logits from")
    parser.add_argument(
        "--nnunet-python", type=Path, help="python of an environment with nnunetv2; without it ours only"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; the median is printed")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(machine())
    if arguments.nnunet_python:
        print(f"peer: {peer_line(arguments.nnunet_python)}")
    with tempfile.TemporaryDirectory() as folder:
        logits = make_logits(arguments.labels)
        rows = [row(export, logits, Path(folder), arguments) for export in EXPORTS]
    print()
    print(markdown_table(("export", "nnU-Net", "autoseg", "faster", "voxels that differ"), rows))


def make_logits(label_file: Path) -> np.ndarray:
    """Logits (K, Z, Y, X) float16 of every label of the file, with soft boundaries and noise."""
    import torch
    from torch.nn import functional

    from autoseg.image import read_image

    label = torch.from_numpy(read_image(label_file).array[0].astype(np.int64))
    values = label.unique().tolist()
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty((len(values), *NETWORK_SHAPE), dtype=torch.float16)
    for k, value in enumerate(values):
        soft = functional.avg_pool3d((label == value).float()[None, None], 3, stride=1, padding=1)
        resized = functional.interpolate(soft, size=NETWORK_SHAPE, mode="trilinear", align_corners=False)[0, 0]
        logits[k] = 10 * resized + 0.1 * torch.randn(NETWORK_SHAPE, generator=generator)
    return logits.numpy()


def row(export: Export, logits: np.ndarray, folder: Path, arguments: argparse.Namespace) -> tuple[object, ...]:
    """Measure one export."""
    file = folder / "logits.npy"
    np.save(file, np.tile(logits, (1, *(export.tiles,) * 3)))
    classes, *grid = np.load(file, mmap_mode="r").shape
    command = [file, folder / "ours.npy", json.dumps(export.shape), str(arguments.threads)]
    ours = median([timed([sys.executable, "-c", OURS, *command]) for _ in range(arguments.repeats)])
    peer, faster, differ = counted(classes, export), "", ""
    if export.peer and arguments.nnunet_python:
        command[1] = folder / "peer.npy"
        measured = timed([arguments.nnunet_python, "-c", PEER, *command])
        peer = text(measured)
        faster = f"{measured.seconds / ours.seconds:.0f}x"
        differ = f"{np.mean(np.load(folder / 'ours.npy') != np.load(folder / 'peer.npy')):.5%}"
    name = f"{classes} classes, {'x'.join(map(str, grid))} to {'x'.join(map(str, export.shape))}"
    return name, peer, text(ours), faster, differ


def timed(command: list[object]) -> Measurement:
    """The seconds that the process printed and its peak memory."""
    measured = measure([str(word) for word in command], environment={"PYTHONPATH": str(Path(__file__).parents[1])})
    return Measurement(float(measured.output.splitlines()[-1]), measured.peak_bytes)


def counted(classes: int, export: Export) -> str:
    """What dense full-resolution logits alone would take."""
    size = classes * int(np.prod(export.shape)) * 4
    return f"not run: float32 logits at full resolution are {bytes_text(size)}"


def text(measured: Measurement) -> str:
    """Seconds and memory in one cell."""
    return f"{seconds_text(measured.seconds)}, {bytes_text(measured.peak_bytes)}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
