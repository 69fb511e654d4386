"""Products of all pairs of vectors, for losses that compare samples or classes."""

from contextlib import nullcontext

import torch
from torch import Tensor


def products(vectors: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the products (..., A, B) of all pairs of vectors (..., A, D) and (..., B, D), in their type.

    The type stays under autocast, too.

    Args:
        vectors: (..., A, D).
        others: (..., B, D), of the same type. Default: None, which means ``vectors``.
    """
    others = vectors if others is None else others
    device = vectors.device.type
    own_type = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with own_type:
        return vectors @ others.transpose(-1, -2)
