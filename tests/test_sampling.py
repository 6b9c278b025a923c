"""Which patch is trained on next."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import IGNORING, TWO_CLASSES, store_of

from autoseg.labels import Labels
from autoseg.preprocessing.framed import FramedEntry
from autoseg.training.sampling import Patch, PatchSampler, inside_mask, read_patch

SIZE = (4, 6, 6)


def empty(shape: tuple[int, int, int] = (10, 20, 16)) -> np.ndarray:
    return np.zeros(shape, np.int16)


def draw(sampler: PatchSampler, count: int, *, index: int, size: tuple[int, int, int] = SIZE) -> list[Patch]:
    return [sampler.draw(np.random.default_rng((5, i)), index=index, size=size) for i in range(count)]


def shown(sampler: PatchSampler, patch: Patch, size: tuple[int, int, int] = SIZE) -> set[int]:
    return set(np.unique(read_patch(sampler.entries[patch.case], "label", patch.start, size)).tolist())


@pytest.fixture
def common_and_rare(tmp_path: Path) -> PatchSampler:
    """Twenty cases with the class `ball`; one of them has a single voxel of `core`."""
    cases = {f"c{i:02d}": empty() for i in range(20)}
    for label in cases.values():
        label[1:9, 2:18, 2:14] = 1
    cases["c07"][9, 19, 15] = 2
    return PatchSampler(store_of(tmp_path, cases), list(cases), batch_size=9)


def test_a_class_that_one_case_has_gets_its_turn(common_and_rare: PatchSampler) -> None:
    patches = draw(common_and_rare, 400, index=8)
    rare = [2 in shown(common_and_rare, patch) for patch in patches]
    expected = 1 / (1 + np.sqrt(20))  # its share by the square root of the number of cases
    assert abs(np.mean(rare) - expected) < 0.05
    assert all(shown(common_and_rare, patch) & {1, 2} for patch in patches)
    others = Counter(patch.case for patch, is_rare in zip(patches, rare, strict=True) if not is_rare)
    assert len(others) == 20 and max(others.values()) < 40


@pytest.mark.parametrize(("batch_size", "forced"), [(2, [1]), (3, [2]), (6, [4, 5]), (9, [6, 7, 8])])
def test_a_third_of_a_batch_and_at_least_one_patch_shows_foreground(
    tmp_path: Path, batch_size: int, forced: list[int]
) -> None:
    label = empty((40, 40, 40))
    label[20, 20, 20] = 1
    sampler = PatchSampler(store_of(tmp_path, {"a": label}), ["a"], batch_size=batch_size)
    always = [
        index
        for index in range(batch_size)
        if all(1 in shown(sampler, patch) for patch in draw(sampler, 30, index=index))
    ]
    assert always == forced
    others = [
        1 in shown(sampler, patch) for i in set(range(batch_size)) - set(forced) for patch in draw(sampler, 60, index=i)
    ]
    assert np.mean(others) < 0.1  # by chance alone: the structure is one voxel


def test_of_single_patch_batches_a_third_shows_foreground(tmp_path: Path) -> None:
    label = empty((40, 40, 40))
    label[20, 20, 20] = 1
    sampler = PatchSampler(store_of(tmp_path, {"a": label}), ["a"], batch_size=1)
    share = np.mean([1 in shown(sampler, patch) for patch in draw(sampler, 400, index=0)])
    assert 0.25 < share < 0.43


def test_without_any_foreground_patches_are_drawn_all_the_same(tmp_path: Path) -> None:
    sampler = PatchSampler(store_of(tmp_path, {"a": empty(), "b": empty()}), ["a", "b"], batch_size=2)
    assert {patch.case for patch in draw(sampler, 40, index=1)} == {"a", "b"}


def test_cases_are_drawn_evenly_and_places_everywhere(tmp_path: Path) -> None:
    cases = {name: empty((5, 8, 8)) for name in "abcd"}
    sampler = PatchSampler(store_of(tmp_path, cases), list(cases), batch_size=4)
    patches = draw(sampler, 800, index=0)
    assert all(150 < count < 250 for count in Counter(patch.case for patch in patches).values())
    assert {patch.start for patch in patches} == {(z, y, x) for z in range(2) for y in range(3) for x in range(3)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    index=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32),
)
def test_a_patch_lies_inside_the_image_or_is_centred_on_it(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    size: tuple[int, int, int],
    index: int,
    seed: int,
) -> None:
    label = np.random.default_rng(seed).integers(0, 2, shape).astype(np.int16)
    sampler = PatchSampler(store_of(tmp_path_factory.mktemp("store"), {"a": label}), ["a"], batch_size=2)
    patch = sampler.draw(np.random.default_rng(seed), index=index, size=size)
    for first, length, voxels in zip(patch.start, size, shape, strict=True):
        if length <= voxels:
            assert 0 <= first <= voxels - length
        else:
            before, behind = -first, first + length - voxels
            assert 0 <= behind - before <= 1 or 0 <= before - behind <= 1
    read = read_patch(sampler.entries["a"], "label", patch.start, size)
    assert read.shape == (1, *size)
    wide = np.pad(label, [(s, s) for s in size])  # zeros all around
    z, y, x = (slice(f + s, f + 2 * s) for f, s in zip(patch.start, size, strict=True))
    assert np.array_equal(read[0], wide[z, y, x])


def test_a_patch_far_outside_reads_only_zeros_where_there_is_no_image(tmp_path: Path) -> None:
    label = empty((4, 6, 6)) + 1
    entry = store_of(tmp_path, {"a": label}).entry("a")
    read = read_patch(entry, "image", (-3, 4, -7), (5, 4, 20))
    assert read.dtype == np.float32
    assert read.sum() == 2 * 2 * 6 and read[0, 3:, :2, 7:13].all()


def test_with_an_ignore_label_every_patch_is_drawn_around_an_annotated_voxel(tmp_path: Path) -> None:
    cases = {name: np.full((30, 30, 30), 3, np.int16) for name in ("scribbled", "nothing", "background")}
    cases["scribbled"][2, 27, 3] = 1
    cases["scribbled"][2, 27, 4] = 2
    cases["background"][15, 15, 15] = 0
    sampler = PatchSampler(store_of(tmp_path, cases, IGNORING), list(cases), batch_size=3)
    for index in range(3):
        patches = draw(sampler, 40, index=index)
        assert all(shown(sampler, patch) & {0, 1, 2} for patch in patches)
        assert {patch.case for patch in patches} == ({"scribbled"} if index == 2 else {"scribbled", "background"})


def test_regions_get_their_turn_like_classes(tmp_path: Path) -> None:
    regions = Labels.from_json({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    label = empty((40, 40, 40))
    label[4:30, 4:30, 4:30] = 1
    label[35, 35, 35] = 2
    sampler = PatchSampler(store_of(tmp_path, {"a": label}, regions), ["a"], batch_size=3)
    share = np.mean([2 in shown(sampler, patch) for patch in draw(sampler, 200, index=2)])
    assert 0.4 < share < 0.6


def test_a_draw_is_a_function_of_its_generator_and_of_nothing_else(tmp_path: Path) -> None:
    cases = {f"c{i}": empty() + (np.arange(16) == i) for i in range(6)}
    store = store_of(tmp_path, cases, TWO_CLASSES)
    first = PatchSampler(store, list(cases), batch_size=3)
    again = PatchSampler(store, list(reversed(cases)), batch_size=3)
    draw(again, 7, index=2)
    assert draw(first, 20, index=2) == draw(again, 20, index=2)


# ---- frames

FRAMES = list(itertools.permutations(range(3)))


def numbered(shape: tuple[int, int, int] = (3, 4, 5)) -> np.ndarray:
    """Every voxel has a value of its own: z, y and x as digits."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return (100 * z + 10 * y + x).astype(np.int16)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_patch_seen_in_a_frame_is_that_of_the_turned_volume(tmp_path: Path, frame: tuple[int, int, int]) -> None:
    volume = numbered()
    entry = FramedEntry(store_of(tmp_path, {"a": volume}).entry("a"), frame)
    turned = volume.transpose(frame)
    assert entry.shape == turned.shape
    assert np.array_equal(entry.read("image")[0], turned)
    for start, size in (((0, 0, 0), (1, 2, 3)), ((1, 2, 1), (2, 1, 2)), ((-1, -2, 1), (4, 5, 4))):
        z, y, x = (slice(f + 5, f + 5 + s) for f, s in zip(start, size, strict=True))
        assert np.array_equal(read_patch(entry, "label", start, size)[0], np.pad(turned, 5)[z, y, x])


@pytest.mark.parametrize("frame", FRAMES)
def test_foreground_is_found_where_the_frame_shows_it(tmp_path: Path, frame: tuple[int, int, int]) -> None:
    label = np.zeros((3, 4, 5), np.int16)
    label[2, 0, 3] = label[1, 3, 4] = 2
    entry = FramedEntry(store_of(tmp_path, {"a": label}).entry("a"), frame)
    voxels = entry.foreground("core")
    assert len(voxels) == 2 and (label.transpose(frame)[tuple(voxels.T)] == 2).all()


def test_each_patch_draws_one_of_several_frames(tmp_path: Path) -> None:
    label = np.zeros((4, 20, 24), np.int16)
    label[1, 5:9, 20] = 1
    store = store_of(tmp_path, {"a": label})
    sampler = PatchSampler(store, ["a"], batch_size=2, frames=((0, 1, 2), (0, 2, 1)))
    patches = draw(sampler, 60, index=1, size=(1, 5, 3))
    assert 15 < Counter(patch.frame for patch in patches)[0, 2, 1] < 45
    for patch in patches:
        shown = read_patch(sampler.entry(patch.case, patch.frame), "label", patch.start, (1, 5, 3))
        assert (shown == 1).any()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.tuples(*[st.integers(-6, 6)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    axes=st.sets(st.sampled_from([0, 1, 2])),
    frame=st.sampled_from(FRAMES),
)
def test_outside_lie_zeros_or_the_outermost_slice_again(
    tmp_path_factory: pytest.TempPathFactory,
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    axes: set[int],
    frame: tuple[int, int, int],
) -> None:
    volume = numbered() + 1
    turned = volume.transpose(frame)
    if any(f + s <= 0 or f >= n for f, s, n in zip(start, size, turned.shape, strict=True)):
        return  # nothing of the image: no patch is drawn there
    entry = FramedEntry(store_of(tmp_path_factory.mktemp("store"), {"a": volume}).entry("a"), frame)
    read = read_patch(entry, "image", start, size, replicate=sorted(axes))
    wide = turned
    for axis in range(3):
        width = [(20, 20) if i == axis else (0, 0) for i in range(3)]
        wide = np.pad(wide, width, mode="edge" if axis in axes else "constant")
    z, y, x = (slice(f + 20, f + 20 + s) for f, s in zip(start, size, strict=True))
    assert np.array_equal(read[0], wide[z, y, x])
    ones = np.pad(np.ones(turned.shape), 20)
    assert np.array_equal(inside_mask(entry.shape, start, size)[0], ones[z, y, x])


def test_foreground_of_a_finer_label_is_found_on_the_images_grid(tmp_path: Path) -> None:
    label = np.zeros((20, 6, 6), np.int16)
    label[11, 2, 3] = 1
    store = store_of(tmp_path, {"a": label}, images={"a": np.zeros((1, 5, 6, 6), np.float32)})
    sampler = PatchSampler(store, ["a"], batch_size=1, label_scale=(4.0, 1.0, 1.0))
    assert sampler.entry("a", (0, 1, 2)).foreground("ball").tolist() == [[2, 2, 3]]
    assert FramedEntry(store.entry("a"), (1, 0, 2), (4.0, 1.0, 1.0)).foreground("ball").tolist() == [[2, 2, 3]]
    assert FramedEntry(store.entry("a"), (2, 1, 0), (4.0, 1.0, 1.0)).foreground("ball").tolist() == [[3, 2, 2]]
