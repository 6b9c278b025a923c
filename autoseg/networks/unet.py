"""An `Architecture` -> a U-Net (Ronneberger et al. 2015, Isensee et al. 2021) with deep supervision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoseg.networks.blocks import (
    CONVOLUTIONS,
    LEAKY_SLOPE,
    TRANSPOSED,
    build_stage,
    slices_as_batch,
    slices_as_volumes,
)
from autoseg.networks.context import build_context
from autoseg.networks.fusion import ReferenceFusion, covering
from autoseg.networks.upsampling import OutputGrid, build_head, interpolate
from autoseg.plan import Architecture


class UNet(nn.Module):
    """Encoder, decoder with skip connections, 1x1 convolutions as heads of the scored decoder stages.

    A network whose kernels and strides are all 1 along z is built from 2D layers; it takes the slices of a volume
    as a batch, so input and output are (B, C, Z, Y, X) for every topology. In 2.5D a context brings the neighbouring
    slices into each slice's channels first. A super-resolving network has an up head that brings the last features
    to the output grid, and a reference image joins there through a fusion block. A network that learns from thick
    volumes alone has a second body for their slices, which makes the image.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        flat = all(v[0] == 1 for v in (*a.kernels, *a.strides))
        self.dimensions = 2 if flat else 3
        self.divisor = a.divisor
        self.deep_supervision = a.deep_supervision
        self.halo, self.image_channels, self.head_scale = a.halo, a.image_channels, a.head_scale
        self.context = build_context(a)
        widths = [self.context.outputs, *a.features]
        self.encoder = nn.ModuleList(
            build_stage(
                a.block,
                widths[i],
                widths[i + 1],
                convs=a.encoder_convs[i],
                kernel=a.kernels[i],
                stride=a.strides[i],
                dimensions=self.dimensions,
            )
            for i in range(len(a.features))
        )
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        # decoder stages with a head, from the finest; the coarsest one is not scored (nnU-Net weights it with zero)
        scored = max(1, len(a.features) - 2) if a.deep_supervision else 1
        for depth, i in enumerate(reversed(range(len(a.features) - 1))):
            stride = a.strides[i + 1][-self.dimensions :]
            self.up.append(TRANSPOSED[self.dimensions](a.features[i + 1], a.features[i], stride, stride))
            self.decoder.append(
                build_stage(
                    a.block,
                    2 * a.features[i],
                    a.features[i],
                    convs=a.decoder_convs[depth],
                    kernel=a.kernels[i],
                    stride=(1, 1, 1),
                    dimensions=self.dimensions,
                )
            )
            if i < scored and a.output_channels:
                self.heads.append(CONVOLUTIONS[self.dimensions](a.features[i], a.output_channels, 1))
        if not self.decoder and a.output_channels:  # one stage: no pooling at all
            self.heads.append(CONVOLUTIONS[self.dimensions](a.features[0], a.output_channels, 1))
        self.up_head = build_head(a, dimensions=self.dimensions)
        self.fusion = ReferenceFusion(a, dimensions=self.dimensions) if a.reference_channels else None
        self.super_resolves = a.head != "plain"
        self.image_body = UNet(a.in_slices) if a.image_body == "slices" else None
        self.apply(_initialise)
        self._begin_with_interpolation()

    def _begin_with_interpolation(self) -> None:
        """What is added to the interpolated answer is zero."""
        for added in (self.up_head, self.fusion):
            if added is not None:
                added.last.zero()
        if self.image_body is not None:
            self.image_body._begin_with_interpolation()

    def forward(
        self,
        x: Tensor,
        grid: OutputGrid | None = None,
        reference: Tensor | None = None,
        reference_grid: OutputGrid | None = None,
    ) -> list[Tensor]:
        """Images (B, C, Z + 2 halo, Y, X) -> logits (B, K, Z, Y, X), finest first; Z, Y, X divisible by `divisor`.

        In training mode with deep supervision one tensor for each scored decoder stage; otherwise only the finest.
        A super-resolving network answers on `grid` first: (B, K + I, *grid.shape), float32, class logits, then image;
        what deep supervision adds are the logits on the input grid and those of the coarser stages. Without a grid it
        answers at its own scale over the whole input. A plain network heeds no grid. A network with reference channels
        needs the reference (B, R, *reference_grid.shape); without a grid it covers what the input does. A network with
        an image body answers with logits alone in training mode: its image is learned apart (`restore`).
        """
        features, logits = self._on_input_grid(x)
        if not self.super_resolves and self.fusion is None:
            return logits
        image = x[:, : self.image_channels, self.halo : x.shape[2] - self.halo]
        if grid is None or not self.super_resolves:
            depth, height, width = image.shape[2:]
            grid = OutputGrid.of((depth, height, width), self.head_scale)
        parts = [interpolate(part.float(), grid) for part in logits[:1]]
        if self.image_channels and self.image_body is None:
            parts.append(interpolate(image.float(), grid))
        elif self.image_channels and not self.training:
            parts.append((self.restore(image, grid, across=1) + self.restore(image, grid, across=2)) / 2)
        finest = torch.cat(parts, dim=1)
        if self.up_head is not None and max(grid.scale) > 1:  # at scale 1 there is nothing to add
            finest = finest + self.up_head(features, grid)
        if self.fusion is not None:
            if reference is None:
                raise ValueError("This network needs a reference image, and none was given.")
            finest = finest + self.fusion(features, reference, reference_grid or covering(reference, image), grid)
        coarser = logits if self.super_resolves else logits[1:]
        return [finest, *coarser] if self.training and self.deep_supervision else [finest]

    def restore(self, image: Tensor, grid: OutputGrid, *, across: int) -> Tensor:
        """Thick volume (B, I, Z, Y, X) -> its fine image (B, I, *grid.shape), float32, by the image body.

        In slices across axis `across`, 1 or 2, which hold the thick axis 0 and the other one.
        """
        assert self.image_body is not None, "the architecture has one"
        order = (across, 0, 3 - across)
        turned = image.permute(0, 1, *(axis + 2 for axis in order))
        (fine,) = self.image_body(turned, grid.turned(order))
        return fine.permute(0, 1, *(order.index(axis) + 2 for axis in range(3)))

    def _on_input_grid(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last features and the logits of the scored decoder stages, finest first, all (B, ..., Z, Y, X)."""
        x = self.context(x)
        batch = x.shape[0]
        x = slices_as_batch(x, self.dimensions)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        logits = []
        every = self.training and self.deep_supervision
        first_head = len(self.decoder) - len(self.heads)
        for i, (up, stage) in enumerate(zip(self.up, self.decoder, strict=True)):
            x = stage(torch.cat((up(x), skips.pop()), dim=1))
            if i >= first_head and (every or i == len(self.decoder) - 1):
                logits.append(self.heads[i - first_head](x))
        if not self.decoder and self.heads:
            logits.append(self.heads[0](x))
        logits.reverse()
        logits = [slices_as_volumes(y, batch, self.dimensions) for y in logits]
        return slices_as_volumes(x, batch, self.dimensions), logits


def _initialise(module: nn.Module) -> None:
    """He initialisation for the leaky ReLU, as nnU-Net has it."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_network(architecture: Architecture) -> UNet:
    """The network that an architecture describes, in training mode, on the CPU (or the active default device)."""
    return UNet(architecture)
