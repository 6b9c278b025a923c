"""Building blocks of the U-Net: a convolution stage for each value of `Architecture.block`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from autoseg.errors import PlanError, unknown_choice
from autoseg.plan import Shape

LEAKY_SLOPE = 0.01  # nnU-Net's
CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS: dict[int, type[nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORMS: dict[int, type[nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class ConvNormAct(nn.Sequential):
    """Convolution, instance normalisation, leaky ReLU. Same padding, but along the axes where `padded` is 0."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: Shape, stride: Shape, dimensions: int, padded: Shape = (1, 1, 1)
    ) -> None:
        k, s = kernel[-dimensions:], stride[-dimensions:]
        padding = tuple(size // 2 * here for size, here in zip(k, padded[-dimensions:], strict=True))
        super().__init__(
            CONVOLUTIONS[dimensions](inputs, outputs, k, s, padding=padding),
            NORMS[dimensions](outputs, eps=1e-5, affine=True),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        )


class GridConv(nn.Module):
    """A convolution (same padding) of volumes; slice by slice in a network of 2D layers."""

    def __init__(self, inputs: int, outputs: int, size: int, *, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.conv = CONVOLUTIONS[dimensions](inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, Z, Y, X) -> (B, outputs, Z, Y, X)."""
        y: Tensor = self.conv(slices_as_batch(x, self.dimensions))
        return slices_as_volumes(y, x.shape[0], self.dimensions)

    def zero(self) -> None:
        """From now on every answer is zero, until a step of training."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def slices_as_batch(x: Tensor, dimensions: int) -> Tensor:
    """What layers of so many dimensions take: (B, C, Z, Y, X) as it is, or for 2D layers as (B * Z, C, Y, X)."""
    return x.transpose(1, 2).flatten(0, 1) if dimensions == 2 else x


def slices_as_volumes(x: Tensor, batch: int, dimensions: int) -> Tensor:
    """The inverse of `slices_as_batch`, for a batch of so many volumes."""
    return x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2) if dimensions == 2 else x


class ResidualBlock(nn.Module):
    """Two convolutions around a skip (He et al. 2016); the skip is average-pooled and projected where shapes differ."""

    def __init__(self, inputs: int, outputs: int, *, kernel: Shape, stride: Shape, dimensions: int) -> None:
        super().__init__()
        k, s = kernel[-dimensions:], stride[-dimensions:]
        conv = CONVOLUTIONS[dimensions]
        self.first = ConvNormAct(inputs, outputs, kernel=kernel, stride=stride, dimensions=dimensions)
        self.second = nn.Sequential(
            conv(outputs, outputs, k, 1, padding=tuple(size // 2 for size in k)),
            NORMS[dimensions](outputs, eps=1e-5, affine=True),
        )
        shortcut: list[nn.Module] = [POOLS[dimensions](s, s)] if max(s) > 1 else []
        if inputs != outputs:
            shortcut += [conv(inputs, outputs, 1, bias=False), NORMS[dimensions](outputs, eps=1e-5, affine=True)]
        self.shortcut = nn.Sequential(*shortcut)
        self.act = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) -> (B, outputs, .../stride)."""
        out: Tensor = self.act(self.second(self.first(x)) + self.shortcut(x))
        return out


class Stage(nn.Sequential):
    """`convs` blocks, each a `ConvNormAct` or a `ResidualBlock`; the first one carries the stride."""

    def __init__(
        self,
        block: Callable[..., nn.Module],
        inputs: int,
        outputs: int,
        *,
        convs: int,
        kernel: Shape,
        stride: Shape,
        dimensions: int,
    ) -> None:
        one = (1, 1, 1)
        super().__init__(
            *(
                block(
                    inputs if i == 0 else outputs,
                    outputs,
                    kernel=kernel,
                    stride=stride if i == 0 else one,
                    dimensions=dimensions,
                )
                for i in range(convs)
            )
        )


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "plain": partial(Stage, ConvNormAct),
    "residual": partial(Stage, ResidualBlock),
}


def build_stage(
    block: str, inputs: int, outputs: int, *, convs: int, kernel: Shape, stride: Shape, dimensions: int
) -> nn.Module:
    """The stage named `block`. Raises PlanError listing the known ones."""
    if block not in BLOCKS:
        raise PlanError(unknown_choice("Block", block, BLOCKS))
    return BLOCKS[block](inputs, outputs, convs=convs, kernel=kernel, stride=stride, dimensions=dimensions)
