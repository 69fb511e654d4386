"""Dropped tokens: their share, what is never dropped, and which inputs fit."""

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.data.transforms import TokenDropout
from kd_lightning.data.views.dataset import uses_torch_rng_only

IDS = torch.tensor([101, 7, 8, 9, 7, 102, 0, 0])
ATTENTION = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0])


def many(transform, count=4000):
    torch.manual_seed(0)
    return [transform({"input_ids": IDS, "attention_mask": ATTENTION, "other": IDS}) for _ in range(count)]


@pytest.mark.parametrize("mask_token", [None, 103])
def test_share(mask_token):
    """Each ordinary token with probability p; a text of four of them stays whole with p ** 4 more."""
    p, found = 0.4, many(TokenDropout([101, 102], 0.4, mask_token))
    ids, attention = (torch.stack([one[name] for one in found]) for name in ("input_ids", "attention_mask"))
    hidden = (ids == 103) if mask_token else (attention == 0) & (ATTENTION == 1)
    assert torch.equal(ids.masked_fill(hidden, -1), IDS.expand_as(ids).masked_fill(hidden, -1))
    assert torch.equal(attention, (ATTENTION * ~hidden) if mask_token is None else ATTENTION.expand_as(attention))
    assert not hidden[:, [0, 5, 6, 7]].any() and not hidden[:, 1:5].all(dim=1).any()
    expected = p - p**4
    error = (expected * (1 - expected) / len(found)) ** 0.5
    assert (hidden[:, 1:5].double().mean(dim=0) - expected).abs().max() < 4 * error
    pair = (hidden[:, 1] & hidden[:, 2]).double().mean()
    assert pair.item() == pytest.approx(p**2 - p**4, abs=0.03)
    assert all(torch.equal(one["other"], IDS) for one in found)


def test_ids_alone_and_other_types():
    torch.manual_seed(0)
    found = TokenDropout([], 0.5, mask_token=1)(torch.arange(2, 50, dtype=torch.uint8))
    assert found.dtype == torch.uint8 and 10 < (found == 1).sum() < 40
    lists = TokenDropout([0], 0.0)({"input_ids": IDS.tolist(), "attention_mask": ATTENTION.tolist()})
    assert torch.equal(lists["attention_mask"], ATTENTION)
    one = {"input_ids": torch.tensor([101, 7, 102]), "attention_mask": torch.ones(3)}
    assert TokenDropout([101, 102], 0.99, 103)(one)["input_ids"].tolist() == [101, 7, 102]  # its only token


def test_arguments_and_inputs_that_do_not_fit():
    for p in (-0.1, 1.0):
        with pytest.raises(InputError, match="p must be at least 0 and below 1, got"):
            TokenDropout([], p)
    with pytest.raises(InputError, match="mask_token must be at least 0, or null, got -1"):
        TokenDropout([], mask_token=-1)
    drop = TokenDropout([], 0.5)
    with pytest.raises(InputError, match="TokenDropout needs input_ids, got tokens"):
        drop({"tokens": IDS})
    with pytest.raises(
        InputError, match=r"TokenDropout needs input_ids \(T,\) of whole numbers, got \[8\] torch.float32"
    ):
        drop(IDS.float())
    with pytest.raises(InputError, match=r"of whole numbers, got \[1, 8\] torch.int64"):
        drop({"input_ids": IDS[None]})
    with pytest.raises(InputError, match="without mask_token needs attention_mask; set mask_token"):
        drop(IDS)


def test_replay_seeds_one_generator():
    assert uses_torch_rng_only(TokenDropout([1]))
