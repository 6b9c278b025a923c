"""A network and a preprocessed image -> logits on the network's grid, in overlapping, Gaussian-weighted tiles.

Sliding window with Gaussian importance weights and mirrored copies, as in nnU-Net (Isensee et al. 2021). Tiles lie on
a regular lattice, so the sum of their weights is a product of one value for each axis: every tile is scaled to its
share before it is added, and planes that no later tile touches are finished. Sums are
float32 and one tile deep; the result is float16 when it is large.

Tiles are counted in voxels of the input. What they answer for is counted in voxels of the output: those that lie in
the tile, which are the same ones unless the network super-resolves. A network that sees neighbouring slices reads a
halo of them before and after its tile. Of a reference on a grid of its own it is given what lies in the tile.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.nn import functional

from autoseg.acquisition import apply_along, interpolation_inside
from autoseg.networks.fusion import covering
from autoseg.networks.upsampling import OutputGrid

Shape = tuple[int, int, int]
Network = Callable[..., Tensor | Sequence[Tensor]]

GAUSSIAN_SIGMA = 1 / 8  # of the tile's size; nnU-Net's value
STRETCH = 1.25
"""A tile may be this much longer than the training patch where one tile then does the work of two. A convolutional
network does not mind: on Hippocampus cases larger than the patch the mean Dice was 0.894 so and 0.893 with two tiles;
padded to the divisor instead of the patch, the others had 0.877 and 0.875 (within noise)."""
MAX_RAM_BYTES = 4 * 2**30  # what logits may take before they are kept on disk
EXTRAPOLATED = 1e-9
"""Factor on the weight of output voxels between the centre of a tile's last voxel and its face: the tile does not see
the voxel on the other side, so they count only where no other tile has both."""
TINY = 1e-6  # voxels: positions this close count as equal
DECIMALS = 9  # positions of grids are rounded to, so that tiles that see the same grid are found to


@dataclass(frozen=True)
class TileAxis:
    """Where the tiles lie along one axis, and what each adds to every output voxel there."""

    size: int
    """Input voxels of a tile."""
    starts: tuple[int, ...]
    """First voxel of each tile on the padded axis."""
    padding: tuple[int, int]
    """Voxels added before and after the image."""
    outputs: tuple[slice, ...]
    """Output voxels that each tile answers for."""
    weights: tuple[Tensor, ...]
    """For each tile its share of those voxels; the shares of all tiles sum to one everywhere."""
    scale: float
    """Input spacing / output spacing."""
    start: float
    """In output voxels, from the outer face of the image to that of the first output voxel."""

    @property
    def padded(self) -> int:
        """Input voxels of the axis with its padding."""
        return self.starts[-1] + self.size

    def grid(self, tile: int) -> tuple[int, float, float]:
        """Shape, scale and start, from the tile's first voxel, of the output voxels that a tile answers for."""
        side, first = self.outputs[tile], self.starts[tile] - self.padding[0]
        return side.stop - side.start, self.scale, round(self.start + side.start - first * self.scale, DECIMALS)

    def seen(self, tile: int) -> slice:
        """The output voxels that a tile answers for as voxels of the tile (where the scale is 1)."""
        side, first = self.outputs[tile], self.starts[tile] - self.padding[0]
        return slice(side.start - first, side.stop - first)


def sliding_window_logits(
    network: Network,
    image: Tensor,
    *,
    patch_size: Shape,
    divisor: Shape = (1, 1, 1),
    halo: int = 0,
    grid: OutputGrid | None = None,
    reference: Tensor | None = None,
    reference_grid: OutputGrid | None = None,
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

    The network is given `halo` more slices at both ends of the first axis; outside of the image the outermost slice is
    repeated. With `grid`, the output voxels that are asked for of the whole image, it is called as
    `network(tiles, grid)`, answers (B, K, *grid.shape), and the result is (K, *grid.shape). Outside of the image lie
    zeros, as in training: a network has learned what they do to the interpolation at the image's end.

    With a `reference` (R, Z', Y', X'), which lies on `reference_grid` as seen from the image and by default covers just
    that, the network is called as `network(tiles, grid or None, references)`, where the references (B, R, ...) cover
    what their tiles do, at about the spacing of the reference; outside of that they are 0.
    """
    device = device or image.device
    steps = (step_size,) * 3 if isinstance(step_size, int | float) else tuple(step_size)
    asked = [(n, 1.0, 0.0) for n in image.shape[1:]] if grid is None else grid.axes()
    axes = [
        tile_axis(n, patch=p, divisor=d, step=s, stretch=stretch, asked=o)
        for n, p, d, s, o in zip(image.shape[1:], patch_size, divisor, steps, asked, strict=True)
    ]
    if all(axis.size == d for axis, d in zip(axes, divisor, strict=True)):
        # at the bottom of the network one voxel would be left, which cannot be normalised: as large as in training
        axes = [
            tile_axis(n, patch=p, divisor=p, asked=o)
            for n, p, o in zip(image.shape[1:], patch_size, asked, strict=True)
        ]
    apart = (
        None if reference is None else _References(reference, reference_grid or covering(reference[None], image[None]))
    )
    image = _pad(image, axes, halo=halo)
    flips = mirror_flips(mirror_axes)
    evaluate = functools.partial(
        _tile_logits,
        network,
        size=tuple(axis.size for axis in axes),
        flips=flips,
        batch_size=batch_size,
        precision=precision,
        device=device,
    )
    with torch.inference_mode():
        return _accumulate(
            evaluate,
            image,
            axes,
            halo=halo,
            super_resolves=grid is not None,
            references=apart,
            tiles_at_once=max(1, batch_size // len(flips)),
            max_ram_bytes=max_ram_bytes,
        )


def tile_axis(
    length: int,
    *,
    patch: int,
    divisor: int = 1,
    step: float = 0.5,
    stretch: float = STRETCH,
    asked: tuple[int, float, float] | None = None,
) -> TileAxis:
    """The tiles along an axis of `length` voxels; `step` is the largest distance of their starts, in tiles.

    `asked` is shape, scale and start of the output voxels along the axis (default: the input's own). Each tile answers
    for those that lie between its outer faces, the first and the last one also for those beyond.
    """
    voxels, scale, start = (length, 1.0, 0.0) if asked is None else asked
    whole = -(-length // divisor) * divisor
    size = whole if whole <= patch * stretch else patch
    padded = max(size, length)
    before = (padded - length) // 2
    stride = max(1.0, size * step)
    count = int(np.ceil((padded - size) / stride)) + 1
    starts = tuple(int(round(first)) for first in np.linspace(0, padded - size, count))
    places = (start + torch.arange(voxels, dtype=torch.float64) + 0.5) / scale  # from the image's outer face
    outputs, weights = [], []
    total = torch.zeros(voxels, dtype=torch.float64)
    for number, first in enumerate(starts):
        low, high = float(first - before), float(first - before + size)
        is_first, is_last = number == 0, number == count - 1
        begin = 0 if is_first else min(max(math.ceil(low * scale - start - 0.5 - TINY), 0), voxels)
        end = voxels if is_last else min(math.floor(high * scale - start - 0.5 + TINY) + 1, voxels)
        outputs.append(slice(begin, max(begin, end)))
        place = places[outputs[-1]]
        weight = _gaussian(place.clamp(low, high) - (low + high) / 2, size)
        if not is_first:
            weight[place < low + 0.5 - TINY] *= EXTRAPOLATED
        if not is_last:
            weight[place > high - 0.5 + TINY] *= EXTRAPOLATED
        weights.append(weight)
        total[outputs[-1]] += weight
    shares = tuple((weight / total[side]).float() for side, weight in zip(outputs, weights, strict=True))
    return TileAxis(size, starts, (before, padded - length - before), tuple(outputs), shares, scale, start)


def mirror_flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of mirrored axes as dimensions of a (B, C, Z, Y, X) tensor; the first is none.

    >>> mirror_flips((0, 2))
    [(), (2,), (4,), (2, 4)]
    """
    dimensions = [axis + 2 for axis in sorted(set(axes))]
    return [flip for n in range(len(dimensions) + 1) for flip in itertools.combinations(dimensions, n)]


def _gaussian(from_centre: Tensor, size: int) -> Tensor:
    return torch.exp(-0.5 * (from_centre / (size * GAUSSIAN_SIGMA)) ** 2)


def _pad(image: Tensor, axes: Sequence[TileAxis], *, halo: int) -> Tensor:
    """The image with what its tiles need around it: zeros, but with a halo the outermost slices again."""
    z, y, x = (axis.padding for axis in axes)
    if halo:
        slices = torch.arange(-z[0] - halo, image.shape[1] + z[1] + halo).clamp(0, image.shape[1] - 1)
        image, z = image.index_select(1, slices.to(image.device)), (0, 0)
    widths = [*x, *y, *z]
    return functional.pad(image, widths) if any(widths) else image


@dataclass(frozen=True)
class _Tile:
    """What the network is given at once."""

    image: Tensor
    """(C, z, y, x), with halo."""
    grid: OutputGrid | None
    """What is asked for; None: the tile's own voxels."""
    reference: Tensor | None
    """(R, z', y', x') over the extent of the tile without its halo."""


@dataclass(frozen=True)
class _References:
    """A reference and where it lies."""

    image: Tensor
    """(R, Z', Y', X')."""
    grid: OutputGrid
    """Its voxels, seen from the image."""

    def over(self, first: Sequence[int], size: Sequence[int]) -> Tensor:
        """The reference over `size` voxels of the image from voxel `first` on: linear, 0 outside of its faces."""
        box, weights = [], []
        for (voxels, scale, start), begin, length in zip(self.grid.axes(), first, size, strict=True):
            outputs = max(1, round(length * scale))
            step = length * scale / outputs
            places = np.asarray(begin * scale - start + (np.arange(outputs) + 0.5) * step - 0.5, dtype=np.float64)
            side, matrix = interpolation_inside(places, voxels)
            box.append(side)
            weights.append(matrix)
        part = self.image[:, box[0], box[1], box[2]]
        for axis, matrix in enumerate(weights):
            part = apply_along(part, matrix, axis)
        return part


def _accumulate(
    evaluate: Callable[[list[_Tile]], list[Tensor]],
    image: Tensor,
    axes: Sequence[TileAxis],
    *,
    halo: int,
    super_resolves: bool,
    references: _References | None,
    tiles_at_once: int,
    max_ram_bytes: int,
) -> Tensor:
    """All tiles' logits, weighted and summed; planes are moved to the result as soon as they are finished."""
    z, y, x = axes
    places = [
        place
        for place in itertools.product(*(range(len(axis.starts)) for axis in axes))  # z slowest
        if all(axis.outputs[i].start < axis.outputs[i].stop for axis, i in zip(axes, place, strict=True))
    ]
    every = (slice(None),)  # channels or classes
    constant: dict[tuple[Any, ...], Tensor] = {}
    sums: _FinishedPlanes | None = None
    for at in range(0, len(places), tiles_at_once):
        group = places[at : at + tiles_at_once]
        tiles = [
            _tile(image, axes, place, halo=halo, super_resolves=super_resolves, references=references)
            for place in group
        ]
        for (i, j, k), answer in zip(group, _cached(evaluate, tiles, constant), strict=True):
            logits = answer if super_resolves else answer[every + (z.seen(i), y.seen(j), x.seen(k))]
            if len(places) == 1:
                return logits.cpu().contiguous()
            if sums is None:
                sums = _FinishedPlanes(len(logits), axes, like=logits, max_ram_bytes=max_ram_bytes)
            weight = z.weights[i][:, None, None] * (y.weights[j][:, None] * x.weights[k])
            sums.add(logits, weight, box=(z.outputs[i], y.outputs[j], x.outputs[k]))
    assert sums is not None
    return sums.finish()


def _tile(
    image: Tensor,
    axes: Sequence[TileAxis],
    place: tuple[int, ...],
    *,
    halo: int,
    super_resolves: bool,
    references: _References | None,
) -> _Tile:
    z, y, x = (slice(axis.starts[i], axis.starts[i] + axis.size) for axis, i in zip(axes, place, strict=True))
    part = image[:, z.start : z.stop + 2 * halo, y, x]
    first = [axis.starts[i] - axis.padding[0] for axis, i in zip(axes, place, strict=True)]
    reference = None if references is None else references.over(first, [axis.size for axis in axes])
    if not super_resolves:
        return _Tile(part, None, reference)
    shape, scale, start = zip(*(axis.grid(i) for axis, i in zip(axes, place, strict=True)), strict=True)
    return _Tile(part, OutputGrid(shape, scale, start), reference)


class _FinishedPlanes:
    """Sums of one tile's depth in float32; planes below the next tile are moved to the result.

    Where even that is too large (many classes, wide planes), tiles are added to the result itself, in its precision.
    """

    def __init__(self, channels: int, axes: Sequence[TileAxis], *, like: Tensor, max_ram_bytes: int) -> None:
        self.start = 0  # output plane that the sums begin at
        z, *plane = (max(side.stop for side in axis.outputs) for axis in axes)
        depth = max(side.stop - side.start for side in axes[0].outputs)
        shape = (channels, depth, *plane)
        padded = [axes[0].size * axes[0].scale, *(axis.padded * axis.scale for axis in axes[1:])]
        self.direct = channels * float(np.prod(padded)) * 4 > max_ram_bytes // 4
        self.sums = like.new_zeros((0,) if self.direct else shape)
        self.result = empty_logits((channels, z, *plane), max_ram_bytes=max_ram_bytes)
        if self.direct:
            self.result.zero_()

    def add(self, logits: Tensor, weight: Tensor, *, box: tuple[slice, ...]) -> None:
        """Add a tile (K, z, y, x) times its shares (z, y, x); tiles come in the order of their first plane."""
        z, y, x = box
        if self.direct:
            weighted = logits * weight.to(logits.device)
            self.result[:, z, y, x] += weighted.to(self.result.device, self.result.dtype)
            return
        if z.start > self.start:
            self._advance(z.start)
        self.sums[:, : z.stop - z.start, y, x].addcmul_(logits, weight.to(logits.device))

    def finish(self) -> Tensor:
        """The whole result (K, Z, Y, X)."""
        if not self.direct:
            self._flush(self.sums)
        return self.result

    def _advance(self, start: int) -> None:
        finished, depth = start - self.start, self.sums.shape[1]
        self._flush(self.sums[:, :finished])
        kept = max(0, depth - finished)
        if kept:
            self.sums[:, :kept] = self.sums[:, finished:].clone()
        self.sums[:, kept:] = 0
        self.start = start

    def _flush(self, planes: Tensor) -> None:
        end = min(self.result.shape[1], self.start + planes.shape[1])
        self.result[:, self.start : end] = planes[:, : end - self.start]


def _cached(
    evaluate: Callable[[list[_Tile]], list[Tensor]], tiles: list[_Tile], constant: dict[tuple[Any, ...], Tensor]
) -> list[Tensor]:
    """The logits of each tile; one in which every channel is constant is computed once for each value and grid."""
    keys: list[tuple[Any, ...] | None] = []
    for tile in tiles:
        values: list[float] = []
        same = True
        for image in (tile.image, *(() if tile.reference is None else (tile.reference,))):
            lowest = image[:, 0, 0, 0]
            same = same and bool((image.flatten(1) == lowest[:, None]).all())
            values += lowest.tolist()
        keys.append((*values, tile.grid) if same else None)
    waiting = [i for i, key in enumerate(keys) if key is None or (key not in constant and keys.index(key) == i)]
    computed = dict(zip(waiting, evaluate([tiles[i] for i in waiting]), strict=True)) if waiting else {}
    for i in waiting:
        key = keys[i]
        if key is not None:
            if len(constant) >= 2:  # values seldom differ: outside the body, and padding
                constant.pop(next(iter(constant)))
            constant[key] = computed[i]
    return [computed[i] if i in computed else constant[keys[i] or ()] for i in range(len(tiles))]


@dataclass(frozen=True)
class _Job:
    """One copy of a tile."""

    tile: int
    flip: tuple[int, ...]
    """Mirrored dimensions of a (B, C, z, y, x) tensor."""
    grid: OutputGrid | None
    """What is asked for, mirrored alike."""


def _tile_logits(
    network: Network,
    tiles: list[_Tile],
    *,
    size: tuple[int, ...],
    flips: list[tuple[int, ...]],
    batch_size: int,
    precision: torch.dtype | None,
    device: torch.device,
) -> list[Tensor]:
    """The mean of each tile's logits (K, z, y, x) float32 over its mirrored copies, `batch_size` inputs at a time.

    `size` (z, y, x) is that of a tile without its halo. What enters the network at once is asked for one grid.
    """
    sums: list[Tensor | None] = [None] * len(tiles)
    jobs = [
        _Job(i, flip, None if tile.grid is None else mirrored_grid(tile.grid, size, [d - 2 for d in flip]))
        for i, tile in enumerate(tiles)
        for flip in flips
    ]
    on_device = [tile.image[None].to(device) for tile in tiles]
    references = [None if tile.reference is None else tile.reference[None].to(device) for tile in tiles]
    for at in range(0, len(jobs), batch_size):
        for grid, together in itertools.groupby(jobs[at : at + batch_size], key=lambda job: job.grid):
            batch = list(together)
            inputs = torch.cat([on_device[j.tile].flip(j.flip) if j.flip else on_device[j.tile] for j in batch])
            beside = [r.flip(j.flip) for j in batch if (r := references[j.tile]) is not None]
            given = (inputs, grid, torch.cat(beside)) if beside else (inputs,) if grid is None else (inputs, grid)
            with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                answer = network(*given)
            logits = answer if isinstance(answer, Tensor) else answer[0]
            for job, one in zip(batch, logits[:, None], strict=True):
                turned = (one.flip(job.flip) if job.flip else one)[0].float()
                total = sums[job.tile]
                # a view would keep the whole batch
                sums[job.tile] = turned.clone() if total is None else total.add_(turned)
    return [total / len(flips) for total in sums if total is not None]


def mirrored_grid(grid: OutputGrid, size: Sequence[int], axes: Sequence[int]) -> OutputGrid:
    """The same output voxels, in reverse order, of an input of `size` (z, y, x) that is mirrored along `axes`."""
    start = [
        round(n * scale - first - voxels, DECIMALS) if axis in axes else first
        for axis, ((voxels, scale, first), n) in enumerate(zip(grid.axes(), size, strict=True))
    ]
    return OutputGrid(grid.shape, grid.scale, (start[0], start[1], start[2]))


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
