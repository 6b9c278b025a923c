"""An architecture -> what one training step of it needs: memory and operations, measured on fake tensors.

The real network, loss and optimiser of `autoseg.training.step` take a step under FakeTensorMode: its tensors have a
shape, a type and a lifetime but no memory, and they follow autocast. A dispatch mode sees every tensor that an
operation returns and counts each storage once, from its birth until the last reference to it is gone. The highest
sum is the peak: parameters, gradients, optimiser state, averaged weights, everything kept for the backward pass and
the largest transient, at the moment at which they are largest together. Nothing is scaled by reference constants.

What a convolution kernel allocates inside itself is the one thing that fake tensors cannot show; `workspace_bytes`
counts it from what oneDNN documents.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from autoseg.labels import Labels
from autoseg.plan import Architecture, Configuration, Shape
from autoseg.training.settings import RECIPES
from autoseg.training.shapes import Batch, blank_batch
from autoseg.training.step import TrainingState, build_training, training_step

CHANNEL_BLOCK = 16  # channels in a block of oneDNN's layout on a processor with 512-bit vectors
PLAIN_CHANNELS = 3  # up to so many input channels oneDNN reads the plain layout
PRECISIONS: dict[str, torch.dtype | None] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step needs."""

    peak_bytes: int
    """Largest sum of everything alive at once."""
    persistent_bytes: int
    """Alive between two steps: parameters, gradients, optimiser state, averaged weights."""
    step_flops: int
    """Floating-point operations of the convolutions and matrix products of one step, forward and backward."""
    parameters: int
    """Trainable parameters."""

    @property
    def moving_bytes(self) -> int:
        """The part that grows with batch and patch."""
        return self.peak_bytes - self.persistent_bytes


def training_memory(
    configuration: Configuration,
    labels: Labels,
    *,
    batch_size: int | None = None,
    patch_size: Shape | None = None,
    precision: str = "bf16",
    threads: int | None = None,
) -> MemoryEstimate:
    """What a training step of `configuration` needs, by default with its own batch and patch size.

    `precision` is a key of PRECISIONS: the type that autocast computes in.
    """
    meter = StepMeter(
        configuration.architecture,
        labels,
        recipe=configuration.training.recipe,
        precision=precision,
        threads=threads,
        configuration=configuration,
    )
    return meter.measure(batch_size or configuration.batch_size, patch_size or configuration.patch_size)


class StepMeter:
    """A training of one architecture on fake tensors, built once and measured for any batch and patch size.

    `threads` are those of the training, by default torch's own. The `configuration` says what a super-resolving network
    is trained on, and by what loss; without it that is degraded images, at the head's scale, and L1.
    """

    def __init__(
        self,
        architecture: Architecture,
        labels: Labels,
        *,
        recipe: str,
        precision: str = "bf16",
        threads: int | None = None,
        configuration: Configuration | None = None,
    ) -> None:
        self.architecture, self.configuration = architecture, configuration
        self.precision = PRECISIONS[precision]
        self.fake = FakeTensorMode()
        self.live = LiveStorages(threads or torch.get_num_threads())
        with self.fake, self.live:
            self.state = build_training(architecture, labels, RECIPES[recipe], configuration=configuration)
        self.parameters = sum(p.numel() for p in self.state.network.parameters())
        self._update: _Update | None = None

    def measure(self, batch_size: int, patch_size: Shape) -> MemoryEstimate:
        """What a step on a batch (batch_size, C, *patch_size), with its halo and its fine truth, needs."""
        with self.fake, self.live:
            self.live.restart()
            peak = self._step(blank_batch(self.architecture, batch_size, patch_size, configuration=self.configuration))
            if self._update is None:
                raise AssertionError("the optimiser was never asked for its update")
        return MemoryEstimate(
            peak_bytes=peak,
            persistent_bytes=self._update.persistent_bytes,
            step_flops=self.live.flops,
            parameters=self.parameters,
        )

    def _step(self, batch: Batch) -> int:
        """The peak of one step; the update itself, which neither batch nor patch changes, is measured once."""
        state_before = _state_bytes(self.state)
        peak_before = bytes_before = 0

        def note_and_stop(*_: object) -> None:
            nonlocal peak_before, bytes_before
            peak_before, bytes_before = self.live.peak_bytes, self.live.bytes
            if self._update is not None:
                raise _Stop
            self.live.peak_bytes = bytes_before

        hook = self.state.optimizer.register_step_pre_hook(note_and_stop)
        with contextlib.suppress(_Stop):
            training_step(self.state, batch, precision=self.precision)
        hook.remove()
        # the first step ever runs without optimiser state, every later one with it
        made = _state_bytes(self.state) - state_before
        if self._update is None:
            tensors = [t for part in batch.parts for t in (part.image, part.label, part.truth, part.reference)]
            data = sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
            self._update = _Update(self.live.peak_bytes - bytes_before - made, self.live.bytes - data)
        return made + max(peak_before, bytes_before + self._update.transient_bytes)


@dataclass(frozen=True)
class _Update:
    """Of the optimiser's update."""

    transient_bytes: int
    """What it needs beyond what was there before it and the optimiser's state."""
    persistent_bytes: int
    """Alive after it, without the batch."""


class _Stop(Exception):
    """Ends a step before its update."""


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and something still refers to; and the operations."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads
        self.bytes = 0
        """Alive now."""
        self.peak_bytes = 0
        """The most that was alive since `restart`, kernels' workspace included."""
        self.flops = 0
        """Counted since `restart`."""
        self._known: set[int] = set()

    def restart(self) -> None:
        """Begin a new measurement; what is alive stays counted."""
        self.peak_bytes, self.flops = self.bytes, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and take note of what it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # `.item()`: AdamW asks for its step number, and a fake tensor has no value
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.bytes + workspace_bytes(func, args, out, threads=self.threads))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def workspace_bytes(func: Any, args: Sequence[Any], out: Any, *, threads: int) -> int:
    """What a convolution needs beyond its arguments and results while it runs; 0 for every other operation.

    oneDNN computes on copies of its operands in a layout with channels in blocks of 16. Forward it holds the input's,
    the weight's and the output's; backward those of input and output gradient, and with bf16 also up to four
    transposed samples of both, by the number of threads, and the weight gradient in float32. On a GPU cuDNN makes
    similar copies where it prefers another layout than the given one, so the same reserve is kept.
    """
    aten = torch.ops.aten
    if func is aten.convolution.default:
        image, weight, transposed = args[0], args[1], args[6]
        channels = weight.shape[0 if transposed else 1]
        source = 0 if channels <= PLAIN_CHANNELS else _blocked_bytes(image)
        target = _blocked_bytes(out)
        return max(source + _bytes(weight) + target - _bytes(out), target)
    if func is aten.convolution_backward.default:
        gradient, image, weight = args[0], args[1], args[2]
        copies = _blocked_bytes(gradient)
        if image.shape[1] > PLAIN_CHANNELS:
            copies += _blocked_bytes(image)
        elif args[10][0]:  # the gradient of a plain image, where it is wanted, is blocked before it is made plain
            copies += _blocked_bytes(image) - _bytes(image)
        if image.dtype == torch.float32:
            return copies
        samples = 1 if threads == 1 else 2 if threads < 8 else 4  # seen with torch 2.13 from 1 to 16 threads
        return copies + copies * samples // int(image.shape[0]) + 4 * weight.numel()
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _blocked_bytes(tensor: Tensor) -> int:
    """Bytes of a (B, C, ...) tensor with its channels filled up to whole blocks."""
    channels = int(tensor.shape[1])
    return _bytes(tensor) // channels * CHANNEL_BLOCK * math.ceil(channels / CHANNEL_BLOCK)


def _state_bytes(state: TrainingState) -> int:
    entries = (value for group in state.optimizer.state.values() for value in group.values())
    return sum(_bytes(value) for value in entries if isinstance(value, Tensor))
