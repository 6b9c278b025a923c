"""A patch, larger than asked for -> an augmented patch: nnU-Net's augmentations, from batchgeneratorsv2."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from numpy.typing import NDArray
from torch import Tensor

from autoseg.plan import Configuration, Shape

Arrays = dict[str, Any]  # as batchgeneratorsv2 has it

SPATIAL_PROBABILITY = 0.2  # of a rotation, and of a scaling (nnU-Net's)
BLUR_REACH = 7  # voxels that the blur's kernel needs on each side
SCALING = (0.7, 1.4)  # nnU-Net's range; above 1 the structures become smaller
ROTATION_3D = math.radians(30)  # about every axis
ROTATION_IN_PLANE = math.pi  # where only the plane is rotated
LONG_PLANE_ROTATION = math.radians(15)  # in a plane longer than 1.5 times its width
KEPT_TURNS = 4  # spatial transforms that are kept, one for each size: any-scale training has many sizes


def in_plane(configuration: Configuration) -> bool:
    """Whether slices are turned and scaled in their plane alone, all of a volume or stack alike."""
    thick = not configuration.training.rotate_out_of_plane or max(configuration.preprocessing.label_scale) > 1
    return thick or configuration.patch_size[0] == 1


def rotation_limit(configuration: Configuration, patch: Shape | None = None) -> float:
    """Largest rotation in radians (nnU-Net's rule) of a patch, by default the configuration's."""
    _, y, x = patch or configuration.patch_size
    if not in_plane(configuration):
        return ROTATION_3D
    return LONG_PLANE_ROTATION if max(y, x) / min(y, x) > 1.5 else ROTATION_IN_PLANE


def source_size(configuration: Configuration, patch: Shape | None = None) -> Shape:
    """Voxels (z, y, x) to read so that a rotated and scaled patch finds data in its corners where there are any.

    The patch is the configuration's, without a halo, or the fine one behind it.
    """
    z, y, x = patch or configuration.patch_size
    angle = min(rotation_limit(configuration, patch), math.pi / 4)
    cos, sin = math.cos(angle), math.sin(angle)
    flat = in_plane(configuration)
    sizes = [
        float(z) if flat else cos * z + sin * max(y, x),
        cos * y + sin * (x if flat else max(z, x)),
        cos * x + sin * (y if flat else max(z, y)),
    ]
    scaled = [math.ceil(size * SCALING[1]) for size in sizes]
    return (z if flat else scaled[0], scaled[1], scaled[2])


@dataclass(frozen=True)
class Motion:
    """What became of a patch in space: for what lies on another grid and is to be moved alike."""

    matrix: NDArray[np.float64] | None = None
    """(3, 3): a place of the moved patch -> one of the source, both from their centres, in voxels (z, y, x)."""
    mirrored: tuple[int, ...] = ()
    """Axes along which the moved patch was then mirrored."""


class Augmentation:
    """Spatial, intensity and mirroring augmentations of one configuration, in nnU-Net's order.

    It draws from torch's and numpy's global generators; who calls it seeds both. Samples whose input and label share a
    grid are called with at once; super-resolution takes the steps one by one: `turn` or `flip`, then `disturb`.
    """

    motion: Motion
    """Of the sample that was made last."""

    def __init__(self, configuration: Configuration, *, previous_labels: tuple[tuple[int, ...], ...] = ()) -> None:
        self.configuration = configuration
        self.halo = configuration.architecture.halo
        self.plane = _depth(configuration) == 1
        self.spatial = _spatial(configuration, probability=SPATIAL_PROBABILITY)
        self.crop = _spatial(configuration, probability=0.0)
        self.intensity = _intensity(configuration)
        axes = configuration.training.mirror_axes
        self.mirror = MirrorTransform(tuple(axis - 1 for axis in axes if axis > 0) if self.plane else axes)
        self.mirror_volume = MirrorTransform(axes)
        self.previous_labels = previous_labels
        self.turns: dict[Shape, Turn] = {}
        self.reference_intensity = _reference_intensity()
        self.motion = Motion()

    def __call__(self, image: Tensor, label: Tensor, *, augment: bool = True) -> tuple[Tensor, Tensor]:
        """Image (C, Z, Y, X) float32, label (1 or 2, Z, Y, X) int16 of `source_size` -> the same of patch size.

        The image is longer by the halo. A second label channel is the previous stage's answer, and then the label has
        the halo too: it becomes further image channels, one for each group of values in `previous_labels` (a class or a
        region), roughened as an imperfect answer would be. With `augment=False` the patch is only cut out. What is
        given may be overwritten.
        """
        sample = (
            {"image": image[:, 0], "segmentation": label[:, 0]}
            if self.plane
            else {"image": image, "segmentation": label}
        )
        sample, matrix = (self.spatial if augment else self.crop)(sample)
        self.motion = Motion(matrix)
        if augment:
            sample = self._mirrored(self.mirror, self.intensity(**sample))
        image, label = sample["image"], sample["segmentation"]
        if self.plane:
            image, label = image.unsqueeze(1), label.unsqueeze(1)
        if self.previous_labels:
            onehot = torch.stack([torch.isin(label[1], torch.tensor(v)) for v in self.previous_labels]).float()
            if augment:  # built anew each time: it shuffles its own list of channels
                onehot = _roughen(len(self.previous_labels))(image=onehot)["image"]
            image, label = torch.cat((image, onehot)), label[:1, self.halo : label.shape[1] - self.halo]
        return image.contiguous(), label.contiguous()

    def turn(self, image: Tensor, label: Tensor, *, size: Shape) -> tuple[Tensor, Tensor]:
        """Image (C, Z, Y, X) and label (1, Z, Y, X), both of the source size of `size`, turned, scaled and mirrored.

        In the plane image and label may have different numbers of slices, which they keep.
        """
        if size not in self.turns:
            if len(self.turns) >= KEPT_TURNS:
                self.turns.clear()
            self.turns[size] = _turn(self.configuration, size, probability=SPATIAL_PROBABILITY)
        sample, matrix = self.turns[size]({"image": image, "segmentation": label})
        self.motion = Motion(matrix)
        sample = self._mirrored(self.mirror_volume, sample)
        return sample["image"], sample["segmentation"]

    def flip(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Both mirrored along the same axes; they may have different shapes."""
        self.motion = Motion()
        sample = self._mirrored(self.mirror_volume, {"image": image, "segmentation": label})
        return sample["image"], sample["segmentation"]

    def disturb(self, image: Tensor) -> Tensor:
        """The input (C, Z, Y, X) with another noise, sharpness, brightness and contrast; it may be overwritten."""
        disturbed: Tensor = self.intensity(image=image[:, 0] if self.plane else image)["image"]
        return (disturbed.unsqueeze(1) if self.plane else disturbed).contiguous()

    def disturb_reference(self, reference: Tensor) -> Tensor:
        """The reference (R, Z, Y, X) with another noise, brightness and contrast of its own; it may be overwritten."""
        disturbed: Tensor = self.reference_intensity(image=reference)["image"]
        return disturbed.contiguous()

    def _mirrored(self, mirror: MirrorTransform, sample: Arrays) -> Arrays:
        """The sample mirrored; the motion says how."""
        parameters = mirror.get_parameters(**sample)
        mirrored: Arrays = mirror.apply(sample, **parameters)
        flat = 4 - sample["image"].ndim  # a plane lacks its first axis
        self.motion = replace(self.motion, mirrored=tuple(axis + flat for axis in parameters["axes"]))
        return mirrored


def _depth(configuration: Configuration) -> int:
    """Slices of the network's input."""
    return configuration.patch_size[0] + 2 * configuration.architecture.halo


@dataclass(frozen=True)
class Turn:
    """A spatial transform of samples, of volumes (C, Z, Y, X) or of planes (C, Y, X)."""

    transform: SpatialTransform
    slice_wise: bool
    """Whether it is one of planes and every slice of a volume is turned alike."""

    def __call__(self, sample: Arrays) -> tuple[Arrays, NDArray[np.float64] | None]:
        """The sample moved, and `Motion.matrix`."""
        if self.slice_wise:
            sample = Convert3DTo2DTransform()(**sample)
        parameters = self.transform.get_parameters(**sample)
        sample = self.transform.apply(sample, **parameters)
        affine, matrix = parameters["affine"], None
        if affine is not None:
            matrix = np.eye(3)
            matrix[-len(affine) :, -len(affine) :] = affine
        return (Convert2DTo3DTransform()(**sample) if self.slice_wise else sample), matrix


def _spatial(configuration: Configuration, *, probability: float) -> Turn:
    """For samples as `Augmentation.__call__` sees them: a plane without its z axis."""
    plane = _depth(configuration) == 1
    size = configuration.patch_size
    if plane:
        return Turn(_space_transform(configuration, size, probability), slice_wise=False)
    return _turn(configuration, size, probability=probability)


def _turn(configuration: Configuration, size: Shape, *, probability: float) -> Turn:
    """For volumes (C, Z, Y, X): to `size`, or to its plane with as many slices as there are."""
    return Turn(_space_transform(configuration, size, probability), slice_wise=in_plane(configuration))


def _space_transform(configuration: Configuration, size: Shape, probability: float) -> SpatialTransform:
    limit = rotation_limit(configuration, size)
    return SpatialTransform(
        size[1:] if in_plane(configuration) else size,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=probability,
        rotation=(-limit, limit),
        p_scaling=probability,
        scaling=SCALING,
        p_synchronize_scaling_across_axes=1,
    )


def _slice_wise(transform: BasicTransform) -> BasicTransform:
    """The same in-plane transform for every slice of a volume."""
    return ComposeTransforms([Convert3DTo2DTransform(), transform, Convert2DTo3DTransform()])


def _intensity(configuration: Configuration) -> BasicTransform:
    plane = _depth(configuration) == 1
    kept = tuple(
        axis
        for axis in range(3)
        if axis not in configuration.training.low_resolution_axes or (axis == 0 and configuration.patch_size[0] == 1)
    )
    low_resolution = SimulateLowResolutionTransform(
        (0.5, 1.0),
        synchronize_channels=False,
        synchronize_axes=True,
        ignore_axes=tuple(axis - 1 for axis in kept if axis > 0) if plane else kept,
        p_per_channel=0.5,
    )
    contrast = {"synchronize_channels": False, "p_per_channel": 1.0}
    gamma = {"gamma": BGContrast((0.7, 1.5)), "p_retain_stats": 1.0, **contrast}
    noise = (GaussianNoiseTransform((0.0, 0.1), p_per_channel=1.0, synchronize_channels=True), 0.1)
    stages: list[tuple[BasicTransform, float]] = [
        (MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), **contrast), 0.15),
        (ContrastTransform(BGContrast((0.75, 1.25)), preserve_range=True, **contrast), 0.15),
        (low_resolution, 0.25),
        (GammaTransform(p_invert_image=1.0, **gamma), 0.1),
        (GammaTransform(p_invert_image=0.0, **gamma), 0.3),
    ]
    architecture = configuration.architecture
    if architecture.image_channels and architecture.image_body == "shared":
        # the image to answer with is in the input's units: with another brightness, contrast or gamma in the input
        # alone no network could know which, and a lower resolution would teach it an acquisition that there is not
        stages = []
    blur = _blur(configuration)
    stages = [noise, *([(blur, 0.2)] if blur is not None else []), *stages]
    return ComposeTransforms([RandomTransform(transform, probability) for transform, probability in stages])


def _reference_intensity() -> BasicTransform:
    """What a patch of any shape can take: the image's augmentations without those that change its resolution."""
    contrast = {"synchronize_channels": False, "p_per_channel": 1.0}
    gamma = GammaTransform(BGContrast((0.7, 1.5)), p_invert_image=0.0, p_retain_stats=1.0, **contrast)
    stages: list[tuple[BasicTransform, float]] = [
        (GaussianNoiseTransform((0.0, 0.1), p_per_channel=1.0, synchronize_channels=True), 0.1),
        (MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), **contrast), 0.15),
        (ContrastTransform(BGContrast((0.75, 1.25)), preserve_range=True, **contrast), 0.15),
        (gamma, 0.3),
    ]
    return ComposeTransforms([RandomTransform(transform, probability) for transform, probability in stages])


def _blur(configuration: Configuration) -> BasicTransform | None:
    """Gaussian blur along the axes that are long enough for its kernel; in plane only for thick slices."""
    _, y, x = configuration.patch_size
    z = _depth(configuration)
    if min(y, x) <= BLUR_REACH:
        return None
    # benchmark=False: timing two implementations against each other would make the result depend on the machine's load
    if z > 1 and (z <= BLUR_REACH or in_plane(configuration)):
        return _slice_wise(GaussianBlurTransform((0.5, 1.0), synchronize_channels=True, benchmark=False))
    return GaussianBlurTransform((0.5, 1.0), p_per_channel=0.5, benchmark=False)


def _roughen(count: int) -> BasicTransform:
    """nnU-Net's for cascades: random erosion, dilation, opening, closing; lost components."""
    channels = list(range(count))
    operators = ApplyRandomBinaryOperatorTransform(channel_idx=channels, strel_size=(1, 8), p_per_label=0.5)
    lost = RemoveRandomConnectedComponentFromOneHotEncodingTransform(
        channel_idx=channels, fill_with_other_class_p=0.0, dont_do_if_covers_more_than_x_percent=0.15, p_per_label=0.5
    )
    return ComposeTransforms([RandomTransform(operators, 0.4), RandomTransform(lost, 0.2)])
