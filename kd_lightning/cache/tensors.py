"""The values of tensors of any kind, and the hash of each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, rows_of, tensors_of

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]
_PARTS_OF_LAYOUTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def hash_rows(x: Inputs) -> Hashes:
    """Hash each row of inputs: its values, its type and its shape. Names of a mapping count, too, not their order.

    The padding of token sequences does not count: a sample has the same hash in a batch of any length. Padding is what
    lies after the last token of ``attention_mask``, if it is one value.

    Args:
        x: A tensor (B, ...), or a mapping or tuple of such tensors, on any device.

    Returns:
        (B,) unsigned integers of 64 bits.

    Raises:
        InputError: If a tensor is sparse, nested or without values.
    """
    if isinstance(x, Tensor):
        return _hash_tensor(x)
    x, count, mask = _in_order(x), rows_of(x), token_mask(x)
    lengths = None if mask is None else token_lengths(mask)
    width = 0 if mask is None else mask.shape[1]
    columns = np.stack(
        [
            np.broadcast_to(_hash_tensor(part) if lengths is None else _hash_tokens(part, lengths, width), count)
            for part in tensors_of(x)
        ],
        axis=1,
    )
    form = xxhash.xxh3_64_intdigest(_form(x).encode())
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes(), seed=form) for row in columns], dtype=np.uint64)


def token_mask(x: Any) -> Tensor | None:
    """Return the ``attention_mask`` (B, T) among inputs; None if there is none."""
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def token_lengths(mask: Tensor) -> Lengths:
    """Return the length (B,) of each sequence: up to the last token that a mask (B, T) has."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: Lengths = ((mask != 0) * places).amax(dim=1).cpu().numpy() if mask.shape[1] else np.zeros(len(mask), int)
    return lengths


def _hash_tokens(x: Tensor, lengths: Lengths, width: int) -> Hashes:
    """Hash each row of a tensor without its padding, if it has one entry for each of ``width`` tokens."""
    if x.ndim < 2 or x.shape[1] != width or len(x) != len(lengths) or values_of(x) is None:
        return _hash_tensor(x)
    rows = []
    for row, length in zip(x.detach().cpu(), lengths.tolist(), strict=True):
        rest = row[length:]
        same = torch.equal(rest, rest[:1].expand_as(rest))
        rows.append(_hash_tensor((row[:length] if same else row)[None]))
    return np.concatenate(rows) if rows else np.zeros(0, np.uint64)


def _in_order(x: Any) -> Any:
    """Return inputs with all names in one order."""
    if isinstance(x, Mapping):
        return {name: _in_order(part) for name, part in sorted(x.items(), key=lambda item: str(item[0]))}
    return tuple(map(_in_order, x)) if isinstance(x, tuple | list) else x


def _form(x: Any) -> str:
    """Describe how inputs hold their tensors."""
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name!r}: {_form(part)}" for name, part in x.items()) + "}"
    return "(" + ", ".join(map(_form, x)) + ")" if isinstance(x, tuple | list) else type(x).__name__


def _hash_tensor(x: Tensor) -> Hashes:
    kind = xxhash.xxh3_64_intdigest(f"{x.dtype} {[*x.shape[1:]]}".encode())
    data = values_of(x)
    if data is None:
        raise InputError(f"cache: a transform must return dense tensors with values, got {x.layout} on {x.device}")
    if not x.ndim:  # one value for all rows
        return np.array([xxhash.xxh3_64_intdigest(data.data, seed=kind)], dtype=np.uint64)
    size = len(data) // max(len(x), 1)
    rows = (data[number * size : (number + 1) * size].data for number in range(len(x)))
    return np.array([xxhash.xxh3_64_intdigest(row, seed=kind) for row in rows], dtype=np.uint64)


def values_of(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    """The bytes of a tensor's values, row by row. None if it is sparse, nested, quantised, or not in memory at all."""
    plain = type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__")
    if not plain or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return None
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        values: np.ndarray[Any, Any] = tensor.view(torch.uint8).numpy()
    except (RuntimeError, TypeError, ValueError):  # without values, such as a fake or an uninitialised tensor
        return None
    return values


def parts_of(tensor: Tensor) -> list[Any]:
    """What identifies a tensor of any kind: its type, its shape, and arrays or tensors with its values."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return [str(tensor.dtype), "no shape yet"]
    values = values_of(tensor)
    if values is not None:
        return [str(tensor.dtype), [*tensor.shape], values]
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return [type(tensor), names, context, *(getattr(tensor, name) for name in names)]
    if tensor.is_nested:
        return ["nested", *tensor.unbind()]
    about = [str(tensor.dtype), [*tensor.shape], str(tensor.layout)]
    if tensor.is_meta:
        return about
    if tensor.is_quantized:
        per_channel = tensor.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        names = ("q_per_channel_scales", "q_per_channel_zero_points") if per_channel else ("q_scale", "q_zero_point")
        names += ("q_per_channel_axis",) if per_channel else ()
        return [*about, str(tensor.qscheme()), tensor.int_repr(), *(getattr(tensor, name)() for name in names)]
    if tensor.layout in _PARTS_OF_LAYOUTS:
        tensor = tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor
        return [*about, *(getattr(tensor, name)() for name in _PARTS_OF_LAYOUTS[tensor.layout])]
    return about
