"""What every YAML in configs/ must obey; a later method is held to it by adding its file."""

import csv
import re
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from parts import StoppedError
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_lightning import PseudoLabelModule, PseudoLabelRefresh, SimKDModule
from kd_lightning.__main__ import main
from kd_lightning.cli.main import DistillCLI
from kd_lightning.errors import InputError
from kd_lightning.modules._shared.soft_loss import SoftLosses
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.runs.run import Run

RUN = Path("runs/quick/version_0")
TAGS = {"SupervisedModule": {"train/loss", "train/hard"}}
TAGS["DistillModule"] = TAGS["SupervisedModule"] | {"train/soft", "soft_weight"}
TAGS["HintModule"] = TAGS["DistillModule"] | {"train/hint", "hint_weight", "stage", "projector_parameters"}
TAGS["EnsembleDistillModule"] = TAGS["DistillModule"] | {f"train/teacher_{number}_share" for number in range(3)}
TAGS["ApprenticeModule"] = TAGS["DistillModule"]
TAGS["CoTeachingModule"] = TAGS["SupervisedModule"] | {"train/peer_hard", "forget_rate"}
TAGS["PseudoLabelModule"] = TAGS["SupervisedModule"] | {"train/unsupervised", "train/coverage", "unsupervised_weight"}
TAGS["ABCModule"] = TAGS["PseudoLabelModule"] | {
    f"{part}balanced_{name}"
    for part, names in {
        "train/": ("hard", "unsupervised", "coverage"),
        "": ("hard_weight", "unsupervised_weight"),
    }.items()
    for name in names
}
TAGS["DistillationTokenModule"] = TAGS["DistillModule"]
TAGS["FeatureDistillModule"] = TAGS["SimKDModule"] = {"train/loss"}
REFRESHED = {f"pseudo_labels/{name}" for name in ("coverage", "confidence", "flips", "precision", "accepted_precision")}
VALUES_REFRESHED = {
    f"pseudo_labels/{name}" for name in ("accepted", "coverage", "spread", "change", "mae", "rmse", "accepted_mae")
}
HELPERS = ("features.", "teacher.", "ema.", "peer.", "selection.", "base_classifier.")  # for a resume, not deployed
FIGURES = {"loss", "accuracy", "f1", "calibration_error"}
TEACHER_FIGURES = {"agreement", "teacher_accuracy", "teacher_kl"}
FEATURE_FIGURES = {"knn_accuracy", "probe_accuracy", "teacher_knn_accuracy", "rankme", "neighbor_agreement"}
VALUE_FIGURES = {"loss", "mae", "rmse", "r2", "teacher_mae", "teacher_rmse", "teacher_difference"}


def tags_of(model):
    """The charts of training, with one of each term."""
    tags, names = set(TAGS[type(model).__name__]), {*model.features} - {"hint"}
    if isinstance(getattr(model, "soft_loss", None), SoftLosses):
        tags -= {"train/soft", "soft_weight"}
        names |= {*model.soft_loss}
    return tags | {f"train/{name}" for name in names} | {f"{name}_weight" for name in names}


def saved(path):
    return torch.load(path, weights_only=True)


def newest(folder):
    return max(Path(folder, "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def assert_equal(one, other):
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different


def assert_same_end(one, other):
    """Two runs' last checkpoints: weights, averaged weights, optimiser."""
    one, other = saved(one), saved(other)
    assert one["global_step"] == other["global_step"]
    for key in ("state_dict", "current_model_state"):
        assert (key in one) == (key in other)
        if key in one:
            assert_equal(one[key], other[key])
    for mine, theirs in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        for number, state in mine["state"].items():
            assert_equal(
                {k: torch.as_tensor(v) for k, v in state.items() if v is not None},
                {k: torch.as_tensor(v) for k, v in theirs["state"][number].items() if v is not None},
            )


def test_each_module_is_represented(contract):
    """Among the configs whose stories "make test" runs."""
    paths = {path.stem: path for path in [*contract.CONFIGS, *contract.TEXTS]}
    modules = {contract.module_of(paths[stem]) for stem in contract.REPRESENTATIVES}
    assert modules == {contract.module_of(path) for path in paths.values()}


def test_is_built(other_config, tmp_path, monkeypatch, contract):
    """What the stories of these, which are slow, do first."""
    monkeypatch.chdir(tmp_path)
    config = contract.quick(other_config)
    cli = DistillCLI(contract.Story.write(config, "config.yaml"), run=False)
    assert type(cli.model).__name__ == contract.module_name(config)
    assert cli.datamodule.batch_size == config["data"]["init_args"]["batch_size"]
    assert cli.trainer.max_epochs == contract.EPOCHS


class TestOneRun:
    def test_fits_validates_tests_and_predicts(self, story):
        commands = [] if story.whole.datamodule.val_size == 0 else ["validate"]
        for command in [*commands, "test", "predict"]:
            main([command, *story.args, "--ckpt_path", "last"])
        (board,) = {path.parent for path in RUN.rglob("events.*")}
        tags = set(EventAccumulator(str(board)).Reload().Tags()["scalars"])
        rates = {tag for tag in tags if tag.startswith("lr/")}
        assert rates
        tags -= rates
        taught = story.teachers or getattr(story.whole.model, "teacher", None) is not None
        figures = FIGURES | (TEACHER_FIGURES if taught else set())
        if story.whole.model.task == "regression":
            figures = {name for name in VALUE_FIGURES if taught or not name.startswith("teacher")}
        if story.whole.model.task == "features":  # of as many samples as the digits have in two batches
            figures = FEATURE_FIGURES if story.whole.datamodule.batch_size == 64 else set()
        elif len(story.teachers) > 1:
            kinds = ("accuracy", "agreement", "ensemble_agreement")
            figures |= {f"teacher_{number}_{kind}" for number in range(len(story.teachers)) for kind in kinds}
            figures |= {"disagreement"}
        expected = tags_of(story.whole.model) | {f"test/{name}" for name in figures}
        expected |= {f"val/{name}" for name in figures} if commands else set()
        if story.whole.datamodule.transductive:
            expected = {name.replace("test/", "transductive/test/") for name in expected}
        refreshes = [c for c in story.whole.trainer.callbacks if isinstance(c, PseudoLabelRefresh)]
        if not story.teachers:  # one that labels has figures of its own
            assert bool(refreshes) == isinstance(story.whole.model, PseudoLabelModule)
        if refreshes:
            expected |= VALUES_REFRESHED if story.whole.model.task == "regression" else REFRESHED
            assert [path.name for path in sorted((RUN / "pseudo_labels").iterdir())] == [
                "round_0000.csv",
                "round_0001.csv",
            ]
        if story.whole.datamodule.samples.dense and getattr(story.whole.model, "class_dim", None) == 1:
            expected |= {"test/mean_iou"}
            masks = {path.name: path for path in (RUN / "predictions").iterdir()}
            assert len(masks) == 2 * story.whole.datamodule.batch_size
            assert all(Image.open(path).size == (16, 16) for path in masks.values())
        assert expected <= tags
        count = 2 * story.whole.datamodule.batch_size
        if getattr(story.whole.model, "causal", False):
            assert len((RUN / "predictions.jsonl").read_text().splitlines()) == count
        else:
            assert len((RUN / "predictions.csv").read_text().splitlines()) == 1 + count

    def test_loads_without_pickle_and_predicts_the_same(self, story):
        checkpoint = saved(RUN / "checkpoints/last.ckpt")
        state = checkpoint["state_dict"]
        fresh = DistillCLI([*story.args, "--seed_everything", "77"], run=False).model.eval()
        x = next(iter(story.whole.datamodule.test_dataloader())).x
        trained = story.whole.model.eval().predict_step(x, 0)
        assert not torch.equal(fresh.predict_step(x, 0), trained)
        fresh.on_load_checkpoint(checkpoint)  # as Lightning does: a module may build what the checkpoint tells of
        fresh.load_state_dict(state)
        assert torch.equal(fresh.predict_step(x, 0), trained)
        student = load_file(RUN / "student.safetensors")
        deployed = {key: tensor for key, tensor in state.items() if not key.startswith(HELPERS)}
        assert_equal({f"student.{key}": tensor for key, tensor in student.items()}, deployed)

    def test_checkpoint_holds_the_student_alone(self, story):
        state = saved(RUN / "checkpoints/last.ckpt")["state_dict"]
        count = sum(tensor.numel() for key, tensor in state.items() if not key.startswith(HELPERS))
        student = sum(tensor.numel() for tensor in story.whole.model.student.state_dict().values())
        assert count <= 1.1 * student
        if isinstance(story.whole.model, SimKDModule):  # its student ends in the teacher's classifier
            state = {name: tensor for name, tensor in state.items() if not name.startswith("student.head.")}
        for teacher in story.teachers.values():
            frozen = [tensor for tensor in teacher.network.state_dict().values() if tensor.numel() > 1]
            for name, tensor in state.items():
                assert not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in frozen), name

    def test_teacher_is_unchanged_and_another_is_refused(self, story, contract):
        if not story.teachers:
            joint = story.config["model"]["init_args"].get("scheme") == "joint"
            assert joint or not {"teacher", "teachers"} & story.config["model"]["init_args"].keys()
            return
        before = {path: path.read_bytes() for path in Path().glob("teacher_*.pt")}
        fresh = contract.teachers_of(DistillCLI(story.args, run=False).model)
        for name, teacher in story.teachers.items():
            if before:  # pretrained weights are left out here, and their network is drawn anew each time
                assert_equal(teacher.network.state_dict(), fresh[name].network.state_dict())
            preprocess = next(iter(teacher._hidden[:-1]), None)
            assert teacher.fingerprint() == type(teacher)(teacher.network, preprocess=preprocess).fingerprint()
        contract.save_teachers(story.config, seed=9)
        other = [] if before else ["--seed_everything", "9"]
        first = next(iter(story.teachers))
        try:
            message = rf"^{re.escape(first)}: the checkpoint was trained with another teacher"
            with pytest.raises(InputError, match=message):
                DistillCLI(["fit", *story.args, *other, "--ckpt_path", str(RUN / "checkpoints/last.ckpt")])
        finally:
            for path, content in before.items():
                path.write_bytes(content)

    def test_hidden_truth_changes_nothing(self, story):
        """Other labels for the images whose labels training may not see, and the same weights."""
        if not (story.whole.datamodule.split.unlabeled or story.whole.datamodule.transductive):
            return
        permute = {"class_path": "parts.PermuteHidden"}
        config = story.config | {"name": "permuted"}
        config["trainer"] = config["trainer"] | {"callbacks": [*config["trainer"].get("callbacks", []), permute]}
        other = DistillCLI(["fit", *story.write(config, "permuted.yaml")])
        assert any(getattr(c, "changed", 0) for c in other.trainer.callbacks)
        assert_equal(story.whole.model.state_dict(), other.model.state_dict())

    def test_predict_gives_the_last_pseudo_labels(self, story):
        """Of the test images, where these are the pool."""
        if not story.whole.datamodule.transductive:
            return
        first = len(story.whole.datamodule._parts.train.images)
        if not (RUN / "predictions.csv").is_file():  # another process may run the test that predicts
            DistillCLI(["predict", *story.args])
        with (RUN / "predictions.csv").open() as file:
            predicted = {int(row["index"]): row["prediction"] for row in csv.DictReader(file)}
        with max((RUN / "pseudo_labels").glob("round_*.csv")).open() as file:
            labels = {int(row["index"]) - first: row["label"] for row in csv.DictReader(file)}
        assert predicted
        assert predicted == {index: labels[index] for index in predicted}

    def test_doctor_examines_it(self, story, capsys):
        """An untrained teacher is pointless, which is status 1 if there are enough labels to know it."""
        status = 0
        try:
            main(["doctor", *story.args])
        except SystemExit as end:
            status = end.code
        output = capsys.readouterr().out
        lines = [line[6:].partition(":")[0] for line in output.splitlines() if line[6:9] != "-> "]
        expected = ["gradients"] if story.whole.model.task == "regression" else ["labels", "gradients"]
        if story.teachers:
            soft = ["soft targets"] if getattr(story.whole.model, "has_soft_term", True) else []
            expected = ["teacher", "normalisation", "class order", "eval mode", *soft, *expected]
            if story.whole.model.task == "regression":
                expected = ["teacher", "eval mode", "gradients"]
        if story.whole.model.task == "features":
            terms, expected = story.whole.model.features.all.values(), []
            for number, name in enumerate(story.teachers):
                own = f"{number}." if story.whole.model.features.several else ""
                layers = [layer for term in terms for layer in term.layers.values() if layer.startswith(own)]
                layers = [f"features of {layer.removeprefix(own) or 'the output'}" for layer in layers]
                checks = ["input size", "normalisation", *layers, "eval mode"]
                expected += [name, *(f"{name}, {check}" for check in checks)] if own else ["teacher", *checks]
            expected += ["gradients"]
        elif len(story.teachers) > 1:
            checks = ["", *(f", {check}" for check in expected[1:5])]
            each = [name + check for name in story.teachers for check in checks]
            expected = [*each, "ensemble", *expected[4:]]
        assert [name for name in lines if name in expected] == expected
        untrained = story.teachers and story.whole.model.task != "features"
        assert status == (1 if untrained and "too few to judge" not in output else 0)

    def test_mixed_precision_stays_close(self, story, contract):
        # 56 layers normalised over 4 images are chaotic: larger steps would soon train another network
        gentle = ["--model.init_args.optimizer.init_args.lr", "0.0001"]
        gentle += ["--trainer.enable_checkpointing", "false", "--trainer.logger", "false"]
        config = deepcopy(story.config)
        for callback in config["trainer"].get("callbacks", []):
            if callback["class_path"].endswith("PseudoLabelRefresh"):  # rounding decides on a sample at the limit
                callback["init_args"] |= {"selection": None}
        config["model"]["init_args"].pop("selection", None)  # likewise
        if story.path.stem.startswith("feature_dinov"):
            config["trainer"]["callbacks"].append({"class_path": "parts.FixedStatistics"})
        args, losses = contract.Story.write(config, "precision.yaml"), []
        for precision in ("32-true", "bf16-mixed"):
            cli = DistillCLI(["fit", *args, *gentle, "--trainer.precision", precision])
            losses.append(cli.trainer.callback_metrics)
        # bfloat16's own rounding is up to half a level of an 8-bit activation, so that many fall on the next one; and
        # losses that divide similarities by 0.07 multiply it: 2^-9 / 0.07 are 3 %
        sharp = {"crd", "queue"} & {*story.whole.model.features}
        near = 0.05 if quantized_layers(story.whole.model.student) else 0.03 if sharp else 0.02
        for name in tags_of(story.whole.model) - {"soft_weight", "unsupervised_weight"}:
            assert losses[1][name].isfinite()
            assert float(losses[1][name]) == pytest.approx(float(losses[0][name]), rel=near), name


STOPPED = ("--name", "stopped")


def interrupt(monkeypatch, args, step):
    """Fit until an optimiser step; gives the last checkpoint."""
    monkeypatch.setenv("STOP_AT", str(step))
    with pytest.raises(StoppedError):
        DistillCLI(["fit", *args, *STOPPED])
    monkeypatch.delenv("STOP_AT")
    return newest("runs/stopped/version_0")


def resume(args, checkpoint):
    """Go on from a checkpoint; gives the last one."""
    DistillCLI(["fit", *args, *STOPPED, "--ckpt_path", str(checkpoint)])
    assert [path.name for path in Path("runs/stopped").iterdir()] == ["version_0"]
    return newest("runs/stopped/version_0")


class TestInterruption:
    """Each run is stopped before an optimiser step, and resumed from its last checkpoint."""

    def test_in_mid_epoch(self, story, contract, monkeypatch):
        step = contract.STEPS + 3  # the last checkpoint is one step old
        checkpoint = interrupt(monkeypatch, story.args, step)
        assert saved(checkpoint)["global_step"] == step - 1
        assert_same_end(RUN / "checkpoints/last.ckpt", resume(story.args, checkpoint))

    def test_another_order_is_noticed(self, story):
        """The comparison can fail: a run of another seed ends elsewhere."""
        other = DistillCLI(["fit", *story.args, "--data.init_args.seed", "9", "--name", "other"])
        with pytest.raises(AssertionError):
            assert_equal(story.whole.model.state_dict(), other.model.state_dict())


EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
AVERAGED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "limit_train_batches": 7, "callbacks": [EMA]}
OFTEN = {"monitor": None, "every_n_train_steps": 2, "save_top_k": -1}
USUAL = {}  # the best by validation accuracy, and the last of each epoch
STOPS = {  # trainer, checkpoint, workers, the step before which it ends: in mid-epoch, at a boundary, in the last epoch
    "usual checkpoints": ({}, USUAL, 0, 10),
    "averaged, mid-epoch, 2 workers": (AVERAGED, OFTEN, 2, 3),
}
OTHER_STOPS = {  # the stories are stopped in mid-epoch, too
    "mid-epoch, 2 workers": ({}, OFTEN, 2, 3),
    "boundary": ({}, OFTEN, 0, 4),
    "boundary, 2 workers": ({}, OFTEN, 2, 8),
    "last epoch": ({}, OFTEN, 0, 11),
    "averaged, boundary": (AVERAGED, OFTEN, 0, 4),
    "averaged, last epoch": (AVERAGED, OFTEN, 0, 10),
}


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in STOPS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in OTHER_STOPS.items()),
    ],
)
def test_interrupted_anywhere(options, tmp_path, monkeypatch, contract):
    """One config, with gradient accumulation (windows that do not divide the epoch), clipping and averaged weights."""
    trainer, checkpoint, workers, step = options
    monkeypatch.chdir(tmp_path)
    config = contract.quick(next(path for path in contract.CONFIGS if path.stem == "distill_digits"))
    trainer = trainer | {"callbacks": [*config["trainer"]["callbacks"], *trainer.get("callbacks", [])]}
    config["trainer"] |= {"max_epochs": 3} | trainer
    config["checkpoint"] = checkpoint
    config["data"]["init_args"]["num_workers"] = workers
    args = contract.Story.write(config, "config.yaml")
    assert DistillCLI(["fit", *args]).trainer.global_step == 12
    last = interrupt(monkeypatch, args, step)
    assert 0 < saved(last)["global_step"] <= step
    end = resume(args, last)
    assert ("current_model_state" in saved(end)) == (EMA in trainer["callbacks"])
    assert_same_end(RUN / "checkpoints/last.ckpt", end)


@pytest.mark.parametrize(
    ("step", "saved_at", "workers"),
    [
        pytest.param(3, 2, 2, marks=pytest.mark.slow),
        (4, 4, 0),
        pytest.param(5, 4, 2, marks=pytest.mark.slow),
        pytest.param(7, 6, 0, marks=pytest.mark.slow),  # as the story
    ],
)
def test_interrupted_in_either_stage(step, saved_at, workers, tmp_path, monkeypatch, contract):
    """FitNets' stages are an epoch of four steps each here: within the first, at the boundary, within the second."""
    monkeypatch.chdir(tmp_path)
    config = contract.quick(next(path for path in contract.CONFIGS if path.stem == "hint_digits"))
    config["data"]["init_args"]["num_workers"] = workers
    args = contract.Story.write(config, "config.yaml")
    assert DistillCLI(["fit", *args]).model.distill_from_epoch == 1
    last = interrupt(monkeypatch, args, step)
    assert saved(last)["global_step"] == saved_at
    assert saved(last)["hints"]["distilling"] == (saved_at > 4)
    assert_same_end(RUN / "checkpoints/last.ckpt", resume(args, last))


KILLS = [  # the step before which each attempt ends, of three epochs of four steps: the first is an epoch's boundary
    pytest.param((4, 9), False, id="twice"),
    pytest.param((4, 8, 11), True, id="three times, averaged weights"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "averaged"), KILLS)
def test_killed_again_and_again(each_module, kills, averaged, tmp_path, monkeypatch, contract):
    """Each attempt resumes from the last checkpoint of the one before. Averaged weights are the deployed ones."""
    monkeypatch.chdir(tmp_path)
    path, changes = each_module
    config = contract.quick(path, **changes)
    config["checkpoint"]["every_n_train_steps"] = 1
    config["trainer"]["max_epochs"] = 3
    config["trainer"]["callbacks"] += [EMA] * averaged
    args = contract.Story.write(config, "config.yaml")
    DistillCLI(["fit", *args])
    last, ckpt_path = None, []
    for step in kills:
        last = interrupt(monkeypatch, [*args, *ckpt_path], step)
        assert saved(last)["global_step"] == step
        ckpt_path = ["--ckpt_path", str(last)]
    assert_same_end(RUN / "checkpoints/last.ckpt", resume(args, last))
    student = load_file(RUN / "student.safetensors")
    assert_equal(student, load_file("runs/stopped/version_0/student.safetensors"))
    assert contract.metrics("runs/stopped/version_0") == contract.metrics(RUN)
    end = saved(RUN / "checkpoints/last.ckpt")
    assert ("current_model_state" in end) == averaged
    assert_equal(student, {key: end["state_dict"][f"student.{key}"] for key in student})
    if averaged:
        assert any(not torch.equal(student[key], end["current_model_state"][f"student.{key}"]) for key in student)


@pytest.mark.slow
def test_killed_for_real(story, processes, contract):
    """SIGKILL, which no handler sees: at the end of an epoch, then in the middle of the next.

    The killed run reads its data in workers, the story reads them itself, and they end alike.
    """
    config = deepcopy(story.config)
    config["data"]["init_args"]["num_workers"] = 2
    args = ["fit", *story.write(config, "killed.yaml"), "--name", "killed"]
    for step, ckpt_path in ((4, []), (7, ["--ckpt_path", "last"])):
        codes, outputs = processes.run(([*args, *ckpt_path], {"KILL_AT": str(step)}))
        assert codes == [-signal.SIGKILL], outputs
        assert saved("runs/killed/version_0/checkpoints/last.ckpt")["global_step"] == step // 2 * 2
    main([*args, "--ckpt_path", "last"])
    assert [path.name for path in Path("runs/killed").iterdir()] == ["version_0"]
    assert_equal(load_file(RUN / "student.safetensors"), load_file("runs/killed/version_0/student.safetensors"))
    assert contract.metrics("runs/killed/version_0") == story.metrics
    assert yaml.safe_load(Path("runs/killed/version_0/config.yaml").read_text())["name"] == "killed"
    assert_same_end(RUN / "checkpoints/last.ckpt", newest("runs/killed/version_0"))


FAST = ("hint_digits", "cifar100_resnet56_resnet20")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_fast(name, tmp_path, monkeypatch, contract):
    """``fast: true``, on a CPU for which it picks all that it may: interrupted, resumed, tested and exported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd_lightning.cli.fast._why_no_bf16", lambda device: "")
    config = contract.quick(next(path for path in contract.CONFIGS if path.stem == name))
    del config["trainer"]["precision"]
    args = contract.Story.write(config | {"fast": True}, "config.yaml")
    whole = DistillCLI(["fit", *args])
    assert whole.trainer.precision == "bf16-mixed"
    convolutions = [p for p in whole.model.student.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    checkpoint = interrupt(monkeypatch, args, contract.STEPS + 3)
    assert_same_end(RUN / "checkpoints/last.ckpt", resume(args, checkpoint))
    for command in ("test", "predict"):
        main([command, *args])
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    student = Run(RUN).student().eval()  # in float32, as it is deployed
    x = next(iter(whole.datamodule.test_dataloader())).x
    with (RUN / "predictions.csv").open() as file:
        rows = [*csv.DictReader(file)][: len(x)]
    names = list(rows[0])[-student(x).shape[1] :]
    predicted = torch.tensor([[float(row[name]) for name in names] for row in rows])
    torch.testing.assert_close(predicted, student(x).softmax(dim=1).detach(), rtol=0, atol=0.02)
    main(["export", str(RUN), "--out", "student.onnx"])
    assert Path("student.onnx").is_file()


@pytest.mark.slow
def test_fast_has_caches_of_its_own(tmp_path, monkeypatch, contract):
    """The teacher's outputs of another precision and memory layout are others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd_lightning.cli.fast._why_no_bf16", lambda device: "")
    config = contract.quick(next(path for path in contract.CONFIGS if path.stem == "cached_digits"))
    del config["trainer"]["precision"]
    args = contract.Story.write(config, "config.yaml")
    folders = []
    for fast in ("false", "true", "true"):
        cli = DistillCLI(["fit", *args, "--fast", fast])
        folders += cli.model.teacher.cache_folders.values()
    plain, first, second = folders
    assert first == second != plain
