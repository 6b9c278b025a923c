"""What the integers of a label map mean: classes, overlapping regions, the ignore label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError

BACKGROUND = "background"
IGNORE = "ignore"
LARGEST_VALUE = 32766
"""Label maps are kept as 16-bit integers; the ignore label comes after all others."""


@dataclass(frozen=True)
class Labels:
    """The foreground structures of a dataset, in the order of the network's foreground outputs."""

    names: tuple[str, ...]
    """Foreground names, without background and ignore; empty where a dataset has images alone."""
    values: tuple[tuple[int, ...], ...]
    """For each name the label values it covers: one for a class, several for a region."""
    region_order: tuple[int, ...] = ()
    """`regions_class_order`: the value written for each region, later ones over earlier ones; empty without regions."""
    ignore: int | None = None
    """The value of voxels that nobody annotated; they are left out of losses and scores."""

    @property
    def has_regions(self) -> bool:
        """Whether outputs overlap: sigmoids and an ordered assignment, not softmax and argmax."""
        return bool(self.region_order)

    @property
    def output_channels(self) -> int:
        """Channels of the network's logits: background + classes, or one for each region."""
        return len(self.names) if self.has_regions else len(self.names) + 1

    @property
    def foreground_values(self) -> tuple[int, ...]:
        """Every integer that is foreground, sorted; without background and ignore."""
        return tuple(sorted({value for group in self.values for value in group}))

    @property
    def known_values(self) -> tuple[int, ...]:
        """Every integer that may stand in a label file, sorted."""
        return tuple(sorted({0, *self.foreground_values, *(() if self.ignore is None else (self.ignore,))}))

    def mask(self, label: NDArray[np.integer[Any]], name: str) -> NDArray[np.bool_]:
        """Where `label` (any shape, integers) shows the structure `name`; same shape, bool."""
        values = self.values[self.names.index(name)]
        return label == values[0] if len(values) == 1 else np.isin(label, values)

    @classmethod
    def from_json(cls, labels: Any, region_order: Any = None) -> Labels:
        """Read `labels` and `regions_class_order` as they stand in nnU-Net's dataset.json.

        `{"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}`; `{}` or the background alone: there are no labels.
        Raises DatasetError.
        """
        if not isinstance(labels, Mapping):
            raise DatasetError(
                'dataset.json: "labels" must be an object of name: integer, such as {"background": 0, "liver": 1}, or '
                "{} where there are none."
            )
        if not labels:
            return cls((), ())
        if labels.get("0") == BACKGROUND:
            raise DatasetError(
                'dataset.json: "labels" has the older form {"0": "background"}; turn it round: {"background": 0}.'
            )
        values: dict[str, tuple[int, ...]] = {}
        for name, entry in labels.items():
            group = entry if isinstance(entry, list | tuple) else [entry]
            if not group or not all(_is_whole(value) for value in group):
                raise DatasetError(
                    f'dataset.json: label "{name}" must be an integer or a list of integers, got {entry!r}.'
                )
            values[str(name)] = tuple(int(value) for value in group)
        if values.get(BACKGROUND) != (0,):
            raise DatasetError(f'dataset.json: "labels" must have "background": 0, got {values.get(BACKGROUND)}.')
        ignore = values.get(IGNORE)
        if ignore is not None and len(ignore) != 1:
            raise DatasetError(f'dataset.json: label "ignore" must be one integer, got {list(ignore)}.')
        names = tuple(name for name in values if name not in (BACKGROUND, IGNORE))
        if not names and ignore is None:
            return cls((), ())
        if not names:
            raise DatasetError('dataset.json: "labels" has no foreground class; name at least one beside "background".')
        groups = tuple(values[name] for name in names)
        regions = any(len(group) > 1 for group in groups)
        _check_values(dict(zip(names, groups, strict=True)), None if ignore is None else ignore[0], regions=regions)
        order = _region_order(region_order, groups) if regions else ()
        return cls(names, groups, order, None if ignore is None else ignore[0])

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`: `{"labels": ..., "regions_class_order": ...}`."""
        entries: dict[str, Any] = {BACKGROUND: 0}
        for name, group in zip(self.names, self.values, strict=True):
            entries[name] = list(group) if len(group) > 1 else group[0]
        if self.ignore is not None:
            entries[IGNORE] = self.ignore
        content: dict[str, Any] = {"labels": entries}
        if self.has_regions:
            content["regions_class_order"] = list(self.region_order)
        return content


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and str(value).lstrip("-").isdigit()


def _check_values(groups: Mapping[str, tuple[int, ...]], ignore: int | None, *, regions: bool) -> None:
    owner: dict[int, str] = {}
    for name, group in groups.items():
        for value in group:
            if value > LARGEST_VALUE:
                raise DatasetError(
                    f'dataset.json: label "{name}" has the value {value}; values up to {LARGEST_VALUE} can be used.'
                )
            if value <= 0:
                raise DatasetError(f'dataset.json: label "{name}" has the value {value}; foreground values start at 1.')
            if not regions and value in owner:
                raise DatasetError(f'dataset.json: labels "{owner[value]}" and "{name}" both have the value {value}.')
            owner[value] = name
    if ignore is not None and not max(owner) < ignore <= LARGEST_VALUE + 1:
        raise DatasetError(
            f'dataset.json: label "ignore" is {ignore}; it must be above every other label '
            f"(here at least {max(owner) + 1}, at most {LARGEST_VALUE + 1})."
        )


def _region_order(order: Any, groups: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    if not isinstance(order, list | tuple) or len(order) != len(groups) or not all(_is_whole(v) for v in order):
        raise DatasetError(
            f'dataset.json: with regions, "regions_class_order" must list one integer for each of the {len(groups)} '
            f"regions, in the order of the labels; got {order!r}."
        )
    return tuple(int(value) for value in order)
