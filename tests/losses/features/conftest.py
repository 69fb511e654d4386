import pytest
import torch


@pytest.fixture
def randn():
    """Return a function that gives the same normal numbers for the same shape and seed."""

    def draw(*shape, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def rotation(randn):
    """Return a function that gives an orthogonal matrix (n, n)."""
    return lambda n, seed=9: torch.linalg.qr(randn(n, n, seed=seed)).Q
