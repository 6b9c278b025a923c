"""One training step of the same network, patch and batch, here and in nnU-Net's trainer, in turns.

python benchmarks/training_step.py --nnunet-python /path/to/python [--rounds 3]

The network is what nnU-Net plans for the Hippocampus at 8 GB (`3d_fullres`: patch 40x56x40, batch 9, 32 to 256
features, deep supervision). Each side takes its own step: its loss, optimiser, clipping and precision (float32 there,
bfloat16 autocast here where the processor has it). Random data; loading and augmentation are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import machine, markdown_table, peer_line

PATCH, FEATURES, STRIDES = (40, 56, 40), (32, 64, 128, 256), (1, 2, 2, 2)

PEER_SCRIPT = """
import json, sys, time, types
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
patch, features, strides, batch, steps = json.loads(sys.argv[1])
n = len(features)
network = get_network_from_plans(
    "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    dict(n_stages=n, features_per_stage=features, conv_op="torch.nn.modules.conv.Conv3d", kernel_sizes=[[3]*3]*n,
         strides=[[s]*3 for s in strides], n_conv_per_stage=[2]*n, n_conv_per_stage_decoder=[2]*(n-1), conv_bias=True,
         norm_op="torch.nn.modules.instancenorm.InstanceNorm3d", norm_op_kwargs=dict(eps=1e-5, affine=True),
         dropout_op=None, dropout_op_kwargs=None, nonlin="torch.nn.LeakyReLU", nonlin_kwargs=dict(inplace=True)),
    ["conv_op", "norm_op", "dropout_op", "nonlin"], 1, 3, deep_supervision=True)
device = torch.device("cpu")
# the trainer's own train_step and loss, without its constructor, which wants a preprocessed dataset
trainer = types.SimpleNamespace(network=network, device=device, grad_scaler=None, is_ddp=False,
    enable_deep_supervision=True, label_manager=types.SimpleNamespace(has_regions=False, ignore_label=None),
    configuration_manager=types.SimpleNamespace(batch_dice=False, pool_op_kernel_sizes=[[s]*3 for s in strides]))
trainer._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(trainer)
trainer._do_i_compile = lambda: False
trainer.loss = nnUNetTrainer._build_loss(trainer)
trainer.optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
data = torch.randn(batch, 1, *patch)
scales = [torch.randint(0, 3, (batch, 1, *[p // (2**i) for p in patch])).float() for i in range(n - 1)]
times = []
for _ in range(steps + 1):
    start = time.perf_counter()
    nnUNetTrainer.train_step(trainer, {"data": data, "target": scales})
    times.append(time.perf_counter() - start)
print(json.dumps(times[1:]))
"""


def ours(batch: int, steps: int) -> list[float]:
    """Seconds of `steps` steps here, after one that is not counted."""
    import torch

    from autoseg.device import autocast_dtype
    from autoseg.labels import Labels
    from autoseg.plan import Architecture
    from autoseg.training.settings import RECIPES
    from autoseg.training.shapes import Batch
    from autoseg.training.step import build_training, training_step

    stages = len(FEATURES)
    strides = tuple((s, s, s) for s in STRIDES)
    convs = (2,) * stages
    architecture = Architecture(1, 3, FEATURES, strides, ((3, 3, 3),) * stages, convs, convs[1:])
    torch.manual_seed(0)
    state = build_training(architecture, Labels(("a", "b"), ((1,), (2,))), RECIPES["adamw"])
    image = torch.randn(batch, 1, *PATCH)
    label = torch.randint(0, 3, (batch, 1, *PATCH), dtype=torch.int16)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        training_step(state, Batch(image, label), precision=autocast_dtype(torch.device("cpu")))
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, help="python of an environment that has nnunetv2")
    parser.add_argument("--batch", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    here: list[float] = []
    there: list[float] = []
    for _ in range(options.rounds):
        here.append(statistics.median(ours(options.batch, options.steps)))
        if options.nnunet_python:
            arguments = json.dumps([PATCH, FEATURES, STRIDES, options.batch, options.steps])
            command = [str(options.nnunet_python), "-c", PEER_SCRIPT, arguments]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            there.append(statistics.median(json.loads(run.stdout.splitlines()[-1])))

    print(machine())
    if there:
        print(f"peer: {peer_line(options.nnunet_python)}")
    print(f"patch {PATCH}, batch {options.batch}; median step of each of {options.rounds} rounds, in turns\n")
    rows = [["autoseg", *(f"{t:.2f} s" for t in here), f"{statistics.median(here):.2f} s"]]
    if there:
        rows.append(["nnU-Net", *(f"{t:.2f} s" for t in there), f"{statistics.median(there):.2f} s"])
        ratios = [b / a for a, b in zip(here, there, strict=True)]
        rows.append(["ratio", *(f"{r:.2f}" for r in ratios), f"{statistics.median(ratios):.2f}"])
    print(markdown_table(("", *(f"round {i + 1}" for i in range(options.rounds)), "median"), rows))


if __name__ == "__main__":
    main()
