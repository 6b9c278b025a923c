"""What autoseg and nnU-Net 2.8.1 plan for eight kinds of dataset at 8 and 24 GB: writes docs/planner-vs-nnunet.md.

nnU-Net's plans are read from a file (`--peer`); ours are made for a GPU of that memory, without shaping by time. For
every difference the peer's own network is measured too, so that the text can say what it would need.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from autoseg.experiment_planning import planner  # noqa: E402
from autoseg.experiment_planning.fingerprint import Fingerprint, uniform_fingerprint  # noqa: E402
from autoseg.experiment_planning.machine import MEMORY_SHARE  # noqa: E402
from autoseg.experiment_planning.memory import training_memory  # noqa: E402
from autoseg.labels import Labels  # noqa: E402
from autoseg.plan import Budget, Configuration, Plan  # noqa: E402

GIGABYTES = (8, 24)
PEER_NAMES = {"3d_cascade": "3d_cascade_fullres"}
SHARED = ("2d", "3d_fullres", "3d_lowres", "3d_cascade")  # nnU-Net has no 2.5D and no super-resolution

INTRODUCTION = """# What autoseg plans, beside nnU-Net

Made by `python benchmarks/planner_vs_nnunet.py`. nnU-Net is 2.8.1 with its default planner (`ExperimentPlanner`), given
the memory in the first column; autoseg is given the same memory and no time limit. Every case of a dataset has the
median shape. "Memory" is what one training step of our network needs, counted on fake tensors (on a CPU within 1 % of
the measured peak: `benchmarks/memory.py`); a tenth of the budget is kept free for the allocator's gaps and the CUDA
context.

What is equal everywhere: target spacing, the U-Net (two convolutions a stage, 32 feature maps doubling to 320 in 3D and
512 in 2D), and for equal patches the strides and kernels.

What differs by rule:

- **2D networks** are planned by default only where slices are more than 3 times thicker than pixels, or the images are
  2D; elsewhere on request (`--configurations 2d,3d_fullres`; these rows are marked \\*). nnU-Net always plans one.
- **Memory is measured**, not estimated from the number of feature-map voxels against a reference network. Where the
  reference is generous, nnU-Net leaves memory unused; where it is tight, it would not fit. The last column says what
  nnU-Net's patch and batch would need by the same measure.
- **The cascade's second stage** is a configuration of its own and is measured with its further input channels;
  nnU-Net's inherits everything from `3d_fullres`.
"""


def main() -> None:
    """Plan all datasets and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=ROOT.parent / "shared" / "peer" / "nnunet-plans.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "planner-vs-nnunet.md")
    arguments = parser.parse_args()
    peer = json.loads(arguments.peer.read_text())
    lines = [INTRODUCTION]
    for name, facts in peer.items():
        print(name, flush=True)
        lines += section(name, facts)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def section(name: str, facts: dict[str, Any]) -> list[str]:
    """The table of one dataset and the reasons under it."""
    shape, spacing = "x".join(map(str, facts["median_shape"])), "x".join(f"{s:g}" for s in facts["spacing"])
    lines = [
        f"## {name}",
        "",
        f"{facts['cases']} cases, median {shape} voxels of {spacing} mm, channels {', '.join(facts['channels'])}, "
        f"{facts['classes']} classes.",
        "",
        "| memory | configuration | spacing | patch | batch | stages | nnU-Net: spacing | patch | batch | stages |"
        " memory | nnU-Net's would need |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reasons: list[str] = []
    fingerprint = as_fingerprint(name, facts)
    for gigabytes in GIGABYTES:
        theirs = facts[f"ExperimentPlanner@{gigabytes}GB"]
        budget = Budget(gigabytes * 10**9, 0.0, "auto")
        plan = planner.plan_experiment(fingerprint, budget, probe=False)
        plans = {c.name: plan for c in plan.configurations if c.name in SHARED}
        if "2d" not in plans:
            asked = planner.plan_experiment(fingerprint, budget, probe=False, configurations=["2d"])
            plans = {"2d": asked, **plans}
        for configuration, source in plans.items():
            ours = source.configuration(configuration)
            peer = theirs.get(PEER_NAMES.get(configuration, configuration))
            peer = theirs[peer["inherits"]] if peer and "inherits" in peer else peer
            lines.append(row(gigabytes, ours, peer, source, marked=source is not plan))
            reasons += [f"- {gigabytes} GB, {configuration}: {text}" for text in differences(ours, peer, source)]
        missing = [n for n in theirs if n not in {PEER_NAMES.get(c, c) for c in plans}]
        reasons += [f"- {gigabytes} GB: nnU-Net also plans {n}; here {because(plan, 'lowres')}" for n in missing]
    return [*lines, "", *(reasons or ["No difference."]), ""]


def as_fingerprint(name: str, facts: dict[str, Any]) -> Fingerprint:
    """Equal cases of the median shape."""
    labels = Labels.from_json({"background": 0, **{f"class_{i}": i for i in range(1, facts["classes"] + 1)}})
    z, y, x = facts["median_shape"]
    sz, sy, sx = (float(s) for s in facts["spacing"])
    return uniform_fingerprint(
        name,
        shape=(z, y, x),
        spacing=(sz, sy, sx),
        cases=facts["cases"],
        labels=labels,
        channels=tuple(facts["channels"]),
    )


def row(gigabytes: int, ours: Configuration, peer: dict[str, Any] | None, plan: Plan, *, marked: bool) -> str:
    """One line of the table."""
    flat = ours.topology == "2d"
    cells = [
        f"{gigabytes} GB",
        ours.name + ("\\*" if marked else ""),
        sizes(ours.preprocessing.spacing[flat:]),
        sizes(ours.patch_size[flat:]),
        ours.batch_size,
        len(ours.architecture.strides),
    ]
    if peer:
        cells += [sizes(peer["spacing"]), sizes(peer["patch_size"]), peer["batch_size"], len(peer["strides"])]
    else:
        cells += ["not planned", "", "", ""]
    cells.append(f"{plan.forecasts[ours.name].memory_bytes / 1e9:.2f} GB")
    cells.append(f"{peer_bytes(ours, peer, plan) / 1e9:.2f} GB" if peer else "")
    return "| " + " | ".join(map(str, cells)) + " |"


def peer_bytes(ours: Configuration, peer: dict[str, Any], plan: Plan) -> int:
    """What nnU-Net's patch and batch need by our measure."""
    if same_network(ours, peer) and ours.batch_size == peer["batch_size"]:
        return plan.forecasts[ours.name].memory_bytes
    flat = ours.topology == "2d"

    def volumes(entries: list[list[int]]) -> tuple[tuple[int, int, int], ...]:
        return tuple((1, *entry) if flat else tuple(entry) for entry in entries)  # type: ignore[return-value]

    stages = len(peer["strides"])
    architecture = replace(
        ours.architecture,
        features=tuple(peer["features"]),
        strides=volumes(peer["strides"]),
        kernels=volumes(peer["kernels"]),
        encoder_convs=(2,) * stages,
        decoder_convs=(2,) * (stages - 1),
    )
    theirs = replace(
        ours,
        architecture=architecture,
        patch_size=volumes([peer["patch_size"]])[0],
        batch_size=peer["batch_size"],
    )
    return training_memory(theirs, plan.labels, threads=1).peak_bytes


def same_network(ours: Configuration, peer: dict[str, Any]) -> bool:
    """Whether patch, strides, kernels and features are equal."""
    flat = ours.topology == "2d"
    a = ours.architecture
    return (
        list(ours.patch_size[flat:]) == peer["patch_size"]
        and [list(s[flat:]) for s in a.strides] == peer["strides"]
        and [list(k[flat:]) for k in a.kernels] == peer["kernels"]
        and list(a.features) == peer["features"]
    )


def differences(ours: Configuration, peer: dict[str, Any] | None, plan: Plan) -> list[str]:
    """A sentence for each thing that differs, with its reason."""
    if peer is None:
        return ["nnU-Net does not plan it here; " + because(plan, "lowres")]
    flat = ours.topology == "2d"
    found = []
    spacing = [s for s in ours.preprocessing.spacing[flat:] if s is not None]
    if any(abs(s - p) > 1e-3 * p for s, p in zip(spacing, peer["spacing"], strict=True)):
        found.append(
            f"spacing {sizes(spacing)} against {sizes(peer['spacing'])} mm: the low resolution is the first one at "
            "which the patch sees a quarter of the image, and our patch has "
            f"{volume_ratio(ours, peer):.2f} times the voxels."
        )
    theirs_gb, ours_gb = peer_bytes(ours, peer, plan) / 1e9, plan.forecasts[ours.name].memory_bytes / 1e9
    limit = plan.budget.gpu_memory_bytes * MEMORY_SHARE / 1e9
    if list(ours.patch_size[flat:]) != peer["patch_size"]:
        found.append(
            f"patch {sizes(ours.patch_size[flat:])} against {sizes(peer['patch_size'])}: nnU-Net's step needs "
            f"{theirs_gb:.2f} GB when measured, ours {ours_gb:.2f} of the {limit:.1f} GB that may be used."
        )
    elif not same_network(ours, peer):
        found.append("strides, kernels or features differ for the same patch.")
    if ours.batch_size != peer["batch_size"]:
        found.append(
            f"batch {ours.batch_size} against {peer['batch_size']}: nnU-Net's needs {theirs_gb:.2f} GB when measured, "
            f"ours {ours_gb:.2f} of {limit:.1f} GB; {because(plan, f'{ours.name}.batch_size')}"
        )
    return found


def because(plan: Plan, name: str) -> str:
    """The reason that the plan gives for a decision."""
    return next((d.because for d in plan.decisions if d.name == name), "")


def volume_ratio(ours: Configuration, peer: dict[str, Any]) -> float:
    """Voxels of our patch by voxels of nnU-Net's."""
    return math.prod(ours.patch_size) / math.prod(peer["patch_size"])


def sizes(values: Any) -> str:
    """`128x160x128`."""
    return "x".join("?" if v is None else f"{v:g}" for v in values)


if __name__ == "__main__":
    main()
