"""The ledger of values: what is written and read, and damaged files."""

import csv

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.pseudo_labels import PseudoValues, make_pseudo_labels
from kd_lightning.pseudo_labels.ledger import write_round
from kd_lightning.pseudo_labels.values_ledger import VALUE_COLUMNS, holds_values, read_values, write_values


def table(output, number=2):
    columns = torch.tensor([[-1.5, 0.25, 1e-7], [0.5, 0.0, 0.125], [0.0, 1.0, 1.0], [0.0, 0.5, 2.0]])
    return PseudoValues(torch.tensor([3, 3, 7]), *columns, number, 4, output)


def test_written_and_read(tmp_path):
    one = table(torch.tensor([0, 1, 1]))
    path = write_values(tmp_path, one, ["=width"], {3: "x/3.png", 7: None}.get, lambda index: f"h{index}")
    assert path == tmp_path / "pseudo_labels" / "round_0002.csv"
    with path.open(newline="") as file:
        rows = [*csv.reader(file)]
    assert tuple(rows[0]) == VALUE_COLUMNS
    assert rows[1] == ["2", "4", "3", "x/3.png", "h3", "'=width", "-1.5", "0.5", "0", "0"]
    found = read_values(path)
    assert (found.number, found.epoch, found.samples) == (2, 4, 2)
    assert (found.path, found.content) == (["x/3.png", "x/3.png", ""], ["h3", "h3", "h7"])
    assert found.output == ["=width", "1", "1"]
    assert torch.equal(found.value, one.label.double())
    assert found.spread.tolist() == [0.5, 0.0, 0.125]
    assert found.accepted.tolist() == [False, True, True]
    assert found.change.tolist() == [0.0, 0.5, 2.0]
    assert found.caption(0) == "=width -1.5\nspread 0.500"
    assert found.doubt.argmax() == 0


def test_later_rounds_go_and_kinds_are_told_apart(tmp_path):
    later = write_values(tmp_path, table(None, 5), None, lambda index: None)
    path = write_values(tmp_path, table(None), None, lambda index: None)
    assert not later.exists()
    assert holds_values(path)
    assert read_values(path).output == ["0"] * 3
    assert not holds_values(write_round(tmp_path, make_pseudo_labels(torch.eye(2), torch.arange(2)), None, str))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("2,4,3,,,0,1.0,nan,1,0", "line 2: the ledger is damaged: index, spread and change must be at least 0"),
        ("2,4,3,,,0,inf,1,1,0", "value be finite"),
        ("2,4,3,,,0,1.0,-1,1,0", "must be at least 0"),
        ("2,4,3,,,0,1.0,1,2,0", "accepted be 0 or 1"),
        ("2,4,3,,,0,1.0,1,,0", "accepted be 0 or 1"),
        ("2,4,3,,,0,1.0,1", "8 cells instead of 10"),
        ("2,4,3,,,0,1,1,1,0\n3,4,3,,,0,1,1,1,0", "line 3: .*round and epoch must be those of the other rows"),
        ("", "it has no rows"),
    ],
)
def test_damaged(tmp_path, cells, message):
    path = tmp_path / "round_0000.csv"
    path.write_text(",".join(VALUE_COLUMNS) + "\n" + cells)
    with pytest.raises(InputError, match=message):
        read_values(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="its columns must be round, epoch"):
        read_values(path)
