"""The arms of the super-resolution protocol: thick slices in, labels and an image on the thin grid out; one table.

python benchmarks/superresolution.py ../shared/data/Dataset004_Hippocampus --axis 0 --scales 4 --arms B D \
    --minutes 10 --seeds 0 --json rows.json
python benchmarks/superresolution.py --table rows.json
python benchmarks/superresolution.py ../shared/data/Dataset004_Hippocampus --floors --axis 0 --scales 2 3 4

Every arm but A2 is commands as users type them, on a dataset that is written to a temporary folder:
plan-and-preprocess, train-fold, predict. All are scored on the held-out cases of the same fold, on labels drawn on the
thin grid, on the part of each case that the thick slices cover. Arms:

    A0     segment the thick slices with the largest share's label; labels brought up by nearest
    A2     the same with soft labels (the share of each class), probabilities brought up by cubic splines
    B      interpolate the image to the thin grid (cubic), then segment: what is done without super-resolution
    C      super-resolve (half of the time), then segment on the thin grid (the other half)
    D      joint: thick slices in, labels and image on the thin grid out (3d_sr)
    D-implicit, D-filters  the same with another up head
    D-any  one network for any scale (3d_sr_any), trained once and scored at every one of --scales
    E      the thin slices themselves: the upper bound
    image  super-resolution without labels
    self   only thick slices and their labels are there: labels through the forward model, the image in the plane
           (3d_sr)
    self-2d  the same by one network of slices (2d_sr)

The budget is time on a quiet machine, and every arm gets the steps that it takes in it: `--pace` plans each arm and
times its steps (several calls: the median), with nothing else on the machine; the trainings that follow with the same
--folder take so many steps, so that what else runs beside them changes how long they take and nothing else. Without
--pace before it, an arm is timed just before it is trained. Rows are added to --json, so that arms may be run on
different days. `--cost` times training steps of B and D in turns in one process and counts their memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from measure import machine, markdown_table, measure
from paced import AUTOSEG, Training
from soft_labels import SoftTraining
from sr_data import DATASETS, Array, Degradation, HighCase, cubic, floors, read_cases, write_dataset

from autoseg.dataset import RawDataset
from autoseg.device import autocast_dtype
from autoseg.experiment_planning.memory import training_memory
from autoseg.geometry import corner_distance
from autoseg.image import Image, read_image
from autoseg.metrics import score_images, score_masks
from autoseg.plan import Plan
from autoseg.preprocessing.store import Store
from autoseg.training.batches import Samples, collate
from autoseg.training.settings import RECIPES
from autoseg.training.step import build_training, training_step
from autoseg.workspace import Workspace

FOLD = "0"
PACE_ROUNDS = 3
COST_ROUNDS, COST_STEPS = 15, 4
TOLERANCE_MM = 0.5  # of NSD: at 1 mm data of 1 mm cannot rank methods
METRICS = ("dice", "assd", "hd95", "nsd", "volume_error_ratio")
IMAGE_METRICS = ("psnr", "ssim")
SAME_PLACE = 0.01  # voxels by which a prediction's corners may miss the truth's
SHIFT_SAMPLES = 5000  # of the bootstrap
REFERENCE_ARM, UPPER_ARM = "B", "E"


@dataclass(frozen=True)
class Run:
    """One arm at one scale with one seed."""

    source: RawDataset
    cases: Sequence[HighCase]
    degradation: Degradation
    scales: Sequence[float]
    minutes: float
    seed: int
    folder: Path
    steps: int | None = None
    """Of every training, instead of what the time allows."""
    only_pace: bool = False

    def high(self) -> list[HighCase]:
        """The cases, cropped to what thick slices cover."""
        return [self.degradation.crop(case) for case in self.cases]

    def write(self, kind: str) -> Path:
        """The dataset of that kind (a key of DATASETS), unless it is there."""
        root = self.folder / kind / self.source.name
        if (root / "dataset.json").exists():
            return root
        cases = self.cases if kind == "whole" else self.high()
        made = [DATASETS[kind](case, self.degradation) for case in cases]
        return write_dataset(root, self.source, made)


class OnlyPaced(Exception):
    """The arm is planned and its steps are timed; no more was asked for."""


@dataclass(frozen=True)
class Trained:
    """A trained fold and what it cost."""

    plan: Plan
    configuration: str
    fold: Path
    held_out: tuple[str, ...]
    facts: dict[str, Any]

    def validation(self, case: str) -> Image:
        """The held-out prediction that train-fold wrote."""
        return read_image(self.fold / "validation" / f"{case}.nii.gz")


def planned(run: Run, dataset: Path, configuration: str, *options: str, minutes: float | None = None) -> Training:
    """plan-and-preprocess for a share of the budget."""
    training = Training(dataset, configuration, FOLD, dataset.parent / f"workspace_{configuration}")
    training.plan([configuration], 60 * (minutes or run.minutes), *options)
    return training


def train(run: Run, dataset: Path, configuration: str, *options: str, minutes: float | None = None) -> Trained:
    """plan-and-preprocess and train-fold, for a share of the budget. Raises OnlyPaced."""
    training = planned(run, dataset, configuration, *options, minutes=minutes)
    if run.only_pace:
        training.time_steps()
        raise OnlyPaced
    steps, used = training.train(60 * (minutes or run.minutes), run.seed, steps=run.steps)
    return _trained(training, steps, training.pace, memory=used.peak_bytes)


def _trained(training: Training, steps: int, pace: float, **facts: Any) -> Trained:
    plan = Plan.load(training.root / "plan.json")
    folds = json.loads((training.root / "folds.json").read_text())
    c = plan.configuration(training.configuration)
    memory = training_memory(c, plan.labels)
    facts |= {
        "configuration": c.name,
        "steps": steps,
        "s/step": pace,
        "patch": list(c.patch_size),
        "batch": c.batch_size,
        "width": c.architecture.features[0],
        "parameters": memory.parameters,
        "activations": memory.moving_bytes,
        "GFLOP": memory.step_flops / 1e9,
    }
    return Trained(plan, c.name, training.folder, tuple(folds[int(FOLD)]["val"]), facts)


def predict(run: Run, trained: Trained, names: Sequence[str], degradation: Degradation, *options: str) -> Path:
    """Predict the thick slices of some cases, written as files; the folder with labels and images."""
    source = run.folder / f"thick_{degradation.scale:g}"
    by_name = {case.name: case for case in run.cases}
    made = [DATASETS["low"](degradation.crop(by_name[name]), degradation) for name in names]
    write_dataset(source, run.source, made)
    output = run.folder / f"predicted_{trained.configuration}_{degradation.scale:g}"
    shutil.rmtree(output, ignore_errors=True)
    measure([*AUTOSEG, "predict", source / "imagesTr", output, "--model", trained.fold, *options, "--quiet"])
    return output


Scored = tuple[dict[str, Any], dict[str, Any], float]
"""What an arm gives: facts of its training, scores by case, the scale at which they were taken."""


def arm_a0(run: Run) -> list[Scored]:
    """Thick slices and thick labels; the answer brought up by nearest."""
    trained = train(run, run.write("low"), "3d_fullres")
    axis = run.degradation.axis
    return [_score(run, run.degradation, trained, lambda case: _nearest(run, trained, case, axis))]


def _nearest(run: Run, trained: Trained, case: HighCase, axis: int) -> Array:
    low = trained.validation(case.name).array[0]
    return run.degradation.up_nearest(low, case.label.shape[axis])


def arm_a2(run: Run) -> list[Scored]:
    """Thick slices and the share of each class in their voxels; probabilities brought up by cubic splines."""
    low = planned(run, run.write("low"), "3d_fullres")
    soft = SoftTraining(low, planned(run, run.write("high"), "3d_sr", *_input(run)), run.seed)
    if run.only_pace:
        soft.time_steps()
        raise OnlyPaced
    steps, pace = soft.train(60 * run.minutes, run.steps)
    trained = _trained(low, steps, pace)
    output = predict(run, trained, trained.held_out, run.degradation, "--probabilities")

    def labels(case: HighCase) -> Array:
        files = sorted((output / f"{case.name}_probabilities").glob("*.nii.gz"), key=_channel)
        shares = [cubic(read_image(path).array[0], case.label.shape) for path in files]
        values = np.array([0, *(value for value in run.source.labels.known_values if value)])
        found: Array = values[np.argmax(shares, axis=0)]
        return found

    return [_score(run, run.degradation, trained, labels)]


def _channel(path: Path) -> int:
    """`2_posterior.nii.gz`: 2."""
    return int(path.name.partition("_")[0])


def arm_b(run: Run) -> list[Scored]:
    """The interpolated image, the thin labels."""
    trained = train(run, run.write("interpolated"), "3d_fullres")
    return [_score(run, run.degradation, trained, lambda case: _on_grid(trained.validation(case.name), case))]


def arm_c(run: Run) -> list[Scored]:
    """Super-resolve all cases with a network of its own, then segment what it made."""
    first = train(run, run.write("high"), "3d_sr", *_input(run), "--task", "super_resolution", minutes=run.minutes / 2)
    output = predict(run, first, [case.name for case in run.cases], run.degradation)
    restored = [(case.name, _image(output, case), case.label, case.grid) for case in run.high()]
    dataset = write_dataset(run.folder / "restored" / run.source.name, run.source, restored)
    trained = train(run, dataset, "3d_fullres", minutes=run.minutes / 2)
    return [
        _score(
            run,
            run.degradation,
            trained,
            lambda case: _on_grid(trained.validation(case.name), case),
            lambda case: _image(output, case),
        )
    ]


def arm_d(run: Run) -> list[Scored]:
    """Joint, at one scale."""
    trained = train(run, run.write("high"), "3d_sr", *_input(run))
    return [_score_predictions(run, trained, run.degradation, "--image")]


def with_head(head: str) -> Callable[[Run], list[Scored]]:
    """Arm D with another up head: the value is changed in the plan."""

    def arm(run: Run) -> list[Scored]:
        dataset = run.write("high")
        training = planned(run, dataset, "3d_sr", *_input(run))
        plan = Plan.load(training.root / "plan.json")
        changed = [replace(c, architecture=replace(c.architecture, head=head)) for c in plan.configurations]
        replace(plan, configurations=tuple(changed)).save(training.root / "plan.json")
        return [_score_predictions(run, train(run, dataset, "3d_sr"), run.degradation, "--image")]

    return arm


def arm_d_any(run: Run) -> list[Scored]:
    """Joint, one network for all scales."""
    dataset = run.write("whole")
    largest = replace(run, degradation=Degradation(run.degradation.axis, max(run.scales)))
    trained = train(run, dataset, "3d_sr_any", *_input(largest))
    spacing = ["--output-spacing", _text(run.cases[0].grid.spacing)]
    at = [Degradation(run.degradation.axis, scale) for scale in run.scales]
    return [_score_predictions(run, trained, degradation, "--image", *spacing) for degradation in at]


def arm_e(run: Run) -> list[Scored]:
    """The thin slices themselves."""
    trained = train(run, run.write("high"), "3d_fullres")
    return [_score(run, run.degradation, trained, lambda case: _on_grid(trained.validation(case.name), case))]


def arm_image(run: Run) -> list[Scored]:
    """Super-resolution alone."""
    trained = train(run, run.write("high"), "3d_sr", *_input(run), "--task", "super_resolution")
    output = predict(run, trained, trained.held_out, run.degradation)
    return [_score(run, run.degradation, trained, None, lambda case: _image(output, case))]


def self_supervised(name: str) -> Callable[[Run], list[Scored]]:
    """Only thick slices are there, images and labels."""

    def arm(run: Run) -> list[Scored]:
        spacing = ["--output-spacing", _text(run.cases[0].grid.spacing)]
        trained = train(run, run.write("low"), name, *spacing)
        return [_score_predictions(run, trained, run.degradation, "--image")]

    return arm


ARMS: dict[str, Callable[[Run], list[Scored]]] = {
    "A0": arm_a0,
    "A2": arm_a2,
    "B": arm_b,
    "C": arm_c,
    "D": arm_d,
    "D-implicit": with_head("implicit"),
    "D-filters": with_head("filters"),
    "D-any": arm_d_any,
    "E": arm_e,
    "image": arm_image,
    "self": self_supervised("3d_sr"),
    "self-2d": self_supervised("2d_sr"),
}


def _input(run: Run) -> list[str]:
    spacing = [s * f for s, f in zip(run.cases[0].grid.spacing, run.degradation.factors, strict=True)]
    return ["--input-spacing", _text(spacing)]


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:.6g}" for value in values)


# --- scores -----------------------------------------------------------------------------------------------------------


def _score_predictions(run: Run, trained: Trained, degradation: Degradation, *options: str) -> Scored:
    output = predict(run, trained, trained.held_out, degradation, *options)
    return _score(
        run,
        degradation,
        trained,
        lambda case: _on_grid(read_image(output / f"{case.name}.nii.gz"), case),
        lambda case: _image(output, case),
    )


def _score(
    run: Run,
    degradation: Degradation,
    trained: Trained,
    labels: Callable[[HighCase], Array] | None,
    images: Callable[[HighCase], Array] | None = None,
) -> Scored:
    """Scores by case: for each class those of METRICS, and of the image."""
    by_name = {case.name: case for case in run.cases}
    cases: dict[str, Any] = {}
    for name in trained.held_out:
        case = degradation.crop(by_name[name])
        scores: dict[str, Any] = {}
        if labels is not None:
            answer = labels(case)
            for structure in run.source.labels.names:
                mask, truth = (run.source.labels.mask(array, structure) for array in (answer, case.label))
                found = score_masks(mask, truth, case.grid.spacing, tolerance_mm=TOLERANCE_MM)
                scores[structure] = {metric: found[metric] for metric in METRICS}
        if images is not None:
            scores["image"] = score_images(case.image, images(case))
        cases[name] = scores
    return trained.facts, cases, degradation.scale


def _on_grid(answer: Image, case: HighCase) -> Array:
    """The voxels of an answer. Raises RuntimeError where it does not lie on the thin grid: shifts would be scored."""
    if answer.shape != case.label.shape or corner_distance(case.grid, answer.grid) > SAME_PLACE:
        raise RuntimeError(f"{case.name}: the answer lies on {answer.grid}, expected {case.grid}")
    voxels: Array = answer.array[0]
    return voxels


def _image(folder: Path, case: HighCase) -> Array:
    """The super-resolved image of a case; a model without labels writes it in their place."""
    path = folder / f"{case.name}_image.nii.gz"
    return _on_grid(read_image(path if path.exists() else folder / f"{case.name}.nii.gz"), case)


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores and costs of every arm, axis and scale: means over seeds and cases."""

    def key(row: dict[str, Any]) -> tuple[int, float, float, int]:
        return row["axis"], row["scale"], row["minutes"], row.get("steps") or 0

    parts = []
    for axis, scale, minutes, steps in sorted({key(row) for row in rows}):
        chosen = [row for row in rows if key(row) == (axis, scale, minutes, steps)]
        arms = [arm for arm in ARMS if any(row["arm"] == arm for row in chosen)]
        by_arm = {arm: [row for row in chosen if row["arm"] == arm] for arm in arms}
        parts += [
            f"### axis {axis}, x{scale:g}, " + (f"{steps} steps" if steps else f"{minutes:g} minutes"),
            "",
            scores_table(by_arm),
            "",
            costs_table(by_arm),
        ]
        parts.append("")
    return "\n".join(parts)


def scores_table(by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """Means, and how each arm differs from B: interval of the mean difference and Wilcoxon's p over cases."""
    header = ("arm", "seeds", "Dice", "ASSD mm", "HD95 mm", "NSD 0.5", "volume", "gap closed", "- B [95 %]", "p")
    header = (*header, "PSNR", "SSIM")
    dice = {arm: by_case(rows, "dice") for arm, rows in by_arm.items()}
    lines = []
    for arm, rows in by_arm.items():
        cells: list[str] = [arm, str(len(rows))]
        cells += [_number(_mean(by_case(rows, metric)), metric) for metric in METRICS]
        cells.append(_gap(dice, arm))
        cells += _against_b(dice, arm)
        cells += [_number(_mean(by_case(rows, metric, image=True)), metric) for metric in IMAGE_METRICS]
        lines.append(cells)
    return markdown_table(header, lines)


def costs_table(by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """What the trainings took; activations are those of a step, counted on fake tensors, for each sample."""
    header = ("arm", "steps", "s/step", "patch", "batch", "width", "parameters", "GFLOP/step", "activations/sample")
    lines = []
    for arm, rows in by_arm.items():
        facts = [row["facts"] for row in rows]
        first = facts[0]
        lines.append(
            [
                arm,
                f"{mean(f['steps'] for f in facts):.0f}",
                f"{mean(f['s/step'] for f in facts):.3f}",
                "x".join(map(str, first["patch"])),
                first["batch"],
                first["width"],
                f"{first['parameters'] / 1e6:.2f} M",
                f"{first['GFLOP']:.1f}",
                f"{first['activations'] / first['batch'] / 1e6:.0f} MB",
            ]
        )
    return markdown_table(header, lines)


def by_case(rows: Sequence[dict[str, Any]], metric: str, *, image: bool = False) -> dict[str, float]:
    """For each case the mean over classes and seeds; cases without a finite value are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for case, scores in row["cases"].items():
            parts = [scores["image"]] if image and "image" in scores else []
            parts = parts if image else [entry for name, entry in scores.items() if name != "image"]
            values = [part[metric] for part in parts if part[metric] is not None and math.isfinite(part[metric])]
            found.setdefault(case, []).extend(values)
    return {case: mean(values) for case, values in found.items() if values}


def _mean(values: dict[str, float]) -> float:
    return mean(values.values()) if values else math.nan


def _number(value: float, metric: str) -> str:
    if math.isnan(value):
        return ""
    if metric == "volume_error_ratio":
        return f"{value:+.1%}"
    return f"{value:.2f}" if metric == "psnr" else f"{value:.4f}" if metric == "dice" else f"{value:.3f}"


def _gap(dice: dict[str, dict[str, float]], arm: str) -> str:
    """(arm - B) / (E - B)."""
    if not dice.get(arm) or REFERENCE_ARM not in dice or UPPER_ARM not in dice:
        return ""
    low, high = _mean(dice[REFERENCE_ARM]), _mean(dice[UPPER_ARM])
    return f"{(_mean(dice[arm]) - low) / (high - low):.0%}" if high > low else ""


def _against_b(dice: dict[str, dict[str, float]], arm: str) -> list[str]:
    """The mean difference in Dice from B with its bootstrap interval, and Wilcoxon's p."""
    from scipy.stats import wilcoxon

    reference = dice.get(REFERENCE_ARM, {})
    common = sorted(set(reference) & set(dice[arm]))
    if arm == REFERENCE_ARM or not common:
        return ["", ""]
    difference = np.array([dice[arm][case] - reference[case] for case in common])
    drawn = np.random.default_rng(0).integers(len(difference), size=(SHIFT_SAMPLES, len(difference)))
    low, high = np.percentile(difference[drawn].mean(axis=1), (2.5, 97.5))
    p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return [f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]", f"{p:.2g}"]


def floors_table(source: RawDataset, cases: Sequence[HighCase], axis: int, scales: Sequence[float]) -> str:
    """What is had without a network; the protocol has the same numbers for the hippocampus."""
    found = {scale: floors(source, cases, Degradation(axis, scale)) for scale in scales}
    names = list(next(iter(found.values())))
    lines = [[f"{axis}, x{scale:g}", *(f"{found[scale][name]:.3f}" for name in names)] for scale in scales]
    return markdown_table(("axis, scale", *names), lines)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost_table(run: Run, arms: Sequence[str]) -> str:
    """Seconds of a training step of the arms, taken in turns, and memory; as shares of the first arm's."""
    trainings = [COSTED[arm](run) for arm in arms]
    steps = [Steps(training) for training in trainings]
    seconds = np.array([[each.seconds() for each in steps] for _ in range(COST_ROUNDS)])
    shares = seconds / seconds[:, :1]
    lines = []
    for column, (arm, each) in enumerate(zip(arms, steps, strict=True)):
        low, middle, high = np.percentile(shares[:, column], (25, 50, 75))
        own, first = each.activations, steps[0].activations
        lines.append(
            [arm, f"{np.median(seconds[:, column]):.3f} s", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
            + [f"{own / 1e6:.1f} MB", f"{own / first:.2f}", f"{each.parameters / 1e6:.2f} M"]
        )
    return markdown_table(("arm", "step", "share (quartiles)", "activations/sample", "share", "parameters"), lines)


class Steps:
    """Training steps of a planned configuration on one batch of its own."""

    def __init__(self, training: Training) -> None:
        plan = Plan.load(training.root / "plan.json")
        c = plan.configuration(training.configuration)
        memory = training_memory(c, plan.labels)
        self.activations, self.parameters = memory.moving_bytes / c.batch_size, memory.parameters
        store = Store(Workspace(training.root).store(c.preprocessing))
        samples = Samples(store, store.cases(), c, plan.labels, seed=0)
        self.batch = collate([samples[0, index] for index in range(c.batch_size)])
        recipe = RECIPES[c.training.recipe]
        self.state = build_training(c.architecture, plan.labels, recipe, configuration=c)
        self.precision = autocast_dtype(torch.device("cpu"))

    def seconds(self) -> float:
        """Of one step: the mean of a few, after one that is not counted."""
        for number in range(COST_STEPS + 1):
            if number == 1:
                began = time.perf_counter()
            training_step(self.state, self.batch, precision=self.precision)
        return (time.perf_counter() - began) / COST_STEPS


COSTED: dict[str, Callable[[Run], Training]] = {
    "B": lambda run: planned(run, run.write("interpolated"), "3d_fullres"),
    "D": lambda run: planned(run, run.write("high"), "3d_sr", *_input(run)),
}


def main() -> None:
    """Run the arms and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--axis", type=int, default=0, choices=(0, 1, 2), help="of the files' arrays (z, y, x)")
    parser.add_argument("--scales", type=float, nargs="+", default=[4.0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["B", "D"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="file that collects the rows of several runs")
    parser.add_argument("--floors", action="store_true", help="only what is had without a network")
    parser.add_argument("--pace", action="store_true", help="plan the arms in --folder and time their steps, no more")
    parser.add_argument("--cost", action="store_true", help="only time steps of B and D in turns, and count memory")
    parser.add_argument("--steps", type=int, help="of every arm, instead of what it takes in --minutes")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the tables of JSON files and end")
    parser.add_argument("--folder", type=Path, help="keep datasets and models here [default: a temporary folder]")
    options = parser.parse_args()

    if options.table:
        print(table([row for path in options.table for row in json.loads(path.read_text())]))
        return
    if options.dataset is None:
        parser.error("a dataset is needed")
    if options.pace and options.folder is None:
        parser.error("--pace needs --folder")
    source, cases = read_cases(options.dataset)
    if options.floors:
        print(floors_table(source, cases, options.axis, options.scales))
        return
    if options.cost:
        print(machine(), "\n")
        for scale in options.scales:
            with tempfile.TemporaryDirectory() as folder:
                run = Run(source, cases, Degradation(options.axis, scale), (scale,), options.minutes, 0, Path(folder))
                print(f"axis {options.axis}, x{scale:g}\n\n{cost_table(run, list(COSTED))}\n", flush=True)
        return
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for seed in range(PACE_ROUNDS) if options.pace else options.seeds:  # in turns: the machine is never the same
        for scale in options.scales:
            for arm in options.arms:
                if arm == "D-any" and scale != options.scales[0]:
                    continue  # one model, scored at all scales
                rows += _rows(arm, options, source, cases, scale=scale, seed=seed)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.pace:
        return
    print(machine(), "\n")
    print(table(rows))


def _rows(
    arm: str, options: argparse.Namespace, source: RawDataset, cases: Sequence[HighCase], *, scale: float, seed: int
) -> list[dict[str, Any]]:
    """Train and score one arm; a row for each scale that it was scored at."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / f"{arm}_axis{options.axis}_x{scale:g}"
        degradation = Degradation(options.axis, scale)
        budget = {"minutes": options.minutes, "steps": options.steps}
        run = Run(
            source, cases, degradation, options.scales, seed=seed, folder=folder, only_pace=options.pace, **budget
        )
        rows: list[dict[str, Any]] = []
        try:
            answers = ARMS[arm](run)
        except OnlyPaced:
            return rows
        for facts, scores, at in answers:
            shown = {"arm": arm, "axis": options.axis, "scale": at, "seed": seed, **budget}
            rows.append({"dataset": source.name, **shown, "facts": facts, "cases": _finite(scores)})
            dice, psnr = _mean(by_case(rows[-1:], "dice")), _mean(by_case(rows[-1:], "psnr", image=True))
            line = f"Dice {dice:.4f}, PSNR {psnr:.2f} dB, {facts['steps']} steps"
            print(json.dumps(shown), line, file=sys.stderr, flush=True)
        return rows


def _finite(value: Any) -> Any:
    """The same content without NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
