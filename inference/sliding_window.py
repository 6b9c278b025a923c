"""A network and a preprocessed image -> logits on the network's grid, in overlapping, Gaussian-weighted tiles.

Sliding window with Gaussian importance weights and mirrored copies, as in nnU-Net (Isensee et al. 2021). Tiles lie on
a regular lattice, so the sum of their weights is a product of one value for each axis: every tile is scaled to its
share before it is added, and planes that no later tile touches are finished. Sums are
float32 and one tile deep; the result is float16 when it is large.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, int, int]
Network = Callable[[Tensor], Tensor | Sequence[Tensor]]

GAUSSIAN_SIGMA = 1 / 8  # of the tile's size; nnU-Net's value
STRETCH = 1.25
"""A tile may be this much longer than the training patch where one tile then does the work of two. A convolutional
network does not mind: on Hippocampus cases larger than the patch the mean Dice was 0.894 so and 0.893 with two tiles;
padded to the divisor instead of the patch, the others had 0.877 and 0.875 (within noise)."""
MAX_RAM_BYTES = 4 * 2**30  # what logits may take before they are kept on disk


@dataclass(frozen=True)
class TileAxis:
    """Where the tiles lie along one axis, and what each adds to every voxel there."""

    size: int
    """Voxels of a tile."""
    starts: tuple[int, ...]
    """First voxel of each tile on the padded axis."""
    weights: tuple[Tensor, ...]
    """For each tile its share (size,) of the voxels it covers; the shares of all tiles sum to one everywhere."""
    padding: tuple[int, int]
    """Voxels added before and after the image."""


def sliding_window_logits(
    network: Network,
    image: Tensor,
    *,
    patch_size: Shape,
    divisor: Shape = (1, 1, 1),
    step_size: float | Sequence[float] = 0.5,
    mirror_axes: Sequence[int] = (),
    batch_size: int = 1,
    precision: torch.dtype | None = None,
    device: torch.device | None = None,
    max_ram_bytes: int = MAX_RAM_BYTES,
    stretch: float = STRETCH,
) -> Tensor:
    """The network's logits (K, Z, Y, X) for `image` (C, Z, Y, X) float32; on the CPU, float32, or float16 when large.

    `patch_size` (z, y, x) is the training patch, `divisor` what the network's input must be divisible by, `step_size`
    the step between tiles as a fraction of the tile (one number, or one for each axis), `mirror_axes` the axes
    (0, 1, 2 = z, y, x) along which mirrored copies are averaged (2 to the power of their number), `batch_size` how
    many tiles or copies enter the network at once, `precision` the autocast dtype or None. Where the image is not
    much longer than the patch (`stretch`), one tile takes it all, padded to the divisor (to the patch where it is no
    larger than the divisor). Constant tiles are computed once for each value.
    """
    device = device or image.device
    steps = (step_size,) * 3 if isinstance(step_size, int | float) else tuple(step_size)
    axes = [
        tile_axis(n, patch=p, divisor=d, step=s, stretch=stretch)
        for n, p, d, s in zip(image.shape[1:], patch_size, divisor, steps, strict=True)
    ]
    if all(axis.size == d for axis, d in zip(axes, divisor, strict=True)):
        # at the bottom of the network one voxel would be left, which cannot be normalised: as large as in training
        axes = [tile_axis(n, patch=p, divisor=p) for n, p in zip(image.shape[1:], patch_size, strict=True)]
    image = _pad(image, axes)
    flips = mirror_flips(mirror_axes)
    evaluate = functools.partial(
        _tile_logits, network, flips=flips, batch_size=batch_size, precision=precision, device=device
    )
    with torch.inference_mode():
        return _accumulate(
            evaluate, image, axes, tiles_at_once=max(1, batch_size // len(flips)), max_ram_bytes=max_ram_bytes
        )


def tile_axis(length: int, *, patch: int, divisor: int = 1, step: float = 0.5, stretch: float = STRETCH) -> TileAxis:
    """The tiles along an axis of `length` voxels; `step` is the largest distance of their starts, in tiles."""
    whole = -(-length // divisor) * divisor
    size = whole if whole <= patch * stretch else patch
    padded = max(size, length)
    before = (padded - length) // 2
    stride = max(1.0, size * step)
    count = int(np.ceil((padded - size) / stride)) + 1
    starts = tuple(int(round(start)) for start in np.linspace(0, padded - size, count))
    weights = _gaussian(size)
    total = torch.zeros(padded, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += weights
    shares = tuple((weights / total[start : start + size]).float() for start in starts)
    return TileAxis(size, starts, shares, (before, padded - length - before))


def mirror_flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of mirrored axes as dimensions of a (B, C, Z, Y, X) tensor; the first is none.

    >>> mirror_flips((0, 2))
    [(), (2,), (4,), (2, 4)]
    """
    dimensions = [axis + 2 for axis in sorted(set(axes))]
    return [flip for n in range(len(dimensions) + 1) for flip in itertools.combinations(dimensions, n)]


def _gaussian(size: int) -> Tensor:
    centre, sigma = (size - 1) / 2, size * GAUSSIAN_SIGMA
    return torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - centre) / sigma) ** 2)


def _pad(image: Tensor, axes: Sequence[TileAxis]) -> Tensor:
    widths = [width for axis in reversed(axes) for width in axis.padding]
    return functional.pad(image, widths) if any(widths) else image


def _accumulate(
    evaluate: Callable[[list[Tensor]], list[Tensor]],
    image: Tensor,
    axes: Sequence[TileAxis],
    *,
    tiles_at_once: int,
    max_ram_bytes: int,
) -> Tensor:
    """All tiles' logits, weighted and summed; planes are moved to the result as soon as they are finished."""
    z, y, x = axes
    inside = tuple(slice(axis.padding[0], n - axis.padding[1]) for axis, n in zip(axes, image.shape[1:], strict=True))
    places = list(itertools.product(*(range(len(axis.starts)) for axis in axes)))  # z slowest
    boxes = [tuple(slice(a.starts[i], a.starts[i] + a.size) for a, i in zip(axes, p, strict=True)) for p in places]
    every = (slice(None),)  # channels or classes
    constant: dict[tuple[float, ...], Tensor] = {}
    sums: _FinishedPlanes | None = None
    for at in range(0, len(places), tiles_at_once):
        group = range(at, min(at + tiles_at_once, len(places)))
        answers = _cached(evaluate, [image[every + boxes[n]] for n in group], constant)
        for n, logits in zip(group, answers, strict=True):
            if len(places) == 1:
                return logits[every + inside].cpu().contiguous()
            i, j, k = places[n]
            if sums is None:
                sums = _FinishedPlanes(logits, image.shape[2:], inside=inside, max_ram_bytes=max_ram_bytes)
            weight = z.weights[i][:, None, None] * (y.weights[j][:, None] * x.weights[k])
            sums.add(logits, weight, box=boxes[n])
    assert sums is not None
    return sums.finish()


class _FinishedPlanes:
    """Sums of one tile's depth in float32; planes below the next tile are moved to the result.

    Where even that is too large (many classes, wide planes), tiles are added to the result itself, in its precision.
    """

    def __init__(self, first: Tensor, plane: Sequence[int], *, inside: tuple[slice, ...], max_ram_bytes: int) -> None:
        self.inside = inside
        self.start = 0  # plane of the padded image that the sums begin at
        shape = (*first.shape[:2], *plane)
        self.direct = int(np.prod(shape, dtype=np.int64)) * 4 > max_ram_bytes // 4
        self.sums = first.new_zeros((0,) if self.direct else shape)
        self.result = empty_logits((len(first), *(s.stop - s.start for s in inside)), max_ram_bytes=max_ram_bytes)
        if self.direct:
            self.result.zero_()

    def add(self, logits: Tensor, weight: Tensor, *, box: tuple[slice, ...]) -> None:
        """Add a tile (K, z, y, x) times its shares (z, y, x); tiles come in the order of their first plane."""
        z, y, x = box
        if self.direct:
            return self._add_to_result(logits * weight.to(logits.device), box)
        if z.start > self.start:
            self._advance(z.start)
        self.sums[:, :, y, x].addcmul_(logits, weight.to(logits.device))

    def finish(self) -> Tensor:
        """The whole result (K, Z, Y, X)."""
        if not self.direct:
            self._flush(self.sums)
        return self.result

    def _add_to_result(self, weighted: Tensor, box: tuple[slice, ...]) -> None:
        source, target = [slice(None)], [slice(None)]
        for side, kept in zip(box, self.inside, strict=True):
            begin, end = max(side.start, kept.start), min(side.stop, kept.stop)
            source.append(slice(begin - side.start, end - side.start))
            target.append(slice(begin - kept.start, end - kept.start))
        self.result[tuple(target)] += weighted[tuple(source)].to(self.result.device, self.result.dtype)

    def _advance(self, start: int) -> None:
        finished, depth = start - self.start, self.sums.shape[1]
        self._flush(self.sums[:, :finished])
        kept = max(0, depth - finished)
        if kept:
            self.sums[:, :kept] = self.sums[:, finished:].clone()
        self.sums[:, kept:] = 0
        self.start = start

    def _flush(self, planes: Tensor) -> None:
        z, y, x = self.inside
        first = self.start - z.start
        begin, end = max(0, first), min(self.result.shape[1], first + planes.shape[1])
        if begin < end:
            self.result[:, begin:end] = planes[:, begin - first : end - first, y, x]


def _cached(
    evaluate: Callable[[list[Tensor]], list[Tensor]], tiles: list[Tensor], constant: dict[tuple[float, ...], Tensor]
) -> list[Tensor]:
    """The logits of each tile; a tile in which every channel is constant is computed once for each value."""
    keys: list[tuple[float, ...] | None] = []
    for tile in tiles:
        flat = tile.flatten(1)
        lowest = tile[:, 0, 0, 0]
        keys.append(tuple(lowest.tolist()) if bool((flat == lowest[:, None]).all()) else None)
    waiting = [i for i, key in enumerate(keys) if key is None or (key not in constant and keys.index(key) == i)]
    computed = dict(zip(waiting, evaluate([tiles[i] for i in waiting]), strict=True)) if waiting else {}
    for i in waiting:
        key = keys[i]
        if key is not None:
            if len(constant) >= 2:  # values seldom differ: outside the body, and padding
                constant.pop(next(iter(constant)))
            constant[key] = computed[i]
    return [computed[i] if i in computed else constant[keys[i] or ()] for i in range(len(tiles))]


def _tile_logits(
    network: Network,
    tiles: list[Tensor],
    *,
    flips: list[tuple[int, ...]],
    batch_size: int,
    precision: torch.dtype | None,
    device: torch.device,
) -> list[Tensor]:
    """The mean of each tile's logits (K, z, y, x) float32 over its mirrored copies, `batch_size` inputs at a time."""
    sums: list[Tensor | None] = [None] * len(tiles)
    jobs = [(i, flip) for i in range(len(tiles)) for flip in flips]
    on_device = [tile[None].to(device) for tile in tiles]
    for at in range(0, len(jobs), batch_size):
        batch = jobs[at : at + batch_size]
        inputs = torch.cat([on_device[i].flip(flip) if flip else on_device[i] for i, flip in batch])
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            answer = network(inputs)
        logits = answer if isinstance(answer, Tensor) else answer[0]
        for (i, flip), one in zip(batch, logits[:, None], strict=True):
            turned = (one.flip(flip) if flip else one)[0].float()
            total = sums[i]
            sums[i] = turned.clone() if total is None else total.add_(turned)  # a view would keep the whole batch
    return [total / len(flips) for total in sums if total is not None]


def empty_logits(shape: tuple[int, ...], *, max_ram_bytes: int) -> Tensor:
    """Room for logits: float32 when that is a small part of `max_ram_bytes`, else float16, else float16 on disk."""
    voxels = int(np.prod(shape, dtype=np.int64))
    if voxels * 4 <= max_ram_bytes // 16:
        return torch.empty(shape, dtype=torch.float32)
    return torch.from_numpy(room(shape, np.float16, in_memory=voxels * 2 <= max_ram_bytes // 2))


def room(shape: tuple[int, ...], dtype: DTypeLike, *, in_memory: bool) -> NDArray[Any]:
    """An array of zeros or of anything; unless `in_memory`, its voxels lie in a nameless file in the temporary folder.

    The file vanishes with the array, or with the process, however that ends.
    """
    if in_memory:
        return np.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(prefix="autoseg-") as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)
