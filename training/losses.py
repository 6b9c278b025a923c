"""What a network answers, and the truth -> a loss: soft Dice + cross-entropy, deep supervision, fine images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoseg.acquisition import apply_along, slice_matrix
from autoseg.errors import PlanError, unknown_choice
from autoseg.labels import Labels
from autoseg.networks import UNet
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Acquisition, Architecture, Configuration, Vector
from autoseg.training.distributed import ALONE, World
from autoseg.training.shapes import has_fine_image

SMOOTH = 1e-5  # keeps the Dice of an absent class finite (nnU-Net's)
LEAST_SHARE = 1e-4  # of a thick voxel that a class has at least
LARGEST_SHARE = 4.0  # how sharply the label of a thick voxel follows the class with the largest share of it
LEAST_SPREAD = 1e-3  # of a feature over a batch; below it the feature says nothing there and is not blown up


class DiceCrossEntropy(nn.Module):
    """Cross-entropy minus soft Dice (Drozdzal et al. 2016) over the foreground, sums taken over the whole batch.

    The batch is that of all processes of `world`; the mean of what they answer is its loss.

    Classes: softmax and categorical cross-entropy, Dice without background. Regions: sigmoid and binary
    cross-entropy, Dice of every region. Voxels of the ignore label count in neither.
    """

    channel_of: Tensor
    members: Tensor

    def __init__(self, labels: Labels, world: World = ALONE) -> None:
        super().__init__()
        self.world = world
        self.regions = labels.has_regions
        self.ignores = labels.ignore is not None
        top = max(labels.known_values)
        channel_of = torch.zeros(top + 1, dtype=torch.long)  # label value -> logits channel, -1 for ignore
        members = torch.zeros(top + 1, len(labels.names))  # label value -> which regions it belongs to
        for i, values in enumerate(labels.values):
            channel_of[list(values)] = i + 1
            members[list(values), i] = 1.0
        if labels.ignore is not None:
            channel_of[labels.ignore] = -1
        self.identity = bool((channel_of == torch.arange(top + 1)).all())  # values are channels already
        self.register_buffer("channel_of", channel_of, persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.ignore_value = labels.ignore

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, Z, Y, X), label values (B, 1, Z, Y, X) integer -> scalar, lower is better, -1 at best."""
        logits = logits.float()
        return self._regions(logits, label) if self.regions else self._classes(logits, label)

    def _classes(self, logits: Tensor, label: Tensor) -> Tensor:
        target = label[:, 0].long() if self.identity else self.channel_of[label[:, 0].long()]
        log_probabilities = F.log_softmax(logits, dim=1)
        cross_entropy = F.nll_loss(log_probabilities, target, ignore_index=-1, reduction="sum")
        valid = (target >= 0).unsqueeze(1)
        counted = self._counted(valid) if self.ignores else valid.numel()
        onehot = torch.zeros_like(logits).scatter_(1, target.clamp(min=0).unsqueeze(1), 1.0)[:, 1:]
        probabilities = log_probabilities[:, 1:].exp()
        if self.ignores:
            onehot, probabilities = onehot * valid, probabilities * valid
        return cross_entropy / counted - _soft_dice(probabilities, onehot, self.world)

    def _regions(self, logits: Tensor, label: Tensor) -> Tensor:
        onehot = self.members[label[:, 0].long()].movedim(-1, 1)
        entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        probabilities = logits.sigmoid()
        if not self.ignores:
            return entropy.mean() - _soft_dice(probabilities, onehot, self.world)
        valid = label.ne(self.ignore_value)  # type: ignore[arg-type]  # there is one
        counted = self._counted(valid) * logits.shape[1]
        return (entropy * valid).sum() / counted - _soft_dice(probabilities * valid, onehot * valid, self.world)

    def _counted(self, valid: Tensor) -> Tensor:
        """How many voxels count, of all processes by their number."""
        return self.world.mean(valid.sum().float()).clamp(min=1 / self.world.size)


def _soft_dice(probabilities: Tensor, onehot: Tensor, world: World) -> Tensor:
    """Mean over channels of 2 |P n T| / (|P| + |T|), sums over batch and voxels."""
    axes = [0, *range(2, probabilities.ndim)]
    sizes = probabilities.sum(axes) + onehot.sum(axes)
    overlap, size = world.sum(torch.stack([(probabilities * onehot).sum(axes), sizes]))
    return ((2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


class DeepSupervision(nn.Module):
    """A loss at every scale of the decoder, halved in weight with each coarser one (Lee et al. 2015, nnU-Net)."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self,
        logits: list[Tensor],
        label: Tensor,
        truth: Tensor | None = None,
        image: Tensor | None = None,
        grid: OutputGrid | None = None,
    ) -> Tensor:
        """Logits, finest first, and the label at the finest scale -> scalar. What is for images is not looked at."""
        weights = [0.5**i for i in range(len(logits))]
        total = torch.zeros((), device=label.device)
        for weight, scale in zip(weights, logits, strict=True):
            fitted = label
            if scale.shape[2:] != label.shape[2:]:
                fitted = F.interpolate(label.float(), size=scale.shape[2:], mode="nearest-exact")
            total = total + weight / sum(weights) * self.loss(scale, fitted)
        return total


@dataclass(frozen=True)
class Restoration:
    """An image that a network answered with, and what it is compared with; all in the units of the input."""

    predicted: Tensor
    """(B, I, *grid.shape) float32."""
    truth: Tensor | None
    """The same shape; None where no fine image is known."""
    image: Tensor
    """(B, I, Z, Y, X) float32: the input, without its halo."""
    grid: OutputGrid
    """Where the predicted voxels lie in the input."""
    acquisition: Acquisition | None
    """How the input came from the fine image; None where it is not known."""
    filters: Tensor | None = None
    """(F, I, kz, ky, kx): the first filters of the network, detached."""
    world: World = ALONE
    """The processes whose batches are parts of one."""

    @property
    def known(self) -> Tensor:
        """The fine image, where there must be one."""
        assert self.truth is not None, "terms that need the fine image are left out where there is none"
        return self.truth


def _l1(r: Restoration) -> Tensor:
    return F.l1_loss(r.predicted, r.known)


def _high_frequency(r: Restoration) -> Tensor:
    """Mean size of the difference of the spectra above half the input's Nyquist frequency, along each refined axis."""
    difference = r.predicted - r.known
    terms = []
    for axis, scale in enumerate(r.grid.scale):
        if scale > 1:
            # component k has k / voxels cycles a fine voxel; the input's Nyquist frequency is 0.5 / scale
            above = int(difference.shape[axis + 2] * 0.25 / scale) + 1
            spectrum = torch.fft.rfft(difference, dim=axis + 2, norm="ortho")
            terms.append(spectrum.movedim(axis + 2, -1)[..., above:].abs().mean())
    return torch.stack(terms).mean() if terms else difference.sum() * 0


def _perceptual(r: Restoration) -> Tensor:
    """L1 between what the network's own first filters see in both images, each in units of its spread in the truth.

    So what segmentation looks at counts: edges and textures that the filters have learned to answer to. The filters are
    linear: one convolution of the difference on the fine grid. They are detached, or the loss would be lowered by
    making them blind.
    """
    assert r.filters is not None, "the builder gives the filters of the network"
    padding = [size // 2 for size in r.filters.shape[2:]]
    with torch.no_grad():
        seen = F.conv3d(r.known, r.filters, padding=padding)
        variance, mean = torch.var_mean(seen, dim=(0, 2, 3, 4), correction=0)
        spread = r.world.mean(variance + (mean - r.world.mean(mean)).square()).sqrt()  # over all processes
        del seen
    filters = r.filters / spread.clamp(min=LEAST_SPREAD)[:, None, None, None, None]
    return F.conv3d(r.predicted - r.known, filters, padding=padding).abs().mean()


def _consistency(r: Restoration) -> Tensor:
    """L1 between the input and what the forward model makes of the answer, each slice where it lies.

    For labels see `thick_logits`; where one is known on the output grid, it says all that its thick slices could say.
    """
    assert r.acquisition is not None, "check_plan asks for one"
    return F.l1_loss(made_thick(r.predicted, r.grid, r.image.shape[2:], r.acquisition), r.image)


def made_thick(fine: Tensor, grid: OutputGrid, inputs: Sequence[int], acquisition: Acquisition) -> Tensor:
    """What the forward model makes of (B, C, *grid.shape) in the places of an input of shape `inputs` (z, y, x)."""
    for axis, (voxels, scale, start) in enumerate(grid.axes()):
        if scale != 1:
            matrix = slice_matrix(voxels, scale, acquisition, place=(inputs[axis], -start))
            fine = apply_along(fine, matrix, axis)
    return fine


def thick_logits(logits: Tensor, made: Callable[[Tensor], Tensor], *, regions: bool) -> Tensor:
    """Class logits of thick voxels, from those of the fine ones behind them and the forward model `made`.

    Whoever labels a thick voxel takes the class with the largest share of it. So the shares, which the forward model
    makes of the fine probabilities, are sharpened (to the power of LARGEST_SHARE): an edge within a slice costs nothing
    as long as it leaves the larger part on the side of the label.
    """
    if regions:
        share = made(logits.sigmoid()).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
        return LARGEST_SHARE * share.logit()
    return LARGEST_SHARE * made(logits.softmax(1)).clamp(min=LEAST_SHARE).log()


IMAGE_LOSSES: dict[str, Callable[[Restoration], Tensor]] = {
    "l1": _l1,
    "high_frequency": _high_frequency,
    "perceptual": _perceptual,
    "consistency": _consistency,
}
LABELS, IMAGE = range(2)  # tasks, in the order of their weights
WITHOUT_TRUTH = ("consistency",)  # terms for which no fine image need be known


class SuperResolutionLoss(nn.Module):
    """Segmentation on the output grid and on the coarser ones, and the fine image, weighted against each other.

    The weights are learned (Kendall et al. 2018): each task counts exp(-w) L + w, with L 0 at best. A task that stands
    alone is not weighted.
    """

    weights: nn.Parameter | None

    def __init__(
        self,
        segmentation: nn.Module,
        *,
        classes: int,
        image_channels: int,
        terms: Sequence[str],
        regions: bool = False,
        scale: Vector,
        halo: int = 0,
        acquisition: Acquisition | None = None,
        filters: Callable[[], Tensor] | None = None,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.segmentation, self.world, self.regions = segmentation, world, regions
        self.classes, self.image_channels = classes, image_channels
        self.terms = tuple(terms)
        self.scale, self.halo = scale, halo
        self.acquisition, self.filters = acquisition, filters
        both = classes > 0 and image_channels > 0
        self.register_parameter("weights", nn.Parameter(torch.zeros(2)) if both else None)

    def forward(
        self,
        outputs: list[Tensor],
        label: Tensor,
        truth: Tensor | None = None,
        image: Tensor | None = None,
        grid: OutputGrid | None = None,
    ) -> Tensor:
        """What the network answers, finest first; label (B, 1, *fine), truth (B, I, *fine) and input -> scalar.

        The finest answer holds the class logits, then the image; of one that stands alone the other is not learned
        (no logits where the label is empty). Without `grid` the answer covers the input's extent. A label may lie on
        the input's grid, and truth may be unknown: the forward model brings the answer there.
        """
        finest = outputs[0].float()
        classes = self.classes if label.numel() else 0
        logits, losses = finest[:, :classes], {}
        if classes:
            if label.shape[2:] != finest.shape[2:]:
                logits = self._made_thick(logits, label.shape[2:], grid)
            losses[LABELS] = self.segmentation([logits, *outputs[1:]], label) + 1
        if finest.shape[1] > classes:
            assert image is not None, "an image is compared with the input"
            losses[IMAGE] = self._image(finest[:, classes:], truth, image, grid)
        if self.weights is None:
            return sum(losses.values(), start=finest.new_zeros(()))
        weighted = [torch.exp(-self.weights[task]) * loss + self.weights[task] for task, loss in losses.items()]
        return torch.stack(weighted).sum()

    def _made_thick(self, logits: Tensor, inputs: Sequence[int], grid: OutputGrid | None) -> Tensor:
        assert grid is not None and self.acquisition is not None, "self-supervision has both"
        made = functools.partial(made_thick, grid=grid, inputs=inputs, acquisition=self.acquisition)
        return thick_logits(logits, made, regions=self.regions)

    def _image(self, predicted: Tensor, truth: Tensor | None, image: Tensor, grid: OutputGrid | None) -> Tensor:
        z, y, x = predicted.shape[2:]
        restoration = Restoration(
            predicted,
            truth,
            image[:, : self.image_channels, self.halo : image.shape[2] - self.halo].float(),
            grid or OutputGrid((z, y, x), self.scale),
            self.acquisition,
            self.filters() if self.filters is not None and "perceptual" in self.terms else None,
            self.world,
        )
        terms = self.terms if truth is not None else [name for name in self.terms if name in WITHOUT_TRUTH]
        return torch.stack([IMAGE_LOSSES[name](restoration) for name in terms or WITHOUT_TRUTH]).sum()


def build_loss(
    labels: Labels,
    architecture: Architecture | None = None,
    *,
    configuration: Configuration | None = None,
    filters: Callable[[], Tensor] | None = None,
    world: World = ALONE,
) -> nn.Module:
    """The training loss for a set of labels, and for the image that a network of this architecture answers with.

    Of a configuration the image terms and the forward model are taken; without one the image is compared by L1.
    `filters` gives the network's first filters (F, I, kz, ky, kx), detached. Of several processes (`world`) each gets
    a loss whose mean over all of them, and its gradient, are those of their batches as one. Raises PlanError for an
    unknown term, and where no term is left because no fine image is known.
    """
    segmentation = DeepSupervision(DiceCrossEntropy(labels, world))
    if architecture is None or architecture.head == "plain":
        return segmentation
    terms = configuration.training.image_losses if configuration is not None else ("l1",)
    unknown = next((name for name in terms if name not in IMAGE_LOSSES), None)
    if unknown is not None:
        raise PlanError(unknown_choice("Image loss", unknown, IMAGE_LOSSES))
    if configuration is not None and not has_fine_image(architecture, configuration.sr_source):
        terms = tuple(name for name in terms if name in WITHOUT_TRUTH)
    if architecture.image_channels and configuration is not None and not configuration.training.image_losses:
        raise PlanError(f"image_losses names nothing, and there is an image head; give {' or '.join(IMAGE_LOSSES)}.")
    if architecture.image_channels and not terms:
        raise PlanError(
            "Nothing says what the super-resolved image should be: without fine images image_losses must have "
            f"{' or '.join(WITHOUT_TRUTH)}."
        )
    return SuperResolutionLoss(
        segmentation,
        classes=architecture.output_channels,
        image_channels=architecture.image_channels,
        terms=terms,
        regions=labels.has_regions,
        scale=configuration.sr_scale if configuration is not None else architecture.head_scale,
        halo=architecture.halo,
        acquisition=configuration.acquisition if configuration is not None else Acquisition(),
        filters=filters,
        world=world,
    )


def first_filters(network: UNet, architecture: Architecture) -> Tensor:
    """The network's first filters of the image channels, (F, I, kz, ky, kx), detached; of stacks the middle slice's."""
    body = network if network.image_body is None else network.image_body
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    weight: Tensor = first.weight.detach().float()
    if body is not network:  # of slices along axis 1
        return weight[:, : architecture.image_channels].unsqueeze(3)
    weight = weight.unsqueeze(2) if weight.ndim == 4 else weight
    weight = weight.reshape(len(weight), architecture.input_channels, -1, *weight.shape[2:])
    return weight[:, : architecture.image_channels, weight.shape[2] // 2]
