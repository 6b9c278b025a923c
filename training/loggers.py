"""Rows of a training's history -> TensorBoard's event file or a run of MLflow, where that is asked for.

Both repeat `history.csv`: what a training that goes on had written already is not written twice. Their packages are
imported only here and only when asked for, and nothing leaves the machine unless the address of a server is given.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoseg.errors import PlanError, StorageError, unknown_choice
from autoseg.extras import require_extra
from autoseg.files import atomic_path
from autoseg.training.history import Row

log = logging.getLogger(__name__)

EVENTS = "events.out.tfevents.autoseg"  # TensorBoard looks for files with "tfevents" in their names
MLFLOW_STORE = "mlflow.db"
NOT_A_NAME = re.compile(r"[^\w .:/-]")  # what MLflow takes in no name of a metric

Logger = Callable[[Row], None]


@dataclass(frozen=True)
class Logs:
    """Where the rows of a training go besides history.csv."""

    names: tuple[str, ...] = ()
    """Keys of LOGGERS."""
    mlflow_uri: str | None = None
    """MLflow's tracking store or server; None: a file `mlflow.db` in the workspace."""


NO_LOGS = Logs()


@dataclass(frozen=True)
class LoggedTraining:
    """What a logger is told besides the rows."""

    folder: Path
    """Of the fold."""
    workspace: Path
    dataset: str
    name: str
    """Of the training: "3d_fullres, fold 0"."""
    structures: tuple[str, ...]
    resumed: bool
    """Whether it goes on where an earlier one stopped."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was begun with: plan, seed, recipe, ..."""
    mlflow_uri: str | None = None


def asked_logs(names: Sequence[str], mlflow_uri: str | None = None) -> Logs:
    """What a user asked for, checked. Raises PlanError for an unknown name, and where a package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise PlanError(unknown_choice("Log", name, LOGGERS))
        require_extra(name, wanted_by=f"--log {name}")
    if mlflow_uri is not None and "mlflow" not in names:
        raise PlanError("--mlflow-uri says where MLflow's store is, but MLflow was not asked for; add --log mlflow.")
    return Logs(tuple(dict.fromkeys(names)), mlflow_uri)


def require_reachable(logs: Logs, machines: int) -> None:
    """Raises PlanError where several machines would write MLflow's store into a file, which only one can."""
    uri = logs.mlflow_uri or ""
    file = "://" not in uri or uri.startswith(("sqlite:", "file:"))
    if machines > 1 and "mlflow" in logs.names and file:
        raise PlanError(
            f"--log mlflow: {machines} machines cannot write one file, {logs.mlflow_uri or MLFLOW_STORE}; start "
            "`mlflow server` on one of them and give its address, such as --mlflow-uri http://10.0.0.1:5000."
        )


def open_loggers(names: Sequence[str], training: LoggedTraining, rows: Sequence[Row]) -> list[Logger]:
    """A function of a row for each name of LOGGERS; `rows` are those that a training that goes on has already.

    One that fails later says so once and is left out: history.csv has every row. Raises StorageError where one cannot
    be opened.
    """
    return [_dispensable(name, LOGGERS[name](training, rows)) for name in names]


def _dispensable(name: str, logger: Logger) -> Logger:
    """The logger, but for its errors: a training of hours does not end because a log cannot be written."""
    failed = False

    def guarded(row: Row) -> None:
        nonlocal failed
        if failed:
            return
        try:
            logger(row)
        except Exception as error:
            failed = True
            log.warning("The log to %s ends here: %s; history.csv has every row.", name, _first_line(error))

    return guarded


def _values(row: Row, structures: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Names and values of what a row measures."""
    yield "loss", row.loss
    yield "learning_rate", row.learning_rate
    for name, value in zip(("mean", *structures), (row.dice, *row.dice_by_class), strict=True):
        if value is not None:
            yield f"dice/{name}", value


def _tensorboard(training: LoggedTraining, rows: Sequence[Row]) -> Logger:
    """Rows to an event file in `tensorboard/` of the fold's folder, which is begun anew with `rows`."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    path = training.folder / "tensorboard" / EVENTS
    began = time.time() - (rows[-1].seconds if rows else 0.0)  # so that TensorBoard shows the time of training

    def events(row: Row) -> Iterator[Event]:
        for tag, value in _values(row, training.structures):
            scalar = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            yield Event(wall_time=began + row.seconds, step=row.step, summary=scalar)

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for row in rows:
            for event in events(row):
                writer.write(event.SerializeToString())

    def append(row: Row) -> None:
        with open(path, "ab") as file:
            for event in events(row):
                RecordWriter(file).write(event.SerializeToString())

    return append


def _mlflow(training: LoggedTraining, rows: Sequence[Row]) -> Logger:
    """Rows to a run of the experiment named as the dataset; a training that goes on goes on in its run."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY
    from mlflow.exceptions import MlflowException
    from mlflow.telemetry import set_telemetry_client

    MLFLOW_DISABLE_TELEMETRY.set("true")  # else MLflow tells its makers what it is used for
    set_telemetry_client()
    for talkative in ("alembic", "mlflow.store"):  # they tell every step of making a database
        logging.getLogger(talkative).setLevel(logging.WARNING)
    uri = training.mlflow_uri or f"sqlite:///{(training.workspace / MLFLOW_STORE).resolve().as_posix()}"
    tag = f"{training.settings.get('plan')} {training.name}"
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(training.dataset)
        experiment = found.experiment_id if found else client.create_experiment(training.dataset)
        newest = ["attributes.start_time DESC"]
        earlier = client.search_runs([experiment], f"tags.autoseg = '{tag}'", order_by=newest, max_results=1)
        run = next(iter(earlier), None)
        steps = {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")} if run else set()
        if run is None or not training.resumed or not steps <= {row.step for row in rows}:
            # what a run holds cannot be cut back, as history.csv is: another one begins
            if run is not None and run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
            run, steps = client.create_run(experiment, run_name=training.name, tags={"autoseg": tag}), set()
            params = [Param(key, str(value)) for key, value in training.settings.items()]
            client.log_batch(run.info.run_id, params=params)
        identifier, began = run.info.run_id, run.info.start_time

        def append(row: Row) -> None:
            metrics = [
                Metric(NOT_A_NAME.sub("_", name), value, began + round(1000 * row.seconds), row.step)
                for name, value in _values(row, training.structures)
            ]
            client.log_batch(identifier, metrics=metrics)
            if row.progress >= 1:
                client.set_terminated(identifier)

        for row in rows:
            if row.step not in steps:
                append(row)
    except (MlflowException, OSError) as error:
        raise StorageError(
            f"{uri}: MLflow cannot log here ({_first_line(error)}); choose another place with --mlflow-uri."
        ) from error
    return append


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


LOGGERS: dict[str, Callable[[LoggedTraining, Sequence[Row]], Logger]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}
