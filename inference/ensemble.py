"""The logits of several networks -> one set of logits whose probabilities are the mean of theirs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from autoseg.inference.grids import SMALLEST, bring_logits
from autoseg.inference.sliding_window import MAX_RAM_BYTES
from autoseg.preprocessing.case import CaseGeometry

PLANE_BYTES = 2**26  # what is converted to float32 at a time


def average_logits(members: Iterable[Tensor], *, regions: bool, weights: Iterable[float] | None = None) -> Tensor:
    """Logits (K, Z, Y, X) whose softmax (with `regions`: sigmoid) is the mean of the members' probabilities.

    Members are (K, Z, Y, X) of any float dtype and are taken one after the other, so a generator that predicts them
    keeps one alive. The result has the first one's dtype and its memory; a single member is returned as it is.
    `weights` are the members' (default: equal ones).
    """
    result: Tensor | None = None
    count, total = 0, 0.0
    with torch.inference_mode():
        for member, weight in zip(members, itertools.repeat(1.0) if weights is None else weights, strict=False):
            count, before, total = count + 1, total, total + weight
            if result is None:
                result = member
                continue
            if member.shape != result.shape:
                raise ValueError(f"members have the shapes {tuple(result.shape)} and {tuple(member.shape)}")
            for planes in _slabs(result):
                if count == 2:
                    first = _probabilities(result[:, planes], regions=regions) * before
                    result[:, planes] = first.to(result.dtype)
                result[:, planes] += (_probabilities(member[:, planes], regions=regions) * weight).to(result.dtype)
        if result is None:
            raise ValueError("an ensemble needs at least one member")
        if count > 1:
            for planes in _slabs(result):
                mean = (result[:, planes].float() / total).clamp(SMALLEST, 1 - SMALLEST)
                result[:, planes] = (mean.logit() if regions else mean.log()).to(result.dtype)
    return result


def average_on_one_grid(
    members: Iterable[tuple[Tensor, CaseGeometry]],
    *,
    regions: bool,
    target: CaseGeometry | None = None,
    weights: Iterable[float] | None = None,
    max_ram_bytes: int = MAX_RAM_BYTES,
) -> tuple[Tensor, CaseGeometry]:
    """The mean of members that answer on grids of their own: logits (K, Z, Y, X) and the geometry they lie on.

    Each member is its logits and the geometry whose network grid they are on, all of one case; `target` is the
    geometry that is asked for (default: the first member's). Probabilities are brought to its network grid, averaged
    over its voxels where it is coarser than a member's, and averaged there.
    """
    waiting = iter(members)
    first = next(waiting, None)
    if first is None:
        raise ValueError("an ensemble needs at least one member")
    asked = target or first[1]

    def brought() -> Iterator[Tensor]:
        for logits, geometry in itertools.chain([first], waiting):
            yield bring_logits(logits, geometry, asked, regions=regions, max_ram_bytes=max_ram_bytes)

    return average_logits(brought(), regions=regions, weights=weights), asked


def _probabilities(logits: Tensor, *, regions: bool) -> Tensor:
    logits = logits.float()
    return logits.sigmoid() if regions else logits.softmax(0)


def _slabs(logits: Tensor) -> list[slice]:
    depth = max(1, PLANE_BYTES // (4 * logits[:, 0].numel()))
    return [slice(z, z + depth) for z in range(0, logits.shape[1], depth)]
