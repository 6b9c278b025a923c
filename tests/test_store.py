"""The store: read by box, whole or refused, never half there."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.errors import StorageError
from autoseg.files import PARTIAL
from autoseg.image import Grid
from autoseg.preprocessing import store as store_module
from autoseg.preprocessing.case import CaseGeometry
from autoseg.preprocessing.store import Store

SHAPE = (40, 70, 150)


def geometry(shape: tuple[int, int, int] = SHAPE) -> CaseGeometry:
    crop = ((0, shape[0]), (0, shape[1]), (0, shape[2]))
    return CaseGeometry(Grid(shape, (2.5, 1.0, 0.7)), (0, 1, 2), (False, False, True), crop, shape)


def some_arrays(shape: tuple[int, int, int] = SHAPE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(2, *shape)).astype(np.float32),
        "label": rng.integers(0, 3, (1, *shape)).astype(np.int16),
    }


FOREGROUND = {
    "liver": np.arange(30).reshape(10, 3),
    "nothing": np.empty((0, 3), int),
    "annotated": np.ones((4, 3), int),
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return some_arrays()


@pytest.fixture(scope="module")
def filled(tmp_path_factory, arrays) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    store.write("a", arrays, geometry(), FOREGROUND)
    return store


@pytest.fixture
def fresh(tmp_path, arrays) -> Store:
    store = Store(tmp_path / "store")
    store.write("liver_07", arrays, geometry(), FOREGROUND)
    return store


def test_what_is_written_comes_back_bit_by_bit(filled, arrays):
    entry = filled.entry("a")
    assert entry.shape == SHAPE and entry.channels == 2
    for name, array in arrays.items():
        read = entry.read(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
    assert entry.geometry == geometry()


def test_a_label_on_a_finer_grid_keeps_its_shape_and_its_way_back(tmp_path):
    store = Store(tmp_path)
    arrays = {"image": np.zeros((1, 4, 8, 8), np.float32), "label": np.zeros((1, 16, 8, 8), np.int16)}
    own = geometry((16, 8, 8))
    store.write("a", arrays, geometry((4, 8, 8)), {}, label_geometry=own)
    store.write("b", {**arrays, "label": arrays["label"][:, :4]}, own, {}, label_geometry=own)
    entry = store.entry("a")
    assert entry.shape == (4, 8, 8) and entry.label_shape == (16, 8, 8) and entry.label_geometry == own
    assert store.entry("b").label_geometry is None, "the image's"


def test_foreground_comes_back_by_name(filled):
    entry = filled.entry("a")
    assert entry.present == ("liver",)
    np.testing.assert_array_equal(entry.foreground("liver"), FOREGROUND["liver"])
    assert entry.foreground("liver").dtype == np.int32
    assert entry.foreground("nothing").shape == (0, 3)
    assert entry.foreground("annotated").shape == (4, 3)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_box_holds_the_voxels_of_that_box(data, filled, arrays):
    box = []
    for size in SHAPE:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    read = filled.entry("a").read("image", tuple(box))
    np.testing.assert_array_equal(read, arrays["image"][(slice(None), *box)])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts bytes in /proc/self/io")
@pytest.mark.parametrize(
    "box", [(slice(40, 44), slice(0, 60), slice(0, 60)), (slice(17, 18), slice(None), slice(None))]
)
def test_a_patch_and_a_slice_read_a_small_part_of_the_file(box, tmp_path):
    volume = np.random.default_rng(0).normal(size=(1, 128, 256, 256)).astype(np.float32)
    store = Store(tmp_path)
    store.write("a", {"image": volume}, geometry((128, 256, 256)), {})
    entry = store.entry("a")
    size = (tmp_path / "a.image.b2nd").stat().st_size

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])

    for share in (0.3, 0.06):  # the first time the chunks that are touched are checked as a whole
        before = bytes_read()
        np.testing.assert_array_equal(entry.read("image", box), volume[(slice(None), *box)])
        assert bytes_read() - before < share * size


def test_a_case_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match="Case b is not in the store"):
        Store(tmp_path).entry("b")
    assert Store(tmp_path / "nowhere").cases() == ()


@pytest.mark.parametrize("name", ["image", "label", "foreground"])
def test_a_truncated_file_is_refused_naming_case_and_file(fresh, name):
    path = fresh.folder / f"liver_07.{name}.b2nd"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match=rf"Case liver_07: .*liver_07\.{name}\.b2nd.* bytes"):
        read_everything(fresh)


def test_every_case_with_a_broken_file_is_named_at_once(tmp_path, arrays):
    store = Store(tmp_path / "store")
    for case in ("a", "b", "c"):
        store.write(case, arrays, geometry(), {})
    os.truncate(store.folder / "a.image.b2nd", 100)
    (store.folder / "c.label.b2nd").unlink()
    store.require_whole(["b"])
    with pytest.raises(StorageError, match=r"2 cases .*case a: a\.image\.b2nd; case c: c\.label\.b2nd"):
        store.require_whole(["a", "b", "c"])


def test_a_missing_file_is_refused_naming_case_and_file(fresh):
    (fresh.folder / "liver_07.image.b2nd").unlink()
    with pytest.raises(StorageError, match=r"Case liver_07: .*liver_07\.image\.b2nd"):
        read_everything(fresh)


def test_a_flipped_byte_anywhere_is_refused_naming_case_and_file(tmp_path):
    store = Store(tmp_path)
    shape = (6, 40, 40)
    store.write("liver_07", some_arrays(shape), geometry(shape), FOREGROUND)
    rng = np.random.default_rng(1)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        header, trailer = range(0, min(220, len(whole)), 3), range(max(0, len(whole) - 150), len(whole), 3)
        for position in sorted({*header, *trailer, *rng.integers(0, len(whole), 15).tolist()}):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            forget()
            with pytest.raises(StorageError, match=rf"{path.name}"):
                read_everything(store)
            path.write_bytes(whole)
    forget()
    read_everything(store)


def forget() -> None:
    """As a new process: changes within the clock's resolution would not be seen otherwise."""
    for cache in (store_module._open, store_module._checked, store_module._read_entry):
        cache.cache_clear()


def read_everything(store: Store) -> None:
    for case in store.cases():
        entry = store.entry(case)
        entry.read("image")
        entry.read("label")
        entry.foreground("liver")


def test_a_record_of_another_version_is_refused(fresh):
    path = fresh.folder / "liver_07.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(StorageError, match="Case liver_07: .* version 99"):
        fresh.entry("liver_07")


def test_writing_again_replaces_what_open_readers_see(fresh, arrays):
    assert fresh.entry("liver_07").read("image").shape == (2, *SHAPE)
    shape = (3, 4, 5)
    fresh.write("liver_07", some_arrays(shape), geometry(shape), {})
    entry = fresh.entry("liver_07")
    np.testing.assert_array_equal(entry.read("image"), some_arrays(shape)["image"])
    assert entry.present == () and entry.foreground("liver").shape == (0, 3)
    assert not (fresh.folder / "liver_07.foreground.b2nd").exists()


def test_a_failed_write_leaves_no_case_and_no_partial_file(fresh, arrays, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(store_module, "_describe", fail)
    with pytest.raises(StorageError, match=r"liver_07\.image\.b2nd: cannot be written"):
        fresh.write("liver_07", arrays, geometry(), FOREGROUND)
    assert not fresh.has("liver_07") and fresh.cases() == ()
    assert list(fresh.folder.iterdir()) == []


def test_a_full_disk_is_said_to_be_full(fresh, arrays, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("blosc2 says only that it failed")

    monkeypatch.setattr(store_module, "_describe", fail)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(StorageError, match="the disk is full"):
        fresh.write("liver_07", arrays, geometry(), FOREGROUND)


class _Usage:
    free = 10


def test_a_truncated_record_names_its_case_and_what_to_do(fresh):
    record = fresh.folder / "liver_07.json"
    record.write_bytes(record.read_bytes()[:50])
    with pytest.raises(StorageError, match="Case liver_07: .*liver_07.json: .* delete it and run"):
        fresh.entry("liver_07")


def test_partial_files_are_no_cases_and_can_be_removed(fresh):
    partial = fresh.folder / f".123{PARTIAL}.b.json"
    partial.write_text("{")
    assert fresh.cases() == ("liver_07",)
    fresh.remove_partial_files()
    assert not partial.exists() and fresh.has("liver_07")


def test_removing_a_case_leaves_the_others(fresh):
    shape = (3, 4, 5)
    fresh.write("liver_08", some_arrays(shape), geometry(shape), FOREGROUND)
    fresh.remove("liver_07")
    assert fresh.cases() == ("liver_08",)
    assert not list(fresh.folder.glob("*liver_07*"))


def test_a_linked_case_outlives_the_store_that_it_came_from(tmp_path, arrays):
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    entry = first.write("a", arrays, geometry(), FOREGROUND, source="x")
    (tmp_path / "second").mkdir()
    second.link(entry)
    first.remove("a")
    assert second.entry("a") == replace(entry, folder=second.folder)
    np.testing.assert_array_equal(second.entry("a").read("image"), arrays["image"])


def test_entries_travel_to_other_processes(filled, arrays):
    entry = pickle.loads(pickle.dumps(filled.entry("a")))
    np.testing.assert_array_equal(entry.read("label"), arrays["label"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc/self/fd")
def test_a_process_keeps_few_files_open(tmp_path):
    store = Store(tmp_path)
    shape = (3, 4, 5)
    for index in range(200):
        store.write(f"case_{index}", {"image": some_arrays(shape)["image"]}, geometry(shape), {})
    for case in store.cases():
        store.entry(case).read("image")
    assert len(list(Path("/proc/self/fd").iterdir())) < store_module.OPEN_ARRAYS + 50
