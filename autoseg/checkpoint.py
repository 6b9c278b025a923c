"""A trained model in one file: weights as safetensors, with the plan, configuration and fold as its JSON header.

Opening one runs no code: the file is a table of tensors and text.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from autoseg.errors import CheckpointError, PlanError
from autoseg.files import atomic_path
from autoseg.networks import UNet, build_network
from autoseg.plan import Configuration, Plan
from autoseg.typed_json import to_json

FORMAT = "autoseg checkpoint 1"
CHECKSUM = "checksum"  # its key in the header of a file


@dataclass(frozen=True)
class Checkpoint:
    """Everything prediction needs."""

    plan: Plan
    configuration: str
    """Name of the configuration of the plan that was trained."""
    fold: str
    """"0" to "4", or "all"."""
    weights: Mapping[str, Tensor]
    """State dict of the network, on the CPU."""
    summary: dict[str, Any] = field(default_factory=dict)
    """How it was trained: steps, seconds, seed, ... (JSON)."""

    @property
    def settings(self) -> Configuration:
        """The trained configuration."""
        return self.plan.configuration(self.configuration)

    def save(self, path: Path) -> None:
        """Write the file atomically. Raises StorageError."""
        header = {
            "format": FORMAT,
            "plan": to_json(self.plan),
            "configuration": self.configuration,
            "fold": self.fold,
            "summary": self.summary,
        }
        save_tensors(path, self.weights, header)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read and check the file. Raises CheckpointError where it is missing, damaged or of another version."""
        weights, header = load_tensors(path, FORMAT)
        try:
            plan = Plan.from_json(header["plan"], where=str(path))
            checkpoint = cls(plan, header["configuration"], header["fold"], weights, header["summary"])
            checkpoint.build_network()
        except PlanError as error:
            where = "" if str(error).startswith(str(path)) else f"{path}: "
            raise CheckpointError(f"{where}{error}") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: the checkpoint's header lacks {error}; train the fold anew.") from error
        except RuntimeError as error:
            raise CheckpointError(f"{path}: the weights do not fit the network of its plan; train anew.") from error
        return checkpoint

    def build_network(self) -> UNet:
        """The network with these weights, in eval mode, on the CPU."""
        network = build_network(self.settings.architecture)
        network.load_state_dict(dict(self.weights))
        return network.eval()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write named tensors with a JSON header and a checksum of both to a safetensors file, atomically.

    Raises StorageError.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**header, CHECKSUM: _checksum(content, header)})
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(content, str(temporary), metadata={"autoseg": text})
        except safetensors.SafetensorError as error:  # it hides what the operating system said
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error)) from error


def read_header(path: Path, expected_format: str) -> dict[str, Any]:
    """The header alone of such a file; its tensors are not looked at. Raises what `load_tensors` does."""
    return _read(path, expected_format, tensors=False)[1]


def checkpoint_id(path: Path) -> str:
    """Tells one checkpoint from another by its content, without reading its tensors. Raises CheckpointError."""
    return f"{read_header(path, FORMAT).get(CHECKSUM)}"


def load_tensors(path: Path, expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of such a file. Raises CheckpointError where it is missing, damaged or of another format."""
    tensors, header = _read(path, expected_format, tensors=True)
    if header.pop(CHECKSUM, None) != _checksum(tensors, header):
        raise CheckpointError(f"{path}: its content has changed since it was written; restore the file or train anew.")
    return tensors, header


def _read(path: Path, expected_format: str, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("autoseg", "null"))
            names = file.keys() if tensors else ()
            content = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint; train the fold first.") from error
    except (safetensors.SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: this is not a sound safetensors file ({error}); it is damaged or not from autoseg."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be read ({error.strerror or error}).") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != expected_format:
        raise CheckpointError(f"{path}: expected '{expected_format}', found '{found}'; use the autoseg that wrote it.")
    return content, header


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """CRC-32 of the header and of every tensor: safetensors has none of its own."""
    checksum = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
