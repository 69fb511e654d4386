"""Weights: read from the files of any training, and written to a deployable file."""

from __future__ import annotations

import json
import pickle
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kd_lightning.errors import InputError
from kd_lightning.quantization.calibration import is_range_key
from kd_lightning.runs.unpickling import find_stub, read_tensors

_PLAIN = ("floats", "integers")
_REFUSED = "and loading it could run code. Allowed: tensors saved with torch.save, Lightning checkpoints, safetensors"


def load_weights(model: nn.Module, path: str | Path, prefix: str | None = None) -> nn.Module:
    """Load weights from a file into a network; no code in the file is executed.

    Networks with and without ``torch.compile`` can read each other's files. Extra state of a module that is no tensor
    stays as it is if the file lacks it.

    Args:
        model: The network. It is changed in place. A quantised network accepts float weights; its ranges stay then.
        path: A checkpoint of any LightningModule, a plain state dict (``.pt``), or ``.safetensors``.
        prefix: The text before the network's own names in the file, such as ``"student."``. Default: None, which means
            the prefix under which most names and shapes fit; if several do, ``"student."``, or none.

    Returns:
        The same network.

    Raises:
        InputError: If the file is missing, is no weights file, would run code, if its keys or shapes do not fit (the
            message has the first few of them), or if other weights fit under another prefix. The network stays as it
            was.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no weights file at {file}; train it first or correct the path")
    state = {plain_key(key): value for key, value in read_state(file).items()}
    own = model.state_dict()
    wanted = {plain_key(key): value for key, value in own.items()}
    prefix = _find_prefix(wanted, state, file) if prefix is None else plain_key(prefix)
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    stays = {key: value for key, value in wanted.items() if not isinstance(value, Tensor)}  # safetensors lack them
    if not any(map(is_range_key, found)):  # float weights: the ranges of a quantised network stay
        stays |= {key: tensor for key, tensor in wanted.items() if is_range_key(key)}
    found = stays | found
    check_fit(found, wanted, f"weights in {file} do not fit {type(model).__name__}")
    model.load_state_dict({key: found[plain_key(key)] for key in own})
    return model


def read_metadata(weights: Path) -> dict[str, str]:
    """Return the metadata of a file of deployed weights."""
    try:
        with safe_open(weights, "pt") as content:
            return dict(content.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read: {error}") from error


def class_names_of(weights: Path) -> list[str] | None:
    """Return the names of the classes of deployed weights, by number; None if they are not known."""
    names = json.loads(read_metadata(weights).get("classes", "null"))
    return names if isinstance(names, list) else None


def plain_key(key: str) -> str:
    """Return a key of a state dict as it is without ``torch.compile``, which adds ``_orig_mod`` to it.

    >>> plain_key("student._orig_mod.0.weight")
    'student.0.weight'
    """
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def match_keys(found: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict under the keys of another one, which may come from the network with ``torch.compile``."""
    if found.keys() == wanted.keys():
        return found
    names = {plain_key(key): key for key in wanted}
    return {names.get(plain_key(key), key): value for key, value in found.items()}


def check_fit(found: Mapping[str, Any], wanted: Mapping[str, Any], message: str) -> None:
    """Raise InputError, which begins with the message, unless one state dict has the keys and shapes of another."""
    tensors = {
        key: tensor
        for key, tensor in wanted.items()
        if isinstance(tensor, Tensor)
        and isinstance(found.get(key), Tensor)
        and not key.endswith("_extra_state")  # which may have any shape and type
    }
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {[*found[key].shape]} in the file, {[*tensor.shape]} in the model"
            for key, tensor in tensors.items()
            if _kind_of(found[key]) == _kind_of(tensor) != "nested"
            and not is_lazy(tensor)
            and found[key].shape != tensor.shape
        ],
        "of another kind": [
            f"{key} {_kind_of(found[key])} in the file, {_kind_of(tensor)} in the model"
            for key, tensor in tensors.items()
            if _is_of_another_kind(key, found[key], tensor)
        ],
        "out of range": [
            f"{key} {found[key].dtype} in the file, {tensor.dtype} in the model"
            for key, tensor in tensors.items()
            if not _is_of_another_kind(key, found[key], tensor) and _overflows(found[key], tensor)
        ],
    }
    if any(problems.values()):
        lines = [
            f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for what, keys in problems.items()
            if keys
        ]
        raise InputError(f"{message}: " + "; ".join(lines))


def _kind_of(tensor: Tensor) -> str:
    """Return the kind of a tensor: torch cannot copy one kind to another, or not without a loss."""
    if is_lazy(tensor):  # it takes the shape of what is loaded
        return "floats"
    kinds = {"nested": tensor.is_nested, "meta": tensor.is_meta, "quantised": tensor.is_quantized}
    found = next((name for name, holds in kinds.items() if holds), "")
    if found or tensor.layout != torch.strided:
        return found or str(tensor.layout).removeprefix("torch.")
    return "complex" if tensor.is_complex() else "floats" if tensor.is_floating_point() else "integers"


def _is_of_another_kind(key: str, found: Tensor, wanted: Tensor) -> bool:
    """Return whether torch cannot copy a tensor into that of the model, or not without another meaning."""
    before, after = _kind_of(found), _kind_of(wanted)
    if (before, after) == ("floats", "integers"):  # such as counts, of which a mean was taken
        return not key.endswith("num_batches_tracked") and bool((found != found.trunc()).any())
    return before != after


def _overflows(found: Tensor, wanted: Tensor) -> bool:
    """Return whether the type of the model's tensor cannot hold the values of the file."""
    if found.dtype == wanted.dtype or is_lazy(wanted) or not {_kind_of(found), _kind_of(wanted)} <= {*_PLAIN}:
        return False
    if not wanted.is_floating_point():
        whole = found.trunc()
        return bool((whole.to(wanted.dtype) != whole).any())
    most = torch.finfo(wanted.dtype).max
    if torch.finfo(found.dtype).max <= most:
        return False
    values = found.double()
    return bool((values.isfinite() & (values.abs() > most)).any())


def read_state(file: Path) -> dict[str, Any]:
    """Read the state dict in a file; nothing in the file is executed.

    Args:
        file: As the path of :func:`load_weights`. What a checkpoint holds beside its state dict is not read.

    Returns:
        The state dict of tensors, with the extra state that modules save under ``_extra_state``.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        content = load_file(file) if file.suffix == ".safetensors" else read_tensors(file, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} was refused: it is no plain weights file, {_REFUSED}") from error
    except Exception as error:  # a damaged file can raise any exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "TorchScript" in reason:
            reason = "it is a TorchScript program, which torch.jit.load reads"
        raise InputError(f"{file} cannot be read as weights: {reason}") from error
    content, place = _find_state(content, file)
    if stub := find_stub(content, place):
        raise InputError(f"{file} was refused: {stub[0] or 'it'} holds an object of {stub[1]}, {_REFUSED}")
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
        for key, value in content.items()
    ):
        held = f" with {', '.join(map(str, [*content][:5]))}" if isinstance(content, Mapping) and content else ""
        raise InputError(f"{file} holds no state dict, but {type(content).__name__}{held}")
    return dict(content)


def _find_state(content: Any, file: Path) -> tuple[Any, str]:
    """Return the state dict in the content of a file and its key; the content itself if it holds none."""
    if not isinstance(content, Mapping):
        return content, ""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return content[key], key
    states = [key for key, value in content.items() if _is_state(value)]
    if len(states) > 1:
        names = ", ".join(map(str, states[:5]))
        raise InputError(f"{file} holds several state dicts, {names}; save one of them to a file of its own")
    return (content[states[0]], str(states[0])) if states else (content, "")


def _is_state(value: Any) -> bool:
    is_mapping = isinstance(value, Mapping) and bool(value)
    return is_mapping and all(isinstance(key, str) and isinstance(part, Tensor) for key, part in value.items())


def _find_prefix(wanted: Mapping[str, Any], state: dict[str, Any], file: Path) -> str:
    """Return the prefix under which most of the wanted names are found, with the wanted shapes.

    Raises:
        InputError: If it is not certain which: other weights are found under another prefix.
    """
    if not wanted:
        return ""
    first = next((name for name in wanted if not name.endswith("_extra_state")), next(iter(wanted)))
    candidates = {key.removesuffix(first) for key in state if key.endswith(first)}
    candidates = {p for p in candidates if p == "" or p.endswith(".")} | {""}
    fits = {p: (sum(p + name in state for name in wanted), _fits(wanted, state, p)) for p in sorted(candidates)}
    best = [p for p, fit in fits.items() if fit == max(fits.values())]
    for usual in ("student.", ""):
        if usual in best:
            return usual
    tensors = [name for name, value in wanted.items() if isinstance(value, Tensor)]
    if any(not _is_same(state.get(p + name), state.get(best[0] + name)) for p in best[1:] for name in tensors):
        raise InputError(
            f"{file} holds several networks that fit, under {', '.join(best[:5])}; set prefix to one of them"
        )
    return best[0]


def _fits(wanted: Mapping[str, Any], state: Mapping[str, Any], prefix: str) -> int:
    """Return the number of tensors that have the wanted shape under a prefix."""
    pairs = ((value, state.get(prefix + name)) for name, value in wanted.items())
    return sum(
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and not other.is_nested
        and (is_lazy(one) or one.shape == other.shape)
        for one, other in pairs
    )


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return _kind_of(one) == _kind_of(other) in (*_PLAIN, "complex") and torch.equal(one, other)


def save_weights(state: Mapping[str, Any], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the tensors of a state dict as safetensors.

    Args:
        state: The state dict. Values that are no tensors (the extra state of a module) are left out. Keys are written
            as they are without ``torch.compile``.
        path: The file.
        metadata: Texts, or values that JSON can represent.
    """
    tensors = {plain_key(key): value for key, value in state.items() if isinstance(value, Tensor)}
    # clone: safetensors refuses tensors that share memory, such as tied weights
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    content = save(copies, metadata_texts(metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    # safetensors writes metadata in random order; equal weights and metadata make equal files
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def check_classes(before: Sequence[str] | None, data: Any, place: Path) -> None:
    """Check that a datamodule has these classes in this order. Nothing is checked if either are not known.

    Args:
        before: Names of the classes that a network was trained on.
        data: The datamodule.
        place: Folder of the run, or file of the weights, for the message.

    Raises:
        InputError: If it has others. The same class numbers would mean other classes.
    """
    names = getattr(data, "class_names", None)
    if before is None or not isinstance(names, list | tuple):
        return
    before, names = ([unicodedata.normalize("NFC", str(name)) for name in some] for some in (before, names))
    if before == names:
        return
    new, gone = ([name for name in some if name not in others] for some, others in ((names, before), (before, names)))
    what = ", ".join(filter(None, (f"new: {new[:5]}" if new else "", f"gone: {gone[:5]}" if gone else "")))
    raise InputError(
        f"data: its classes must be those that the network in {place} was trained on "
        f"({what or 'they have another order'})"
    )


def metadata_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as texts: a text as it is, any other value as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return {key: text.encode(errors="replace").decode() for key, text in texts.items()}  # as a file name can need
