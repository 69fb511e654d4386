"""Intervals over seeds and over samples, and when a verdict is drawn."""

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from kd_lightning.runs.figures.statistics import difference, sample_interval, seed_interval
from kd_lightning.runs.results import Prediction, Result, write_result


@pytest.fixture
def results(tmp_path):
    """Makes {seeds: result} of a group from the correctness of each sample, by seed."""

    def make(name, correct, labels=None, first=0, contents=None):
        found = {}
        for seed, row in correct.items():
            folder = tmp_path / name / str(seed)
            folder.mkdir(parents=True)
            figures = {"accuracy": float(np.mean(row))}
            result = Result("test", len(row), figures, None, folder)
            texts = labels or ["a"] * len(row)
            names = contents or [""] * len(row)
            rows = [Prediction(first + k, texts[k], "b", float(one), "", names[k]) for k, one in enumerate(row)]
            write_result(result, rows)
            found[seed, 0] = result
        return found

    return make


def correctness(share, count=400, seed=0):
    return np.random.default_rng(seed).random(count) < share


def group(share, seeds=(0, 1, 2), count=400):
    return {seed: correctness(share + 0.01 * seed, count, seed + int(1000 * share)) for seed in seeds}


def test_seed_interval_agrees_with_scipy():
    values = [0.04, 0.03, 0.10]
    assert seed_interval(values) == pytest.approx(tuple(ttest_1samp(values, 0).confidence_interval(0.95)))


@pytest.mark.parametrize("comparisons", [1, 3, 10])
def test_intervals_of_several_comparisons_are_those_of_a_higher_level(comparisons):
    """Bonferroni: of m intervals each has the level 1 - 0.05 / m."""
    level = 1 - 0.05 / comparisons
    values = [0.04, 0.03, 0.10, 0.01]
    expected = ttest_1samp(values, 0).confidence_interval(level)
    assert seed_interval(values, comparisons) == pytest.approx(tuple(expected))
    differences = np.random.default_rng(1).choice([-1, 0, 0, 1], 400)
    options = {"confidence_level": level, "method": "percentile", "n_resamples": 9999, "rng": 0, "batch": 500}
    expected = bootstrap((differences,), np.mean, **options).confidence_interval
    assert sample_interval(differences, comparisons) == pytest.approx(tuple(expected), abs=0.008)


@pytest.mark.parametrize("values", [[-1, 0, 0, 0, 1 / 3, 1], np.linspace(-1, 1, 5001)])
def test_sample_interval_agrees_with_scipy(values):
    differences = np.random.default_rng(1).choice(values, 400)
    expected = bootstrap((differences,), np.mean, method="percentile", rng=0, batch=500).confidence_interval
    assert sample_interval(differences) == pytest.approx(tuple(expected), abs=0.004)
    assert sample_interval(differences) == sample_interval(differences)


def test_difference_is_paired_by_seed_and_by_sample(results):
    before = {seed: correctness(0.5, seed=seed) for seed in (0, 1, 2, 7)}
    after = {seed: before[seed % 7] | correctness(0.1 + 0.02 * seed, seed=50 + seed) for seed in (2, 1, 0, 8)}
    found = difference(results("after", after), results("before", before))
    by_seed = [after[seed].mean() - before[seed].mean() for seed in (0, 1, 2)]
    assert found.seeds == 3 and found.reasons == []
    assert found.mean == pytest.approx(np.mean(by_seed))
    assert found.over_seeds == pytest.approx(tuple(ttest_1samp(by_seed, 0).confidence_interval(0.95)))
    by_sample = np.mean([after[seed].astype(float) - before[seed] for seed in (0, 1, 2)], axis=0)
    low, high = found.over_samples
    assert by_sample.mean() == pytest.approx(found.mean)
    assert low < found.mean < high
    assert high - low == pytest.approx(2 * 1.96 * by_sample.std() / 20, rel=0.1)  # the normal approximation


class TestVerdict:
    @pytest.mark.parametrize(
        ("one", "other", "verdict"),
        [(0.9, 0.5, "better"), (0.5, 0.9, "worse"), (0.7, 0.71, "no clear difference")],
    )
    def test_it_needs_both_intervals(self, results, one, other, verdict):
        assert difference(results("one", group(one)), results("other", group(other))).verdict == verdict

    def test_seeds_that_scatter_forbid_it(self, results):
        before = {seed: correctness(0.5, 4000, seed) for seed in range(3)}
        after = {seed: correctness(share, 4000, 9 + seed) for seed, share in enumerate((0.52, 0.9, 0.55))}
        found = difference(results("after", after), results("before", before))
        assert found.over_samples[0] > 0 > found.over_seeds[0]
        assert found.verdict == "no clear difference"

    def test_few_samples(self, results):
        found = difference(results("a", group(0.9, count=6)), results("b", group(0.2, count=6)))
        assert found.verdict is None and found.mean is not None
        assert any("6 samples" in reason and "100" in reason for reason in found.reasons)

    def test_few_seeds(self, results):
        found = difference(results("a", group(0.9, (0, 1))), results("b", group(0.2)))
        assert found.verdict is None and found.seeds == 2 and found.over_seeds is not None
        assert any("2 common seeds" in reason and "3" in reason for reason in found.reasons)

    def test_one_seed_has_no_interval_over_seeds(self, results):
        found = difference(results("a", group(0.9, (0,))), results("b", group(0.2)))
        assert found.over_seeds is None and found.over_samples is not None and found.verdict is None

    def test_no_common_seed(self, results):
        found = difference(results("a", group(0.9, (0, 1))), results("b", group(0.2, (2, 3))))
        assert found.mean is None and found.verdict is None and "no common seed" in found.reasons

    def test_equal_differences_over_seeds(self, results):
        """Zero variance over seeds is no certainty."""
        row = correctness(0.5)
        better = row.copy()
        better[np.flatnonzero(~row)[:40]] = True
        found = difference(results("a", dict.fromkeys(range(3), better)), results("b", dict.fromkeys(range(3), row)))
        assert found.mean == pytest.approx(0.1) and found.over_seeds is None and found.verdict is None
        assert len(found.reasons) == 1 and "seeds" in found.reasons[0]

    def test_all_samples_agree(self, results):
        found = difference(results("a", group(0.9)), results("b", group(0.9)))
        assert found.mean == 0 and found.over_samples is None and found.verdict is None
        assert any("all samples agree" in reason for reason in found.reasons)

    def test_another_number_of_samples_gives_no_difference(self, results):
        found = difference(results("a", group(0.9)), results("b", group(0.5, count=300)))
        assert found.mean is None and found.verdict is None
        assert any("400" in reason and "300" in reason for reason in found.reasons)

    @pytest.mark.parametrize("other", [{"first": 1}, {"labels": ["b", *["a"] * 399]}])
    def test_other_samples_or_labels_give_no_interval_over_samples(self, results, other):
        found = difference(results("a", group(0.9)), results("b", group(0.5), **other))
        assert found.mean is not None and found.over_seeds is not None
        assert found.over_samples is None and found.verdict is None and "other samples" in found.reasons[0]

    def test_results_without_predictions(self, results):
        one, other = results("a", group(0.9)), results("b", group(0.5))
        (other[1, 0].folder / "test_predictions.csv.gz").unlink()
        found = difference(one, other)
        assert found.over_samples is None and found.verdict is None
        assert str(other[1, 0].folder) in found.reasons[0]


class TestSamplesByContent:
    """The index of a sample changes when another one comes or goes."""

    NAMES = [f"{k:04x}" for k in range(400)]

    def test_another_order_is_the_same(self, results):
        before, after = group(0.5), group(0.9)
        order = np.random.default_rng(5).permutation(400)
        one = difference(results("a", after), results("b", before))
        shuffled = {seed: row[order] for seed, row in after.items()}
        names = [self.NAMES[k] for k in order]
        other = difference(results("c", shuffled, contents=names), results("d", before, contents=self.NAMES))
        assert other == one and one.verdict == "better"

    def test_other_samples_are_left_out(self, results):
        """As many samples: one was removed, and another was added."""
        before, after = group(0.5), group(0.9)
        names = [*self.NAMES[1:], "ffff"]
        moved = {seed: [*row[1:], True] for seed, row in after.items()}
        found = difference(results("a", moved, contents=names), results("b", before, contents=self.NAMES))
        assert (found.mean, found.over_seeds, found.verdict) == (None, None, None)
        assert "1 only in" in found.reasons[0] and found.reasons[0].count("/0") == 2 and len(found.reasons) == 1
        cut = [{seed: row[1:] for seed, row in rows.items()} for rows in (after, before)]
        assert found.over_samples == difference(results("c", cut[0]), results("d", cut[1])).over_samples

    def test_another_number_of_samples(self, results):
        before, after = group(0.5, count=399), group(0.9)
        found = difference(results("a", after, contents=self.NAMES), results("b", before, contents=self.NAMES[:399]))
        assert found.mean is None and found.over_samples is not None and found.verdict is None
        assert "n = 400, not 399" in found.reasons[0] and "1 only in" in found.reasons[0]

    def test_a_label_that_changed(self, results):
        labels = ["b", *["a"] * 399]
        one = results("a", group(0.9), labels, contents=self.NAMES)
        found = difference(one, results("b", group(0.5), contents=self.NAMES))
        assert found.mean is None and found.verdict is None and found.over_samples is not None
        assert "1 with another label" in found.reasons[0] and "only" not in found.reasons[0]

    def test_copies_differ_by_their_label(self, results):
        """The suffix of a content is another one when a copy of it goes."""
        names, labels = ["00", "00#2", *self.NAMES[2:]], ["a", "b", *["a"] * 398]
        swapped, others = ["00#2", "00", *self.NAMES[2:]], group(0.5)
        found = difference(
            results("a", group(0.9), labels, contents=names), results("b", others, labels, contents=swapped)
        )
        assert found.reasons == [] and found.verdict == "better"

    def test_other_samples_for_each_seed(self, results):
        """As in a validation part; a difference of accuracies is fair, since both runs of a seed have the same."""
        one, other = {}, {}
        for seed in range(3):
            names = [f"{k + 40 * seed:04x}" for k in range(400)]
            one |= results(f"a{seed}", {seed: group(0.9)[seed]}, contents=names)
            other |= results(f"b{seed}", {seed: group(0.5)[seed]}, contents=names)
        found = difference(one, other)
        assert found.mean is not None and found.over_seeds is not None and found.over_samples is not None
        assert found.verdict is None and "320 of 400" in found.reasons[0] and len(found.reasons) == 1

    def test_too_few_common_samples_have_no_interval(self, results):
        names = self.NAMES[:100] + [f"x{k}" for k in range(300)]
        one = results("a", group(0.9), contents=names)
        found = difference(one, results("b", group(0.5), contents=self.NAMES))
        assert found.over_samples is None and found.mean is None
        assert "300 only in" in found.reasons[0] and "other samples" in found.reasons[1]

    def test_names_in_one_run_alone_count_by_index(self, results):
        one = results("a", group(0.9), contents=self.NAMES)
        assert difference(one, results("b", group(0.5))).verdict == "better"


# Errors, and samples with many labels.


def write(root, name, figure, values, labels=None, texts=None):
    """Write the results of a group of three seeds."""
    found = {}
    for seed in range(3):
        folder = root / name / str(seed)
        folder.mkdir(parents=True)
        mine = [float(value) for value in values(seed)]
        counts = labels or [1] * len(mine)
        key = "error" if figure == "mae" else "correct"
        rows = [
            Prediction(k, texts[k] if texts else "a", "", **{"correct": np.nan, key: value}, labels=count)
            for k, (value, count) in enumerate(zip(mine, counts, strict=True))
        ]
        result = Result("test", len(mine), {figure: float(np.average(mine, weights=counts))}, None, folder)
        write_result(result, rows)
        read = result.predictions()
        assert [row.value for row in read] == pytest.approx(mine) and [row.labels for row in read] == counts
        found[seed, 0] = result
    return found


def test_less_error_is_better(tmp_path):
    def errors(scale):
        return lambda seed: scale * np.random.default_rng([seed, int(1e5 * scale)]).gamma(2, size=200)

    small, large = (write(tmp_path, str(scale), "mae", errors(scale)) for scale in (1e-4, 3e-4))
    found = difference(small, large, "mae")
    assert found.verdict == "better" and found.mean < 0
    assert difference(large, small, "mae").verdict == "worse"
    by_sample = np.mean([errors(1e-4)(seed) - errors(3e-4)(seed) for seed in range(3)], axis=0)
    low, high = found.over_samples
    assert (low + high) / 2 == pytest.approx(by_sample.mean(), rel=0.05)
    assert high - low == pytest.approx(2 * 1.96 * by_sample.std() / 200**0.5, rel=0.1)  # the normal approximation


def test_samples_count_by_their_labels(tmp_path):
    """The figure is a mean over all positions: so is the centre of the interval."""
    labels = np.random.default_rng(1).integers(1, 50, 400).tolist()

    def shares(first):
        return lambda seed: np.random.default_rng([seed, first]).beta(first, 3, 400)

    one, two = (write(tmp_path, str(first), "accuracy", shares(first), labels) for first in (6, 5))
    found = difference(one, two)
    assert np.mean(found.over_samples) == pytest.approx(found.mean, abs=2e-3)
    assert found.verdict == "better"


def test_other_masks_are_other_labels(tmp_path):
    values, labels = np.linspace(0, 1, 200), [4] * 200
    one = write(tmp_path, "a", "accuracy", lambda seed: values, labels)
    two = write(tmp_path, "b", "accuracy", lambda seed: values, labels, [f"4 labels {k}" for k in range(200)])
    assert "the runs were measured on other samples or labels" in difference(one, two).reasons
