"""Where and in which precision networks run: device names, bf16 support."""

from __future__ import annotations

import torch

from autoseg.errors import PlanError
from autoseg.units import parse_device


def resolve_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises PlanError where it is not there."""
    kind, _, index = parse_device(name).partition(":")
    if kind == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= found:
            raise PlanError(f"Device {name} is not there: torch sees {found} CUDA devices; use --device cpu or auto.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise PlanError("Device mps is not there: torch sees no Apple GPU; use --device cpu or auto.")
    return torch.device(name)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the processor computes in it, else None (float32)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else None
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else None
    return None


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch offers no public name for it
    return bool(probe and probe())


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that was in use so far: that of a GPU's tensors, else of this whole process; None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            peak = next((line for line in file if line.startswith("VmHWM:")), "")
    except OSError:  # not Linux
        return None
    return 1024 * int(peak.split()[1]) if peak else None
