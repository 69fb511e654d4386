"""Products of all pairs: by hand, and in float32 under autocast."""

import torch

from kd_lightning.losses.products import products


def test_by_hand():
    vectors = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    found = products(vectors)
    for part, of in zip(vectors.double(), found, strict=True):
        for i, a in enumerate(part):
            for j, b in enumerate(part):
                torch.testing.assert_close(of[i, j].double(), (a * b).sum(), rtol=1e-5, atol=1e-6)


def test_under_autocast():
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = products(vectors)
        assert (vectors @ vectors.T).dtype == torch.bfloat16  # the comparison can fail
    assert found.dtype == torch.float32 and torch.equal(found, vectors @ vectors.T)
    assert products(vectors.to("meta")).shape == (4, 4)


def test_products_with_other_vectors():
    one, other = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = products(one, other)
    torch.testing.assert_close(found, torch.einsum("sad,sbd->sab", one, other))
