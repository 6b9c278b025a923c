"""A model folder -> `Model`; an image -> its labels or probabilities, on its own grid and in its own orientation.

A super-resolving model answers on a finer grid over the same extent: the image's, refined.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.checkpoint import Checkpoint
from autoseg.dataset import Case, RawDataset
from autoseg.device import autocast_dtype, resolve_device
from autoseg.errors import CheckpointError, DatasetError, PredictionError
from autoseg.image import Grid, Image, Triple, image_ending
from autoseg.inference.answer_grid import asked_plane, input_settings, output_geometry
from autoseg.inference.chosen import Chosen
from autoseg.inference.ensemble import average_logits, average_on_one_grid
from autoseg.inference.export import export_image, export_labels, export_probabilities
from autoseg.inference.grids import bring_image, bring_logits, grid_between
from autoseg.inference.package import is_packed, unpacked
from autoseg.inference.postprocess import Cleaning, clean_labels
from autoseg.inference.sliding_window import MAX_RAM_BYTES, sliding_window_logits
from autoseg.networks import UNet
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Configuration, Plan, Shape
from autoseg.preprocessing.case import (
    CaseGeometry,
    PreprocessedCase,
    bring_label,
    find_geometry,
    find_units,
    preprocess_case,
)
from autoseg.preprocessing.degradation import as_acquired
from autoseg.preprocessing.framed import turned
from autoseg.reading import check_overlap, read_case
from autoseg.workspace import CHECKPOINT, MODELS, SELECTION

log = logging.getLogger(__name__)

BATCH_VOXELS = {"cpu": 2**17, "cuda": 2**22, "mps": 2**20}  # voxels of all inputs that enter the network at once

Source = Path | str | Sequence[Path | str] | Image | NDArray[np.generic]


@dataclass(frozen=True)
class PredictionSettings:
    """How a model is applied; none of it changes what the model is."""

    mirroring: bool = True
    """Average over mirrored copies, along the axes that the plan allows."""
    step_size: float = 0.5
    """Step between tiles as a fraction of the tile, above 0 and at most 1."""
    max_ram_bytes: int = MAX_RAM_BYTES
    """What one case's logits and probabilities may take in memory before they are kept on disk."""

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= 1:
            raise PredictionError(f"The step size must be above 0 and at most 1, got {self.step_size}.")


class NetworkAnswer(NamedTuple):
    """What the networks of a model answer, on the CPU."""

    logits: Tensor | None
    """(K, Z, Y, X) of classes or regions; None from a model that only super-resolves."""
    image: Tensor | None
    """(I, Z, Y, X) in the units of the input; None from a model without an image head."""


@dataclass(frozen=True)
class CaseAnswer:
    """What a model answers about one case."""

    answer: NetworkAnswer
    geometry: CaseGeometry
    """The network grid that the answer lies on, and the way to the grid that it is asked for on."""

    @property
    def logits(self) -> Tensor:
        """Of classes or regions (K, Z, Y, X), of a model that predicts labels."""
        assert self.answer.logits is not None, "the model has no class logits"
        return self.answer.logits


@dataclass(frozen=True)
class Model:
    """One configuration with its trained folds, ready to predict."""

    plan: Plan
    configuration: Configuration
    networks: tuple[UNet, ...]
    """One for each fold, in evaluation mode, on `device`."""
    folds: tuple[str, ...]
    """Their names: "0" to "4", or "all"."""
    device: torch.device
    previous: Model | None = None
    """The model whose labels are further input channels (cascade)."""
    settings: PredictionSettings = field(default_factory=PredictionSettings)
    partners: tuple[Model, ...] = ()
    """Other configurations whose probabilities are averaged with this one's, on the grid that this one answers on."""
    weight: float = 1.0
    """Of this one's probabilities in such an average."""
    temperature: float = 1.0
    """What logits are divided by, so that probabilities are as likely as they say."""
    cleaning: Mapping[str, Cleaning] = field(default_factory=dict)
    """What is removed from the predicted mask of each structure."""

    def predict(
        self,
        source: Source,
        spacing: Triple | None = None,
        *,
        native: bool = False,
        output_spacing: Triple | None = None,
        settings: PredictionSettings | None = None,
    ) -> Image:
        """Labels (1, Z, Y, X) of an image, unsigned integers, on its own grid and in its own orientation.

        `source` is a file (or one for each channel, in a list), a folder with a DICOM series, an `Image`, or an array
        (Z, Y, X) or (C, Z, Y, X) with its `spacing` (z, y, x) in mm. A super-resolving model answers on the refined
        grid: of `output_spacing` (mm, along the array's axes) where it takes any scale; with `native` on the image's
        own, where a voxel gets the class with the largest mean probability. Raises DatasetError where a file cannot be
        read and PredictionError where the image does not fit the model.
        """
        settings = settings or self.default_settings
        image = self.read(source, spacing)
        answer = self.label_answer(image, native=native, output_spacing=output_spacing, settings=settings)
        return self.labels_of(answer)

    def predict_probabilities(
        self,
        source: Source,
        spacing: Triple | None = None,
        *,
        native: bool = False,
        output_spacing: Triple | None = None,
        settings: PredictionSettings | None = None,
    ) -> Image:
        """Probabilities (K, Z, Y, X) float32 on the grid that `predict` answers on: background and classes, or regions.

        Takes and raises what `predict` does.
        """
        settings = settings or self.default_settings
        image = self.read(source, spacing)
        answer = self.label_answer(image, native=native, output_spacing=output_spacing, settings=settings)
        return self.probabilities_of(answer, max_ram_bytes=settings.max_ram_bytes)

    def predict_image(
        self,
        source: Source,
        spacing: Triple | None = None,
        *,
        output_spacing: Triple | None = None,
        settings: PredictionSettings | None = None,
    ) -> Image:
        """The super-resolved image (I, Z, Y, X) float32 on the refined grid, in the units of the image.

        Normalised intensities where the normalisation cannot be undone (masked or bias-corrected). Takes and raises
        what `predict` does, and PredictionError where the model has no image head.
        """
        settings = settings or self.default_settings
        image = self.read(source, spacing)
        case = self.preprocess(image)
        answer = self.answer(case, image=image, output_spacing=output_spacing, settings=settings)
        return self.export_super_resolved(answer, image, max_ram_bytes=settings.max_ram_bytes)

    def labels_of(self, answer: CaseAnswer) -> Image:
        """The labels of an answer, cleaned as cross-validation chose, on the grid of the file."""
        return clean_labels(
            export_labels(answer.logits, answer.geometry, self.plan.labels), self.cleaning, self.plan.labels
        )

    def probabilities_of(self, answer: CaseAnswer, *, max_ram_bytes: int = MAX_RAM_BYTES) -> Image:
        """The calibrated probabilities of an answer on the grid of the file; not cleaned."""
        logits = answer.logits if self.temperature == 1 else answer.logits / self.temperature
        return export_probabilities(logits, answer.geometry, self.plan.labels, max_ram_bytes=max_ram_bytes)

    def label_answer(
        self, image: Image, *, native: bool, output_spacing: Triple | None, settings: PredictionSettings
    ) -> CaseAnswer:
        """What the model answers about an image that `read` gave, brought to the image's own grid with `native`.

        Raises PredictionError where the model predicts no labels.
        """
        if not self.predicts_labels:
            raise PredictionError(
                f"Configuration {self.configuration.name} was trained without labels and answers with an image only; "
                "ask for that: predict_image, or `autoseg predict --image`."
            )
        case = self.preprocess(image)
        answer = self.answer(case, image=image, output_spacing=output_spacing, settings=settings)
        return self.brought_back(answer, case.geometry, settings=settings) if native else answer

    def brought_back(
        self, answer: CaseAnswer, geometry: CaseGeometry, *, settings: PredictionSettings | None = None
    ) -> CaseAnswer:
        """The labels' part of an answer on the grid of the image, whose `geometry` it is given: mean probabilities.

        That is the network's input grid, but for images that are finer than it where the network refines: their voxels.
        """
        if self.configuration.super_resolves:
            finest = zip(geometry.cropped.shape, answer.geometry.network_shape, geometry.network_shape, strict=True)
            z, y, x = (max(least, min(own, asked)) for own, asked, least in finest)
            geometry = replace(geometry, network_shape=(z, y, x))
        limit = (settings or self.settings).max_ram_bytes
        regions = self.plan.labels.has_regions
        logits = bring_logits(answer.logits, answer.geometry, geometry, regions=regions, max_ram_bytes=limit)
        return CaseAnswer(NetworkAnswer(logits, None), geometry)

    @property
    def predicts_labels(self) -> bool:
        """Whether there are class logits; a model may be trained on images alone."""
        return self.configuration.architecture.output_channels > 0

    def export_super_resolved(self, answer: CaseAnswer, image: Image, *, max_ram_bytes: int = MAX_RAM_BYTES) -> Image:
        """The image of an answer on its grid, in the units of the raw `image`. Raises PredictionError without one."""
        self.require_image_head()
        assert answer.answer.image is not None
        settings = input_settings(self.configuration, image)
        units = find_units(image, find_geometry(image, settings), settings, acquire=self._acquire)
        return export_image(answer.answer.image, answer.geometry, units, max_ram_bytes=max_ram_bytes)

    def require_image_head(self) -> None:
        """Raises PredictionError where the model does not super-resolve images."""
        if not self.configuration.architecture.image_channels:
            raise PredictionError(
                f"Configuration {self.configuration.name} has no image head, so there is no super-resolved image; use "
                "a model that was trained with one, such as 3d_sr."
            )

    def read(self, source: Source, spacing: Triple | None = None) -> Image:
        """The image (C, Z, Y, X) float32 of any `source` that `predict` takes, checked against the model."""
        if isinstance(source, Image):
            return self.check(source)
        if isinstance(source, np.ndarray):
            return self.check(image_from_array(source, spacing))
        paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
        return self.check(self.read_case(Case(_case_name(paths[0]), tuple(paths))))

    def read_case(self, case: Case) -> Image:
        """The image of a case's files. Raises DatasetError naming case and file."""
        plan = self.plan
        reading = RawDataset(
            case.images[0].parent,
            plan.dataset,
            plan.channels,
            plan.labels,
            plan.file_ending,
            (),
            reference_channels=plan.reference_channels,
        )
        return read_case(case, reading)[0]

    def check(self, image: Image) -> Image:
        """The image as float32. Raises PredictionError where the model cannot take it."""
        channels = self.plan.channels
        self._check_references(image)
        if image.channels + len(image.references) != len(channels):
            raise PredictionError(
                f"The image has {image.channels} channels, expected {len(channels)} ({', '.join(channels)}); give one "
                "file for each channel, CASE_0000 to "
                f"CASE_{len(channels) - 1:04d}, in this order."
            )
        if image.grid.dimensions == 2 and self.configuration.topology != "2d":
            raise PredictionError(
                f"The image is a plane of {image.shape[1:]} pixels, expected a volume: configuration "
                f"{self.configuration.name} is {self.configuration.topology}; use a 2d configuration."
            )
        array = image.array
        if array.dtype.kind not in "biuf":
            raise PredictionError(f"The image has voxels of type {array.dtype}, expected numbers.")
        if array.dtype.kind == "f" and not np.isfinite(array.sum(dtype=np.float64)):
            raise PredictionError("The image has NaN or infinite voxels; replace them by a value that makes sense.")
        return replace(image, array=array.astype(np.float32, copy=False))

    def _check_references(self, image: Image) -> None:
        """Refuse an image without the channels that the model takes on grids of their own. Raises PredictionError."""
        names = [self.plan.channels[number] for number in self.plan.reference_channels]
        if len(image.references) != len(names):
            raise PredictionError(
                f"The image has {len(image.references)} reference channels on grids of their own, expected {len(names)}"
                + (f" ({', '.join(names)}); give one file for each channel, or `Image.references`." if names else ".")
            )
        for name, reference in zip(names, image.references, strict=True):
            try:
                check_overlap(image.grid, reference.grid, f"'{name}'")
            except DatasetError as error:
                raise PredictionError(str(error)) from error
            if reference.channels != 1 or not np.isfinite(reference.array.sum(dtype=np.float64)):
                raise PredictionError(f"The reference '{name}' must be one channel without NaN or infinite voxels.")

    def preprocess(self, image: Image) -> PreprocessedCase:
        """The image on the grid that the network reads, with the way back."""
        return preprocess_case(image, None, input_settings(self.configuration, image), None, acquire=self._acquire)

    def _acquire(self, array: NDArray[Any], geometry: CaseGeometry) -> NDArray[Any]:
        return as_acquired(array, geometry, self.configuration)

    def answer(
        self,
        case: PreprocessedCase,
        *,
        image: Image | None = None,
        output_spacing: Triple | None = None,
        settings: PredictionSettings | None = None,
    ) -> CaseAnswer:
        """What the networks answer about a case from `preprocess`, and where; a cascade needs its `image` too."""
        settings = settings or self.default_settings
        asked = settings  # what the partners are given
        settings = replace(settings, mirroring=settings.mirroring and self.settings.mirroring)
        geometry = output_geometry(self.configuration, case.geometry, output_spacing)
        if self.needs_image and image is None:
            raise ValueError("a cascade and an ensemble need the image, to predict with their other models")
        array = case.image
        if self.previous is not None and image is not None:
            coarse = self.previous.predict(image, native=True, settings=settings)
            array = self.with_previous_labels(array, coarse, case.geometry)
        grid = grid_between(case.geometry, geometry) if self.configuration.super_resolves else None
        network_answer = predict_network_grid(self, array, grid=grid, reference=case.reference, settings=settings)
        own = CaseAnswer(network_answer, geometry)
        if self.partners and image is not None:
            logits, _ = average_on_one_grid(
                itertools.chain([(own.logits, geometry)], self._partner_answers(image, asked)),
                regions=self.plan.labels.has_regions,
                target=geometry,
                weights=[self.weight, *(partner.weight for partner in self.partners)],
                max_ram_bytes=settings.max_ram_bytes,
            )
            own = CaseAnswer(NetworkAnswer(logits, own.answer.image), geometry)
        if output_spacing is None:
            return own
        target = asked_plane(self.configuration, geometry, output_spacing)
        return self._brought_to(target, own, max_ram_bytes=settings.max_ram_bytes)

    def _brought_to(self, target: CaseGeometry, answer: CaseAnswer, *, max_ram_bytes: int) -> CaseAnswer:
        """An answer on another network grid: mean probabilities, and the image."""
        logits, image = answer.answer
        if target == answer.geometry:
            return answer
        if logits is not None:
            regions = self.plan.labels.has_regions
            logits = bring_logits(logits, answer.geometry, target, regions=regions, max_ram_bytes=max_ram_bytes)
        if image is not None:
            image = torch.from_numpy(bring_image(Image(image.numpy(), answer.geometry.network), target.network).array)
        return CaseAnswer(NetworkAnswer(logits, image), target)

    @property
    def default_settings(self) -> PredictionSettings:
        """The settings that hold where none are given; each member of an ensemble mirrors only where it pays for it."""
        mirroring = any(model.settings.mirroring for model in (self, *self.partners))
        return replace(self.settings, mirroring=mirroring)

    @property
    def needs_image(self) -> bool:
        """Whether `answer` needs the raw image, for models that preprocess it otherwise."""
        return self.previous is not None or bool(self.partners)

    def _partner_answers(self, image: Image, settings: PredictionSettings) -> Iterator[tuple[Tensor, CaseGeometry]]:
        for partner in self.partners:
            answer = partner.answer(partner.preprocess(image), image=image, settings=settings)
            yield answer.logits, answer.geometry

    def with_previous_labels(
        self, array: NDArray[np.float32], coarse: Image, geometry: CaseGeometry
    ) -> NDArray[np.float32]:
        """`array` (C, Z, Y, X) and after it, for each foreground structure, where `coarse` labels show it (0 or 1)."""
        labels = self.plan.labels
        brought = bring_label(coarse, geometry)[0]
        masks = [labels.mask(brought, name) for name in labels.names]
        return np.concatenate([array, np.stack(masks).astype(np.float32)])


def predict_network_grid(
    model: Model,
    image: NDArray[np.float32] | Tensor,
    *,
    grid: OutputGrid | None = None,
    reference: NDArray[np.float32] | Tensor | None = None,
    reference_grid: OutputGrid | None = None,
    settings: PredictionSettings | None = None,
) -> NetworkAnswer:
    """Logits (K, Z, Y, X) of a preprocessed `image` (C, Z, Y, X) float32, and the super-resolved image, on the CPU.

    `grid` is what is asked for of a super-resolving model, along the network axes; others answer on the image's grid.
    A `reference` (R, Z', Y', X') lies on `reference_grid` as seen from the image, by default it covers just that.
    Of several folds or frames, logits whose probabilities are the mean of theirs, and the mean of the images. They run
    one after the other. In a cascade the channels of the previous stage must be there (`Model.with_previous_labels`).
    Raises PredictionError where the number of channels is not the network's, or there are too few slices.
    """
    settings = settings or model.settings
    configuration = model.configuration
    array = torch.as_tensor(image)
    architecture = configuration.architecture
    if len(array) != architecture.input_channels:
        raise PredictionError(
            f"Configuration {configuration.name} takes {architecture.input_channels} channels, got {len(array)} "
            "(in a cascade: image channels and one for each foreground structure)."
        )
    _check_slices(configuration, array)
    apart = None if reference is None else torch.as_tensor(reference)
    if (0 if apart is None else len(apart)) != architecture.reference_channels:
        raise PredictionError(
            f"Configuration {configuration.name} takes {architecture.reference_channels} reference channels, got "
            f"{0 if apart is None else len(apart)}."
        )
    images: list[Tensor] = []  # their sum

    def class_logits() -> Iterator[Tensor]:
        for member in _member_answers(model, array, grid, apart, reference_grid, settings):
            if architecture.image_channels:
                part = member[architecture.output_channels :].float()
                images[:] = [images[0] + part] if images else [part]
            yield member[: architecture.output_channels]

    if architecture.output_channels:
        logits = average_logits(class_logits(), regions=model.plan.labels.has_regions)
    else:
        logits = None
        for _ in class_logits():
            pass
    members = len(model.networks) * len(configuration.frames(training=False))
    return NetworkAnswer(logits, images[0] / members if images else None)


def _check_slices(configuration: Configuration, image: Tensor) -> None:
    """Refuse a volume that is mostly edge for a network that sees neighbouring slices. Raises PredictionError."""
    seen = configuration.architecture.context_slices
    for frame in configuration.frames(training=False):
        slices = image.shape[frame[0] + 1]
        if slices < seen:
            raise PredictionError(
                f"The image has {slices} {'slice' if slices == 1 else 'slices'} along the axis of the stack, expected "
                f"at least {seen}, which configuration {configuration.name} sees at once; use a 2d configuration."
            )


def _member_answers(
    model: Model,
    image: Tensor,
    grid: OutputGrid | None,
    reference: Tensor | None,
    reference_grid: OutputGrid | None,
    settings: PredictionSettings,
) -> Iterator[Tensor]:
    """(K + I, Z, Y, X) along the network axes from each fold, in each frame."""
    configuration = model.configuration
    patch, architecture = configuration.patch_size, configuration.architecture
    at_once = BATCH_VOXELS.get(model.device.type, BATCH_VOXELS["cpu"])
    voxels = int(np.prod(patch)) * architecture.context_slices
    if grid is not None:
        voxels = round(voxels * float(np.prod(grid.scale)))
    if reference is not None:
        voxels += int(np.prod(architecture.reference_shape(patch, configuration.sr_scale)))
    for network in model.networks:
        for frame in configuration.frames(training=False):
            answer = sliding_window_logits(
                network,
                image.permute(0, *(axis + 1 for axis in frame)),
                patch_size=patch,
                divisor=architecture.divisor,
                halo=architecture.halo,
                grid=None if grid is None else _in_frame(grid, frame),
                reference=None if reference is None else reference.permute(0, *(axis + 1 for axis in frame)),
                reference_grid=None if reference_grid is None else _in_frame(reference_grid, frame),
                step_size=settings.step_size,
                mirror_axes=_mirror_axes(configuration, settings),
                batch_size=max(1, at_once // voxels),
                precision=autocast_dtype(model.device),
                device=model.device,
                max_ram_bytes=settings.max_ram_bytes,
            )
            yield answer.permute(0, *(frame.index(axis) + 1 for axis in range(3)))


def _in_frame(grid: OutputGrid, frame: Shape) -> OutputGrid:
    return OutputGrid(turned(grid.shape, frame), turned(grid.scale, frame), turned(grid.start, frame))


def _mirror_axes(configuration: Configuration, settings: PredictionSettings) -> tuple[int, ...]:
    if not settings.mirroring:
        return ()
    # a network that sees one slice: mirroring along z changes nothing
    one_slice = configuration.topology != "3d" and not configuration.architecture.halo
    return tuple(axis for axis in configuration.training.mirror_axes if not (one_slice and axis == 0))


def load_model(path: Path | str, device: str = "auto", *, folds: Sequence[str] = ()) -> Model:
    """The model at `path`: one fold's folder, `models/CONFIGURATION` (its finished folds), an exported folder or zip.

    `folds` keeps only the named ones ("0", "all"); by default all finished ones are averaged, and one whose training
    was stopped or still runs is left out, unless there is no other. The previous stage of a
    cascade is loaded from the folder beside, `models/<previous stage>`. Raises CheckpointError where there is no
    sound model, or its folds are of different plans.
    """
    where = Path(path)
    if is_packed(where):
        with unpacked(where) as folder:
            if (folder / SELECTION).is_file():
                return _load_selected(folder, device, folds=folds)
            return load_model(folder / MODELS, device, folds=folds)
    configuration_folder, files = _checkpoint_files(where)
    if folds:
        files = _chosen_folds(files, folds, where)
    checkpoints = [Checkpoint.load(file) for file in files]
    if not folds:
        files, checkpoints = _finished(files, checkpoints)
    first = checkpoints[0]
    for checkpoint, file in zip(checkpoints[1:], files[1:], strict=True):
        if (checkpoint.plan.id, checkpoint.configuration) != (first.plan.id, first.configuration):
            raise CheckpointError(
                f"{file}: was trained with another plan or configuration than {files[0]}; train the older one anew."
            )
    on_device = resolve_device(device)
    networks = tuple(checkpoint.build_network().requires_grad_(False).to(on_device) for checkpoint in checkpoints)
    previous = _previous_stage(first, configuration_folder, device)
    names = tuple(checkpoint.fold for checkpoint in checkpoints)
    log.info("Model %s, folds %s, on %s.", first.configuration, ", ".join(names), on_device)
    return Model(first.plan, first.settings, networks, names, on_device, previous)


def _load_selected(folder: Path, device: str, *, folds: Sequence[str]) -> Model:
    """The ensemble, or the single configuration, that cross-validation chose, with what it does to the answer."""
    chosen = Chosen.load(folder / SELECTION)
    members = [
        replace(
            load_model(folder / MODELS / member.configuration, device, folds=folds),
            settings=PredictionSettings(mirroring=member.mirroring),
            weight=weight,
        )
        for member, weight in zip(chosen.members, chosen.weights, strict=True)
    ]
    # whose answer has the finest grid says where all of them answer, and whose grid can be asked for, before the others
    members.sort(key=lambda member: _abilities(member.configuration), reverse=True)
    first, *partners = members
    return replace(first, partners=tuple(partners), temperature=chosen.temperature, cleaning=chosen.cleaning)


def _abilities(configuration: Configuration) -> tuple[bool, bool, bool]:
    """Whether it answers on any grid, on a finer one, and with an image."""
    any_grid, image = configuration.sr_range is not None, configuration.architecture.image_channels > 0
    return any_grid, configuration.super_resolves, image


def _previous_stage(checkpoint: Checkpoint, configuration_folder: Path, device: str) -> Model | None:
    name = checkpoint.settings.previous_stage
    if name is None:
        return None
    folder = configuration_folder.parent / name
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no model of the previous stage, which {checkpoint.configuration} needs; "
            f"train {name}, or put its folder beside that of {checkpoint.configuration}."
        )
    previous = load_model(folder, device)
    if previous.plan.id != checkpoint.plan.id:
        raise CheckpointError(f"{folder}: was trained with another plan than {configuration_folder}; train it anew.")
    return previous


def _checkpoint_files(path: Path) -> tuple[Path, list[Path]]:
    """The folder `models/CONFIGURATION` that `path` means or lies in, and the checkpoints to load."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such model.")
    if path.is_file():
        return path.parent.parent, [path]
    if (path / CHECKPOINT).is_file():
        return path.resolve().parent, [path / CHECKPOINT]
    finished = sorted(path.glob(f"fold_*/{CHECKPOINT}"))
    if finished:
        return path.resolve(), finished
    return _exported_configuration(path)


def _exported_configuration(path: Path) -> tuple[Path, list[Path]]:
    """The one configuration of an exported folder that no other takes as its previous stage."""
    models = path / MODELS if (path / MODELS).is_dir() else path
    folders = {file.parent.parent for file in models.glob(f"*/fold_*/{CHECKPOINT}")}
    if not folders:
        raise CheckpointError(
            f"{path}: no finished fold found; expected {CHECKPOINT}, fold_*/{CHECKPOINT} or "
            f"{MODELS}/CONFIGURATION/fold_*/{CHECKPOINT}."
        )
    plan = Checkpoint.load(next(iter(sorted(folders))).glob(f"fold_*/{CHECKPOINT}").__next__()).plan
    stages = {c.previous_stage for c in plan.configurations if c.name in {folder.name for folder in folders}}
    last = sorted(folder for folder in folders if folder.name not in stages)
    if len(last) != 1:
        raise CheckpointError(
            f"{path}: holds several models ({', '.join(folder.name for folder in last)}), expected one; "
            f"give one of their folders, such as {last[0]}."
        )
    return _checkpoint_files(last[0])


def _finished(files: list[Path], checkpoints: list[Checkpoint]) -> tuple[list[Path], list[Checkpoint]]:
    """Without the folds whose training is not at its end; all of them where none is."""
    finished = [i for i, checkpoint in enumerate(checkpoints) if checkpoint.summary.get("finished", True)]
    for i in sorted(set(range(len(files))) - set(finished)):
        what = "it is left out" if finished else "it is used as it stands"
        log.warning("%s: the training of this fold is not finished; %s.", files[i].parent, what)
    kept = finished or range(len(files))
    return [files[i] for i in kept], [checkpoints[i] for i in kept]


def _chosen_folds(files: Sequence[Path], folds: Sequence[str], where: Path) -> list[Path]:
    found = {file.parent.name.removeprefix("fold_"): file for file in files}
    missing = [fold for fold in folds if fold not in found]
    if missing:
        raise CheckpointError(
            f"{where}: fold {', '.join(missing)} is not finished; finished are {', '.join(sorted(found))}."
        )
    return [found[fold] for fold in folds]


def image_from_array(array: NDArray[np.generic], spacing: Triple | None) -> Image:
    """An array (Z, Y, X) or (C, Z, Y, X) with its `spacing` (z, y, x) in mm as `Image`. Raises PredictionError."""
    if spacing is None or len(spacing) != 3 or min(spacing) <= 0:
        raise PredictionError(
            f"An array needs its spacing (z, y, x) in mm, three positive numbers, got {spacing}; "
            "predict(array, spacing=(3.0, 1.0, 1.0))."
        )
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise PredictionError(f"An array must be (Z, Y, X) or (C, Z, Y, X) and not empty, got shape {array.shape}.")
    channels = array[None] if array.ndim == 3 else array
    z, y, x = (int(n) for n in channels.shape[1:])
    return Image(channels, Grid((z, y, x), (float(spacing[0]), float(spacing[1]), float(spacing[2]))))


def _case_name(path: Path) -> str:
    return path.name.removesuffix(image_ending(path) or "")
