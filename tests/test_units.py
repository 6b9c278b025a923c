"""Sizes and durations as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseg.errors import PlanError
from autoseg.units import (
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_device,
    parse_numbers,
    parse_part,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("8 gb", 8e9), ("8G", 8e9), ("512MB", 512e6), ("1.5GiB", 1.5 * 2**30), ("100B", 100), ("2TB", 2e12)],
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text, option="--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "8", "GB", "8 apples", "-8GB", "0GB", "8GBs", "1e3MB", "0.0001B"])
def test_nonsense_sizes_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--gpu-memory .*such as 8GB"):
        parse_bytes(text, option="--gpu-memory")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("30min", 1800), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("2d", 172800), ("1h 5s", 3605)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text, option="--time") == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "soon", "-5m", "0s", "30m1h", "5 minutes"])
def test_nonsense_durations_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--time .*such as 30m"):
        parse_seconds(text, option="--time")


@given(st.integers(1, 10**6))
def test_a_duration_that_is_shown_reads_as_itself(seconds: int) -> None:
    shown = format_seconds(seconds)
    read = parse_seconds(shown, option="--time")
    assert abs(read - seconds) <= (0 if seconds < 3600 else 30)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2"])
def test_a_part_is_one_of_its_parts(text: str) -> None:
    assert parse_part("2/4", option="--part") == (2, 4)
    with pytest.raises(PlanError, match="--part .*k/n"):
        parse_part(text, option="--part")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_devices_that_cannot_be_are_refused(name: str) -> None:
    assert parse_device("cuda:1") == "cuda:1"
    with pytest.raises(PlanError, match=f"Device '{name}' is not known; choose one of auto, cpu, cuda"):
        parse_device(name)


def test_numbers_are_read_in_the_order_in_which_they_stand() -> None:
    assert parse_numbers("4,1,0.5", option="--input-spacing") == (4.0, 1.0, 0.5)
    assert parse_numbers("2.5", option="--sr-scale", counts=(1, 3)) == (2.5,)


@pytest.mark.parametrize("text", ["", "4", "4,1", "4,1,a", "4 1 1", "4,1,1,1", "4,1,nan", "inf,1,1"])
def test_nonsense_spacings_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"--input-spacing .*such as 4,1,1.*\(z, y, x\)"):
        parse_numbers(text, option="--input-spacing")


def test_sizes_are_shown_with_two_figures_or_three() -> None:
    assert [format_bytes(size) for size in (8e9, 512e6, 1.25e12, 900)] == ["8.0 GB", "512 MB", "1.2 TB", "1 KB"]


def test_durations_are_shown_in_the_units_that_matter() -> None:
    shown = [format_seconds(s) for s in (12, 60, 270, 3600, 12000, float("inf"))]
    assert shown == ["12 s", "1 min", "4 min 30 s", "1 h", "3 h 20 min", "unknown"]
