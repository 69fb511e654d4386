"""The statistics of the benchmarks of cost."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def measuring():
    path = Path(__file__).parents[2] / "benchmarks/measuring.py"
    spec = importlib.util.spec_from_file_location("measuring", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_ratio_lies_within_its_spread(measuring, capsys):
    """The figure is the median of the ratios of the pairs, not the ratio of the medians."""
    table = measuring.Table()
    table.add("a", [1, 2, 6, 12, 15], [1, 2, 3, 4, 5], most=1.9)  # the pairs: 1, 1, 2, 3, 3
    assert "| 2.000 | 1.000 to 3.000 | ≤ 1.9 | missed |" in capsys.readouterr().out
    table.add("b", [1, 2, 6], [1, 4, 2])  # the pairs: 1, 0.5, 3; the medians: 2 and 2
    table.add("c", [3, 4, 5], [1, 4, 10])  # the pairs: 3, 1, 0.5
    table.add("d", [10, 1, 2], [5, 4, 1])  # the pairs: 2, 0.25, 2; the medians: 2 and 4
    out = capsys.readouterr().out
    assert "| 2 / 4 s | 2.000 | 0.600 to 2.000 |" in out
    assert table.missed == 1


@pytest.mark.parametrize(("least", "missed"), [(1.0, 0), (2.5, 1), (1.5, 0)])
def test_a_lower_bound_of_one_is_reached_within_the_spread(measuring, least, missed):
    table = measuring.Table()
    table.add("a", [2, 2, 2], [1, 1, 1], least=least)
    if least == 1.0:
        table.add("b", [0.9, 0.95, 1.1], [1, 1, 1], least=least)
    assert table.missed == missed


def test_a_finished_part_is_read_from_the_file_only_under_the_same_settings_and_code(measuring, tmp_path, monkeypatch):
    file, runs = tmp_path / "parts.jsonl", []

    def measure(table):
        runs.append(1)
        table.add("a", [1.0], [2.0], most=0.1)

    def missed(rounds):
        table = measuring.Table(file)
        table.run("part", {"rounds": rounds}, measure)
        return table.missed

    assert [missed(1), missed(1), missed(2)] == [1, 1, 1]
    assert len(runs) == 2
    monkeypatch.setattr(measuring, "code_hash", lambda: "other")
    assert missed(1) == 1
    assert len(runs) == 3
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3
