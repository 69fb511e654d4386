"""Weights: read from the files of any training, and written to a deployable file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.quantization.calibration import is_range_key


def load_weights(model: nn.Module, path: str | Path, prefix: str | None = None) -> nn.Module:
    """Load weights from a file into a network; no code in the file is executed.

    Args:
        model: The network. It is changed in place. A quantised network accepts float weights; its ranges stay then.
        path: A checkpoint of any LightningModule, a plain state dict (``.pt``), or ``.safetensors``.
        prefix: The text before the network's own names in the file, such as ``"student."``. Default: None, which means
            the prefix under which most names fit; if several do, ``"student."``.

    Returns:
        The same network.

    Raises:
        InputError: If the file is missing, is no weights file, would run code, or if its keys or shapes do not fit;
            the message has the first few of them.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no weights file at {file}; train it first or correct the path")
    state = _read(file)
    wanted = model.state_dict()
    if prefix is None:
        prefix = _find_prefix(list(wanted), state)
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not any(map(is_range_key, found)):  # float weights: the ranges of a quantised network stay
        found |= {key: tensor for key, tensor in wanted.items() if is_range_key(key)}
    check_fit(found, wanted, f"weights in {file} do not fit {type(model).__name__}")
    model.load_state_dict(found)
    return model


def check_fit(found: Mapping[str, Any], wanted: Mapping[str, Any], message: str) -> None:
    """Raise InputError, which begins with the message, unless one state dict has the keys and shapes of another."""
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {[*found[key].shape]} in the file, {[*tensor.shape]} in the model"
            for key, tensor in wanted.items()
            if isinstance(tensor, Tensor)
            and isinstance(found.get(key), Tensor)
            and found[key].shape != tensor.shape
            and not key.endswith("_extra_state")  # which may have any shape
        ],
    }
    if any(problems.values()):
        lines = [
            f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for what, keys in problems.items()
            if keys
        ]
        raise InputError(f"{message}: " + "; ".join(lines))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} was refused: it is no plain weights file, and loading it could run code. "
            "Allowed: tensors saved with torch.save, Lightning checkpoints, safetensors"
        ) from error
    except Exception as error:  # a damaged file can raise any exception
        raise InputError(f"{file} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{file} holds no state dict, but {type(content).__name__}")
    return dict(content)


def _find_prefix(wanted: list[str], state: dict[str, Tensor]) -> str:
    """Return the prefix under which most of the wanted names are found."""
    if not wanted:
        return ""
    candidates = {key.removesuffix(name) for name in wanted[:1] for key in state if key.endswith(name)}
    candidates = {p for p in candidates if p == "" or p.endswith(".")} | {""}
    return max(
        sorted(candidates),
        key=lambda p: (sum(p + name in state for name in wanted), p == "student.", p == ""),
    )


def save_weights(state: Mapping[str, Any], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the tensors of a state dict as safetensors.

    Args:
        state: The state dict. Values that are no tensors (the extra state of a module) are left out.
        path: The file.
        metadata: Texts, or values that JSON can represent.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    # clone: safetensors refuses tensors that share memory, such as tied weights
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, path, metadata_texts(metadata))


def metadata_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as texts: a text as it is, any other value as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
