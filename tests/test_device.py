"""Device names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from autoseg.device import autocast_dtype, peak_memory_bytes, resolve_device
from autoseg.errors import PlanError


def test_auto_is_a_device_that_is_there() -> None:
    device = resolve_device("auto")
    torch.zeros(1, device=device)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:", "cuda:²", "cpu:1", "auto:3", "mps:0:1", "CPU"])
def test_a_name_that_is_no_device_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(PlanError, match=f"Device '{name}' is not known; choose one of auto, cpu, cuda, cuda:0, mps"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"Device cuda:99 is not there: torch sees \d+ CUDA devices; use --device cpu"):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_cuda_is_refused() -> None:
    with pytest.raises(PlanError, match="Device cuda is not there: torch sees 0 CUDA devices"):
        resolve_device("cuda")


def test_half_precision_is_bfloat16_or_nothing() -> None:
    assert autocast_dtype(torch.device("cpu")) in (torch.bfloat16, None)
    assert autocast_dtype(torch.device("meta")) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the peak is read from Linux' /proc")
def test_the_peak_of_memory_remembers_what_is_freed() -> None:
    held = torch.ones(2**26)  # 256 MB
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    del held
    peak = peak_memory_bytes(torch.device("cpu"))
    assert peak is not None and 0.95 * resident <= peak < 100 * resident
