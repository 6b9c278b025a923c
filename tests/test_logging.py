"""Rows of a training in TensorBoard and MLflow: those of history.csv, each step once, and only where it is asked."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_training import NAME, TWO_CLASSES, preprocessed, tiny_plan
from typer.testing import CliRunner

import autoseg.extras as extras
from autoseg import pipeline
from autoseg.agenda import commands
from autoseg.cli import app
from autoseg.errors import PlanError, StorageError
from autoseg.training.history import History, Row
from autoseg.training.loggers import LOGGERS, LoggedTraining, Logs, asked_logs, open_loggers, require_reachable
from autoseg.training.loop import TrainedFold, train_fold
from autoseg.workspace import HISTORY, Workspace

# MLflow's and TensorBoard's own: what they use is deprecated, and MLflow leaves its database to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]

ROOT = Path(__file__).resolve().parents[1]
STRUCTURES = ("ball", "core + rim")
ROWS = [
    Row(10, 1.5, 0.25, 3e-3, 0.5, 0.7, (0.8, 0.6)),
    Row(20, 3.0, 0.5, 3e-3, -0.25, None, (None, None)),
    Row(40, 6.25, 1.0, 0.0, -0.75, 0.9, (0.9, None)),
]

Scalars = dict[str, list[tuple[int, float]]]

installed = {
    name: pytest.mark.skipif(
        any(find_spec(module) is None for module in extras.EXTRAS[name]),
        reason=f"needs the extra {name}",
    )
    for name in LOGGERS
}
each = pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in installed.items()])


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MLflow without runs: making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    if find_spec("mlflow") is not None:
        open_loggers(["mlflow"], training(folder, dataset="another"), [])
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _store_is_made(empty_store: Path, tmp_path: Path) -> None:
    if empty_store.exists():
        shutil.copy(empty_store, tmp_path)


def training(folder: Path, **changes: Any) -> LoggedTraining:
    described = {
        "folder": folder / "models" / NAME / "fold_0",
        "workspace": folder,
        "dataset": "Dataset001_Tiny",
        "name": f"{NAME}, fold 0",
        "structures": STRUCTURES,
        "resumed": False,
        "settings": {"plan": "abc", "seed": 3},
    }
    return LoggedTraining(**{**described, **changes})


def read_tensorboard(folder: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("*tfevents*")
    events = EventAccumulator(str(file.parent), purge_orphaned_data=False)  # what is there, not what is shown
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_runs(folder: Path, uri: str | None = None) -> tuple[Any, list[Any]]:
    """A client, and the runs of the experiment, the newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("Dataset001_Tiny")
    return client, list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]))


def read_mlflow(folder: Path) -> Scalars:
    client, (run, *_) = mlflow_runs(folder)
    return {
        key: [(one.step, one.value) for one in sorted(client.get_metric_history(run.info.run_id, key), key=by_step)]
        for key in run.data.metrics
    }


def by_step(metric: Any) -> int:
    return int(metric.step)


READ: dict[str, Callable[[Path], Scalars]] = {"tensorboard": read_tensorboard, "mlflow": read_mlflow}


def steps(scalars: Scalars) -> list[int]:
    return [step for step, _ in scalars["loss"]]


@each
def test_every_value_of_every_row_comes_back(tmp_path: Path, name: str) -> None:
    (logger,) = open_loggers([name], training(tmp_path), [])
    for row in ROWS:
        logger(row)
    found = READ[name](tmp_path)
    rim = "dice/core + rim" if name == "tensorboard" else "dice/core _ rim"  # MLflow takes no plus in names
    assert set(found) == {"loss", "learning_rate", "dice/mean", "dice/ball", rim}
    assert found["loss"] == [(10, 0.5), (20, -0.25), (40, -0.75)]
    assert [step for step, _ in found["dice/mean"]] == [10, 40] and [step for step, _ in found[rim]] == [10]
    assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), b in zip(found["dice/ball"], (0.8, 0.9), strict=True))


@each
def test_a_training_that_goes_on_writes_no_step_twice(tmp_path: Path, name: str) -> None:
    (logger,) = open_loggers([name], training(tmp_path), [])
    logger(ROWS[0])
    logger(ROWS[1])
    (again,) = open_loggers([name], training(tmp_path, resumed=True), ROWS[:2])
    again(ROWS[2])
    assert steps(READ[name](tmp_path)) == [10, 20, 40]


@each
def test_what_a_killed_training_wrote_beyond_its_last_save_is_not_taken_for_the_one_that_goes_on(
    tmp_path: Path, name: str
) -> None:
    (logger,) = open_loggers([name], training(tmp_path), [])
    logger(ROWS[0])
    logger(ROWS[1])
    (again,) = open_loggers([name], training(tmp_path, resumed=True), ROWS[:1])  # the second row came after the save
    again(Row(25, 3.5, 0.6, 3e-3, 0.125, None, (None, None)))
    assert READ[name](tmp_path)["loss"] == [(10, 0.5), (25, 0.125)]


@each
def test_rows_from_before_the_log_was_asked_for_are_written_too(tmp_path: Path, name: str) -> None:
    (logger,) = open_loggers([name], training(tmp_path, resumed=True), ROWS[:2])
    logger(ROWS[2])
    assert steps(READ[name](tmp_path)) == [10, 20, 40]


@installed["mlflow"]
def test_a_run_of_mlflow_is_one_training_and_says_how_it_ended(tmp_path: Path) -> None:
    (first,) = open_loggers(["mlflow"], training(tmp_path), [])
    first(ROWS[0])
    (second,) = open_loggers(["mlflow"], training(tmp_path), [])  # begun anew
    for row in ROWS:
        second(row)
    open_loggers(["mlflow"], training(tmp_path, name="2d, fold 1"), [])[0](ROWS[0])
    _, runs = mlflow_runs(tmp_path)
    assert [(run.info.run_name, run.info.status) for run in runs] == [
        ("2d, fold 1", "RUNNING"),
        (f"{NAME}, fold 0", "FINISHED"),
        (f"{NAME}, fold 0", "KILLED"),
    ]
    assert runs[0].data.params == {"plan": "abc", "seed": "3"}


@installed["mlflow"]
def test_another_store_of_mlflow_is_used_where_it_is_named(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    open_loggers(["mlflow"], training(tmp_path, mlflow_uri=uri), ROWS)
    assert len(mlflow_runs(tmp_path, uri)[1]) == 1
    with pytest.raises(AttributeError):  # no experiment in the store of the workspace
        mlflow_runs(tmp_path)
    broken = training(tmp_path, mlflow_uri=f"sqlite:///{tmp_path / 'no' / 'folder' / 'x.db'}")
    (tmp_path / "no").write_text("a file")
    with pytest.raises(StorageError, match="MLflow cannot log here .*; choose another place with --mlflow-uri"):
        open_loggers(["mlflow"], broken, [])


def test_a_log_that_fails_says_so_once_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[int] = []

    def full(row: Row) -> None:
        if row.step > 10:
            raise OSError("No space left on device")
        written.append(row.step)

    monkeypatch.setitem(LOGGERS, "full", lambda training, rows: full)
    history = History(tmp_path / HISTORY, STRUCTURES)
    history.loggers = open_loggers(["full"], training(tmp_path), [])
    with caplog.at_level(logging.WARNING):
        for row in ROWS:
            history.append(row)
    assert written == [10] and len(history.rows) == 3
    assert len(caplog.records) == 1 and "No space left on device; history.csv has every row" in caplog.text


@each
def test_a_training_logs_the_rows_of_its_history_across_a_stop(
    tiny_dataset: Callable[..., Path], empty_store: Path, tmp_path: Path, name: str
) -> None:
    plan = tiny_plan()
    place: Workspace = preprocessed(tiny_dataset(cases=5), plan, tmp_path / "ws")
    if name == "mlflow":
        shutil.copy(empty_store, place.root)

    def train(**options: Any) -> None:
        train_fold(plan, NAME, "0", workspace=place, device="cpu", workers=0, steps=4, logs=Logs((name,)), **options)

    asked = iter([False, False, True])
    train(stop=lambda: next(asked))
    train(resume=True)
    history = History(place.fold(NAME, "0") / HISTORY, TWO_CLASSES.names)
    history.load(until_step=100)
    logged = READ[name](place.root)
    assert steps(logged) == [row.step for row in history.rows] == [1, 2, 3, 4]
    for (_, loss), row in zip(logged["loss"], history.rows, strict=True):
        assert loss == pytest.approx(row.loss, abs=1e-4)


def test_unknown_logs_and_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="Log 'tensorbord' is not known; .* Did you mean 'tensorboard'"):
        asked_logs(["tensorbord"])
    monkeypatch.setitem(extras.EXTRAS, "tensorboard", ("no_such_board",))
    with pytest.raises(PlanError, match=r"--log tensorboard needs no_such_board, which is not installed; .*\[tensorb"):
        asked_logs(["tensorboard"])
    with pytest.raises(PlanError, match="add --log mlflow"):
        asked_logs([], mlflow_uri="http://localhost:5000")
    assert asked_logs([]) == Logs()


@pytest.mark.parametrize("command", [["train-fold", "NOWHERE", NAME, "0"], ["run", "NOWHERE"]])
def test_the_commands_refuse_an_unknown_log_before_any_work(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--log", "nowhere"], prog_name="autoseg")
    assert result.exit_code == 2 and "Log 'nowhere' is not known; choose one of mlflow, tensorboard" in result.stderr


def test_a_run_hands_its_logs_on_to_every_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Logs] = []

    def train(*fold: Any, logs: Logs, **options: Any) -> TrainedFold:
        handed.append(logs)
        return TrainedFold(tmp_path, 0, 0.0, finished=False)

    monkeypatch.setattr(pipeline, "train", train)
    tiny_plan().save(Workspace(tmp_path).plan)
    logs = Logs(("mlflow",), "http://localhost:5000")
    pipeline.run_job(pipeline.Job(tmp_path, tmp_path, NAME, "0", steps=1, logs=logs))
    assert handed == [logs]
    nothing: Any = SimpleNamespace(steps=None, contenders=(), configurations=(), asked=(), names=())
    printed = commands(nothing, tmp_path, None, device="auto", seed=0, logs=logs)
    assert printed[-1] == f"autoseg run {tmp_path} --log mlflow --mlflow-uri http://localhost:5000"


def test_without_the_option_neither_package_is_imported() -> None:
    script = (
        "import sys, autoseg.cli, autoseg.pipeline, autoseg.training.loop, autoseg.training.loggers as loggers\n"
        "assert loggers.asked_logs([]) == loggers.NO_LOGS and loggers.open_loggers((), None, []) == []\n"
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {module.split(".")[0] for module in run.stdout.split()}
    assert "torch" in loaded and not loaded & {"tensorboard", "mlflow", "sqlalchemy"}


@each
def test_nothing_leaves_the_machine(tmp_path: Path, name: str) -> None:
    script = (
        "import socket, sys, time\n"
        "sent = []\n"
        "def refuse(*where): sent.append(where); raise OSError('no network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from test_logging import ROWS, training\n"
        "from autoseg.training.loggers import open_loggers\n"
        f"(logger,) = open_loggers(['{name}'], training(Path('.')), [])\n"
        "for row in ROWS: logger(row)\n"
        "time.sleep(0.5)\n"  # statistics would be sent by a thread
        "assert not sent, sent\n"
    )
    tells = {"CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "DO_NOT_TRACK"}  # MLflow keeps silent where it is tested
    environment = {key: value for key, value in os.environ.items() if key not in tells}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stdout


def test_several_machines_write_no_file_of_mlflow():
    require_reachable(Logs(("mlflow",)), 1)
    require_reachable(Logs(("tensorboard",)), 3)
    for uri in ("http://10.0.0.1:5000", "postgresql://user@10.0.0.1/mlflow"):
        require_reachable(Logs(("mlflow",), uri), 3)
    for uri in (None, "sqlite:////disk/mlflow.db", "/disk/mlflow.db"):
        with pytest.raises(PlanError, match=r"3 machines cannot write one file, .*mlflow\.db; start `mlflow server`"):
            require_reachable(Logs(("mlflow",), uri), 3)
