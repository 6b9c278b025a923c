"""A preprocessed store and a plan -> the checkpoint of one fold. One loop for every topology, budget and device."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.checkpoint import Checkpoint, load_tensors, read_header, save_tensors
from autoseg.device import autocast_dtype, peak_memory_bytes, resolve_device
from autoseg.errors import CheckpointError, PlanError, StorageError, unknown_choice
from autoseg.labels import Labels
from autoseg.plan import Configuration, Plan
from autoseg.preprocessing.degradation import fine_cases, is_thick
from autoseg.preprocessing.store import Store
from autoseg.training.batches import Batch, Samples, batches, collate, default_workers
from autoseg.training.distributed import ALONE, World
from autoseg.training.folds import ALL, load_or_make_folds, select_fold
from autoseg.training.history import History, Row, draw_curve
from autoseg.training.loggers import NO_LOGS, LoggedTraining, Logs, open_loggers
from autoseg.training.schedule import in_decay, learning_rate_factor
from autoseg.training.settings import (
    HISTORY_ROWS,
    MOST_UNSAVED_SECONDS,
    RECIPES,
    SAVE_SECONDS,
    SAVE_SHARE,
    SLOW_SHARE,
    VALIDATION_BYTES,
    VALIDATION_PATCHES,
    VALIDATION_SHARE,
)
from autoseg.training.step import TrainingState, build_training, training_step
from autoseg.workspace import CHECKPOINT, CURVE, HISTORY, RESUME, Workspace

logger = logging.getLogger(__name__)

RESUME_FORMAT = "autoseg training 1"
MOST_SEEDS = 2**63  # torch takes no larger one
VALIDATION_SEED = 1  # added to the seed for the held-out patches of the online Dice


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows."""

    step: int
    steps: int | None
    """Steps in all, or None where only time limits the training."""
    fraction: float
    """0 to 1."""
    seconds: float
    """Training time so far."""
    seconds_left: float
    """Forecast from the pace so far."""
    loss: float
    dice: float | None
    """The last online Dice on held-out patches."""


@dataclass(frozen=True)
class Limits:
    """When a training ends: after `steps`, after `seconds`, or at whichever comes first."""

    steps: int | None
    seconds: float | None

    def progress(self, step: int, elapsed: float) -> float:
        """0 at the start, 1 at the end."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_step, by_time))


@dataclass(frozen=True)
class TrainedFold:
    """What came of a training."""

    checkpoint: Path
    steps: int
    seconds: float
    finished: bool
    """False where a stop signal ended it before its budget did."""


@dataclass(frozen=True)
class Standing:
    """Where a training stands, as `resume.safetensors` says."""

    plan: str
    """Id of the plan."""
    limits: Limits
    """The budget that it has."""
    seconds: float
    """That it has trained."""
    finished: bool
    """Whether it came to the end of that budget."""
    cases: str
    """`Fold.id` of the cases that it trains on."""
    steps: int = 0
    """Optimiser steps that it has taken."""
    seed: int = 0


def read_standing(folder: Path) -> Standing | None:
    """Where the training of a fold's folder stands; None where there is none. Raises CheckpointError."""
    path = folder / RESUME
    if not path.exists():
        return None
    header = read_header(path, RESUME_FORMAT)
    limits = Limits(header["limits"]["steps"], header["limits"]["seconds"])
    finished, steps = bool(header.get("finished")), int(header.get("steps", 0))
    seed = int(header.get("seed", 0))
    return Standing(header["plan"], limits, float(header["elapsed"]), finished, header["cases"], steps, seed)


def train_fold(
    plan: Plan,
    configuration: str,
    fold: str,
    *,
    workspace: Workspace,
    device: str = "auto",
    seconds: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int | None = None,
    recipe: str | None = None,
    previous: Path | None = None,
    world: World = ALONE,
    clock: Callable[[], float] = time.monotonic,
    logs: Logs = NO_LOGS,
    on_step: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainedFold:
    """Train one fold within `seconds` and/or `steps` and write its folder.

    Without either, the plan says how long or, with `resume`, the budget of the earlier run holds.

    `previous` is a store with the previous stage's labels (cascade). `stop` is asked after each step; when it says
    yes the training ends with a valid checkpoint and can be resumed. `resume` goes on where an earlier run stopped.
    `workers` processes prepare the patches (0: a thread; default: by the number of cores); it changes no result. The
    processes of `world` train together, each on a batch of the plan; the first writes the folder. `logs` are told of
    every row of history.csv.
    Raises PlanError, CheckpointError, StorageError, WorkerError.
    """
    settings = plan.configuration(configuration)
    folder = workspace.fold(configuration, fold)
    limits = _limits(settings, seconds=seconds, steps=steps)
    torch_device = world.device(resolve_device(device))
    recipe_name = recipe or settings.training.recipe
    if recipe_name not in RECIPES:
        raise PlanError(unknown_choice("Recipe", recipe_name, RECIPES))
    if not 0 <= seed < MOST_SEEDS:
        raise PlanError(f"The seed must be 0 or more and below 2 to the power of 63, got {seed}.")

    store = Store(workspace.store(settings.preprocessing))
    cases = store.cases()
    if not cases:
        raise StorageError(f"{store.folder}: no preprocessed case is there; run `autoseg plan-and-preprocess` first.")
    # one case alone cannot be held out, but trained on
    split = select_fold([] if fold == ALL else load_or_make_folds(workspace.folds, cases), fold, cases)
    store.require_whole((*split.train, *split.validation))
    earlier = _previous_stage(settings, previous, (*split.train, *split.validation))
    together = replace(settings, batch_size=settings.batch_size * world.size)
    shown = fine_cases(store, split.train, settings)
    watched = [case for case in split.validation if not is_thick(store.entry(case), settings)]
    training = Samples(store, shown, together, plan.labels, seed=seed, previous=earlier)
    held_out = Samples(
        store, watched or shown, together, plan.labels,
        seed=seed + VALIDATION_SEED, augment=False, previous=earlier,
    )  # fmt: skip

    torch.manual_seed(seed)
    state = build_training(
        settings.architecture, plan.labels, RECIPES[recipe_name], torch_device, configuration=settings, world=world
    )
    identity = {"plan": plan.id, "configuration": configuration, "fold": fold, "seed": seed, "recipe": recipe_name}
    identity["cases"] = split.id
    identity["processes"] = world.size
    run = _Run(plan, settings, fold, folder, limits, state, identity)
    run.begin(resume=resume, same_limits=seconds is None and steps is None)
    if world.first:
        run.log(logs, workspace.root, resumed=resume)
    online = OnlineDice(held_out, plan.labels, device=torch_device, batch_size=settings.batch_size, world=world)
    return _optimise(
        run,
        training,
        online,
        device=torch_device,
        workers=default_workers(world.local_size) if workers is None else workers,
        clock=world.agreed(clock),
        on_step=on_step,
        stop=world.agreed(stop),
    )


def _previous_stage(settings: Configuration, folder: Path | None, cases: Sequence[str]) -> Store | None:
    """The store of the previous stage's labels, with all of `cases`; None where there is no previous stage."""
    if folder is None and settings.previous_stage is None:
        return None
    if folder is None:
        raise PlanError(f"Configuration {settings.name} needs the predictions of {settings.previous_stage}.")
    if settings.previous_stage is None:
        raise PlanError(f"Configuration {settings.name} has no previous stage; leave out the predictions in {folder}.")
    store = Store(folder)
    missing = [case for case in cases if not store.has(case)]
    if missing:
        raise PlanError(
            f"{folder}: the predictions of {settings.previous_stage} are missing for {', '.join(missing[:5])} "
            f"({len(missing)} of {len(cases)} cases); train and validate all of its folds."
        )
    return store


def _optimise(
    run: _Run,
    samples: Samples,
    online: OnlineDice,
    *,
    device: torch.device,
    workers: int,
    clock: Callable[[], float],
    on_step: Callable[[Progress], None] | None,
    stop: Callable[[], bool],
) -> TrainedFold:
    """The linear story: until the budget is spent, take a batch, take a step, note it, save now and then."""
    state, limits, precision = run.state, run.limits, autocast_dtype(device)
    size = run.settings.batch_size
    began = clock() - run.elapsed
    losses: list[Tensor] = []
    dice: float | None = None
    validating = 0.0
    progress = limits.progress(state.step, run.elapsed)
    next_row = _next_row(progress)
    last_save, last_saved_progress = run.elapsed, progress
    stream = batches(
        samples, batch_size=size, first_index=state.world.rank * size, first_step=state.step, workers=workers
    )
    with contextlib.closing(stream):  # type: ignore[type-var]
        while progress < 1.0 and not stop():
            if in_decay(state.recipe.schedule, progress):
                run.keep_plateau()
            batch = next(stream)
            rate = state.recipe.learning_rate * learning_rate_factor(state.recipe.schedule, progress)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            losses.append(training_step(state, batch.to(device), precision=precision))
            run.elapsed = clock() - began
            progress = limits.progress(state.step, run.elapsed)

            if progress >= next_row or progress >= 1.0:
                next_row = _next_row(progress)
                loss = float(state.world.mean(torch.stack(losses).mean()))
                losses.clear()
                if not math.isfinite(loss):
                    raise run.diverged(f"the loss became {loss}")
                by_class: tuple[float | None, ...] = (None,) * len(run.plan.labels.names)
                if validating <= VALIDATION_SHARE * run.elapsed or progress >= 1.0:
                    start = clock()
                    by_class = online(state, precision=precision)
                    validating += clock() - start
                    dice = _mean(by_class)
                run.history.append(Row(state.step, run.elapsed, progress, rate, loss, _mean(by_class), by_class))
            unsaved = run.elapsed - last_save
            due = unsaved >= SAVE_SECONDS and progress - last_saved_progress >= SAVE_SHARE
            if due or unsaved >= MOST_UNSAVED_SECONDS:
                run.save()
                last_save, last_saved_progress = run.elapsed, progress
            if on_step is not None:
                left = run.elapsed * (1 - progress) / progress if progress > 0 else 0.0
                shown = run.history.rows[-1].loss if run.history.rows else float(losses[-1])
                on_step(Progress(state.step, limits.steps, progress, run.elapsed, left, shown, dice))
    run.finish()
    planned = run.settings.training
    if limits.seconds and planned.seconds and planned.steps and progress >= 1.0:
        expected = planned.steps * limits.seconds / planned.seconds
        if state.step < SLOW_SHARE * expected:
            logger.warning(
                "%s: %d steps were taken where about %d were forecast: the machine is slower than when it was planned, "
                "or busy; expect a weaker model, or train longer.", run.folder, state.step, expected,
            )  # fmt: skip
    return TrainedFold(run.folder / CHECKPOINT, state.step, run.elapsed, finished=progress >= 1.0)


def _next_row(progress: float) -> float:
    """The progress at which the next row of the history is due: the same whether a training was resumed or not."""
    return (math.floor(progress * HISTORY_ROWS) + 1) / HISTORY_ROWS


def _mean(values: tuple[float | None, ...]) -> float | None:
    seen = [value for value in values if value is not None]
    return float(np.mean(seen)) if seen else None


def _limits(settings: Configuration, *, seconds: float | None, steps: int | None) -> Limits:
    """What the user asked for, else what the plan says."""
    if seconds is None and steps is None:
        seconds = settings.training.seconds or None
        steps = None if seconds else settings.training.steps or None
    given = [limit for limit in (seconds, steps) if limit is not None]
    if not given or min(given) <= 0:
        raise PlanError(
            f"Configuration {settings.name} needs a budget above zero: give --time or --steps, or plan a fold time."
        )
    return Limits(steps, seconds)


class OnlineDice:
    """Dice of the predicting network on a fixed set of held-out patches, on the output grid: a trend, not a score."""

    def __init__(
        self, samples: Samples, labels: Labels, *, device: torch.device, batch_size: int, world: World = ALONE
    ) -> None:
        self.labels, self.device, self.world = labels, device, world
        if not samples.configuration.architecture.output_channels:  # an image alone
            self.batches: list[Batch] = []
            return
        first = samples[0, 0]
        bytes_each = first.image.nbytes + first.label.nbytes
        count = max(1, min(VALIDATION_PATCHES, VALIDATION_BYTES // bytes_each))
        size = min(batch_size * world.size, count)
        own = [samples[i // size, i % size] for i in range(world.rank, count, world.size)]
        kept = [sample._replace(truth=None) for sample in own]
        self.batches = [collate(kept[i : i + batch_size]) for i in range(0, len(kept), batch_size)]

    @torch.inference_mode()
    def __call__(self, state: TrainingState, *, precision: torch.dtype | None) -> tuple[float | None, ...]:
        """Dice of each structure over the patches of all processes; None where neither shows it, or without logits."""
        network = state.predictor
        was_training = network.training
        network.eval()
        overlap, size = counts = np.zeros((2, len(self.labels.names)))
        for batch in self.batches:
            with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
                reference = None if batch.reference is None else batch.reference.to(self.device)
                finest = network(batch.image.to(self.device), batch.grid, reference)[0]
            logits = finest[:, : self.labels.output_channels].float().cpu()
            for i, (predicted, true) in enumerate(_masks(logits, batch.label.numpy(), self.labels)):
                overlap[i] += np.count_nonzero(predicted & true)
                size[i] += np.count_nonzero(predicted) + np.count_nonzero(true)
        network.train(was_training)
        overlap, size = self.world.sum(torch.from_numpy(counts)).numpy()
        return tuple(float(2 * o / s) if s else None for o, s in zip(overlap, size, strict=True))


def _masks(
    logits: Tensor, truth: NDArray[Any], labels: Labels
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Predicted and true mask of each structure, without the voxels of the ignore label."""
    valid = truth[:, 0] != labels.ignore if labels.ignore is not None else np.ones_like(truth[:, 0], bool)
    chosen = None if labels.has_regions else logits.argmax(1).numpy()
    for i, name in enumerate(labels.names):
        predicted = logits[:, i].numpy() > 0 if chosen is None else chosen == i + 1
        yield predicted & valid, labels.mask(truth[:, 0], name) & valid


@dataclass
class _Run:
    """A training and its files: where it stands, how it is saved and taken up again."""

    plan: Plan
    settings: Configuration
    fold: str
    folder: Path
    limits: Limits
    state: TrainingState
    identity: dict[str, Any]
    """What a resumed training must share with the one before."""
    elapsed: float = 0.0
    plateau: dict[str, Tensor] | None = None
    """The state before the decay of the learning rate, for a longer training to go on from."""
    plateau_elapsed: float = 0.0

    def __post_init__(self) -> None:
        self.history = History(self.folder / HISTORY, self.plan.labels.names, writes=self.state.world.first)

    def begin(self, *, resume: bool, same_limits: bool = False) -> None:
        """Start afresh, or take up `resume.safetensors`, with `same_limits` its budget too.

        Raises PlanError or CheckpointError where that is not what the user asked for.
        """
        path = self.folder / RESUME
        if path.exists() and not resume:
            raise PlanError(
                f"{self.folder}: a training of this fold is there already; add --continue to go on with it, "
                "or delete the folder to begin anew."
            )
        if resume and not path.exists():
            raise CheckpointError(f"{path}: there is no training to continue; leave out --continue to begin one.")
        if not resume:
            return
        tensors, header = load_tensors(path, RESUME_FORMAT)
        header.setdefault("processes", 1)  # of before there could be more
        for key, value in self.identity.items():
            if header.get(key) != value and key == "cases":
                raise CheckpointError(
                    f"{path}: this training had other cases than fold {self.fold} of the folds has now; restore the "
                    "file of folds, or delete the folder to begin anew."
                )
            if header.get(key) != value:
                raise CheckpointError(
                    f"{path}: this training had {key} {header.get(key)}, now it is {value}; "
                    "continue with the same, or delete the folder to begin anew."
                )
        before = header["limits"]
        if same_limits:
            self.limits = Limits(before["steps"], before["seconds"])
        now = {"steps": self.limits.steps, "seconds": self.limits.seconds}
        prefix, self.elapsed = "now/", float(header["elapsed"])
        decaying = any(name.startswith("plateau/") for name in tensors)
        if decaying and before != now:  # another budget: go on from before the decay
            prefix, self.elapsed = "plateau/", float(header["plateau_elapsed"])
        elif decaying:
            self.plateau = {n[len("plateau/") :]: t for n, t in tensors.items() if n.startswith("plateau/")}
            self.plateau_elapsed = float(header["plateau_elapsed"])
        chosen = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        try:
            _restore(self.state, chosen)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: it does not fit the network of the plan; begin anew.") from error
        if before != now and self.limits.progress(self.state.step, self.elapsed) >= 1.0:
            raise PlanError(
                f"{self.folder}: this training stands at step {self.state.step} after {self.elapsed:.0f} s of constant "
                "learning rate, so the budget is spent already; ask for more --time or --steps."
            )
        self.history.load(until_step=self.state.step)
        logger.info("%s: going on from step %d, %.0f s", self.folder, self.state.step, self.elapsed)

    def log(self, logs: Logs, workspace: Path, *, resumed: bool) -> None:
        """Tell `logs` of every row, too. Raises StorageError where one cannot be opened."""
        training = LoggedTraining(
            folder=self.folder,
            workspace=workspace,
            dataset=self.plan.dataset,
            name=f"{self.settings.name}, fold {self.fold}",
            structures=self.plan.labels.names,
            resumed=resumed,
            settings=self.identity,
            mlflow_uri=logs.mlflow_uri,
        )
        self.history.loggers = open_loggers(logs.names, training, self.history.rows)

    def keep_plateau(self) -> None:
        """Remember the state at the beginning of the decay (once)."""
        if self.plateau is None:
            # on the CPU: the device's memory is planned for one state only
            self.plateau = {name: tensor.to("cpu", copy=True) for name, tensor in _tensors(self.state).items()}
            self.plateau_elapsed = self.elapsed

    def diverged(self, how: str) -> PlanError:
        """The sentence for a training that cannot go on; what was saved before stays."""
        return PlanError(
            f"{self.folder}: the training diverged at or before step {self.state.step} ({how}); "
            "look for extreme intensities with `autoseg verify`, or choose another recipe."
        )

    def finish(self) -> None:
        """Write everything that a training ends with, last that it has ended; no process returns before it is there."""
        if self.state.world.first:
            self.history.write()
            draw_curve(
                self.history, self.folder / CURVE, title=f"{self.plan.dataset}: {self.settings.name}, fold {self.fold}"
            )
        self.save()
        self.state.world.wait()

    def save(self) -> None:
        """Write what to predict with, then what to go on from. Raises PlanError where the weights are not finite."""
        network = self.state.predictor
        summary = {
            "steps": self.state.step,
            "seconds": round(self.elapsed, 1),
            "finished": self.limits.progress(self.state.step, self.elapsed) >= 1.0,
            **{key: self.identity[key] for key in ("seed", "recipe")},
            "processes": self.identity.get("processes", 1),
            "device": str(device := next(network.parameters()).device),
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        weights = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise self.diverged("the weights are not finite")
        if not self.state.world.first:
            return
        if self.state.step:  # weights that no step has touched are no model
            Checkpoint(self.plan, self.settings.name, self.fold, weights, summary).save(self.folder / CHECKPOINT)
        tensors = {f"now/{name}": tensor for name, tensor in _tensors(self.state).items()}
        if self.plateau is not None:
            tensors |= {f"plateau/{name}": tensor for name, tensor in self.plateau.items()}
        header = {
            "format": RESUME_FORMAT,
            **self.identity,
            "elapsed": self.elapsed,
            "steps": self.state.step,
            "plateau_elapsed": self.plateau_elapsed,
            "limits": {"steps": self.limits.steps, "seconds": self.limits.seconds},
            "finished": summary["finished"],
        }
        save_tensors(self.folder / RESUME, tensors, header)


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    tensors = {f"network/{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"loss/{name}": tensor for name, tensor in state.loss.state_dict().items()}
    if state.ema is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for i, entry in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": torch.as_tensor(value) for key, value in entry.items() if value is not None}
    tensors["step"] = torch.tensor(state.step)
    return tensors


def _restore(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """The inverse of `_tensors`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}

    state.network.load_state_dict(part("network/"))
    state.loss.load_state_dict(part("loss/"))
    if state.ema is not None:
        state.ema.load_state_dict(part("ema/"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer/").items():
        i, key = name.split("/")
        moments.setdefault(int(i), {})[key] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = int(tensors["step"])
