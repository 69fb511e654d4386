"""experiment: the plan, the comparison, and which runs are not repeated."""

import io
import json
import re
import shutil
import statistics
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import ttest_1samp

import kd_lightning.cli.commands.experiment as command
from kd_lightning import Digits, SemiSupervisedDataModule
from kd_lightning.__main__ import main
from kd_lightning.cli import fit_once
from kd_lightning.cli.commands.experiment import fit_and_test
from kd_lightning.cli.fit_once import find_fits
from kd_lightning.cli.parse import parse_config
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.run import Run
from kd_lightning.runs.teacher_runs import teacher_runs

pytestmark = pytest.mark.usefixtures("parsed_once")


@pytest.fixture(scope="module")
def experiment(root, tmp_path_factory):
    """A quick experiment of two seeds after a fit of the first one; where its config and its runs lie."""
    folder = tmp_path_factory.mktemp("experiment")
    config = yaml.safe_load((root / "configs/distill_digits.yaml").read_text())
    config["trainer"] |= {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    config["trainer"]["default_root_dir"] = str(folder / "runs")
    config["trainer"]["callbacks"] = [
        {"class_path": "kd_lightning.SoftWeightAnnealing", "init_args": {"start": 0.9, "end": 0.5}}
    ]
    config["model"]["init_args"]["teacher"]["init_args"]["path"] = str(folder / "teacher.pt")
    torch.manual_seed(0)
    torch.save(DigitsCNN(32).state_dict(), folder / "teacher.pt")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    main(["experiment", str(path), "--seeds", "2"])
    return path, folder / "runs"


def test_a_plain_fit_counts(experiment):
    """README's own order: fit, then experiment. Seed 0 is trained once."""
    _, runs = experiment
    assert sorted(path.name for path in (runs / "distill_digits").iterdir()) == ["version_0", "version_1"]
    assert [Run(runs / f"distill_digits/version_{k}").seed for k in (0, 1)] == [0, 1]


def test_baseline_has_the_same_steps_and_labels(experiment):
    _, runs = experiment
    for version in ("version_0", "version_1"):
        method, baseline = runs / "distill_digits" / version, runs / "distill_digits_alone" / version
        splits = [json.loads((run / "split.json").read_text()) for run in (method, baseline)]
        assert splits[0] == splits[1]
        assert len(splits[0]["labeled"]) == 100
        checkpoints = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (method, baseline)]
        assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] == 2 * 17
        configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (method, baseline)]
        for key in ("student", "optimizer", "lr_scheduler", "hard_loss"):
            assert configs[0]["model"]["init_args"][key] == configs[1]["model"]["init_args"][key]
        assert configs[0]["seed_everything"] == configs[1]["seed_everything"] == int(version[-1])


def test_report(experiment):
    _, runs = experiment
    out = runs / "distill_digits_comparison"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "Measured on 600 test samples and 2 seeds (0, 1)" in (out / "report.html").read_text()
    content = json.loads((out / "comparison.json").read_text())
    alone, taught = content["groups"]
    assert content["part"] == "test" and content["left_out"] == []
    assert [alone["name"], taught["name"]] == ["distill_digits_alone", "distill_digits"]
    assert alone["parameters"] == sum(p.numel() for p in DigitsCNN(8).parameters())
    # written out: a 3x3 convolution costs 9 * inputs * outputs for each of its pixels
    macs = 9 * 8 * 64 + 9 * 8 * 16 * 64 + 9 * 16 * 32 * 16 + 32 * 10
    assert alone["macs"] == taught["macs"] == macs
    assert 0 < taught["latency_ms"] < 100
    # 4 bytes for each parameter and for BatchNorm's statistics; not the file, which has a header, too
    assert alone["size_kb"] == 4 * (alone["parameters"] + 2 * (8 + 16 + 32)) / 1000
    assert alone["precision"] == "fp32" and "coded_kb" not in alone
    differences = [b["accuracy"] - a["accuracy"] for a, b in zip(alone["runs"], taught["runs"], strict=True)]
    assert taught["difference"]["mean"] == pytest.approx(statistics.mean(differences))
    assert taught["difference"]["verdict"] is None  # of two seeds
    low, high = taught["difference"]["interval_95_over_samples"]
    assert low < taught["difference"]["mean"] < high
    table = (out / "comparison.md").read_text()
    mean = 100 * statistics.mean(run["accuracy"] for run in taught["runs"])
    assert f"{mean:.2f} ± " in table and "accuracy % (test, n = 600)" in table
    assert all((run["part"], run["samples"]) == ("test", 600) for run in taught["runs"] + alone["runs"])
    assert "agreement" in taught["runs"][0]


def test_again_is_quick_and_trains_nothing(experiment, capsys):
    path, runs = experiment
    before = sorted(runs.rglob("*.ckpt"))
    main(["experiment", str(path), "--seeds", "2"])
    assert capsys.readouterr().out.count("is done") == 4
    assert sorted(runs.rglob("*.ckpt")) == before


@pytest.fixture(scope="module")
def several(experiment):
    """An experiment of the same method and two others after that of the one; its folder and what it printed."""
    path, runs = experiment
    config = yaml.safe_load(path.read_text())
    other = deepcopy(config) | {"name": "weighted"}
    other["model"]["init_args"]["soft_weight"] = 0.9  # has the same baseline
    (path.parent / "weighted.yaml").write_text(yaml.safe_dump(other))
    other = deepcopy(config) | {"name": "taught_fixmatch"}  # a teacher's pseudo-labels; it has a baseline of its own
    arguments = other["model"]["init_args"]
    other["model"]["class_path"] = "PseudoLabelModule"
    del other["trainer"]["callbacks"], arguments["soft_loss"], arguments["soft_weight"]
    other["trainer"]["max_epochs"] = 1
    other["data"]["init_args"] |= {"batch_size": 96, "labeled_batch_size": 32}
    (path.parent / "taught.yaml").write_text(yaml.safe_dump(other))
    printed = io.StringIO()
    files = [str(path), str(path.parent / "weighted.yaml"), "--config", str(path.parent / "taught.yaml")]
    with redirect_stdout(printed):
        main(["experiment", *files, "--seeds", "2", "--trainer.log_every_n_steps", "5"])
    return runs / "distill_digits_vs_weighted_vs_taught_fixmatch_comparison", printed.getvalue(), files


class TestSeveralMethods:
    def test_finished_fits_and_equal_baselines_are_not_repeated(self, several, experiment):
        out, printed, _ = several
        assert printed.count("is done: ") == 4  # the method and its baseline
        assert not (out.parent / "weighted_alone").exists()
        assert len([*(out.parent / "taught_fixmatch_alone").iterdir()]) == 2
        assert "[10/10] taught_fixmatch, seed 1" in printed
        assert "distill_digits_alone is the baseline of distill_digits and weighted" in printed
        assert "taught_fixmatch_alone is the baseline of taught_fixmatch: " in printed and "batch_size: 96" in printed

    def test_differences_are_to_the_own_baseline_and_corrected(self, several):
        out, _, _ = several
        content = json.loads((out / "comparison.json").read_text())
        groups = {one["name"]: one for one in content["groups"]}
        names = ["distill_digits_alone", "distill_digits", "weighted", "taught_fixmatch_alone", "taught_fixmatch"]
        assert [*groups] == names
        accuracy = {name: [run["accuracy"] for run in one["runs"]] for name, one in groups.items()}
        for name, base in (("distill_digits", 0), ("weighted", 0), ("taught_fixmatch", 3)):
            found = groups[name]["difference"]
            gaps = [one - other for one, other in zip(accuracy[name], accuracy[names[base]], strict=True)]
            assert found["to"] == names[base] and found["mean"] == pytest.approx(statistics.mean(gaps))
            level = 1 - 0.05 / 3
            expected = [*ttest_1samp(gaps, 0).confidence_interval(level)] if gaps[0] != gaps[1] else None
            assert found["interval_95_over_seeds"] == (expected and pytest.approx(expected))
        methods = [name for name in names if not name.endswith("_alone")]
        assert [name for name in names if "difference" in groups[name]] == methods
        best = max(methods, key=lambda name: statistics.mean(accuracy[name]))
        others = {name for name in names if "difference_to_best" in groups[name]}
        assert others == {*methods} - {best}
        assert {groups[name]["difference_to_best"]["to"] for name in others} == {best}

    def test_the_table_names_what_differs(self, several):
        out, _, _ = several
        table = (out / "comparison.md").read_text()
        header, _, *rows = table.splitlines()[:7]
        assert " steps |" in header and " parameters |" not in header
        assert [row.split(" | ")[2] for row in rows] == ["34", "34", "34", "16", "16"]
        assert "The methods have other numbers of steps: distill_digits 34, weighted 34, taught_fixmatch 16." in table
        assert "corrected (Bonferroni) for 3 methods and for 3 pairs of methods" in table

    def test_the_report_again_from_its_folder_is_the_same(self, several):
        out, _, _ = several
        first = (out / "report.html").read_text()
        main(["report", str(out)])
        again = (out / "report.html").read_text()
        shown = re.compile("<h1.*?</h1>.*?</p>|<section id=.accuracy.*?</section>", re.DOTALL)
        assert shown.findall(first) == shown.findall(again) and len(shown.findall(first)) == 2
        assert "the baseline of the method" in first and "No verdict yet" in first

    def test_another_split_is_refused_before_any_fit(self, several, fails, tmp_path):
        _, _, files = several
        config = yaml.safe_load(Path(files[1]).read_text())
        config["data"]["init_args"]["labeled"] = 4
        (tmp_path / "fewer.yaml").write_text(yaml.safe_dump(config | {"name": "fewer"}))
        error = fails("experiment", files[0], str(tmp_path / "fewer.yaml"))
        assert "fewer.yaml has other labeled samples or labels than " in error and "data.labeled: 4, not 10" in error
        assert not (Path(files[0]).parent / "runs/fewer").exists()

    def test_tuning_takes_one(self, several, fails):
        _, _, files = several
        assert "--tune: 3 takes one config, got 2" in fails("experiment", *files[:2], "--tune", "3")


@pytest.fixture
def plan(config, tmp_path):
    """The tiny config of one method, as experiment plans it."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return parse_config(["--config", "tiny.yaml"], "experiment")


@pytest.fixture
def commands(monkeypatch):
    """The commands that an experiment runs, each as its first word and its checkpoint."""
    given = []
    for module in (command, fit_once):
        cli = module.DistillCLI
        monkeypatch.setattr(module, "DistillCLI", lambda args, cli=cli: given.append((args[0], *args[4:])) or cli(args))
    return given


def fit_plan(plan):
    return fit_and_test(plan, SemiSupervisedDataModule(Digits()))


class TestRunsThatAreThere:
    @pytest.mark.parametrize(("part", "done"), [("train", ["fit", "test"] * 2), ("test", ["fit", "test", "test"])])
    def test_runs_on_data_that_have_changed_do_not_count(self, plan, commands, monkeypatch, part, done):
        first = fit_plan(plan)
        load = Digits.load

        def changed(self):
            parts = load(self)
            getattr(parts, part).images.tensors[0][0] += 1
            return parts

        monkeypatch.setattr(Digits, "load", changed)
        for _ in range(2):
            again = fit_plan(plan)
        assert (again == first) == (part == "test")
        assert [args[0] for args in commands] == done

    def test_an_untested_run_is_tested_and_not_trained(self, config, plan, commands, fit_or_copy):
        fit_or_copy(config, "tiny.yaml")
        [run] = find_fits(plan)
        before = run.weights.stat().st_mtime_ns
        for _ in range(2):
            assert fit_plan(plan) == run.folder
            assert run.result("test") is not None
        assert run.weights.stat().st_mtime_ns == before
        assert [args[0] for args in commands] == ["test"]

    def test_figures_of_other_weights_are_measured_again(self, config, plan, commands, fit_or_copy):
        fit_or_copy(config, "tiny.yaml")
        path = fit_plan(plan) / "test.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "0" * 64}))
        fit_plan(plan)
        assert [args[0] for args in commands] == ["test", "test"]

    def test_a_stopped_run_is_resumed_from_its_last_checkpoint(self, config, plan, commands, capsys, fit_or_copy):
        fit_or_copy(config, "tiny.yaml")
        [run] = find_fits(plan)
        run.weights.unlink()
        Run.write_state(run.folder, finished=False)
        assert fit_plan(plan) == run.folder
        assert "resumed" in capsys.readouterr().out
        assert commands[0] == ("fit", str(run.last_checkpoint())) or str(run.last_checkpoint()) in commands[0]
        assert run.finished
        assert run.result("test") is not None

    def test_a_run_that_left_no_checkpoint_begins_anew(self, config, plan, commands, fit_or_copy):
        fit_or_copy(config, "tiny.yaml")
        [run] = find_fits(plan)
        shutil.rmtree(run.folder / "checkpoints")
        Run.write_state(run.folder, finished=False)
        assert fit_plan(plan).name == "version_1"

    @pytest.mark.parametrize("key", ["seed_everything", "max_epochs"])
    def test_a_run_of_another_config_or_seed_does_not_count(self, config, plan, key, fit_or_copy):
        fit_or_copy(config, "tiny.yaml")
        other = deepcopy(plan)
        (other if key in other else other["trainer"])[key] = 5
        assert find_fits(other) == []
        plan["trainer"]["enable_model_summary"] = True  # changes no weight
        assert len(find_fits(plan)) == 1

    def test_nor_one_with_another_teacher(self, config, plan, fit_or_copy):
        fit_or_copy(config, "tiny.yaml")
        torch.save(DigitsCNN(8).state_dict(), "teacher.pt")
        assert find_fits(plan) == []


def test_runs_of_several_teachers_are_found(tmp_path):
    """Each once, bare or in a Teacher; not where weights belong to no finished run."""
    for name, finished in (("one", True), ("two", True), ("four", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: {class_path: SupervisedModule}")
        (tmp_path / name / "student.safetensors").touch()
        Run.write_state(tmp_path / name, finished=finished)

    def load(name):
        path = str(tmp_path / name / "student.safetensors")
        return {"class_path": "kd_lightning.load_weights", "init_args": {"path": path}}

    wrapped = {"class_path": "kd_lightning.Teacher", "init_args": {"network": load("two")}}
    plain = {"class_path": "torchvision.models.resnet18"}
    teachers = [load("one"), wrapped, load("one"), load("three"), load("four"), plain]
    found = teacher_runs({"model": {"init_args": {"teachers": teachers}}})
    assert [run.folder for run in found] == [tmp_path / "one", tmp_path / "two"]
    assert [run.folder for run in teacher_runs({"model": {"init_args": {"teacher": wrapped}}})] == [tmp_path / "two"]
    assert teacher_runs({"model": {"init_args": {}}}) == []
