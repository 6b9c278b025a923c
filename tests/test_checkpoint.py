"""Models in one file: what is saved comes back, what is damaged or foreign is refused."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import NAME, tiny_plan

from autoseg.checkpoint import FORMAT, Checkpoint, load_tensors, save_tensors
from autoseg.errors import CheckpointError, StorageError
from autoseg.networks import build_network
from autoseg.typed_json import to_json


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Checkpoint, Path]:
    plan = tiny_plan()
    torch.manual_seed(0)
    weights = build_network(plan.configurations[0].architecture).state_dict()
    checkpoint = Checkpoint(plan, NAME, "0", weights, {"steps": 8})
    path = tmp_path / "models" / "checkpoint.safetensors"
    checkpoint.save(path)
    return checkpoint, path


def test_a_checkpoint_comes_back_as_it_was(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    loaded = Checkpoint.load(path)
    assert (loaded.plan, loaded.configuration, loaded.fold, loaded.summary) == (
        checkpoint.plan,
        NAME,
        "0",
        {"steps": 8},
    )
    assert loaded.settings == checkpoint.plan.configurations[0]
    assert loaded.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in checkpoint.weights.items())


def test_the_network_of_a_checkpoint_is_ready_to_predict(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    network = Checkpoint.load(path).build_network()
    assert not network.training
    trained = build_network(checkpoint.settings.architecture)
    trained.load_state_dict(dict(checkpoint.weights))
    image = torch.randn(1, 1, 4, 8, 8)
    with torch.inference_mode():
        assert torch.equal(network(image)[0], trained.eval()(image)[0])


def test_saving_leaves_one_file(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    checkpoint.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors: there is no such checkpoint; train the fold first"):
        Checkpoint.load(tmp_path / "none.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_anywhere_is_refused(saved: tuple[Checkpoint, Path], where: float, flip: int) -> None:
    _, path = saved
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= flip
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged.safetensors: "):
        Checkpoint.load(damaged)


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1])
def test_a_truncated_checkpoint_is_refused(saved: tuple[Checkpoint, Path], kept: int) -> None:
    _, path = saved
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="this is not a sound safetensors file .*damaged or not from autoseg"):
        Checkpoint.load(path)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("sprung"),))  # type: ignore[return-value]


def test_a_file_made_to_run_code_when_opened_is_refused_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(_Trap()))
    torch.save({"weights": _Trap()}, tmp_path / "torch.safetensors")
    for name in ("plain", "torch"):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: this is not a sound safetensors file"):
            Checkpoint.load(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_a_folder_in_the_place_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Checkpoint.load(tmp_path)


def test_a_file_of_another_format_or_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resume.safetensors"
    save_tensors(path, {"a": torch.zeros(2)}, {"format": "autoseg training 1"})
    with pytest.raises(CheckpointError, match=f"expected '{FORMAT}', found 'autoseg training 1'"):
        Checkpoint.load(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, str(path))
    with pytest.raises(CheckpointError, match="found 'None'; use the autoseg that wrote it"):
        Checkpoint.load(path)


def test_a_plan_of_another_version_is_refused(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    plan = {**to_json(checkpoint.plan), "version": 99}
    header = {"format": FORMAT, "plan": plan, "configuration": NAME, "fold": "0", "summary": {}}
    save_tensors(path, checkpoint.weights, header)
    with pytest.raises(CheckpointError, match="checkpoint.safetensors: plan version 99 cannot be read"):
        Checkpoint.load(path)


def test_a_header_without_its_parts_is_refused(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    header = {"format": FORMAT, "plan": to_json(checkpoint.plan), "configuration": NAME, "fold": "0", "summary": {}}
    for key in ("plan", "configuration", "fold", "summary"):
        save_tensors(path, checkpoint.weights, {k: v for k, v in header.items() if k != key})
        with pytest.raises(CheckpointError, match=f"checkpoint.safetensors: the checkpoint's header lacks '{key}'"):
            Checkpoint.load(path)
    save_tensors(path, checkpoint.weights, {**header, "configuration": "2d"})
    with pytest.raises(CheckpointError, match=f"checkpoint.safetensors: Configuration '2d' .*choose one of {NAME}"):
        Checkpoint.load(path)


def test_weights_that_do_not_fit_the_plan_are_refused(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    weights = dict(checkpoint.weights)
    weights.pop(next(iter(weights)))
    Checkpoint(checkpoint.plan, NAME, "0", weights).save(path)
    with pytest.raises(CheckpointError, match="the weights do not fit the network of its plan; train anew"):
        Checkpoint.load(path)


def test_tensors_keep_their_values_whatever_their_layout(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"format": "test", "note": "µm"})
    loaded, header = load_tensors(tmp_path / "a.safetensors", "test")
    assert header["note"] == "µm"
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_disk_without_room_is_named_and_the_file_before_stays(saved: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = saved
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond: writing fails half-way
    try:
        with pytest.raises(StorageError, match=f"{path}: cannot be written"):
            checkpoint.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_header_is_json_that_other_tools_can_read(saved: tuple[Checkpoint, Path]) -> None:
    _, path = saved
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["autoseg"])
    assert header["format"] == FORMAT
    assert header["plan"]["dataset"] == "Dataset001_Tiny"
