"""Hadamard matrices, and a substitute for sizes that have none."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """Return a Hadamard matrix (size, size) in float64, of entries 1 and -1; None if there is none, or it is unknown.

    It is the Kronecker product of Sylvester's matrix, whose size is a power of 2, and one of Paley's, of size q + 1 for
    a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4. Common numbers of channels have one, such as 384, 768,
    1152 and 1408; 116 and 232 do not.

    >>> hadamard(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(size - 1) and size % 4 == 0:
        q = size - 1
        core = torch.zeros(size, size, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, -1, _jacobsthal(q)
        return core + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if size % 4 == 0 and _is_prime(q) and q % 4 == 1:
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _jacobsthal(q)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    half = hadamard(size // 2) if size % 2 == 0 else None
    if half is None:
        return None
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def equal_variance_rotation(variances: Tensor) -> Tensor:
    """Return an orthogonal matrix H (C, C) for which the diagonal of H diag(variances) H^T is the mean variance.

    It is a normalized Hadamard matrix, which depends on C alone, where :func:`hadamard` has one. Else it is Hartley's
    matrix, whose diagonal comes close to the mean, followed by at most C - 1 rotations of two channels each, which set
    one entry of the diagonal to the mean (Bendel and Mickey 1978, https://doi.org/10.1080/03610917808812068).

    Args:
        variances: (C,) in float64, at least 0.
    """
    size = len(variances)
    matrix = hadamard(size)
    if matrix is not None:
        return matrix / math.sqrt(size)
    angles = torch.outer(*[torch.arange(size, dtype=torch.float64)] * 2) % size * (2 * math.pi / size)
    rotation = (angles.cos() + angles.sin()) / math.sqrt(size)
    excess = rotation.square() @ variances - variances.mean()  # of the diagonal
    for _ in range(size - 1):
        low, high = int(excess.argmin()), int(excess.argmax())
        a, c = excess[high].clone(), excess[low].clone()
        if a <= 1e-12 * variances.mean():
            break
        # the angle that sets the lowest entry to the mean: its tangent is a root of a quadratic equation
        b = (rotation[low] * variances * rotation[high]).sum()
        tangent = (-b + (b.square() - a * c).sqrt()) / a
        one = torch.ones_like(tangent)
        pair = torch.stack([one, tangent, -tangent, one]).view(2, 2) * (1 + tangent.square()).rsqrt()
        rotation[[low, high]] = pair @ rotation[[low, high]]
        excess[high], excess[low] = a + c, 0
    return rotation


def _jacobsthal(q: int) -> Tensor:
    """Jacobsthal's matrix (q, q): 1 where row minus column is a square mod q, -1 where it is not, 0 where it is 0."""
    numbers = torch.arange(q)
    character = -torch.ones(q, dtype=torch.float64)
    character[numbers * numbers % q] = 1
    character[0] = 0
    return character[(numbers[:, None] - numbers) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
