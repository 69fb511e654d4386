"""Cells that a spreadsheet would run: escaped in each CSV file of this package, and read back as they were."""

import csv
import io

import pytest
import torch

from kd_lightning.data.tables import read_table
from kd_lightning.pseudo_labels.ledger import read_round, write_round
from kd_lightning.pseudo_labels.table import PseudoLabels
from kd_lightning.runs.results import Prediction, Result, read_result, write_result
from kd_lightning.runs.spreadsheet import SafeWriter, escape_cell, unescape_cell

DANGEROUS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "\r=x", "=", "-"]
SAFE = ["", "cat", "a=b", "'", "'tis", "''", "1", "-1", "+1.5e-3", "-.5", "-1.", "-inf", "nan", "-0.5;0.25", "cat;=dog"]


@pytest.mark.parametrize("text", [*DANGEROUS, *(f"'{text}" for text in DANGEROUS), *SAFE, "'-1", "''=x"])
def test_each_text_comes_back(text):
    assert unescape_cell(escape_cell(text)) == text
    assert not escape_cell(text).startswith(tuple("=@\t\r"))


@pytest.mark.parametrize("text", DANGEROUS)
def test_a_formula_becomes_text(text):
    assert escape_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", SAFE)
def test_other_texts_stay(text):
    assert escape_cell(text) == text


def test_numbers_are_written_as_by_csv():
    text, plain = io.StringIO(), io.StringIO()
    rows = [[1, -2.5, None, "-2.5", 'a "b", c'], [float("-inf"), True, "", "x\ny", -0.0]]
    SafeWriter(text).writerows(rows)
    csv.writer(plain).writerows(rows)
    assert text.getvalue() == plain.getvalue()


def test_tables_of_labels_and_images(tmp_path):
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        SafeWriter(file).writerows([["path", "label"], ["-a/=b.png", "=cat"], ["@c.png", "-1"]])
    assert "'=cat" in path.read_text()
    _, rows = read_table(path, "label_file")
    assert [[*row.values()] for _, row in rows] == [["-a/=b.png", "=cat"], ["@c.png", "-1"]]


def test_the_ledger_of_pseudo_labels(tmp_path):
    one = torch.tensor([0, 1])
    labels = PseudoLabels(one, one, torch.tensor([0.5, 0.5]), one == 1, one == 1, round=0, epoch=0)
    path = write_round(tmp_path, labels, ["=cat", "dog"], lambda index: f"@{index}.png")
    found = read_round(path)
    assert "'=cat" in path.read_text()
    assert (found.label, found.path) == (["=cat", "dog"], ["@0.png", "@1.png"])


def test_predictions_of_a_test(tmp_path):
    rows = [Prediction(0, "=cat", "@dog", 0.0, "-x/a.png", "abc"), Prediction(1, "dog", "dog", 1.0, "b.png", "def")]
    write_result(Result("test", 2, {"accuracy": 0.5}, None, tmp_path), rows)
    result = read_result(tmp_path, "test")
    assert result.predictions() == rows
