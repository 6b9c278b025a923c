"""Sizes, durations, devices: "8GB", "1h30m", "cuda:1" as a user writes them -> checked values; and the way back."""

from __future__ import annotations

import math
import re

from autoseg.errors import PlanError, unknown_choice

# "8 GB" on a graphics card's box is 8 GiB, but a plan for 8e9 bytes fits either reading
BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
SHORT = {"K": "KB", "M": "MB", "G": "GB", "T": "TB"}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


def parse_bytes(text: str, *, option: str) -> int:
    """The bytes of "8GB", "512 MB" or "1.5GiB". Raises PlanError naming `option`."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else ""
    unit = SHORT.get(unit, unit)
    if match is None or unit not in BYTES:
        raise PlanError(f"{option} {text}: a size is a number with a unit (KB, MB, GB, TB), such as 8GB or 512MB.")
    size = round(float(match[1]) * BYTES[unit])
    if size <= 0:
        raise PlanError(f"{option} {text}: the size must be above zero, such as 8GB or 512MB.")
    return size


def parse_seconds(text: str, *, option: str) -> float:
    """The seconds of "30m", "1h30m", "90s" or "2d". Raises PlanError naming `option`."""
    plain = text.strip().lower().replace(" ", "")
    match = _DURATION.fullmatch(plain)
    if not plain or match is None:
        raise PlanError(f"{option} {text}: a duration is a number with a unit (d, h, m, s), such as 30m, 1h30m or 90s.")
    seconds = sum(float(number) * unit for number, unit in zip(match.groups(), SECONDS.values(), strict=True) if number)
    if seconds <= 0:
        raise PlanError(f"{option} {text}: the duration must be above zero, such as 30m, 1h30m or 90s.")
    return seconds


def parse_device(name: str) -> str:
    """The name of a device, if it can be one: auto, cpu, cuda, cuda:N or mps. Raises PlanError."""
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise PlanError(unknown_choice("Device", name, ("auto", "cpu", "cuda", "cuda:0", "mps")))
    return name


def parse_part(text: str, *, option: str) -> tuple[int, int]:
    """(1, 4) of "1/4": which part of how many. Raises PlanError naming `option`."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise PlanError(f"{option} {text}: a part is written k/n with k from 1 to n, such as 1/4.")
    return part, parts


def parse_numbers(text: str, *, option: str, counts: tuple[int, ...] = (3,)) -> tuple[float, ...]:
    """(4.0, 1.0, 1.0) of "4,1,1"; `counts`: how many numbers may be given. Raises PlanError naming `option`."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        expected = " or ".join("one number" if n == 1 else f"{n} numbers with commas, such as 4,1,1" for n in counts)
        raise PlanError(f"{option} {text}: expected {expected}, in the order of the files' arrays (z, y, x).")
    return numbers


def format_seconds(seconds: float) -> str:
    """`12 s`, `4 min 30 s`, `3 h 20 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def format_bytes(size: float) -> str:
    """`512 MB`, `8.0 GB` (powers of ten)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"
