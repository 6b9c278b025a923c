"""A trained model in one file: weights as safetensors, with the plan, configuration and fold as its JSON header.

Opening one runs no code: the file is a table of tensors and text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from autoseg.errors import CheckpointError, PlanError
from autoseg.files import atomic_path
from autoseg.networks import UNet, build_network
from autoseg.plan import Configuration, Plan, to_json

FORMAT = "autoseg checkpoint 1"


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
            raise CheckpointError(str(error)) from error
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
    """Write named tensors with a JSON header to a safetensors file, atomically. Raises StorageError."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(content, str(temporary), metadata={"autoseg": json.dumps(header)})


def load_tensors(path: Path, expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of such a file. Raises CheckpointError where it is missing, damaged or of another format."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("autoseg", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
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
    return tensors, header
