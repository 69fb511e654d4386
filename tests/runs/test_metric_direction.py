"""Directions of metrics by their names."""

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from kd_lightning.errors import InputError
from kd_lightning.runs.metric_direction import check_callbacks, check_direction, direction_of

LESS = [
    "val/loss",
    "val/loss/1",
    "val/loss/dataloader_idx_1",
    "val_loss",
    "valLoss",
    "train/loss_step",
    "hard_loss",
    "val/teacher_kl",
    "val/calibration_error",
    "val/KL",
    "error_rate",
    "MeanSquaredError",
    "val/rmse",
    "val/mae",
    "perplexity",
    "cross_entropy",
    "train/hard",
    "train/teacher_soft",
    "train/peer_hard",
    "val/hint",
    "val/hint/features.3",
    "val/hint/layer1.conf",
    "pseudo_labels/flips",
    "pseudo_labels/class_distance",
    "transductive/test/loss",
]
MORE = [
    "val/accuracy",
    "val/accuracy/1",
    "val_acc",
    "acc@1",
    "val/accuracy_top5",
    "val/baseline_accuracy",
    "val/teacher_0_accuracy",
    "val/f1",
    "f1_score",
    "val/f1/2",
    "macro_f1",
    "agreement",
    "val/teacher_0_ensemble_agreement",
    "auroc",
    "AUROC",
    "precision",
    "pseudo_labels/precision",
    "recall",
    "val/recall_loss",
    "val/recall_a/b",
    "val/recall_no/error",
    "transductive/test/recall_a/loss/1",
    "val/iou",
    "mIoU",
    "val/mAP",
    "train/coverage",
    "train/confidence",
    "MulticlassAccuracy",
    "transductive/test/f1",
]
UNKNOWN = [
    "stage",
    "frozen",
    "soft_weight",
    "hint_weight",
    "train/teacher_0_share",
    "lr-Adam",
    "score",
    "val/accuracy_gap",
    "val/loss_gap",
    "val/1-accuracy",
    "val/neg_loss",
    "negative_accuracy",
    "val/accuracy_hard",
    "entropy",
    "val/disagreement",
    "mine",
]


@pytest.mark.parametrize(("names", "direction"), [(LESS, "min"), (MORE, "max"), (UNKNOWN, None)])
def test_direction(names, direction):
    assert {name: direction_of(name) for name in names} == dict.fromkeys(names, direction)


def test_the_opposite_mode_is_refused():
    for monitor, right, wrong in (("val/loss", "min", "max"), ("val/accuracy/1", "max", "min")):
        check_direction("key", monitor, right)
        with pytest.raises(InputError, match=rf"^key: mode must be {right} with monitor {monitor}.* got {wrong}$"):
            check_direction("key", monitor, wrong)
    for mode in ("min", "max"):
        check_direction("key", "mine", mode)


def test_callbacks(tmp_path):
    right = [
        EarlyStopping("val/loss"),
        EarlyStopping("val/accuracy", mode="max"),
        ModelCheckpoint(tmp_path),
        ModelCheckpoint(tmp_path, monitor="val/f1", mode="max"),
        ModelCheckpoint(tmp_path, monitor="mine", mode="max"),
        LearningRateMonitor(),
    ]
    check_callbacks(right)
    with pytest.raises(InputError, match="^EarlyStopping: mode must be max .*val/accuracy"):
        check_callbacks([*right, EarlyStopping("val/accuracy")])
    with pytest.raises(InputError, match="^ModelCheckpoint: mode must be min .*val/loss"):
        check_callbacks([*right, ModelCheckpoint(tmp_path, monitor="val/loss", mode="max")])


def test_figures_of_dense_outputs_and_of_regression():
    least = ("mae", "rmse", "teacher_mae", "teacher_rmse", "teacher_difference", "teacher_0_difference", "mape", "MAE")
    most = ("mean_iou", "r2", "R2Score", "r2_score", "teacher_r2", "miou")
    assert {direction_of(f"val/{name}") for name in least} == {"min"}
    assert {direction_of(f"test/{name}/1") for name in most} == {"max"}
    assert direction_of("val/layer2") is None


def test_terms_of_an_objective_are_losses(tmp_path):
    terms = {"maps", "rows"}
    for name in ("val/maps", "val/maps/layer1.0", "train/rows"):
        assert direction_of(name) is None
        assert direction_of(name, terms) == "min"
    assert direction_of("val/accuracy", terms) == "max"
    assert direction_of("maps", terms) is None  # logged by nothing here
    assert {direction_of(f"val/{name}") for name in ("feature", "global", "global_1")} == {"min"}
    with pytest.raises(InputError, match="^ModelCheckpoint: mode must be min with monitor val/maps"):
        check_callbacks([ModelCheckpoint(tmp_path, monitor="val/maps", mode="max")], terms)
