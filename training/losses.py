"""Logits and label maps -> a loss: soft Dice + cross-entropy, deep supervision, regions, ignore label."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoseg.labels import Labels

SMOOTH = 1e-5  # keeps the Dice of an absent class finite (nnU-Net's)


class DiceCrossEntropy(nn.Module):
    """Cross-entropy minus soft Dice (Drozdzal et al. 2016) over the foreground, sums taken over the whole batch.

    Classes: softmax and categorical cross-entropy, Dice without background. Regions: sigmoid and binary
    cross-entropy, Dice of every region. Voxels of the ignore label count in neither.
    """

    channel_of: Tensor
    members: Tensor

    def __init__(self, labels: Labels) -> None:
        super().__init__()
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
        counted = valid.sum().clamp(min=1) if self.ignores else valid.numel()
        onehot = torch.zeros_like(logits).scatter_(1, target.clamp(min=0).unsqueeze(1), 1.0)[:, 1:]
        probabilities = log_probabilities[:, 1:].exp()
        if self.ignores:
            onehot, probabilities = onehot * valid, probabilities * valid
        return cross_entropy / counted - _soft_dice(probabilities, onehot)

    def _regions(self, logits: Tensor, label: Tensor) -> Tensor:
        onehot = self.members[label[:, 0].long()].movedim(-1, 1)
        entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        probabilities = logits.sigmoid()
        if not self.ignores:
            return entropy.mean() - _soft_dice(probabilities, onehot)
        valid = label.ne(self.ignore_value)  # type: ignore[arg-type]  # there is one
        counted = (valid.sum() * logits.shape[1]).clamp(min=1)
        return (entropy * valid).sum() / counted - _soft_dice(probabilities * valid, onehot * valid)


def _soft_dice(probabilities: Tensor, onehot: Tensor) -> Tensor:
    """Mean over channels of 2 |P n T| / (|P| + |T|), sums over batch and voxels."""
    axes = [0, *range(2, probabilities.ndim)]
    overlap = (probabilities * onehot).sum(axes)
    size = probabilities.sum(axes) + onehot.sum(axes)
    return ((2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


class DeepSupervision(nn.Module):
    """A loss at every scale of the decoder, halved in weight with each coarser one (Lee et al. 2015, nnU-Net)."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: list[Tensor], label: Tensor) -> Tensor:
        """Logits, finest first, and the label at the finest scale -> scalar."""
        weights = [0.5**i for i in range(len(logits))]
        total = torch.zeros((), device=label.device)
        for weight, scale in zip(weights, logits, strict=True):
            fitted = label
            if scale.shape[2:] != label.shape[2:]:
                fitted = F.interpolate(label.float(), size=scale.shape[2:], mode="nearest-exact")
            total = total + weight / sum(weights) * self.loss(scale, fitted)
        return total


def build_loss(labels: Labels) -> DeepSupervision:
    """The training loss for a set of labels."""
    return DeepSupervision(DiceCrossEntropy(labels))
