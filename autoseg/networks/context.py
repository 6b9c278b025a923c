"""How neighbouring slices enter a 2.5D network: (B, C, Z + halo on both sides, Y, X) -> (B, C', Z, Y, X)."""

from __future__ import annotations

from torch import Tensor, nn

from autoseg.errors import PlanError, unknown_choice
from autoseg.networks.blocks import ConvNormAct, slices_as_volumes
from autoseg.plan import Architecture


class Context(nn.Module):
    """What stands before the encoder; by itself it leaves every slice alone."""

    outputs: int
    """Channels that it hands on."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.outputs = architecture.input_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) as it is."""
        return x


class Stack(Context):
    """The slices of a window as channels of its middle slice: channel c of slice k becomes channel c * slices + k."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.slices = architecture.context_slices
        self.outputs = architecture.input_channels * self.slices

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z + slices - 1, Y, X) -> (B, C * slices, Z, Y, X)."""
        return _windows(x, self.slices).flatten(1, 2)


class Reduce(Context):
    """3x3x3 convolutions, padded in the plane alone, that shrink a window to its middle slice.

    The dimension reduction of UV-Net (Jin et al. 2020). Each window is taken by itself, so that a slice's answer does
    not hang on how many are asked for at once: normalisation would mix them.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.slices = architecture.context_slices
        self.outputs = architecture.features[0]
        self.convs = nn.Sequential(
            *(
                ConvNormAct(
                    self.outputs if i else architecture.input_channels,
                    self.outputs,
                    kernel=(3, 3, 3),
                    stride=(1, 1, 1),
                    dimensions=3,
                    padded=(0, 1, 1),
                )
                for i in range(architecture.halo)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z + slices - 1, Y, X) -> (B, features, Z, Y, X)."""
        windows = _windows(x, self.slices).permute(0, 3, 1, 2, 4, 5)
        reduced: Tensor = self.convs(windows.flatten(0, 1))
        return slices_as_volumes(reduced.squeeze(2), x.shape[0], 2)


def _windows(x: Tensor, slices: int) -> Tensor:
    """(B, C, Z + slices - 1, Y, X) -> (B, C, slices, Z, Y, X): slice k of the window around each z."""
    return x.unfold(2, slices, 1).permute(0, 1, 5, 2, 3, 4)


CONTEXTS: dict[str, type[Context]] = {"none": Context, "stack": Stack, "reduce": Reduce}


def build_context(architecture: Architecture) -> Context:
    """The context that the architecture names. Raises PlanError listing the known ones."""
    if architecture.context not in CONTEXTS:
        raise PlanError(unknown_choice("Context", architecture.context, CONTEXTS))
    return CONTEXTS[architecture.context](architecture)
