"""Texts in which random tokens are hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError

_IDS, _ATTENTION = "input_ids", "attention_mask"


class TokenDropout(nn.Module):
    """Hide random tokens of a text: a strong view without a second text.

    Each token is hidden with probability ``p``, but no special token, and no padding (where ``attention_mask`` is 0).
    A text of which no other token would be left stays as it is. Lengths do not change.

    It is a transform of one sample, which gets all of its inputs. Which tokens are hidden follows from seed, sample and
    view.

    Args:
        special_tokens: Ids that are never hidden: those that begin, end, separate and pad texts, such as
            ``tokenizer.all_special_ids``. May be empty.
        p: Probability of each token, at least 0 and below 1.
        mask_token: Id that hidden tokens get, such as ``tokenizer.mask_token_id``. Default: None, which means that they
            keep their id, and their ``attention_mask`` is 0.

    Raises:
        InputError: If ``p`` or ``mask_token`` is out of range. In a call: if there are no ``input_ids`` (T,)
            of whole numbers, or no ``attention_mask`` where it is needed.

    >>> from kd_lightning.data.transforms import TokenDropout
    >>> inputs = {"input_ids": torch.tensor([101, 7, 8, 102]), "attention_mask": torch.tensor([1, 1, 1, 1])}
    >>> _ = torch.manual_seed(2)
    >>> TokenDropout([101, 102], p=0.5, mask_token=103)(inputs)["input_ids"]
    tensor([101, 103,   8, 102])
    """

    def __init__(self, special_tokens: Sequence[int], p: float = 0.15, mask_token: int | None = None) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"p must be at least 0 and below 1, got {p}")
        if mask_token is not None and mask_token < 0:
            raise InputError(f"mask_token must be at least 0, or null, got {mask_token}")
        self.special_tokens = [int(token) for token in special_tokens]
        self.p = float(p)
        self.mask_token = mask_token

    def extra_repr(self) -> str:
        """The arguments."""
        return f"special_tokens={self.special_tokens}, p={self.p}, mask_token={self.mask_token}"

    def forward(self, inputs: Any) -> Any:
        """Return the inputs with hidden tokens.

        Args:
            inputs: A mapping with ``input_ids`` (T,), or these alone.
        """
        named = inputs if isinstance(inputs, Mapping) else {_IDS: inputs}
        if _IDS not in named:
            raise InputError(f"TokenDropout needs {_IDS}, got {', '.join(map(str, named)) or 'no inputs'}")
        ids = torch.as_tensor(named[_IDS])
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"TokenDropout needs {_IDS} (T,) of whole numbers, got {[*ids.shape]} {ids.dtype}")
        attention = torch.as_tensor(named[_ATTENTION]) if _ATTENTION in named else None
        if attention is None and self.mask_token is None:
            raise InputError(f"TokenDropout without mask_token needs {_ATTENTION}; set mask_token to the id of [MASK]")
        hidden = self._hidden(ids, torch.ones_like(ids) if attention is None else attention)
        if self.mask_token is None:
            assert attention is not None
            return {**named, _ATTENTION: attention.masked_fill(hidden, 0)}
        ids = ids.masked_fill(hidden, self.mask_token)
        return {**named, _IDS: ids} if isinstance(inputs, Mapping) else ids

    def _hidden(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Draw which tokens are hidden, (T,) booleans."""
        may = (attention != 0) & ~torch.isin(ids, torch.tensor(self.special_tokens, dtype=ids.dtype))
        hidden = may & (torch.rand(len(ids)) < self.p)
        return hidden & ~(hidden == may).all()
