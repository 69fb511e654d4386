"""The report of a round: its metrics by hand, limit cases, and its figures."""

import matplotlib.pyplot as plt
import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.report import (
    class_figure,
    class_shares,
    confidence_figure,
    round_metrics,
    rounds_figure,
    true_labels,
)
from kd_lightning.pseudo_labels.table import PseudoLabels

LABEL = [0, 0, 1, 2, 2, 2]


def table(accepted, label=LABEL):
    confidence = torch.linspace(0.5, 1.0, len(label))
    changed = torch.arange(len(label)) < 2
    return PseudoLabels(
        torch.arange(len(label)), torch.tensor(label), confidence, torch.tensor(accepted).bool(), changed, 3, 5
    )


def test_by_hand():
    truth = torch.tensor([0, 1, -100, 2, 2, 1])
    values = round_metrics(table([1, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 3]), truth)
    assert values == pytest.approx(
        {
            "coverage": 4 / 6,
            "confidence": 0.75,
            "flips": 2 / 6,
            # 1/4, 1/4, 2/4, 0 against 3/5, 1/5, 0, 1/5
            "class_distance": (0.35 + 0.05 + 0.5 + 0.2) / 2,
            "precision": 3 / 5,
            "accepted_precision": 3 / 3,
        }
    )


def test_same_shares_are_no_distance_apart_and_disjoint_ones_are_one():
    one = table([1] * 6)
    assert round_metrics(one, torch.tensor(LABEL * 3), None)["class_distance"] == pytest.approx(0)
    assert round_metrics(one, torch.tensor([7, 3]), None)["class_distance"] == pytest.approx(1)


@pytest.mark.parametrize("truth", [None, torch.full((6,), -100)])
def test_without_truth(truth):
    assert set(round_metrics(table([1] * 6), torch.tensor([0]), truth)) == {
        "coverage",
        "confidence",
        "flips",
        "class_distance",
    }


def test_nothing_accepted():
    values = round_metrics(table([0] * 6), torch.tensor([0]), torch.tensor([1] * 6))
    assert values == pytest.approx({"coverage": 0, "confidence": 0.75, "flips": 2 / 6, "precision": 1 / 6})


def test_nothing_accepted_of_what_is_known():
    values = round_metrics(table([1, 0, 0, 0, 0, 0]), torch.tensor([0]), torch.tensor([-100, 0, 0, 0, 0, 0]))
    assert values["precision"] == pytest.approx(1 / 5)
    assert "accepted_precision" not in values


def test_no_given_labels():
    """A teacher may label everything."""
    assert "class_distance" not in round_metrics(table([1] * 6), torch.empty(0, dtype=torch.long), None)


def test_shares():
    shares = class_shares(table([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 4]))
    assert shares.tolist() == [[0, 0, 1, 0, 0], [0.25, 0.5, 0, 0, 0.25]]
    none = class_shares(table([0] * 6), torch.empty(0, dtype=torch.long))
    assert none.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("accepted", [[1, 0, 1, 1, 1, 0], [0] * 6])
def test_figures(threshold, accepted):
    open_ones = plt.get_fignums()
    confidence = confidence_figure(table(accepted), threshold)
    classes = class_figure(table(accepted), torch.tensor([0, 0, 1, 4]))
    (panel,) = confidence.axes
    assert panel.get_title() == f"round 3: {sum(accepted)} of 6 accepted"
    assert sum(bar.get_height() for bar in panel.patches) == 6
    assert [line.get_xdata()[0] for line in panel.lines] == ([] if threshold is None else [0.9])
    (panel,) = classes.axes
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == pytest.approx(class_shares(table(accepted), torch.tensor([0, 0, 1, 4])).flatten().tolist())
    for figure in (confidence, classes):
        figure.canvas.draw()
    assert plt.get_fignums() == open_ones  # none is left open


@pytest.mark.parametrize("given", [[], [0]])
def test_figures_of_one_sample(given):
    one = table([1], [0])
    confidence_figure(one, 0.5).canvas.draw()
    class_figure(one, torch.tensor(given, dtype=torch.long)).canvas.draw()


def test_many_classes_are_two_lines():
    """Twenty thousand bars take a minute."""
    (panel,) = class_figure(table([1] * 6), torch.arange(10_000)).axes
    assert len(panel.patches) == 2
    assert panel.patches[0].get_data().values.tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 2] + [0] * 9_997, abs=1e-4)


class TestSeveralLabels:
    """Rows are labels of samples: two samples with labels 0 and 2, 0 and 1 that are not given."""

    @staticmethod
    def table(accepted, label=(1, 0, 1, 1)):
        parts = torch.tensor([4, 4, 7, 7]), torch.tensor(label).float(), torch.tensor([0.9, 0.8, 0.7, 0.6])
        accepted = torch.tensor(accepted).float()
        return PseudoLabels(*parts, accepted, accepted < 0, 0, 0, None, torch.tensor([0, 2, 0, 1]))

    GIVEN = torch.tensor([[1, 0, 0], [0, -100, 1], [1, -100, 0]])

    def test_by_hand(self):
        truth = torch.full((8, 3), float("nan"))
        truth[4], truth[7] = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, float("nan"), 1.0])
        table = self.table([1, 1, 1, 0])
        found = true_labels(table, lambda index: truth[index])
        assert found.tolist() == [1, 1, 0, -100]
        values = round_metrics(table, self.GIVEN, found)
        assert values == pytest.approx(
            {
                "coverage": 3 / 4,
                "confidence": 0.75,
                "flips": 0,
                "class_distance": ((1 - 2 / 3) + abs(0 - 1 / 3)) / 2,  # of labels 0 and 2: of 1, none is accepted
                "precision": 1 / 3,
                "accepted_precision": 1 / 3,
            }
        )

    def test_shares(self):
        shares = class_shares(self.table([1, 1, 1, 0]), self.GIVEN)
        assert shares[1].tolist() == pytest.approx([2 / 3, 0, 1 / 3])
        assert shares[0, [0, 2]].tolist() == [1, 0]
        assert shares[0, 1].isnan()
        class_figure(self.table([1, 1, 1, 0]), self.GIVEN).canvas.draw()

    def test_nothing_accepted(self):
        assert "class_distance" not in round_metrics(self.table([0] * 4), self.GIVEN, None)


class TestRoundsOfRuns:
    """The figure of several runs, from what they have logged."""

    @staticmethod
    def run(folder, text):
        folder.mkdir()
        (folder / "metrics.csv").write_text(text)
        return folder

    def test_lines_are_means_over_runs(self, tmp_path):
        head = "step,train/loss,pseudo_labels/coverage,pseudo_labels/accepted_precision\n"
        first = self.run(tmp_path / "0", head + "5,2.0,,\n9,,0.5,0.75\n19,,0.75,\n")  # in the last nothing is known
        second = self.run(tmp_path / "1", head + "9,,0.25,0.25\n19,,0.25,0.5\n")
        coverage, precision = rounds_figure({"two": [first, second], "one": [str(first)]}).axes
        assert [line.get_xydata().tolist() for line in coverage.lines] == [
            [[9, 37.5], [19, 50]],
            [[9, 50], [19, 75]],
        ]
        assert [line.get_xydata().tolist() for line in precision.lines] == [[[9, 50], [19, 50]], [[9, 75]]]
        band = coverage.collections[0].get_paths()[0].vertices
        assert {round(float(y), 4) for x, y in band if x == 19} == {
            round(50 - 12.5 * 8**0.5, 4),
            round(50 + 12.5 * 8**0.5, 4),
        }
        assert [text.get_text() for text in precision.get_legend().get_texts()] == ["two", "one"]

    def test_without_truth_there_is_no_precision(self, tmp_path):
        run = self.run(tmp_path / "0", "step,pseudo_labels/coverage\n9,0.5\n")
        (panel,) = rounds_figure({"one": [run]}).axes
        assert panel.get_ylabel() == "accepted share of the pool, %"

    @pytest.mark.parametrize("runs", [{}, {"none": []}])
    def test_nothing_to_draw(self, runs):
        with pytest.raises(InputError, match="at least one folder for each method"):
            rounds_figure(runs)

    def test_run_without_rounds(self, tmp_path):
        run = self.run(tmp_path / "0", "step,train/loss\n9,0.5\n")
        for folder in (run, tmp_path / "absent"):
            with pytest.raises(InputError, match=f"{folder.name} has no rounds of pseudo-labels"):
                rounds_figure({"one": [folder]})
