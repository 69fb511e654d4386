"""to_rows: dense outputs as rows, entry by entry."""

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.losses.rows import to_rows

MAPS = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
TOKENS = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])


def test_maps():
    rows = [MAPS[b, :, i, j].tolist() for b in range(2) for i in range(2) for j in range(2)]
    assert to_rows(MAPS, class_dim=1).tolist() == rows
    assert to_rows(MAPS, class_dim=-3).tolist() == rows
    counted = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    assert to_rows(MAPS, 1, counted).tolist() == [rows[n] for n in (0, 3, 6, 7)]


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.to(torch.uint8), 2 * MASK])
def test_tokens(mask):
    expected = [TOKENS[b, t].tolist() for b, t in [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]]
    assert to_rows(TOKENS, -1, mask).tolist() == expected
    assert to_rows(TOKENS, None, mask).tolist() == expected


def test_a_mask_of_samples_selects_all_their_positions():
    assert torch.equal(to_rows(TOKENS, -1, torch.tensor([False, True])), TOKENS[1])
    assert torch.equal(to_rows(MAPS, 1, torch.tensor([0, 1])), MAPS[1].permute(1, 2, 0).reshape(-1, 3))


def test_without_a_dimension_of_classes_nothing_changes():
    assert to_rows(MAPS) is MAPS
    values = torch.randn(2, 4)
    assert torch.equal(to_rows(values, mask=MASK), values[MASK == 1])


def test_no_position_counts():
    rows = to_rows(TOKENS, -1, 0 * MASK)
    assert rows.shape == (0, 3)


def test_logits_are_rows_already():
    logits = torch.randn(5, 3)
    assert torch.equal(to_rows(logits, 1), logits)
    assert torch.equal(to_rows(logits, -1, torch.tensor([1, 0, 0, 1, 0])), logits[[0, 3]])


@pytest.mark.parametrize(
    ("class_dim", "mask", "message"),
    [
        (0, None, r"class_dim must be a dimension of the outputs after the first, got 0 for \[2, 4, 3\]"),
        (-3, None, "got -3"),
        (3, None, "got 3"),
        (-1, torch.ones(2, 4), "mask must be boolean, or integers .*, got torch.float32"),
        (-1, torch.ones(2, 3) > 0, r"the shape of the positions, \[2, 4\], got \[2, 3\]"),
        (-1, torch.ones(2, 4, 3) > 0, r"\[2, 4\], got \[2, 4, 3\]"),
        (-1, torch.tensor(True), r"\[2, 4\], got \[\]"),
    ],
)
def test_refuses_what_does_not_fit(class_dim, mask, message):
    with pytest.raises(InputError, match=message):
        to_rows(TOKENS, class_dim, mask)
