"""The ledger of pseudo-labels: what is written, read, replaced and refused."""

import csv
from dataclasses import replace

import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels import FixedThreshold
from kd_lightning.pseudo_labels.ledger import COLUMNS, find_rounds, read_round, write_round
from kd_lightning.pseudo_labels.table import PseudoLabels, make_pseudo_labels


class TestWriting:
    @staticmethod
    def write(folder, table, names=None, path_of=lambda index: None, **kwargs):
        path = write_round(folder, table, names, path_of, **kwargs)
        with path.open(newline="", encoding="utf-8") as file:
            return path, [*csv.DictReader(file)]

    def test_a_row_a_sample(self, tmp_path):
        first = make_pseudo_labels(
            torch.tensor([[0.7, 0.3], [0.2, 0.8]]), torch.tensor([12, 5]), select=FixedThreshold(0.75)
        )
        table = make_pseudo_labels(
            torch.tensor([[0.4, 0.6], [0.2, 0.8]]),
            torch.tensor([12, 5]),
            select=FixedThreshold(0.75),
            previous=first,
            epoch=3,
        )
        places = {"path_of": {5: "x/5.png", 12: None}.get, "content_of": {5: "ab12", 12: ""}.get}
        path, rows = self.write(tmp_path, table, ['a, "b"', "Käse"], **places)
        assert path == tmp_path / "pseudo_labels" / "round_0001.csv"
        assert [tuple(row) for row in rows] == [COLUMNS] * 2
        assert [[*row.values()] for row in rows] == [
            ["1", "3", "5", "x/5.png", "ab12", "Käse", "0.800000", "1", "0"],
            ["1", "3", "12", "", "", "Käse", "0.600000", "0", "1"],
        ]

    def test_a_round_is_replaced(self, tmp_path):
        for label in (0, 1):
            table = make_pseudo_labels(torch.eye(2)[[label]], torch.tensor([0]))
            _, rows = self.write(tmp_path, table, ['a, "b"', "b"])
        assert [row["label"] for row in rows] == ["b"]
        assert [path.name for path in (tmp_path / "pseudo_labels").iterdir()] == ["round_0000.csv"]

    def test_later_rounds_go(self, tmp_path):
        """They belong to a run that was resumed from an earlier round."""
        first = make_pseudo_labels(torch.eye(2), torch.arange(2))
        second = make_pseudo_labels(torch.eye(2), torch.arange(2), previous=first)
        for table in (first, second, make_pseudo_labels(torch.eye(2), torch.arange(2), previous=second), second):
            self.write(tmp_path, table)
        names = sorted(path.name for path in (tmp_path / "pseudo_labels").iterdir())
        assert names == ["round_0000.csv", "round_0001.csv"]

    @pytest.mark.parametrize(("names", "label"), [(None, "2"), (["a", "b"], "2"), (["a", "b", "c"], "c")])
    def test_classes_without_a_name(self, tmp_path, names, label):
        _, rows = self.write(tmp_path, make_pseudo_labels(torch.eye(3)[[2]], torch.tensor([0])), names)
        assert rows[0]["label"] == label

    def test_several_labels_of_a_sample(self, tmp_path):
        label, ones = torch.tensor([1.0, 0.0, 1.0]), torch.ones(3)
        parts = torch.tensor([3, 3, 5]), label, ones, ones, ones == 0, 0, 1, None, torch.tensor([0, 2, 1])
        path, rows = self.write(tmp_path, PseudoLabels(*parts), ["even", "prime"])
        assert [row["label"] for row in rows] == ["even", "not 2", "prime"]
        found = read_round(path)
        assert (found.samples, found.label) == (2, ["even", "not 2", "prime"])
        assert found.by_class().keys() == {"even", "not 2", "prime"}

    def test_later_rounds_are_deleted_by_number(self, tmp_path):
        table = make_pseudo_labels(torch.eye(2), torch.tensor([0, 1]))
        for number in (3, 9999, 10_000, 12_345):
            write_round(tmp_path, replace(table, round=number), None, lambda index: None)
        assert [*find_rounds(tmp_path)] == [3, 9999, 10_000, 12_345]
        write_round(tmp_path, replace(table, round=9999), None, lambda index: None)
        assert [*find_rounds(tmp_path)] == [3, 9999]


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("round,epoch\n", 1),
        (f"{HEADER}\n", 1),
        (f"{HEADER}\n0,1,7,,,cat,0.5,1,0\n0,1,8,,,cat\n", 3),  # cut off
        (f"{HEADER}\n0,1,7,,,cat,0.5,1,0,\n", 2),
        (f"{HEADER}\n0,1,7,,,cat,0.5,1,0\n\n", 3),
        (f"{HEADER}\n0,1,7,,,cat,much,1,0\n", 2),
        (f"{HEADER}\n0,1,7,,,cat,1.5,1,0\n", 2),
        (f"{HEADER}\n0,1,7,,,cat,nan,1,0\n", 2),
        (f"{HEADER}\n0,1,-7,,,cat,0.5,1,0\n", 2),
        (f"{HEADER}\n0,1,7,,,cat,0.5,yes,0\n", 2),
        (f"{HEADER}\n0,1,7,,,cat,0.5,1,0\n0,2,8,,,cat,0.5,1,0\n", 3),
    ],
)
def test_damaged(tmp_path, text, line):
    path = tmp_path / "round_0001.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"round_0001.csv, line {line}: the ledger is damaged: "):
        read_round(path)


def test_what_is_written_is_read(tmp_path):
    names = ["a, b", 'said "c"']
    columns = ([3, 900], [0, 1], [0.25, 1.0], [True, False], [False, True])
    table = PseudoLabels(*map(torch.tensor, columns), 7, 12)
    path = write_round(tmp_path, table, names, lambda index: f"images/{index},ä.png", lambda index: f"{index:016x}#2")
    one = read_round(path)
    assert one.content == [f"{3:016x}#2", f"{900:016x}#2"]
    assert (one.number, one.epoch, one.label) == (7, 12, names)
    assert one.path == ["images/3,ä.png", "images/900,ä.png"]
    for name in ("index", "confidence", "accepted", "changed"):
        assert getattr(one, name).tolist() == getattr(table, name).tolist()
    write_round(tmp_path, replace(table, round=12345), names, lambda index: None)
    (tmp_path / "pseudo_labels" / "round_x.csv").touch()
    assert list(find_rounds(tmp_path)) == [7, 12345]
    assert find_rounds(tmp_path / "elsewhere") == {}


def test_earlier_files_have_no_contents(tmp_path):
    path = tmp_path / "round_0001.csv"
    path.write_text("round,epoch,index,path,label,confidence,accepted,changed\n1,2,7,a.png,cat,0.5,1,0\n")
    one = read_round(path)
    assert (one.index.tolist(), one.path, one.content, one.label) == ([7], ["a.png"], [""], ["cat"])
    assert (one.confidence.tolist(), one.accepted.tolist(), one.changed.tolist()) == ([0.5], [True], [False])
