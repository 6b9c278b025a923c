"""Held-out probabilities of trained configurations -> which one, which ensemble and which post-processing to use.

Everything is decided on cases that the predicting fold did not train on, and on the label's own grid:

1. mirroring, for each configuration: on where it gains more than noise and MIRROR_GAIN, since it costs 2 to 8 times;
2. the best single configuration, by the mean over classes of the mean Dice over cases;
3. pairs, the views of a volume together, and all together, two or three of them with weights where those beat equal
   ones beyond noise: only where one beats the best single one beyond noise over the cases;
4. the largest component alone, or a smallest size, for each structure: only where it gains beyond noise;
5. a temperature that makes the chosen probabilities honest, with the calibration error before and after.

"Beyond noise" is: the 95 % bootstrap interval of the paired difference of the means lies above zero, the wider the more
were tried of which this is the best. Who was
stopped early (`halving.py`) is not chosen from; the rungs at which that happened are kept beside the choice.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.executor import map_cases
from autoseg.files import read_json, write_json
from autoseg.image import read_image
from autoseg.inference.cascade import held_out_cases
from autoseg.inference.chosen import Chosen, Member
from autoseg.inference.crossval import MIRRORED, PLAIN, PROBABILITIES
from autoseg.inference.postprocess import Cleaning, clean
from autoseg.inference.rungs import Rung, find_views
from autoseg.labels import Labels
from autoseg.plan import Decision, Plan
from autoseg.preprocessing.case import place
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.store import Store
from autoseg.typed_json import from_json, to_json
from autoseg.workspace import VALIDATION, Workspace

SELECTION_VERSION = 2
MIRROR_GAIN = 0.001  # mean Dice that test-time mirroring must add to be worth its time
SIZES_MM3 = (10.0, 30.0, 100.0, 300.0, 1000.0)  # smallest components that are tried
# by how many members; the first are equal, and stay unless others are better beyond noise
WEIGHTS: dict[int, tuple[tuple[float, ...], ...]] = {
    2: ((1, 1), (2, 1), (1, 2)),
    3: ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1)),
}
RESAMPLES = 2000  # of the bootstrap
SEED = 0
CANDIDATES_AT_ONCE = 8  # volumes of running maxima that are held together
CALIBRATION_VOXELS = 20_000  # of each case, from its structures' surroundings
BINS = 15  # of the expected calibration error
TEMPERATURES = np.exp(np.linspace(math.log(0.25), math.log(4.0), 81))


@dataclass(frozen=True)
class Candidate:
    """An ensemble; of one member, the member itself."""

    members: tuple[Member, ...]
    weights: tuple[float, ...]
    """Of the members' probabilities; they sum to 1."""

    @property
    def name(self) -> str:
        """`3d_fullres`, `3d_fullres (mirrored) + 2 x 2d`."""
        least = min(self.weights)
        parts = []
        for member, weight in zip(self.members, self.weights, strict=True):
            times = f"{weight / least:.3g} x " if weight > 1.01 * least else ""
            parts.append(f"{times}{member.configuration}{' (mirrored)' if member.mirroring else ''}")
        return " + ".join(parts)


@dataclass(frozen=True)
class Score:
    """A candidate's cross-validated Dice."""

    candidate: Candidate
    dice: float
    """Mean over the structures of their mean over the cases."""
    low: float
    """Lower end of the 95 % bootstrap interval over the cases."""
    high: float
    by_class: dict[str, float]


@dataclass(frozen=True)
class Selection:
    """What cross-validation chose; `selection.json`."""

    plan: str
    """Id of the plan."""
    chosen: Chosen
    calibration_error: tuple[float, float] | None
    """Expected calibration error (ECE) before and after; None where images alone are answered."""
    scores: tuple[Score, ...]
    """Of every candidate, the best first; empty where images alone are answered."""
    decisions: tuple[Decision, ...]
    cases: int = 0
    """Held-out cases behind the scores."""
    rungs: tuple[Rung, ...] = ()
    """Where candidates were compared before all were trained to their end, and who was dropped."""
    version: int = SELECTION_VERSION

    @property
    def score(self) -> Score:
        """Of what was chosen; of a model that predicts labels."""
        chosen = Candidate(self.chosen.members, self.chosen.weights)
        return next(score for score in self.scores if score.candidate == chosen)

    def save(self, path: Path) -> None:
        """Write `selection.json`, atomically."""
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read `selection.json`. Raises PlanError naming the file and the value at fault."""
        content = read_json(path, error=PlanError, what="selection")
        version = content.get("version") if isinstance(content, dict) else None
        if version != SELECTION_VERSION:
            raise PlanError(
                f"{path}: selection version {version} cannot be read, this autoseg reads version {SELECTION_VERSION}; "
                "delete the file and let `autoseg run` choose again."
            )
        return from_json(cls, content, where=str(path))


# ---- the story


def select(
    dataset: RawDataset,
    plan: Plan,
    configurations: Sequence[str],
    *,
    workspace: Workspace,
    rungs: Sequence[Rung] = (),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """Choose among configurations of which every fold is trained and validated.

    Cases that some configuration did not predict are left out. `rungs` tell who was dropped before. Raises PlanError
    where no case is predicted by all.
    """
    cases = find_held_out(dataset, configurations, workspace)
    mirrored = {name for name in configurations if _has_mirrored(cases, name)}
    decisions = [decision for rung in rungs for decision in rung.decisions()]

    singles = [single(name, mirroring) for name in configurations for mirroring in _ways(name, mirrored)]
    table = score_candidates(cases, singles, plan.labels, workers=workers, progress=progress)
    best_of = [_choose_mirroring(name, table, decisions) for name in configurations]
    best = max(best_of, key=lambda candidate: table.mean(candidate))
    decisions.append(_decision("configuration", best.name, _why_best(best, best_of, table)))

    ensembles = _ensembles(best_of, find_views([plan.configuration(name) for name in configurations]))
    if ensembles:
        table = table.joined(score_candidates(cases, ensembles, plan.labels, workers=workers, progress=progress))
    chosen = choose_ensemble(best, ensembles, table, decisions)

    details = _examine(cases, chosen, plan.labels, workers=workers)
    cleaning = _choose_cleaning(details, plan.labels, decisions)
    temperature, errors = _calibrate(details, decisions, regions=plan.labels.has_regions)
    scores = sorted((table.score(candidate) for candidate in table.candidates), key=lambda s: -s.dice)
    use = Chosen(chosen.members, chosen.weights, temperature, cleaning)
    return Selection(plan.id, use, errors, tuple(scores), tuple(decisions), len(cases), tuple(rungs))


def single(configuration: str, mirroring: bool) -> Candidate:
    """The ensemble of one."""
    return equal_parts((Member(configuration, mirroring),))


def equal_parts(members: tuple[Member, ...]) -> Candidate:
    """The ensemble in which no member counts more than another."""
    return Candidate(members, (1 / len(members),) * len(members))


def _decision(name: str, value: Any, because: str) -> Decision:
    return Decision(name, value, "empirical", because)


def _ways(name: str, mirrored: set[str]) -> tuple[bool, ...]:
    return (False, True) if name in mirrored else (False,)


def _choose_mirroring(name: str, table: Table, decisions: list[Decision]) -> Candidate:
    plain, turned = single(name, False), single(name, True)
    if turned not in table.candidates:
        decisions.append(_decision(f"{name}.mirroring", False, "the plan allows no mirrored copies."))
        return plain
    gain, low, high = table.difference(turned, plain)
    pays = gain >= MIRROR_GAIN and low > 0
    decisions.append(
        _decision(
            f"{name}.mirroring",
            pays,
            f"averaging over mirrored copies changes the mean Dice by {gain:+.4f} ({low:+.4f} to {high:+.4f}); it "
            f"costs several times the time and is done from {MIRROR_GAIN} on, beyond noise.",
        )
    )
    return turned if pays else plain


def _why_best(best: Candidate, others: Sequence[Candidate], table: Table) -> str:
    shown = ", ".join(f"{candidate.name} {table.mean(candidate):.4f}" for candidate in others)
    return f"of the cross-validated mean Dice ({shown}) it has the highest."


def _ensembles(singles: Sequence[Candidate], views: Sequence[tuple[str, ...]]) -> list[Candidate]:
    """Pairs, the views of a volume together, and all together, with their weights."""
    members = [candidate.members[0] for candidate in singles]
    together = [tuple(member for member in members if member.configuration in names) for names in views]
    groups = dict.fromkeys((*itertools.combinations(members, 2), *together, tuple(members)))
    return [candidate for group in groups if len(group) > 1 for candidate in weighted(group)]


def weighted(members: tuple[Member, ...]) -> list[Candidate]:
    """The weights that are tried for an ensemble; equal ones come first."""
    tried = WEIGHTS.get(len(members), ())[1:]
    return [equal_parts(members), *(Candidate(members, tuple(w / sum(weights) for w in weights)) for weights in tried)]


def settle_weights(members: tuple[Member, ...], table: Table) -> tuple[Candidate, str]:
    """An ensemble with equal weights, or with others that are better beyond noise; and why."""
    equal, *others = weighted(members)
    if not others:
        return equal, f"for {len(members)} members no other weights are tried."
    best = max(others, key=table.mean)
    gain, low, high = table.difference(best, equal, tried=len(others))
    because = (
        f"the best of {len(others)} others, {best.name}, differs by {gain:+.4f} mean Dice from equal weights "
        f"({low:+.4f} to {high:+.4f} over {table.cases} cases): "
    )
    return (best, because + "beyond noise.") if low > 0 else (equal, because + "not beyond noise, so equal ones stay.")


def choose_ensemble(
    best: Candidate, ensembles: Sequence[Candidate], table: Table, decisions: list[Decision]
) -> Candidate:
    """The best single configuration, or the best ensemble where that is better beyond what the best of so many are by
    chance; why is added to `decisions`."""
    if not ensembles:
        decisions.append(_decision("ensemble", best.name, "one configuration is there, so there is nothing to join."))
        return best
    settled = dict(settle_weights(members, table) for members in dict.fromkeys(e.members for e in ensembles))
    tried = max(settled, key=table.mean)
    gain, low, high = table.difference(tried, best, tried=len(settled))
    pays = low > 0
    if pays:
        decisions.append(_decision("ensemble.weights", tried.weights, settled[tried]))
    decisions.append(
        _decision(
            "ensemble",
            tried.name if pays else best.name,
            f"the best of {len(settled)} ensembles, {tried.name}, differs from {best.name} by {gain:+.4f} mean Dice "
            f"({low:+.4f} to {high:+.4f} over {table.cases} cases): "
            + ("beyond noise." if pays else "not beyond noise, so the single one stays."),
        )
    )
    return tried if pays else best


# ---- scores


@dataclass
class Table:
    """Dice of candidates by case and structure, nan where neither prediction nor truth shows it."""

    names: tuple[str, ...]
    dice: dict[Candidate, NDArray[np.float64]] = field(default_factory=dict)
    """(cases, structures)."""

    @property
    def candidates(self) -> list[Candidate]:
        return list(self.dice)

    @property
    def cases(self) -> int:
        return len(next(iter(self.dice.values())))

    def joined(self, other: Table) -> Table:
        return Table(self.names, {**self.dice, **other.dice})

    def mean(self, candidate: Candidate) -> float:
        """Mean over the structures of their mean over the cases (nnU-Net's foreground mean)."""
        return _mean(self.dice[candidate])

    def difference(self, candidate: Candidate, other: Candidate, *, tried: int = 1) -> tuple[float, float, float]:
        """By how much the mean of a candidate is above the other's, and its bootstrap interval over the cases.

        Paired: both are drawn the same cases. See `interval`.
        """
        return _difference(self.dice[candidate], self.dice[other], tried=tried)

    def score(self, candidate: Candidate) -> Score:
        dice = self.dice[candidate]
        value, low, high = interval(lambda rows: _mean(dice[rows]), self.cases)
        by_class = {name: float(v) for name, v in zip(self.names, _means(dice), strict=True) if not math.isnan(v)}
        return Score(candidate, value, low, high, by_class)


def _means(dice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each structure over the cases in which it has a score."""
    counted = np.isfinite(dice)
    sums = np.where(counted, dice, 0).sum(axis=0)
    return np.divide(sums, counted.sum(axis=0), out=np.full(dice.shape[1], np.nan), where=counted.any(axis=0))


def _mean(dice: NDArray[np.float64]) -> float:
    """Of (cases, structures): the mean over the structures of their means; nan where there is nothing to score."""
    means = _means(dice)
    known = means[np.isfinite(means)]
    return float(known.mean()) if known.size else math.nan


def _difference(dice: NDArray[np.float64], other: NDArray[np.float64], *, tried: int) -> tuple[float, float, float]:
    """Of the means, not the mean of the cases' differences: a false structure costs, though its lack has no score."""
    return interval(lambda rows: _mean(dice[rows]) - _mean(other[rows]), len(dice), tried=tried)


def interval(value: Callable[[NDArray[np.intp]], float], cases: int, *, tried: int = 1) -> tuple[float, float, float]:
    """The value over all cases, and the 95 % interval of its bootstrap over them.

    Of the best of several that were `tried` it is as wide as all of them ask for together (Bonferroni).
    Of few cases the plain percentiles lie too close together; these are as far apart as Student's t asks for
    (expanded percentiles, Hesterberg 2015, arXiv:1411.5279).
    """
    from scipy import special

    generator = np.random.default_rng(SEED)
    drawn = [value(generator.integers(cases, size=cases)) for _ in range(RESAMPLES)]
    if not np.isfinite(drawn).any():
        return math.nan, math.nan, math.nan
    freedom = max(1, cases - 1)
    tail = float(special.ndtr(-math.sqrt(1 + 1 / freedom) * special.stdtrit(freedom, 1 - 0.025 / tried)))
    low, high = np.nanquantile(drawn, (tail, 1 - tail))
    return value(np.arange(cases)), float(low), float(high)


@dataclass(frozen=True)
class HeldOut:
    """A case, its true label, and where each configuration's probabilities for it are."""

    case: str
    reference: Path
    stores: Mapping[str, Path]
    """By configuration: the store of the fold that held the case out."""


def find_held_out(
    dataset: RawDataset, configurations: Sequence[str], workspace: Workspace, *, folds: Sequence[str] | None = None
) -> list[HeldOut]:
    """Cases of these folds (default: all) that every configuration has predicted. Raises PlanError without any."""
    labels = {case.identifier: case.label for case in dataset.cases if case.label is not None}
    found = []
    for fold, names in enumerate(held_out_cases(workspace.folds)):
        if folds is not None and str(fold) not in folds:
            continue
        stores = {name: workspace.fold(name, str(fold)) / VALIDATION / PROBABILITIES for name in configurations}
        found += [
            HeldOut(case, labels[case], stores)
            for case in names
            if case in labels and all(Store(folder).has(case) for folder in stores.values())
        ]
    if not found:
        raise PlanError(
            f"{workspace.root}: no case is predicted by all of {', '.join(configurations)}; train and validate a fold "
            "of each first."
        )
    return sorted(found, key=lambda one: one.case)


def _has_mirrored(cases: Sequence[HeldOut], name: str) -> bool:
    return all(MIRRORED in Store(one.stores[name]).entry(one.case).arrays for one in cases)


def score_candidates(
    cases: Sequence[HeldOut],
    candidates: Sequence[Candidate],
    labels: Labels,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Dice of every candidate by case and structure, on the labels' own grids."""
    names = [one.case for one in cases]
    rows: dict[int, NDArray[np.float64]] = {}
    score = functools.partial(score_case, candidates=tuple(candidates), labels=labels)
    for index, result in map_cases(score, cases, workers=workers, names=names):
        if isinstance(result, Exception):
            raise result
        rows[index] = result
        if progress is not None:
            progress(len(rows), len(cases))
    stacked = np.stack([rows[index] for index in range(len(cases))])
    return Table(labels.names, {candidate: stacked[:, i] for i, candidate in enumerate(candidates)})


def score_case(one: HeldOut, *, candidates: Sequence[Candidate], labels: Labels) -> NDArray[np.float64]:
    """Dice (candidates, structures) of one case on its label's own grid. Runs in a worker.

    Structure by structure, so that never more than one channel of each member lies at full resolution.
    """
    truth = read_image(one.reference).array[0]
    result = np.empty((len(candidates), len(labels.names)))
    for at in range(0, len(candidates), CANDIDATES_AT_ONCE):
        some = candidates[at : at + CANDIDATES_AT_ONCE]
        for i, answer in enumerate(_answers(one, some, labels)):
            result[at + i] = [_dice(mask, truth, labels, name) for name, mask in answer]
    return result


def _dice(mask: NDArray[np.bool_], truth: NDArray[Any], labels: Labels, name: str) -> float:
    true = labels.mask(truth, name)
    if labels.ignore is not None:
        mask = mask & (truth != labels.ignore)
    size = np.count_nonzero(mask) + np.count_nonzero(true)
    return 2 * np.count_nonzero(mask & true) / size if size else math.nan


def _answers(
    one: HeldOut, candidates: Sequence[Candidate], labels: Labels
) -> list[list[tuple[str, NDArray[np.bool_]]]]:
    """For each candidate the predicted mask of every structure on the grid of the file."""
    reader = _Reader(one, candidates, regions=labels.has_regions)
    if labels.has_regions:
        answers: list[list[tuple[str, NDArray[np.bool_]]]] = [[] for _ in candidates]
        for channel, name in enumerate(labels.names):
            for i, probability in enumerate(reader.probabilities(channel)):
                answers[i].append((name, probability > 0.5))
        return answers
    highest = [probability.copy() for probability in reader.probabilities(0)]
    winner = [np.zeros(volume.shape, np.int16) for volume in highest]
    for channel in range(1, labels.output_channels):
        for i, probability in enumerate(reader.probabilities(channel)):
            larger = probability > highest[i]
            highest[i][larger] = probability[larger]
            winner[i][larger] = channel
    return [[(name, won == channel) for channel, name in enumerate(labels.names, start=1)] for won in winner]


class _Reader:
    """One channel after the other of the candidates' probabilities, on the grid of the file."""

    def __init__(self, one: HeldOut, candidates: Sequence[Candidate], *, regions: bool) -> None:
        self.candidates, self.regions = candidates, regions
        self.members = sorted({m for c in candidates for m in c.members}, key=lambda m: (m.configuration, m.mirroring))
        self.entries = {m: Store(one.stores[m.configuration]).entry(one.case) for m in self.members}

    def probabilities(self, channel: int) -> list[NDArray[np.float32]]:
        """(Z, Y, X) of each candidate; background is sure outside of what the network saw."""
        own = {member: self._of_member(member, channel) for member in self.members}
        return [
            functools.reduce(np.add, [w * own[m] for m, w in zip(c.members, c.weights, strict=True)])
            for c in self.candidates
        ]

    def _of_member(self, member: Member, channel: int) -> NDArray[np.float32]:
        entry = self.entries[member]
        name = MIRRORED if member.mirroring else PLAIN
        volume = np.asarray(entry.read(name)[channel : channel + 1], np.float32)
        outside = 1.0 if channel == 0 and not self.regions else 0.0
        on_cropped = resample_image(volume, entry.geometry.cropped.shape, order=1)
        return np.asarray(place(on_cropped, entry.geometry, outside)[0], np.float32)


# ---- the chosen one, looked at closely


@dataclass(frozen=True)
class _Detail:
    """What cleaning would do to one case, and a sample of its probabilities."""

    cleaned: Mapping[str, Mapping[Cleaning, float]]
    """By structure: Dice under each cleaning that was tried; nan where there is nothing to score."""
    probabilities: NDArray[np.float32]
    """(N, K) of voxels in and around the structures."""
    truth: NDArray[np.int16]
    """(N,) channel of the true class; with regions (N, K), 0 or 1."""


def _cleanings() -> tuple[Cleaning, ...]:
    return (Cleaning(), Cleaning(largest_only=True), *(Cleaning(smallest_mm3=size) for size in SIZES_MM3))


def _examine(cases: Sequence[HeldOut], chosen: Candidate, labels: Labels, *, workers: int) -> list[_Detail]:
    examine = functools.partial(examine_case, chosen=chosen, labels=labels)
    found: dict[int, _Detail] = {}
    for index, result in map_cases(examine, cases, workers=workers, names=[one.case for one in cases]):
        if isinstance(result, Exception):
            raise result
        found[index] = result
    return [found[index] for index in range(len(cases))]


def examine_case(one: HeldOut, *, chosen: Candidate, labels: Labels) -> _Detail:
    """Dice under every cleaning, and sampled probabilities, of the chosen candidate. Runs in a worker."""
    image = read_image(one.reference)
    truth, voxel = image.array[0], math.prod(image.grid.spacing)
    (answer,) = _answers(one, [chosen], labels)
    cleaned = {
        name: {c: _dice(clean(mask, c, voxel_mm3=voxel), truth, labels, name) for c in _cleanings()}
        for name, mask in answer
    }
    where = _around(truth, [mask for _, mask in answer], labels)
    reader = _Reader(one, [chosen], regions=labels.has_regions)
    sampled = [reader.probabilities(k)[0].ravel()[where] for k in range(labels.output_channels)]
    true = truth.ravel()[where]
    members = np.stack([labels.mask(true, name) for name in labels.names], axis=1)
    if not labels.has_regions:
        members = np.concatenate([~members.any(axis=1, keepdims=True), members], axis=1).argmax(axis=1)
    return _Detail(cleaned, np.stack(sampled, axis=1), members.astype(np.int16))


def _around(truth: NDArray[Any], masks: Sequence[NDArray[np.bool_]], labels: Labels) -> NDArray[np.intp]:
    """A fixed sample of voxels near structures: far away every network is right, which says nothing of its honesty."""
    from scipy import ndimage

    near = functools.reduce(np.logical_or, masks, truth > 0)
    near = ndimage.binary_dilation(near, iterations=2)
    if labels.ignore is not None:
        near &= truth != labels.ignore
    inside = np.flatnonzero(near)
    if len(inside) <= CALIBRATION_VOXELS:
        return inside
    return np.random.default_rng(SEED).choice(inside, CALIBRATION_VOXELS, replace=False)


def _choose_cleaning(details: Sequence[_Detail], labels: Labels, decisions: list[Decision]) -> dict[str, Cleaning]:
    chosen: dict[str, Cleaning] = {}
    for name in labels.names:
        dice = {c: np.array([[detail.cleaned[name][c]] for detail in details]) for c in _cleanings()}
        asis = dice.pop(Cleaning())
        tried = max(dice, key=lambda c: _mean(dice[c]))
        gain, low, high = _difference(dice[tried], asis, tried=len(dice))
        pays = low > 0
        if pays:
            chosen[name] = tried
        what = "the largest component alone" if tried.largest_only else f"components from {tried.smallest_mm3:g} mm3"
        decisions.append(
            _decision(
                f"cleaning.{name}",
                to_json(tried) if pays else None,
                f"the best that was tried, {what}, changes the Dice by {gain:+.4f} ({low:+.4f} to {high:+.4f}): "
                + ("beyond noise." if pays else "not beyond noise, so nothing is removed."),
            )
        )
    return chosen


def _calibrate(
    details: Sequence[_Detail], decisions: list[Decision], *, regions: bool
) -> tuple[float, tuple[float, float]]:
    """The temperature with the least cross-entropy over all cases; the calibration error before and after."""
    probabilities = np.clip(np.concatenate([d.probabilities for d in details]).astype(np.float64), 1e-6, 1 - 1e-6)
    truth = np.concatenate([d.truth for d in details])
    losses = [
        _cross_entropy(_tempered(probabilities, t, regions=regions), truth, regions=regions) for t in TEMPERATURES
    ]
    temperature = round(float(TEMPERATURES[int(np.argmin(losses))]), 3)
    before = calibration_error(probabilities, truth, regions=regions)
    after = calibration_error(_tempered(probabilities, temperature, regions=regions), truth, regions=regions)
    if after >= before:  # never less honest than it was
        temperature, after = 1.0, before
    decisions.append(
        _decision(
            "temperature",
            temperature,
            f"it makes held-out probabilities near the structures most likely: expected calibration error {before:.4f} "
            f"before, {after:.4f} after.",
        )
    )
    return temperature, (round(before, 5), round(after, 5))


def _tempered(probabilities: NDArray[np.float64], temperature: float, *, regions: bool) -> NDArray[np.float64]:
    """Probabilities (N, K) whose logits were divided by the temperature (Guo et al. 2017)."""
    powered = probabilities ** (1 / temperature)
    if regions:
        return powered / (powered + (1 - probabilities) ** (1 / temperature))
    return powered / powered.sum(axis=1, keepdims=True)


def _cross_entropy(probabilities: NDArray[np.float64], truth: NDArray[Any], *, regions: bool) -> float:
    likely = np.where(truth, probabilities, 1 - probabilities) if regions else _of_truth(probabilities, truth)
    return float(-np.log(np.clip(likely, 1e-12, None)).mean())


def _of_truth(probabilities: NDArray[np.float64], truth: NDArray[Any]) -> NDArray[np.float64]:
    return np.take_along_axis(probabilities, truth[:, None].astype(np.intp), axis=1)[:, 0]


def calibration_error(probabilities: NDArray[np.float64], truth: NDArray[Any], *, regions: bool) -> float:
    """Expected calibration error of probabilities (N, K): mean distance of confidence and accuracy over BINS bins.

    Guo et al. 2017, arXiv:1706.04599. Classes: of the likeliest one. Regions: each is a decision of its own.
    """
    if regions:
        answer = probabilities > 0.5
        confidence, right = np.where(answer, probabilities, 1 - probabilities).ravel(), (answer == truth).ravel()
    else:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    gap = np.bincount(bins, weights=confidence, minlength=BINS) - np.bincount(bins, weights=right, minlength=BINS)
    return float(np.abs(gap).sum() / max(1, counts.sum()))
