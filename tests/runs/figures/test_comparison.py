"""The tables, their notes, and the files. Folders are made by hand."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.calibration import calibrate
from kd_lightning.quantization.layers import quantize
from kd_lightning.runs.figures.comparison import compare_runs, figure_of
from kd_lightning.runs.results import Prediction, Result, write_result
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import save_weights

NETWORK = {"class_path": "kd_lightning.models.DigitsCNN", "init_args": {"width": 8}}


@pytest.fixture
def make(tmp_path):
    """Makes a finished run below ``runs``, with predictions of its parts."""

    def make(name, seed=0, student=None, spec=NETWORK, finished=True, first=None, samples=None, **correct):
        folder = tmp_path / "runs" / name / f"version_{len([*tmp_path.glob(f'runs/{name}/*')])}"
        folder.mkdir(parents=True)
        model = {"class_path": "DistillModule", "init_args": {"student": spec}}
        config = {"name": name, "seed_everything": seed, "model": model}
        config["data"] = {"class_path": "X", "init_args": {"source": {"class_path": "Digits"}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        Run.write_state(folder, finished=finished, **({} if samples is None else {"samples": samples}))
        if student is not None:
            save_weights(student.state_dict(), folder / "student.safetensors", {"input_shape": [1, 8, 8]})
        for part, row in correct.items():
            part = {"transductive": "transductive/test"}.get(part, part)
            figures = {"accuracy": float(np.mean(row)), "agreement": 0.5}
            result = Result(part, len(row), figures, Run(folder).weights_hash, folder)
            names = [""] * len(row) if first is None else [f"{first + k:04x}" for k in range(len(row))]
            write_result(result, [Prediction(k, "a", "b", float(one), "", names[k]) for k, one in enumerate(row)])
        return folder

    return make


def test_a_module_without_a_figure_to_compare_is_told_what_to_log(make):
    folder = make("own")
    write_result(Result("test", 12, {"f1": 0.5, "acc": 0.25}, None, folder), [])
    (note,) = (one for one in compare_runs([folder]).notes() if "logs" in one)
    assert note == (
        f"{folder}: compared is one of accuracy, mae, knn_accuracy, and its module logs acc, f1; log test/accuracy, a "
        "fraction, in its test step."
    )


def rows(share, seed=0, count=200):
    return np.random.default_rng(seed).random(count) < share


@pytest.fixture
def two_groups(make, tmp_path):
    """A good method, its bad baseline, and their folders."""
    for seed in range(3):
        make("base", seed, test=rows(0.5 + 0.01 * seed, seed))
        make("method", seed, test=rows(0.9 + 0.02 * seed, 10 + seed))
    return [tmp_path / "runs" / name for name in ("base", "method")]


def cells(comparison, table=0):
    """{row's name: {column: cell}} of a table."""
    header, *lines = comparison.tables()[table]
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_verdict_with_both_intervals_and_the_part_in_the_head(two_groups, tmp_path):
    comparison = compare_runs(two_groups, tmp_path / "out")
    table = cells(comparison)
    assert table["base"]["verdict"] == "-" and table["method"]["verdict"] == "better"
    assert table["method"]["seeds"] == "3"
    accuracies = [100 * rows(0.9 + 0.02 * seed, 10 + seed).mean() for seed in range(3)]
    expected = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    assert table["method"]["accuracy % (test, n = 200)"] == expected
    assert comparison.notes() == []
    content = json.loads((tmp_path / "out/comparison.json").read_text())
    assert content["part"] == "test" and content["left_out"] == []
    base, method = content["groups"]
    assert "difference" not in base
    assert [run["samples"] for run in method["runs"]] == [200] * 3
    found = method["difference"]
    assert (found["to"], found["pairs"], found["verdict"], found["reasons"]) == ("base", 3, "better", [])
    for name in ("over_seeds", "over_samples"):
        low, high = found[f"interval_95_{name}"]
        assert 0 < low < found["mean"] < high
        assert table["method"][f"95 % {name.replace('_', ' ')}"] == f"[{100 * low:+.2f}, {100 * high:+.2f}]"
    text = (tmp_path / "out/comparison.md").read_text()
    assert all(cell in text for cell in table["method"].values())
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_untested_run_shows_dashes_and_its_command(make, two_groups, student, capsys):
    """Not validation figures for all, in a footnote."""
    teacher = make("teacher", val=rows(0.9, count=6), student=student, spec={**NETWORK, "init_args": {"width": 4}})
    comparison = compare_runs([*two_groups, teacher])
    table = cells(comparison)
    row = table["teacher"]
    assert {row[key] for key in row if key not in ("run", "seeds")} == {"-"} and row["seeds"] == "0 of 1"
    assert table["method"]["verdict"] == "better" and "accuracy % (test, n = 200)" in table["method"]
    (note,) = comparison.notes()
    command = f"kd-lightning test --config {teacher}/config.yaml --ckpt_path {teacher}/student.safetensors"
    assert note.endswith(command)
    assert any(line.endswith(command) for line in capsys.readouterr().out.splitlines())  # whole, to be copied


def test_validation_on_request(make):
    folder = make("a", test=rows(0.5), val=rows(0.7, count=150))
    untested = make("b", test=rows(0.5))
    comparison = compare_runs([folder, untested], part="val")
    assert "accuracy % (val, n = 150)" in cells(comparison)["a"]
    assert "kd-lightning validate --config" in comparison.notes()[0]


def test_a_verdict_is_never_drawn_from_six_images(make):
    folders = [
        make(name, seed, test=rows(share, seed, 6)) for name, share in (("a", 0.1), ("b", 1)) for seed in (0, 1, 2)
    ]
    comparison = compare_runs(folders)
    table = cells(comparison)
    assert table.keys() == {"a *", "b *"} and table["b *"]["verdict"] == "-"
    assert "accuracy % (test, n = 6)" in table["b *"]
    first, second = comparison.notes()
    assert first.startswith("* a: ") and second.startswith("* b: ") and "6 samples" in first and "6 samples" in second


def test_seeds_without_variance_draw_no_verdict(make):
    folders = [make(name, seed, test=rows(share)) for name, share in (("a", 0.1), ("b", 0.9)) for seed in (0, 1, 2)]
    comparison = compare_runs(folders)
    row = cells(comparison)["b *"]
    assert (row["95 % over seeds"], row["verdict"]) == ("-", "-") and row["95 % over samples"] != "-"
    assert comparison.notes()[0].startswith("* b: ")


def test_parts_of_another_size_are_not_subtracted(make):
    folders = [make("a", test=rows(0.5)), make("b", test=rows(0.9, count=150))]
    comparison = compare_runs(folders)
    table = cells(comparison)
    assert "accuracy % (test)" in table["a"] and [row["n"] for row in table.values()] == ["200", "150"]
    assert table["b *"]["difference"] == "-"


def test_figures_of_other_test_samples_are_not_compared(make, tmp_path):
    """As many, so that their number does not show it."""
    folders = [make("a", seed, test=rows(0.5, seed), first=0) for seed in range(3)]
    folders += [make("b", seed, test=rows(0.9, seed), first=5) for seed in range(3)]
    comparison = compare_runs(folders, tmp_path / "out")
    row = cells(comparison)["b *"]
    assert (row["difference"], row["verdict"]) == ("-", "-") and row["95 % over samples"] != "-"
    (note,) = comparison.notes()
    assert f"5 only in {folders[3]}, 5 only in {folders[0]}" in note
    (reason,) = json.loads((tmp_path / "out/comparison.json").read_text())["groups"][1]["difference"]["reasons"]
    assert reason in note


def test_a_mean_over_other_test_samples_is_named(make):
    """Also where no difference is formed."""
    folders = [make("a", seed, test=rows(0.5), first=3 * (seed == 1)) for seed in range(3)]
    (note,) = compare_runs(folders).notes()
    assert f"a: {folders[1]} was measured on other samples: 3 only in {folders[1]}, 3 only in {folders[0]}" in note
    validated = [make("b", seed, val=rows(0.5), first=3 * (seed == 1)) for seed in range(3)]
    assert compare_runs(validated, part="val").notes() == []  # each seed has a validation part of its own


def test_runs_fitted_before_and_after_their_data_changed(make):
    folders = [make(name, samples=samples, test=rows(0.5)) for name, samples in (("a", "1"), ("b", "2"), ("c", "1"))]
    folders.append(make("d", test=rows(0.5)))  # an older run, whose samples are not known
    (note,) = [note for note in compare_runs(folders).notes() if "fitted" in note]
    assert f"{folders[0]} and {folders[1]}" in note
    assert not [note for note in compare_runs([folders[0], *folders[2:]]).notes() if "fitted" in note]


def test_transductive_test_is_marked(make):
    comparison = compare_runs([make("a", test=rows(0.5)), make("b", transductive=rows(0.9))])
    assert "b [transductive/test] *" in cells(comparison)
    assert "[transductive/test]: " in comparison.explanation()


def test_what_is_left_out_is_printed(make, two_groups, capsys, tmp_path):
    newer = make("base", 0, test=rows(0.5))
    unfinished = make("base", 1, finished=False)
    comparison = compare_runs(two_groups, tmp_path / "out")
    printed = capsys.readouterr().out
    for folder in (tmp_path / "runs/base/version_0", unfinished):
        assert f"left out: {folder}: " in printed
        assert str(folder) in (tmp_path / "out/comparison.md").read_text()
    assert cells(comparison)["base"]["seeds"] == "3"
    content = json.loads((tmp_path / "out/comparison.json").read_text())
    assert {one["folder"] for one in content["left_out"]} == {
        str(tmp_path / "runs/base/version_0"),
        str(unfinished),
    }
    assert str(newer) in [run["folder"] for run in content["groups"][0]["runs"]]


LONG = "one_with_a_name_that_is_long_by_far"


@pytest.fixture
def precisions(make):
    """Runs of one architecture at three precisions, whose students started from a file that is gone."""
    start = {"class_path": "kd_lightning.load_weights", "init_args": {"model": NETWORK, "path": "gone.pt"}}
    torch.manual_seed(0)
    plain = DigitsCNN(8)
    folders = []
    for name, bits in {"plain": None, "four": 4, LONG: "ternary"}.items():
        spec, network = start, plain
        if bits is not None:
            arguments = {"model": start, "weight_bits": bits}
            spec = {"class_path": "kd_lightning.quantization.quantize", "init_args": arguments}
            network = calibrate(quantize(plain, bits), [torch.randn(8, 1, 8, 8)])
        folders.append(make(name, student=network, spec=spec, test=rows(0.5)))
    return folders


def test_precisions(precisions, tmp_path, capsys):
    """What is compared is what the weights take as they are, and never the latency of simulated rounding."""
    comparison = compare_runs(precisions, tmp_path)
    plain, four, ternary = json.loads((tmp_path / "comparison.json").read_text())["groups"]
    assert [entry["precision"] for entry in (plain, four, ternary)] == ["fp32", "8A-4W", "8A-ternary"]
    # written out: a 3x3 convolution costs 9 * inputs * outputs for each of its pixels
    macs = 9 * 8 * 64 + 9 * 8 * 16 * 64 + 9 * 16 * 32 * 16 + 32 * 10
    assert plain["macs"] == four["macs"] == ternary["macs"] == macs
    weights = 9 * 8 * 16 + 9 * 16 * 32
    rest = 4 * (9 * 8 + 4 * (8 + 16 + 32) + 32 * 10 + 10)
    scales = 4 * (16 + 32 + 2)  # two ranges of activations
    assert plain["size_kb"] == pytest.approx((4 * weights + rest) / 1000)
    assert four["size_kb"] == pytest.approx((weights / 2 + scales + rest) / 1000)
    assert ternary["size_kb"] == pytest.approx((weights / 4 + scales + rest) / 1000)
    assert (scales + rest) / 1000 < ternary["coded_kb"] < ternary["size_kb"]
    assert four["coded_kb"] < four["size_kb"]
    assert "latency_ms" in plain and "latency_ms" not in four and "latency_ms" not in ternary
    row = cells(comparison, 1)["four"]
    assert (row["precision"], row["latency ms"]) == ("8A-4W", "-")
    assert row["size KB"] == f"{four['size_kb']:.1f}"
    assert f"four {four['coded_kb']:.1f} KB" in (tmp_path / "comparison.md").read_text()
    names = [label.get_text() for label in comparison.figure().axes[0].get_yticklabels()]
    assert f"{four['size_kb']:,.1f} KB, 8A-4W" in names[1]
    assert f"{plain['size_kb'] / four['size_kb']:.1f}× smaller" in names[1] and "smaller" not in names[0]  # noqa: RUF001
    printed = capsys.readouterr().out
    assert "…" not in printed and f"{LONG} " in printed


def test_figures_are_whole_in_a_narrow_terminal(two_groups, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    comparison = compare_runs(two_groups)
    printed = capsys.readouterr().out
    assert all(cell in printed for row in comparison.tables()[0][1:] for cell in row)
    assert Console().width == 60


def test_a_module_without_a_student_has_no_costs(make):
    folder = make("a", spec=None, test=rows(0.5))
    comparison = compare_runs([folder])
    assert set(cells(comparison, 1)["a"].values()) == {"a", "-"}


@pytest.fixture
def of_figures(make):
    """Makes runs of three seeds with the figures of a test, and errors or shares of each sample."""

    def make_runs(name, key, scale, **figures):
        for seed in range(3):
            folder = make(name, seed, test=[True])
            values = scale * np.random.default_rng(seed).gamma(2, size=200)
            rows = [
                Prediction(k, "1", "", **{"correct": np.nan, key: float(v)}, labels=2) for k, v in enumerate(values)
            ]
            main = {"mae" if key == "error" else "accuracy": float(values.mean())}
            write_result(Result("test", 200, main | figures, Run(folder).weights_hash, folder), rows)
        return folder.parent

    return make_runs


def test_regression_is_compared_by_its_error(of_figures, tmp_path):
    folders = [of_figures(name, "error", scale, rmse=0.5, r2=0.9) for name, scale in (("base", 0.02), ("method", 0.01))]
    comparison = compare_runs(folders, tmp_path / "out")
    table = cells(comparison)
    errors = [0.01 * np.random.default_rng(seed).gamma(2, size=200).mean() for seed in range(3)]
    expected = f"{statistics.mean(errors):.4g} ± {statistics.stdev(errors):.4g}"
    assert table["method"]["MAE (test, n = 200)"] == expected
    assert table["method"]["verdict"] == "better" and table["method"]["difference"].startswith("-0.0")
    assert table["method"]["R2"] == "0.9 ± 0" and table["method"]["to teacher"] == "-"
    assert "less is better" in comparison.explanation()
    assert not any("accuracy" in title or title.endswith("%") for title in comparison.tables()[0][0])
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_dense_runs_have_mean_iou(of_figures, tmp_path):
    folders = [of_figures(name, "correct", scale, mean_iou=0.25) for name, scale in (("base", 0.1), ("method", 0.2))]
    table = cells(compare_runs(folders))
    assert table["method"]["mean IoU %"] == "25.00 ± 0.00" and table["method"]["verdict"] == "better"


@pytest.mark.parametrize(
    ("known", "figure"),
    [
        ([{"accuracy", "mae"}, {"knn_accuracy"}], "accuracy"),
        ([set(), {"mae"}], "mae"),
        ([{"knn_accuracy", "rankme"}], "knn_accuracy"),  # of backbones
        ([set()], "accuracy"),
    ],
)
def test_the_figure_that_is_compared(known, figure):
    groups = [SimpleNamespace(values=lambda name, names=names: [0.5] * (name in names)) for names in known]
    assert figure_of(groups) == figure
