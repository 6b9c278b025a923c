"""A run on a Ray cluster: the same bytes as on this machine, nodes that are lost, what is refused."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason='needs ray: pip install "autoseg[ray]"')

from ray_tasks import double, refuse, wait_for_go  # noqa: E402
from test_pipeline import two_candidates, two_folds  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import autoseg.experiment_planning.planner as planner  # noqa: E402
from autoseg import cluster  # noqa: E402
from autoseg.checkpoint import load_tensors  # noqa: E402
from autoseg.cli import app  # noqa: E402
from autoseg.cluster import RayExecutor  # noqa: E402
from autoseg.errors import DatasetError, PlanError  # noqa: E402
from autoseg.executor import Files, Needs, executor_of  # noqa: E402
from autoseg.inference.predictor import load_model  # noqa: E402
from autoseg.inference.run import ModelSource, predict_files  # noqa: E402
from autoseg.pipeline import run  # noqa: E402
from autoseg.training.loop import RESUME_FORMAT  # noqa: E402
from autoseg.workspace import HISTORY, RESUME, Workspace  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24  # of each fold: long enough to lose a node in the midst of it
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "memory": 8 * 10**9, "include_dashboard": False}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with a core each, on this machine."""
    from ray.cluster_utils import Cluster

    told = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), *sys.path)))}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    made = Cluster(initialize_head=True, head_node_args=NODE)
    made.add_node(**NODE)
    yield made
    made.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def executor(two_nodes: Any) -> Iterator[RayExecutor]:
    """A driver of that cluster."""
    with executor_of(f"ray://{two_nodes.address}") as joined:
        assert isinstance(joined, RayExecutor)
        yield joined


def files(root: Path) -> Files:
    """Of the functions in `ray_tasks`: whatever lies in a folder of their own, beside the path that they are given."""
    return Files((root,), lambda path: [f"{path.parent}/*"], lambda path: [f"{path.with_suffix('')}.[ds]*"])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# ---- a whole run


def artefacts(place: Workspace) -> dict[str, Any]:
    """What must not depend on where it was made: stores, weights, held-out predictions."""
    made: dict[str, Any] = {}
    for path in sorted((*place.root.glob("preprocessed/*/*.b2nd"), *place.models.glob("*/*/validation/*.nii.gz"))):
        made[str(path.relative_to(place.root))] = path.read_bytes()
    for path in sorted(place.models.glob(f"*/*/{RESUME}")):
        tensors, _ = load_tensors(path, RESUME_FORMAT)
        made[str(path.relative_to(place.root))] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return made


@pytest.mark.timeout(900)  # three runs
def test_a_run_gives_the_same_bytes_wherever_it_is_done_and_whatever_is_lost(
    tiny_dataset: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    two_nodes: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tiny_dataset(cases=6)
    plan = two_candidates(root, STEPS)
    monkeypatch.setattr(planner, "plan_experiment", lambda *_, **__: plan)
    places = {name: Workspace(tmp_path / name / root.name) for name in ("local", "shared", "copied")}
    for name in places:
        two_folds(root, tmp_path / name)
    options: dict[str, Any] = {"steps": STEPS, "device": "cpu", "seed": 5}
    run(root, workspace=tmp_path / "local", workers=1, **options)
    expected = artefacts(places["local"])
    assert len([name for name in expected if name.endswith(RESUME)]) == 4

    with executor_of(f"ray://{two_nodes.address}") as shared:
        lost = two_nodes.add_node(**NODE)
        begun = [places["shared"].fold("3d_fullres", fold) / HISTORY for fold in "01"]

        def lose() -> None:
            wait_until(lambda: all(path.exists() for path in begun))
            for node in (lost, *two_nodes.worker_nodes - {lost}):
                two_nodes.remove_node(node, allow_graceful=False)

        thread = threading.Thread(target=lose)
        thread.start()
        with caplog.at_level(logging.WARNING):
            outcome = run(root, workspace=tmp_path / "shared", executor=shared, **options)
        thread.join()
        two_nodes.add_node(**NODE)
    assert outcome.finished and outcome.model.is_file()
    assert "3d_fullres, fold" in caplog.text and "its node was lost" in caplog.text
    assert artefacts(places["shared"]) == expected

    with executor_of(f"ray://{two_nodes.address}") as joined:
        assert isinstance(joined, RayExecutor)
        copying = RayExecutor(joined.ray, copies=True)
        run(root, workspace=tmp_path / "copied", executor=copying, **options)
        assert artefacts(places["copied"]) == expected

        source = ModelSource(outcome.model, "cpu")
        model = load_model(outcome.model, "cpu")
        predict_files(model, root / "imagesTr", tmp_path / "here")
        for name, where in (("there", joined), ("elsewhere", copying)):
            there = predict_files(model, root / "imagesTr", tmp_path / name, executor=where, source=source)
            assert len(there.done) == 6 and not there.failed
            for path in (tmp_path / "here").iterdir():
                assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()
        remains = [
            path
            for path in Path("/tmp").glob("autoseg_*")
            if joined.ray.get_runtime_context().get_job_id() in path.name
        ]
        assert remains
    assert not any(path.exists() for path in remains)


# ---- tasks


def test_tasks_of_a_lost_node_are_done_again_elsewhere(
    two_nodes: Any, executor: RayExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = two_nodes.add_node(**NODE)
    paths = [tmp_path / name for name in "abc"]

    def lose() -> None:
        wait_until(lambda: all(path.exists() for path in paths))
        two_nodes.remove_node(extra, allow_graceful=False)
        wait_until(lambda: "its node was lost" in caplog.text)
        (tmp_path / "go").touch()

    thread = threading.Thread(target=lose)
    thread.start()
    with caplog.at_level(logging.WARNING):
        results = dict(executor.map(wait_for_go, paths, names="abc", needs=Needs(), files=files(tmp_path)))
    thread.join()
    assert extra.node_id not in results.values() and sorted(results) == [0, 1, 2]
    tried = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert sorted(tried.values()) == [1, 1, 2]


def test_an_error_of_a_task_is_not_tried_again(executor: RayExecutor, tmp_path: Path) -> None:
    ((index, result),) = executor.map(refuse, [tmp_path / "a"], names=["a"], needs=Needs(), files=files(tmp_path))
    assert index == 0 and isinstance(result, DatasetError) and str(result) == "a is broken."
    assert (tmp_path / "a").read_text() == "tried\n"


def test_copies_come_back_with_their_times_and_what_was_removed_is_gone(executor: RayExecutor, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 10)
    (tmp_path / "a.stale").touch()
    copying = RayExecutor(executor.ray, copies=True)
    ((_, made),) = copying.map(double, [tmp_path / "a.txt"], names=["a"], needs=Needs(), files=files(tmp_path))
    assert made == tmp_path / "a.doubled" and made.read_text() == "x" * 20
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "a.doubled"}
    (there,) = Path("/tmp").glob(f"autoseg_{ray.get_runtime_context().get_job_id()}_*")
    copied = next(there.rglob("a.doubled"))
    assert copied != made and copied.stat().st_mtime_ns == made.stat().st_mtime_ns


def test_as_many_are_done_at_once_as_the_nodes_have_room_for(executor: RayExecutor) -> None:
    assert executor.places("auto", Needs()) == ("cpu", "cpu")
    assert executor.places("auto", Needs(cores=16)) == ("cpu", "cpu")  # not more than a node has
    assert executor.places("auto", Needs(memory_bytes=10**9)) == ("cpu", "cpu")
    with pytest.raises(PlanError, match="no node has 1 cores, 1 GPUs; the most that one has is 1 cores"):
        executor.places("cuda", Needs(gpus=1))
    with pytest.raises(PlanError, match="no node has 1 cores, 9 GB of memory; the most that one has is"):
        executor.places("auto", Needs(memory_bytes=9 * 10**9))


# ---- what is refused


@pytest.mark.parametrize(("variable", "address"), [(None, "local"), ("auto", "auto")])
def test_without_an_address_that_of_the_environment_is_joined_or_a_cluster_started(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, address: str
) -> None:
    joined: list[str] = []

    def init(where: str, **_: object) -> None:
        joined.append(where)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(PlanError, match=r"cannot be joined \(nobody there\)"), executor_of("ray"):
        pass
    assert joined == [address], "Ray would wait for a cluster of this machine that was killed"


def test_another_version_on_a_node_is_refused(two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "__version__", "9.9")
    with (
        pytest.raises(PlanError, match=r"node .* has autoseg .* \(here 9.9\)"),
        executor_of(f"ray://{two_nodes.address}"),
    ):
        pass
    assert not ray.is_initialized()


def test_an_address_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    done = CliRunner().invoke(app, ["run", str(tmp_path), "--executor", "ray://127.0.0.1:1"])
    assert done.exit_code == 2 and "ray://127.0.0.1:1: nothing answers there" in done.output


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ray://:6379", "expected ray://HOST:PORT"),
        ("ray://host:port", "expected ray://HOST:PORT"),
        ("local://host", "--executor local takes no address"),
        ("rays", "--executor 'rays' is not known; choose one of local, ray. Did you mean 'ray'?"),
    ],
)
def test_what_is_no_executor_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(PlanError) as refused, executor_of(text):
        pass
    assert sentence in str(refused.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r'needs ray, which is not installed; run `pip install "autoseg\[ray\]"`'):
        RayExecutor.connect("127.0.0.1:1")


def test_tasks_that_no_node_can_hold_any_more_wait_and_say_so(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RayExecutor, "_wanted", lambda *_: {"CPU": 64, "GPU": 0, "memory": 0})
    asked = itertools.count()
    results = executor.map(
        double,
        [tmp_path / "a", tmp_path / "b"],
        names=["a", "b"],
        needs=Needs(64),
        files=files(tmp_path),
        stop=lambda: next(asked) > 2,
    )
    assert not list(results)
    assert caplog.text.count("no node with 64 cores is left; 2 tasks wait until one joins the cluster") == 1
