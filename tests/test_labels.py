"""What may stand under "labels" in dataset.json, and what it means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autoseg.errors import DatasetError
from autoseg.labels import LARGEST_VALUE, Labels

PLAIN = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


def test_classes_have_a_background_output_and_regions_have_none() -> None:
    plain, regions = Labels.from_json(PLAIN), Labels.from_json(REGIONS, [1, 2, 3])
    assert (plain.has_regions, plain.output_channels) == (False, 3)
    assert (regions.has_regions, regions.output_channels) == (True, 3)
    assert regions.foreground_values == (1, 2, 3)


def test_the_ignore_label_is_known_but_is_not_foreground() -> None:
    labels = Labels.from_json({**PLAIN, "ignore": 3})
    assert labels.ignore == 3
    assert labels.names == ("liver", "tumour")
    assert labels.foreground_values == (1, 2)
    assert labels.known_values == (0, 1, 2, 3)


def test_the_mask_of_a_region_covers_all_its_values() -> None:
    labels = Labels.from_json(REGIONS, [1, 2, 3])
    values = np.array([0, 1, 2, 3])
    assert labels.mask(values, "whole").tolist() == [False, True, True, True]
    assert labels.mask(values, "core").tolist() == [False, False, True, True]
    assert labels.mask(values, "enhancing").tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("content", "order"),
    [(PLAIN, None), (REGIONS, [1, 2, 3]), ({**PLAIN, "ignore": 3}, None), ({**REGIONS, "ignore": 4}, [1, 2, 3])],
)
def test_labels_survive_json(content: Any, order: Any) -> None:
    labels = Labels.from_json(content, order)
    written = labels.to_json()
    assert written["labels"] == content
    assert Labels.from_json(written["labels"], written.get("regions_class_order")) == labels


@pytest.mark.parametrize("content", [{}, {"background": 0}])
def test_a_dataset_may_have_no_labels(content: Any) -> None:
    labels = Labels.from_json(content)
    assert labels == Labels((), ()) and labels.known_values == (0,)
    assert Labels.from_json(labels.to_json()["labels"]) == labels


def test_values_written_as_text_are_taken_as_integers() -> None:
    assert Labels.from_json({"background": "0", "liver": "1"}) == Labels.from_json({"background": 0, "liver": 1})


@pytest.mark.parametrize(
    ("content", "order", "sentence"),
    [
        (None, None, "must be an object"),
        ([], None, "must be an object"),
        ({"liver": 1}, None, '"background": 0'),
        ({"background": 1, "liver": 2}, None, '"background": 0'),
        ({"background": 0, "ignore": 1}, None, "no foreground class"),
        ({"background": 0, "liver": 1.5}, None, '"liver" must be an integer'),
        ({"background": 0, "liver": True}, None, '"liver" must be an integer'),
        ({"background": 0, "liver": []}, None, '"liver" must be an integer'),
        ({"background": 0, "liver": -1}, None, "start at 1"),
        ({"background": 0, "liver": 0}, None, "start at 1"),
        ({"background": 0, "liver": LARGEST_VALUE + 1}, None, f"up to {LARGEST_VALUE}"),
        ({"background": 0, "liver": 1, "spleen": 1}, None, '"liver" and "spleen" both have the value 1'),
        ({"background": 0, "liver": 2, "ignore": 1}, None, "above every other label .here at least 3"),
        ({"background": 0, "liver": 2, "ignore": [3, 4]}, None, '"ignore" must be one integer'),
        ({"0": "background", "1": "liver"}, None, "turn it round"),
        (REGIONS, None, "regions_class_order"),
        (REGIONS, [1, 2], "each of the 3 regions"),
    ],
)
def test_labels_that_make_no_sense_are_refused(content: Any, order: Any, sentence: str) -> None:
    with pytest.raises(DatasetError, match=f"dataset.json: .*{sentence}"):
        Labels.from_json(content, order)
