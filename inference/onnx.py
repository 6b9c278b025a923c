"""Finished folds of a workspace -> a folder of ONNX files, one for each network, and `onnx.json`: how they are used.

    CONFIGURATION_fold_K.onnx   one network: image in, logits (and a super-resolved image) out, float32, any batch
    onnx.json                   names and shapes of inputs and outputs, labels, and the configuration as in plan.json

Every file is compared with its network before it counts. What surrounds a network is not in its file: preprocessing,
tiles, the mean over folds and mirrored copies, and the way back to the image's grid.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoseg import __version__
from autoseg.errors import CheckpointError, PlanError, StorageError
from autoseg.extras import require_extra
from autoseg.files import atomic_folder, write_json
from autoseg.inference.package import NO_LICENCE, finished_members, require_unused
from autoseg.networks import OutputGrid, UNet
from autoseg.plan import Configuration, Plan
from autoseg.typed_json import to_json
from autoseg.workspace import Workspace

DESCRIPTION = "onnx.json"
ONNX_FORMAT = "autoseg onnx 1"
IMAGE, LOGITS, SUPER_RESOLVED = "image", "logits", "super_resolved"
LARGEST_FILE_BYTES = 2**31 - 2**20  # of a protobuf message, which an ONNX file is
LARGEST_DIFFERENCE = 1e-3  # between the file's answer and the network's, as a share of the largest value

log = logging.getLogger(__name__)


def export_onnx(
    workspace: Workspace,
    configuration: str,
    output: Path,
    *,
    folds: Sequence[str] = (),
    licence: str = NO_LICENCE,
) -> Path:
    """Write the finished folds (default: all) of a configuration, with its previous stage, to a new folder.

    Returns `output`. Raises PlanError where ONNX cannot hold the network or the extra `onnx` is not installed,
    CheckpointError where no fold is finished or a file answers otherwise than its network, StorageError where `output`
    is in use or cannot be written; nothing is left then.
    """
    require_extra("onnx", wanted_by="--onnx")
    output = Path(output)
    require_unused(output)
    if output.suffix and output.suffix[1:].isalpha():
        raise StorageError(f"{output}: ONNX files are written to a folder, whose name has no ending.")
    members = [checkpoint for _, checkpoint in finished_members(workspace, configuration, folds)]
    plan = members[0].plan
    files = []
    with atomic_folder(output) as folder:
        for member in members:
            name = f"{member.configuration}_fold_{member.fold}.onnx"
            network = member.build_network()
            write_network(network, member.settings, folder / name)
            difference = largest_difference(network, member.settings, folder / name)
            if not difference <= LARGEST_DIFFERENCE:
                raise CheckpointError(
                    f"Configuration {member.configuration}, fold {member.fold}: its ONNX file answers otherwise than "
                    f"the network (by {difference:.2g} of the largest value), so nothing is exported; please report it."
                )
            log.info("%s: differs from the network by %.2g of the largest value.", name, difference)
            files.append(
                {
                    "file": name,
                    "configuration": member.configuration,
                    "fold": member.fold,
                    "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
                    "largest_difference": difference,
                }
            )
        content = {
            "format": ONNX_FORMAT,
            "dataset": plan.dataset,
            "configuration": configuration,
            "licence": licence,
            "provenance": {"autoseg": __version__, "plan": plan.id},
            "channels": plan.channels,
            "labels": plan.labels,
            "networks": {name: describe(plan, name) for name in {member.configuration: None for member in members}},
            "files": files,
        }
        write_json(folder / DESCRIPTION, to_json(content))
    return output


def describe(plan: Plan, name: str) -> dict[str, Any]:
    """What goes into a configuration's network, what comes out, and all that the plan says about it."""
    configuration = plan.configuration(name)
    architecture = configuration.architecture
    background = () if plan.labels.has_regions else ("background",)
    previous = plan.labels.names if configuration.previous_stage else ()
    channels = {LOGITS: architecture.output_channels, SUPER_RESOLVED: architecture.image_channels}
    inputs, outputs = sizes(configuration)
    return {
        "inputs": {IMAGE: ["batch", architecture.input_channels, *inputs]},
        "input_channels": [*plan.channels, *(f"{configuration.previous_stage}: {label}" for label in previous)],
        "outputs": {key: ["batch", count, *outputs] for key, count in channels.items() if count},
        "logits_of": [*background, *plan.labels.names] if architecture.output_channels else [],
        "activation": "sigmoid" if plan.labels.has_regions else "softmax",
        "divisor": architecture.divisor,
        "halo": architecture.halo,
        "frames": configuration.frames(training=False),
        "input_preprocessing": configuration.input_preprocessing,
        "configuration": configuration,
    }


def sizes(configuration: Configuration) -> tuple[list[int | str], list[int | str]]:
    """The axes (z, y, x) of a file's input and output: numbers, or what may be chosen, such as "8*y".

    A super-resolving network is asked for the output voxels of one patch, so its sizes are those of a patch.
    """
    architecture = configuration.architecture
    grid = output_grid(configuration)
    if grid is not None:
        z, y, x = configuration.patch_size
        return [z + 2 * architecture.halo, y, x], list(grid.shape)
    free = [name if step == 1 else f"{step}*{name}" for name, step in zip("zyx", architecture.divisor, strict=True)]
    halo = f" + {2 * architecture.halo}" if architecture.halo else ""
    return [free[0] + halo, *free[1:]], list(free)


def output_grid(configuration: Configuration) -> OutputGrid | None:
    """What a super-resolving network is asked for: all of a patch, at the planned scale; None for others."""
    return OutputGrid.of(configuration.patch_size, configuration.sr_scale) if configuration.super_resolves else None


class Answers(nn.Module):
    """A network as its ONNX file has it: (B, C, Z, Y, X) -> logits and super-resolved image, those that there are."""

    def __init__(self, network: UNet, configuration: Configuration) -> None:
        super().__init__()
        architecture = configuration.architecture
        channels = {LOGITS: architecture.output_channels, SUPER_RESOLVED: architecture.image_channels}
        self.channels = {name: count for name, count in channels.items() if count}
        self.network, self.grid = network, output_grid(configuration)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The parts of the finest answer, in the order of `channels`."""
        finest: Tensor = self.network(image, self.grid)[0]
        return finest.split(list(self.channels.values()), dim=1) if len(self.channels) > 1 else (finest,)


def write_network(network: UNet, configuration: Configuration, path: Path) -> None:
    """Write a network in evaluation mode, on the CPU, as one ONNX file. Raises PlanError where ONNX cannot hold it."""
    architecture = configuration.architecture
    if architecture.reference_channels:
        raise _cannot_hold(configuration, "a reference image, whose grid differs from image to image")
    size = sum(parameter.nbytes for parameter in network.parameters())
    if size > LARGEST_FILE_BYTES:
        raise _cannot_hold(configuration, f"{size / 1e9:.1f} GB of weights, at most 2.1 GB")
    answers = Answers(network, configuration)
    example, free = _example(configuration)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)  # it names packages that no network here needs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            captured = torch.export.export(answers, (example,), dynamic_shapes=(free,))
            program = torch.onnx.export(
                captured, dynamo=True, input_names=[IMAGE], output_names=list(answers.channels), verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        operation = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        if operation is None:
            raise
        raise _cannot_hold(configuration, f"the operation {operation[1]}") from error
    finally:
        exporter.setLevel(level)
    assert program is not None
    (image,) = program.model.graph.inputs
    symbols = {axis: re.findall(r"\bs\d+\b", str(image.shape[axis])) for axis in free}
    names = {0: "batch", 2: "z", 3: "y", 4: "x"}
    program.rename_axes({found[0]: names[axis] for axis, found in symbols.items()})
    for node in program.model.graph:
        node.metadata_props.clear()  # the lines of Python that it comes from, with the paths of this machine
    program.save(str(path), external_data=False)


def _example(configuration: Configuration) -> tuple[Tensor, dict[int, Any]]:
    """An input to trace a network with, and which of its axes are free.

    Their sizes differ, so that none is taken for another.
    """
    architecture = configuration.architecture
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if configuration.super_resolves:
        z, y, x = configuration.patch_size
    else:
        z, y, x = (step * count for step, count in zip(architecture.divisor, (3, 5, 7), strict=True))
        for axis, step in enumerate(architecture.divisor, start=2):
            free[axis] = step * torch.export.Dim("zyx"[axis - 2])
        free[2] = free[2] + 2 * architecture.halo
    return torch.zeros(2, architecture.input_channels, z + 2 * architecture.halo, y, x), free


def largest_difference(network: UNet, configuration: Configuration, path: Path) -> float:
    """The largest difference between the answers of an ONNX file and of its network, as a share of the largest value.

    Of one patch of noise, and of two at once.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    answers = Answers(network, configuration)
    z, y, x = configuration.patch_size
    shape = (configuration.architecture.input_channels, z + 2 * configuration.architecture.halo, y, x)
    differences = []
    for batch in (1, 2):
        image = np.random.default_rng(batch).normal(size=(batch, *shape)).astype(np.float32)
        with torch.inference_mode():
            expected = answers(torch.from_numpy(image))
        for found, own in zip(session.run(list(answers.channels), {IMAGE: image}), expected, strict=True):
            differences.append(np.abs(found - own.numpy()).max() / own.abs().max().item())
    return float(np.max(differences))  # not max(), which may lose a NaN


def _cannot_hold(configuration: Configuration, what: str) -> PlanError:
    return PlanError(
        f"Configuration {configuration.name}: ONNX cannot hold {what}; export it without --onnx, for `autoseg predict`."
    )
