"""Networks, built from an `Architecture` and nothing else."""

from autoseg.networks.unet import UNet, build_network
from autoseg.networks.upsampling import OutputGrid

__all__ = ["OutputGrid", "UNet", "build_network"]
