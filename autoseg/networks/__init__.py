"""Networks, built from an `Architecture` and nothing else."""

from autoseg.networks.unet import UNet, build_network

__all__ = ["UNet", "build_network"]
