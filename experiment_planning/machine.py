"""A budget and this machine -> what the plan is made for: device, memory and fold time, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.executor import host_memory_bytes
from autoseg.experiment_planning.notes import Notes
from autoseg.plan import Budget
from autoseg.units import format_bytes, format_seconds

GPU_TARGET_BYTES = 8 * 10**9  # training memory that is planned for where there is no GPU
HOST_SHARE = 0.6  # of the host's memory that a training on the CPU may take; data loading needs some too
MEMORY_SHARE = 0.9  # of the budget that a step may take; the rest is for the allocator's gaps and the CUDA context
CPU_FOLD_SECONDS = 1800.0  # default fold time without a GPU: a coffee, not a weekend
GPU_FOLD_STEPS = 50_000  # default length of a fold on a GPU; nnU-Net takes 250,000


@dataclass(frozen=True)
class Machine:
    """What the plan is made for."""

    budget: Budget
    """With every default filled in; fold_seconds 0 where the fold is counted in steps."""
    usable_bytes: int
    """What a training step may take."""
    precision: str
    """Key of `memory.PRECISIONS`."""
    timed: bool
    """Whether steps are timed here, so that the fold's time can shape the plan."""


def resolve_machine(budget: Budget, notes: Notes, *, probe: bool) -> Machine:
    """Device, memory and fold time, with the reason of each."""
    import torch

    from autoseg.device import autocast_dtype, resolve_device

    device = resolve_device(budget.device)
    absent = device.type == "cpu" and budget.device == "auto" and budget.gpu_memory_bytes and not budget.fold_seconds
    if absent:
        name, precision = "gpu", "bf16"
        notes.add("budget.device", name, "--gpu-memory was given and no GPU is here: planned for one elsewhere.")
    else:
        name, precision = str(device), "fp32" if autocast_dtype(device) is None else "bf16"
        notes.add("budget.device", name, f"the best device here is {name}; a step computes in {precision}.")
    memory = budget.gpu_memory_bytes
    if memory:
        because = f"{format_bytes(memory)} were given."
    elif device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0])
        because = f"the GPU has {format_bytes(memory)} free."
    else:
        host = host_memory_bytes()
        memory = min(GPU_TARGET_BYTES, int(HOST_SHARE * host))
        because = (
            f"no GPU is here: {format_bytes(GPU_TARGET_BYTES)} is the target and {HOST_SHARE:.0%} of the host's "
            f"{format_bytes(host)} the limit."
        )
    notes.add("budget.gpu_memory_bytes", memory, because)
    seconds = budget.fold_seconds
    if seconds:
        because = f"{format_seconds(seconds)} a fold were given."
    elif device.type == "cpu" and not absent:
        seconds = CPU_FOLD_SECONDS
        because = f"no GPU is here: {format_seconds(seconds)} a fold by default."
    else:
        because = f"a fold takes {GPU_FOLD_STEPS} steps by default."
    notes.add("budget.fold_seconds", seconds, because)
    usable = int(memory * MEMORY_SHARE)
    return Machine(Budget(memory, seconds, name), usable, precision, probe and not absent)
