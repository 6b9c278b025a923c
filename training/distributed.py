"""The processes that `torchrun` starts for one fold, one for each GPU -> one training with a batch of all of them.

Each takes a batch of the plan, so N processes train as one process with a batch N times as large would: the samples are
the same, sums over the batch are taken over all of them, gradients are averaged. Instance norm looks at one sample
alone, so nothing has to be exchanged for it. Files are written, time is read and the end is decided by the first.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoseg.device import resolve_device
from autoseg.errors import PlanError, WorkerError

Answer = TypeVar("Answer", bool, float)

TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun alone: schedulers set RANK and WORLD_SIZE for programs of any kind
PATIENCE = datetime.timedelta(days=1)  # for the first, which may bring a whole previous stage into a store


@dataclass(frozen=True)
class World:
    """The processes that train one fold together: by default this one alone, and then nothing is ever sent."""

    rank: int = 0
    """Of this process, from 0."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Of this process among those of its machine."""
    local_size: int = 1
    """Number of processes on its machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes files, reads the clock and decides."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: each has a GPU of its own. Raises PlanError where there are too few."""
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise PlanError(
                f"Device {device} cannot be shared by {self.size} processes; use --device auto, cuda or cpu."
            )
        found = torch.cuda.device_count()
        if self.local_size > found:
            raise PlanError(
                f"torchrun started {self.local_size} processes, but torch sees {found} GPUs; "
                f"use --nproc-per-node {found}."
            )
        return torch.device("cuda", self.local_rank)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same in each; its gradient reaches the values of every process."""
        if self.size == 1:
            return values
        total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, without gradient."""
        return values if self.size == 1 else self.sum(values) / self.size

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient its mean over all processes: that of the mean of their losses."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        _exchange(dist.all_reduce, flat)
        parts = torch.split(flat / self.size, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agreed(self, ask: Callable[[], Answer]) -> Callable[[], Answer]:
        """A function that gives every process the first one's answer; all must call it equally often."""
        if self.size == 1:
            return ask

        def answer() -> Answer:
            own = ask()
            told = torch.tensor(float(own), dtype=torch.float64)  # on the CPU, so that no GPU is waited for
            _exchange(dist.broadcast, told, src=0)
            return type(own)(told.item())

        return answer

    def wait(self) -> None:
        """Go on when the first process has come here, too."""
        self.agreed(lambda: True)()

    @contextlib.contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The first runs the block, then all others do: what it makes they find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


ALONE = World()


@contextlib.contextmanager
def joined(environment: Mapping[str, str], device: str) -> Iterator[World]:
    """Join the other processes of torchrun, which tells by `environment` who this one is; without it, be alone.

    Raises PlanError where `device` does not suit so many.
    """
    if TORCHRUN not in environment or environment["WORLD_SIZE"] == "1":
        yield ALONE
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(*(int(environment[name]) for name in names))
    chosen = world.device(resolve_device(device))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    yield world
    dist.destroy_process_group()  # not after an error: it would wait for the others, whom torchrun ends


class _Sum(torch.autograd.Function):
    """Each process has the sum and a loss of its own made of it, so the gradients of all these losses are summed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        _exchange(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def _exchange(collective: Callable[..., Any], values: Tensor, **options: Any) -> None:
    try:
        collective(values, **options)
    except RuntimeError as error:
        raise WorkerError(
            f"Another process of this training died or cannot be reached ({str(error).splitlines()[0]}); what was "
            "saved stays: start the same command with --continue."
        ) from error
