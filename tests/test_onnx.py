"""ONNX files answer as their networks do, in onnxruntime, for every topology, head and block that is planned."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_fold, small_plan
from tiny_training import sr_configuration, stack_configuration, tiny_configuration
from torch import nn

import autoseg.extras as extras
import autoseg.inference.onnx as onnx_module
import autoseg.inference.predictor as predictor
from autoseg.errors import CheckpointError, PlanError, StorageError
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.inference.onnx import DESCRIPTION, IMAGE, LOGITS, SUPER_RESOLVED, export_onnx, output_grid, write_network
from autoseg.inference.predictor import PredictionSettings, load_model
from autoseg.labels import Labels
from autoseg.networks import UNet, build_network
from autoseg.networks.blocks import BLOCKS, ConvNormAct, Stage
from autoseg.plan import Configuration, Plan
from autoseg.typed_json import to_json
from autoseg.workspace import Workspace

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

SAME = 1e-4  # largest difference of logits between -10 and 10, in float32


def changed(configuration: Configuration, **architecture: Any) -> Configuration:
    return replace(configuration, architecture=replace(configuration.architecture, **architecture))


SR = sr_configuration()
ANY_SCALE = sr_configuration(scale=(2.5, 1.0, 1.0), sr_range=(1.5, 3.0))
FLAT_SR = sr_configuration(scale=(1.0, 1.5, 2.0), patch_size=(1, 8, 12))
STACK_SR = sr_configuration(scale=(1.0, 2.0, 1.0), patch_size=(1, 8, 12), slices=3)
PLANNED: dict[str, Configuration] = {
    "2d": tiny_configuration(patch_size=(1, 12, 16)),
    "2d, residual": changed(tiny_configuration(patch_size=(1, 12, 16)), block="residual"),
    "2.5d_stack": stack_configuration(slices=5),
    "2.5d_reduce": stack_configuration(context="reduce", slices=5),
    "2.5d_coronal": stack_configuration(view_axis=1, channels=2),
    "3d_fullres": tiny_configuration(),
    "3d_lowres, residual": changed(tiny_configuration(patch_size=(8, 12, 8), channels=2), block="residual"),
    "3d_cascade": tiny_configuration(previous_stage="3d_lowres"),
    "3d_sr": SR,
    "3d_sr, implicit": changed(SR, head="implicit"),
    "3d_sr, filters, residual": changed(SR, head="filters", block="residual"),
    "3d_sr, image alone": sr_configuration(segments=False),
    "3d_sr, self": sr_configuration(source="self", patch_size=(4, 8, 12)),
    "3d_sr_any": ANY_SCALE,
    "3d_sr_any, implicit": changed(ANY_SCALE, head="implicit"),
    "3d_sr_any, filters": changed(ANY_SCALE, head="filters"),
    "2d_sr": FLAT_SR,
    "2d_sr, implicit": changed(FLAT_SR, head="implicit"),
    "2.5d_stack_sr, filters": changed(STACK_SR, head="filters"),
}


def trained(configuration: Configuration) -> UNet:
    """A network none of whose weights are zero, in evaluation mode."""
    torch.manual_seed(0)
    network = build_network(configuration.architecture).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def answers(path: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {IMAGE: image}), strict=True))


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def shape(configuration: Configuration, *, batch: int) -> tuple[int, ...]:
    """Of an input that is a planned patch."""
    z, y, x = configuration.patch_size
    return (batch, configuration.architecture.input_channels, z + 2 * configuration.architecture.halo, y, x)


@pytest.mark.parametrize("name", PLANNED)
def test_every_planned_network_answers_the_same_in_onnxruntime_whatever_the_batch(tmp_path: Path, name: str) -> None:
    configuration = PLANNED[name]
    network = trained(configuration)
    write_network(network, configuration, tmp_path / "network.onnx")
    for batch in (1, 2, 5):
        image = noise(shape(configuration, batch=batch))
        with torch.inference_mode():
            expected = network(torch.from_numpy(image), output_grid(configuration))[0].numpy()
        found = answers(tmp_path / "network.onnx", image)
        together = np.concatenate([found[key] for key in (LOGITS, SUPER_RESOLVED) if key in found], axis=1)
        assert together.shape == expected.shape and expected.std() > 0.01
        assert np.abs(together - expected).max() < SAME
        assert (LOGITS in found) == bool(configuration.architecture.output_channels)
        assert (SUPER_RESOLVED in found) == bool(configuration.architecture.image_channels)


@pytest.mark.parametrize("name", ["2.5d_reduce", "3d_fullres"])
def test_a_network_that_does_not_super_resolve_takes_any_size_that_it_can_pool(tmp_path: Path, name: str) -> None:
    configuration = PLANNED[name]
    network, halo = trained(configuration), configuration.architecture.halo
    write_network(network, configuration, tmp_path / "network.onnx")
    for batch, z, y, x in ((1, 1, 2, 3), (3, 4, 1, 2)):
        depth, height, width = (step * n for step, n in zip(configuration.architecture.divisor, (z, y, x), strict=True))
        image = noise((batch, 1, depth + 2 * halo, height, width))
        with torch.inference_mode():
            (expected,) = network(torch.from_numpy(image))
        found = answers(tmp_path / "network.onnx", image)[LOGITS]
        assert found.shape == (batch, 3, depth, height, width)
        assert np.abs(found - expected.numpy()).max() < SAME


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two finished folds of a cascade and one of the stage before."""
    place = Workspace(tmp_path / "ws")
    for fold in ("0", "1"):
        save_fold(small_plan(), place.models, "3d_cascade", fold, seed=int(fold))
    save_fold(small_plan(), place.models, "3d_lowres", "0")
    return place


def test_a_folder_holds_one_file_for_each_network_and_says_how_they_are_used(
    tmp_path: Path, workspace: Workspace
) -> None:
    assert export_onnx(workspace, "3d_cascade", tmp_path / "out", licence="CC0") == tmp_path / "out"
    about = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    files = {(entry["configuration"], entry["fold"]): tmp_path / "out" / entry["file"] for entry in about["files"]}
    assert set(files) == {("3d_cascade", "0"), ("3d_cascade", "1"), ("3d_lowres", "0")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        DESCRIPTION,
        *(path.name for path in files.values()),
    }
    assert about["configuration"] == "3d_cascade" and about["licence"] == "CC0"
    for (name, _), path in files.items():
        network = about["networks"][name]
        session = onnxruntime.InferenceSession(str(path))
        assert {one.name: one.shape for one in session.get_inputs()} == network["inputs"]
        assert {one.name: one.shape for one in session.get_outputs()} == network["outputs"]
        assert network["configuration"] == to_json(small_plan().configuration(name))
    assert about["networks"]["3d_cascade"]["input_channels"] == ["MRI", "3d_lowres: a", "3d_lowres: b"]
    assert about["networks"]["3d_cascade"]["logits_of"] == ["background", "a", "b"]
    for entry in about["files"]:
        content = (tmp_path / "out" / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"] and entry["largest_difference"] < 1e-5
        assert os.fsencode(Path(onnx_module.__file__).parent) not in content  # no path of this machine


def test_only_the_folds_that_are_asked_for_are_written(tmp_path: Path, workspace: Workspace) -> None:
    export_onnx(workspace, "3d_lowres", tmp_path / "out", folds=["0"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["3d_lowres_fold_0.onnx", DESCRIPTION]


class Eigenvalues(Stage):
    """A stage with an operation that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.linalg.eigvals(x[..., :4, :4]).real.mean()


def test_an_operation_that_onnx_lacks_is_named_and_nothing_is_left(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "plain", partial(Eigenvalues, ConvNormAct))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PlanError, match=r"3d_lowres: ONNX cannot hold the operation aten.linalg_eig; .* without"):
        export_onnx(workspace, "3d_lowres", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_no_file_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = changed(PLANNED["3d_sr"], reference_channels=1)
    with pytest.raises(PlanError, match="Configuration 3d_fullres: ONNX cannot hold a reference image"):
        write_network(trained(reference), reference, tmp_path / "network.onnx")
    monkeypatch.setattr(onnx_module, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(PlanError, match="ONNX cannot hold 0.0 GB of weights"):
        write_network(trained(PLANNED["2d"]), PLANNED["2d"], tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_than_its_network_is_never_left(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: nn.Module, configuration: Configuration, path: Path) -> None:
        write_network(trained(configuration), configuration, path)

    monkeypatch.setattr(onnx_module, "write_network", wrong)
    with pytest.raises(CheckpointError, match="3d_lowres, fold 0: its ONNX file answers otherwise"):
        export_onnx(workspace, "3d_lowres", tmp_path / "out")
    assert not (tmp_path / "out").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["ws"]


def test_nothing_is_overwritten_and_a_file_is_no_folder(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="is there already"):
        export_onnx(workspace, "3d_lowres", tmp_path / "out")
    with pytest.raises(StorageError, match="written to a folder"):
        export_onnx(workspace, "3d_lowres", tmp_path / "model.onnx")


def test_without_the_packages_the_command_that_installs_them_is_said(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extras.EXTRAS, "onnx", ("onnx", "no_such_runtime"))
    with pytest.raises(PlanError, match=r"--onnx needs no_such_runtime, which is not installed; .*autoseg\[onnx\]"):
        export_onnx(workspace, "3d_lowres", tmp_path / "out")


def example() -> str:
    """The program in the documentation."""
    text = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text(encoding="utf-8")
    (program,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    return program


def flat_stack() -> Plan:
    """A plan for slices with their neighbours along the second axis, of label values that are not channels."""
    plan = small_plan(labels=Labels(("a", "b"), ((2,), (5,))))
    settings = replace(plan.configurations[0].preprocessing, axis_order=(1, 0, 2))
    stack = replace(stack_configuration(view_axis=1), name="stack", preprocessing=settings)
    return replace(plan, configurations=(stack,))


@pytest.mark.parametrize(("name", "plan"), [("3d_fullres", small_plan()), ("stack", flat_stack())])
def test_the_example_of_the_documentation_predicts_what_autoseg_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, plan: Plan
) -> None:
    place = Workspace(tmp_path / "ws")
    for fold in ("0", "1"):
        save_fold(plan, place.models, name, fold, seed=int(fold))
    export_onnx(place, name, tmp_path / "files")
    random = np.random.default_rng(0)
    array = np.zeros((1, 22, 30, 26), np.float32)
    array[:, 1:20, 2:29, :25] = 50 + 10 * random.normal(size=(1, 19, 27, 25))
    turned = ((0.0, 0.0, -1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
    write_image(Image(array, Grid((22, 30, 26), (1.3, 0.9, 1.1), direction=turned)), tmp_path / "scan.nii.gz")
    monkeypatch.setattr(predictor, "autocast_dtype", lambda device: None)  # the files are float32
    settings = PredictionSettings(mirroring=False)
    expected = load_model(place.models / name, "cpu").predict(tmp_path / "scan.nii.gz", settings=settings)

    monkeypatch.setattr(
        sys, "argv", ["segment.py", *(str(tmp_path / n) for n in ("files", "scan.nii.gz", "out.nii.gz"))]
    )
    exec(compile(example(), "onnx.md", "exec"), {"__name__": "__main__"})
    found = read_image(tmp_path / "out.nii.gz")
    assert found.grid.shape == expected.grid.shape
    np.testing.assert_allclose(found.grid.direction, expected.grid.direction, atol=1e-6)
    assert len(np.unique(expected.array)) == 3
    assert np.mean(found.array == expected.array) > 0.999
