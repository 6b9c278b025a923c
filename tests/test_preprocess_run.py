"""Filling the stores: every case, in parallel, resumed, and nothing that is out of date."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoseg.dataset import RawDataset
from autoseg.errors import DatasetError, PlanError, StorageError
from autoseg.executor import stop_workers
from autoseg.files import PARTIAL
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.labels import Labels
from autoseg.plan import (
    Architecture,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    TrainingSettings,
)
from autoseg.preprocessing import run
from autoseg.preprocessing.case import preprocess_case, restore_label
from autoseg.preprocessing.run import preprocess, sample_foreground
from autoseg.preprocessing.store import ANNOTATED, Store
from autoseg.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def no_worker_is_left():
    yield
    stop_workers()


def configuration(name: str, spacing: tuple[float | None, float, float], channels: int = 1) -> Configuration:
    architecture = Architecture(channels, 3, (4,), ((1, 1, 1),), ((1, 3, 3),), (1,), ())
    settings = PreprocessingSettings(spacing, (0, 1, 2), (Normalization("zscore"),) * channels)
    return Configuration(name, "2d", settings, (12, 16, 14), (1, 16, 16), 2, architecture, TrainingSettings())


def plan_for(dataset: RawDataset, *configurations: Configuration) -> Plan:
    return Plan(
        dataset.name,
        dataset.channels,
        dataset.labels,
        dataset.file_ending,
        Budget(8_000_000_000, 60.0),
        configurations,
        {},
        (),
        "no fingerprint",
    )


FULL = configuration("3d_fullres", (1.0, 1.0, 1.0))
FLAT = configuration("2d", (None, 1.0, 1.0))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def prepare(root: Path, *configurations: Configuration) -> tuple[RawDataset, Plan, Workspace]:
    dataset = RawDataset.load(root)
    return dataset, plan_for(dataset, *configurations), Workspace.of(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_case_is_in_the_store_of_every_configuration(tiny_dataset, workers):
    dataset, plan, workspace = prepare(tiny_dataset(cases=3), FULL, FLAT)
    seen = []
    preprocess(
        dataset, plan.stores(["3d_fullres", "2d"]), workspace, workers=workers,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for planned, shape in ((FULL, (24, 16, 14)), (FLAT, (12, 16, 14))):
        store = Store(workspace.store(planned.preprocessing))
        assert store.cases() == ("case_00", "case_01", "case_02")
        for case in dataset.cases:
            entry = store.entry(case.identifier)
            image, label = read_image(case.images[0]), read_image(case.label)
            expected = preprocess_case(
                Image(image.array.astype(np.float32), image.grid), label, planned.preprocessing, dataset.labels
            )
            np.testing.assert_array_equal(entry.read("image"), expected.image)
            np.testing.assert_array_equal(entry.read("label"), expected.label)
            assert entry.shape == shape and entry.geometry == expected.geometry
            assert entry.present == ("ball", "core")
            for z, y, x in entry.foreground("core"):
                assert expected.label[0, z, y, x] == 2
            assert len(entry.foreground("core")) == (expected.label == 2).sum()
        back = restore_label(entry.read("label")[0], entry.geometry)
        assert back.grid == label.grid
        if planned is FLAT:
            np.testing.assert_array_equal(back.array, label.array)


def test_only_the_configurations_that_are_asked_for_are_made(tiny_dataset):
    dataset, plan, workspace = prepare(tiny_dataset(cases=1), FULL, FLAT)
    preprocess(dataset, plan.stores(["2d"]), workspace, workers=1)
    assert Store(workspace.store(FLAT.preprocessing)).cases() == ("case_00",)
    assert not workspace.store(FULL.preprocessing).exists()
    with pytest.raises(PlanError, match="3d_lowres"):
        preprocess(dataset, plan.stores(["3d_lowres"]), workspace, workers=1)


def test_stores_with_the_same_arrays_share_their_files(tiny_dataset):
    dataset, plan, workspace = prepare(tiny_dataset(cases=1, spacing=(1.0, 1.0, 1.0)), FULL, FLAT)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    one, other = (workspace.store(c.preprocessing) / "case_00.image.b2nd" for c in (FULL, FLAT))
    assert one.samefile(other)
    assert Store(one.parent).entry("case_00").read("image").shape == (1, 12, 16, 14)


def test_labels_on_a_finer_grid_are_stored_on_it_and_foreground_is_counted_there(tiny_dataset):
    root = tiny_dataset(cases=1)  # slices of 2 mm
    path = root / "labelsTr" / "case_00.nii.gz"
    coarse = read_image(path)
    grid = replace(coarse.grid, shape=(24, 16, 14), spacing=(1.0, 1.0, 1.0), origin=(-0.5, 0.0, 0.0))
    write_image(Image(coarse.array.repeat(2, 1), grid), path)
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**content, "label_grid": "own"}))
    paired = replace(FULL.preprocessing, spacing=(2.0, 1.0, 1.0), label_scale=(2.0, 1.0, 1.0))
    plain = replace(paired, label_scale=(1.0, 1.0, 1.0))
    dataset, _, workspace = prepare(root, FULL)
    preprocess(dataset, [plain, paired], workspace, workers=1)
    entry = Store(workspace.store(paired)).entry("case_00")
    assert entry.shape == (12, 16, 14) and entry.label_shape == (24, 16, 14)
    label = entry.read("label")
    np.testing.assert_array_equal(label[0], coarse.array[0].repeat(2, 0))
    for z, y, x in entry.foreground("core"):
        assert label[0, z, y, x] == 2
    assert len(entry.foreground("core")) == (label == 2).sum()
    assert restore_label(label[0], entry.label_geometry).grid == read_image(path).grid
    on_image = Store(workspace.store(plain)).entry("case_00")
    assert on_image.label_shape == on_image.shape == (12, 16, 14), "no scale: on the image's grid, in a store apart"
    np.testing.assert_array_equal(on_image.read("label"), coarse.array)


def test_a_second_run_changes_nothing(tiny_dataset):
    dataset, plan, workspace = prepare(tiny_dataset(cases=2), FULL)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    before = snapshot(workspace.root)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    assert snapshot(workspace.root) == before


@pytest.mark.parametrize("damage", ["no record", "no array", "short array", "bad record"])
def test_what_is_not_whole_is_made_again_and_the_rest_is_kept(tiny_dataset, damage):
    dataset, plan, workspace = prepare(tiny_dataset(cases=2), FULL)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    store = Store(workspace.store(FULL.preprocessing))
    before = snapshot(store.folder)
    record, array = store.folder / "case_01.json", store.folder / "case_01.label.b2nd"
    if damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("{")
    elif damage == "no array":
        array.unlink()
    else:
        array.write_bytes(array.read_bytes()[:50])
    preprocess(dataset, plan.stores(), workspace, workers=1)
    after = snapshot(store.folder)
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert all((before[name] == after[name]) == ("case_00" in name) for name in before)


def test_a_case_whose_files_changed_is_made_again(tiny_dataset):
    dataset, plan, workspace = prepare(tiny_dataset(cases=2), FULL)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    store = Store(workspace.store(FULL.preprocessing))
    label = read_image(dataset.cases[0].label)
    write_image(Image(np.where(label.array == 2, 1, label.array), label.grid), dataset.cases[0].label)
    before = snapshot(store.folder)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    assert store.entry("case_00").present == ("ball",)
    assert store.entry("case_01").present == ("ball", "core")
    assert before["case_01.json"] == snapshot(store.folder)["case_01.json"]


def test_labels_that_mean_something_else_are_looked_at_again(tiny_dataset):
    root = tiny_dataset(cases=1)
    dataset, plan, workspace = prepare(root, FULL)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    content = json.loads((root / "dataset.json").read_text())
    content["labels"] = {"background": 0, "rim": 1, "heart": 2}
    (root / "dataset.json").write_text(json.dumps(content))
    dataset = RawDataset.load(root)
    preprocess(dataset, plan_for(dataset, FULL).stores(), workspace, workers=1)
    assert Store(workspace.store(FULL.preprocessing)).entry("case_00").present == ("rim", "heart")


def test_cases_that_left_the_dataset_and_partial_files_leave_the_store(tiny_dataset):
    dataset, plan, workspace = prepare(tiny_dataset(cases=3), FULL)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    store = Store(workspace.store(FULL.preprocessing))
    partial = store.folder / f".99{PARTIAL}.case_00.image.b2nd"
    partial.write_bytes(b"half")
    preprocess(replace(dataset, cases=dataset.cases[:2]), plan.stores(), workspace, workers=1, drop_cases=["case_00"])
    assert store.cases() == ("case_01",)
    assert {path.name.split(".")[0] for path in store.folder.iterdir()} == {"case_01"}


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_cases_are_all_named_and_the_sound_ones_finished(tiny_dataset, workers):
    root = tiny_dataset(cases=4)
    truncated = root / "imagesTr" / "case_01_0000.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:200])
    write_image(
        Image(np.full((1, 12, 16, 14), 9, np.uint8), Grid((12, 16, 14), (2.0, 1.0, 1.0))),
        root / "labelsTr" / "case_03.nii.gz",
    )
    dataset, plan, workspace = prepare(root, FULL)
    with pytest.raises(DatasetError, match=r"2 cases(.|\n)*case_01(.|\n)*case_03"):
        preprocess(dataset, plan.stores(), workspace, workers=workers)
    store = Store(workspace.store(FULL.preprocessing))
    assert store.cases() == ("case_00", "case_02")
    preprocess(dataset, plan.stores(), workspace, workers=workers, drop_cases=("case_01", "case_03"))
    assert store.cases() == ("case_00", "case_02")


def test_an_unwritable_workspace_is_refused_in_a_sentence(tiny_dataset, tmp_path):
    dataset, plan, _ = prepare(tiny_dataset(cases=1), FULL)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        preprocess(dataset, plan.stores(), Workspace(tmp_path / "file" / "inside"), workers=1)


def test_a_full_disk_stops_the_run(tiny_dataset, monkeypatch):
    dataset, plan, workspace = prepare(tiny_dataset(cases=3), FULL)

    def full(*_: object, **__: object) -> None:
        raise StorageError("x: the disk is full; free some space.")

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(StorageError, match="disk is full"):
        preprocess(dataset, plan.stores(), workspace, workers=1)


def test_a_killed_run_goes_on_where_it_stood(tiny_dataset, tmp_path):
    root = tiny_dataset(cases=12, shape=(24, 40, 40))
    dataset, plan, workspace = prepare(root, FULL)
    plan_file = tmp_path / "plan.json"
    plan.save(plan_file)
    code = (
        "import sys; from pathlib import Path; from autoseg.dataset import RawDataset; from autoseg.plan import Plan\n"
        "from autoseg.preprocessing.run import preprocess; from autoseg.workspace import Workspace\n"
        "root = Path(sys.argv[1])\n"
        "preprocess(RawDataset.load(root), Plan.load(Path(sys.argv[2])).stores(), Workspace.of(root), workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root), str(plan_file)], cwd=ROOT)
    store = Store(workspace.store(FULL.preprocessing))
    end = time.monotonic() + 60
    while len(store.cases()) < 3 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # its workers end by themselves
    finished = {case: os.stat(store.folder / f"{case}.json").st_mtime_ns for case in store.cases()}
    assert finished
    preprocess(dataset, plan.stores(), workspace, workers=1)
    assert len(store.cases()) == 12
    assert all(os.stat(store.folder / f"{case}.json").st_mtime_ns == when for case, when in finished.items())
    assert not [path for path in store.folder.iterdir() if PARTIAL in path.name]
    for case in store.cases():
        store.entry(case).read("image")


def test_one_worker_holds_one_case(tiny_dataset, monkeypatch):
    dataset, plan, workspace = prepare(tiny_dataset(cases=4), FULL)
    order = []
    read, write = run.read_case, Store.write
    monkeypatch.setattr(run, "read_case", lambda *a: (order.append("read"), read(*a))[1])
    monkeypatch.setattr(Store, "write", lambda *a, **k: (order.append("write"), write(*a, **k))[1])
    preprocess(dataset, plan.stores(), workspace, workers=1)
    assert order == ["read", "write"] * 4


LABELS = Labels(("whole", "core"), ((1, 2), (2,)), (1, 2), ignore=3)


def test_foreground_of_regions_and_of_what_is_annotated():
    label = np.random.default_rng(0).integers(0, 4, (1, 5, 6, 7)).astype(np.int16)
    found = sample_foreground(label, LABELS)
    assert set(found) == {"whole", "core", ANNOTATED}
    np.testing.assert_array_equal(found["whole"], np.argwhere((label[0] == 1) | (label[0] == 2)))
    np.testing.assert_array_equal(found["core"], np.argwhere(label[0] == 2))
    np.testing.assert_array_equal(found[ANNOTATED], np.argwhere(label[0] != 3))


def test_foreground_of_big_structures_is_a_fixed_even_sample(monkeypatch):
    monkeypatch.setattr(run, "SLAB_VOXELS", 3 * 50 * 50)
    label = np.zeros((1, 40, 50, 50), dtype=np.int16)
    label[0, 4:, 5:45, 5:45] = 1
    found = sample_foreground(label, Labels(("a", "b"), ((1,), (2,))))
    assert found["a"].shape == (run.MOST_COORDINATES, 3) and found["b"].shape == (0, 3)
    assert (label[0][tuple(found["a"].T)] == 1).all()
    assert len(np.unique(found["a"], axis=0)) == run.MOST_COORDINATES
    np.testing.assert_allclose(found["a"].mean(axis=0), [21.5, 24.5, 24.5], atol=0.6)
    np.testing.assert_array_equal(sample_foreground(label, Labels(("a",), ((1,),)))["a"], found["a"])


def test_planes_and_colours_are_preprocessed(tiny_dataset):
    root = tiny_dataset(cases=2, shape=(1, 20, 24), ending=".png", channels=("grey",), spacing=(1.0, 1.0, 1.0))
    dataset, plan, workspace = prepare(root, FLAT)
    preprocess(dataset, plan.stores(), workspace, workers=1)
    assert Store(workspace.store(FLAT.preprocessing)).entry("case_00").shape == (1, 20, 24)


def test_real_cases_come_back_bit_by_bit(shared_data, tmp_path):
    dataset = RawDataset.load(shared_data / "Dataset004_Hippocampus")
    dataset = replace(dataset, cases=dataset.cases[:6])
    workspace = Workspace(tmp_path)
    preprocess(dataset, plan_for(dataset, FULL, FLAT).stores(), workspace, workers=1)
    store = Store(workspace.store(FULL.preprocessing))
    for case in dataset.cases:
        entry = store.entry(case.identifier)
        label = read_image(case.label)
        back = restore_label(entry.read("label")[0], entry.geometry)
        assert back.grid == read_image(case.images[0]).grid
        np.testing.assert_array_equal(back.array, label.array)


def test_what_was_stopped_says_so_and_is_finished_by_the_next_call(tiny_dataset):
    dataset, plan, workspace = prepare(tiny_dataset(cases=4), FULL)
    assert not preprocess(dataset, plan.stores(), workspace, workers=1, beside=True, stop=lambda: True)
    store = Store(workspace.store(FULL.preprocessing))
    assert 0 < len(store.cases()) < 4
    assert preprocess(dataset, plan.stores(), workspace, workers=1)
    assert len(store.cases()) == 4
