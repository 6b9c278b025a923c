"""How well the planner's estimate of a training step's memory fits the measured peak: a table of configurations.

The measured peak is the highest sum of the allocations and releases that torch.profiler records over two real steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from autoseg.experiment_planning.memory import PRECISIONS, StepMeter  # noqa: E402
from autoseg.labels import Labels  # noqa: E402
from autoseg.plan import Architecture, Shape  # noqa: E402
from autoseg.training.settings import RECIPES  # noqa: E402
from autoseg.training.shapes import Batch  # noqa: E402
from autoseg.training.step import build_training, training_step  # noqa: E402

CLASSES = Labels.from_json({"background": 0, "anterior": 1, "posterior": 2})
ORGANS = Labels.from_json({"background": 0, **{f"organ_{i}": i for i in range(1, 15)}})
REGIONS = Labels.from_json({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3])
IGNORED = Labels.from_json({"background": 0, "lesion": 1, "ignore": 2})


@dataclass(frozen=True)
class Step:
    """One row of the table: a training step to measure."""

    name: str
    features: tuple[int, ...]
    patch: Shape
    batch: int
    labels: Labels = CLASSES
    channels: int = 1
    precision: str = "bf16"
    recipe: str = "adamw"
    deep_supervision: bool = True
    flat_stages: int = 0
    """Stages with kernels and strides of 1 along z, from full resolution."""

    @property
    def architecture(self) -> Architecture:
        """The network that is trained."""
        flat = [i < self.flat_stages for i in range(len(self.features))]
        strides = tuple((1, 1, 1) if i == 0 else (1, 2, 2) if f else (2, 2, 2) for i, f in enumerate(flat))
        return Architecture(
            input_channels=self.channels,
            output_channels=self.labels.output_channels,
            features=self.features,
            strides=strides,
            kernels=tuple((1, 3, 3) if f else (3, 3, 3) for f in flat),
            encoder_convs=(2,) * len(flat),
            decoder_convs=(2,) * (len(flat) - 1),
            deep_supervision=self.deep_supervision,
        )


SMALL, WIDE = (16, 32, 64, 128), (32, 64, 128, 256, 320)
STEPS = (
    Step("3D, 16 features", SMALL, (40, 56, 40), 2),
    Step("3D, 16 features, fp32", SMALL, (40, 56, 40), 2, precision="fp32"),
    Step("3D, batch 9", SMALL, (40, 56, 40), 9),
    Step("3D, no deep supervision", SMALL, (40, 56, 40), 4, deep_supervision=False),
    Step("3D, 32 features", WIDE, (64, 64, 64), 2),
    Step("3D, 32 features, fp32", WIDE, (32, 64, 64), 2, precision="fp32"),
    Step("3D, 32 features, SGD", WIDE, (48, 64, 64), 2, recipe="sgd"),
    Step("3D, anisotropic kernels", WIDE, (12, 128, 128), 2, flat_stages=3),
    Step("3D, anisotropic kernels, fp32", SMALL, (12, 96, 96), 2, flat_stages=2, precision="fp32"),
    Step("3D, 12 features, 14 organs", (12, 24, 48, 96), (48, 48, 48), 2, labels=ORGANS),
    Step("3D, regions, 4 channels", SMALL, (48, 48, 48), 2, labels=REGIONS, channels=4),
    Step("3D, ignore label", SMALL, (48, 48, 48), 2, labels=IGNORED),
    Step("2D, 32 features", (32, 64, 128, 256), (1, 64, 64), 32, flat_stages=4),
    Step("2D, 32 features, fp32", (32, 64, 128, 256), (1, 64, 64), 32, flat_stages=4, precision="fp32"),
    Step("2D, 7 stages, RGB", (32, 64, 128, 256, 512, 512, 512), (1, 256, 320), 4, channels=3, flat_stages=7),
    Step(
        "2D, regions, no deep supervision", (24, 48, 96, 192), (1, 128, 128), 8, REGIONS, 4, "bf16", "adamw", False, 4
    ),
)


def measured_peak(step: Step) -> int:
    """Bytes alive at the worst moment of a real training, from the profiler's record.

    Recorded from the building of the network on, because the profiler does not see the release of what was there
    before it; the second step is the first one with the optimiser's state.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        state = build_training(step.architecture, step.labels, RECIPES[step.recipe])
        image = torch.randn(step.batch, step.channels, *step.patch)
        label = torch.randint(0, 2, (step.batch, 1, *step.patch), dtype=torch.int16)
        for _ in range(2):
            training_step(state, Batch(image, label), precision=PRECISIONS[step.precision])
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def compare(step: Step) -> tuple[int, int, float]:
    """Estimated bytes, measured bytes, seconds of the estimate."""
    began = time.perf_counter()
    meter = StepMeter(step.architecture, step.labels, recipe=step.recipe, precision=step.precision)
    estimate = meter.measure(step.batch, step.patch).peak_bytes
    seconds = time.perf_counter() - began
    return estimate, measured_peak(step), seconds


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    from measure import machine  # beside this file; the tests load the table without it

    print(machine())
    print("\n| training step | batch x patch | estimated MB | measured MB | ratio | estimate took |")
    print("|---|---|---|---|---|---|")
    for step in STEPS:
        if arguments.only and arguments.only not in step.name:
            continue
        estimate, measured, seconds = compare(step)
        size = f"{step.batch} x {'x'.join(map(str, step.patch))}"
        print(
            f"| {step.name} | {size} | {estimate / 1e6:.1f} | {measured / 1e6:.1f} | "
            f"{estimate / measured:.3f} | {seconds:.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
