"""Which key a wrong one means."""

import pytest

from kd_lightning.runs.key_hints import hint_for_key, right_key

CONFIG = {
    "model": {
        "class_path": "DistillModule",
        "init_args": {
            "student": {"class_path": "DigitsCNN", "init_args": {"width": 8}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {"class_path": "SemiSupervisedDataModule", "init_args": {"source": {"class_path": "Digits"}}},
}
KNOWN = ["trainer.max_epochs", "trainer.max_steps", "trainer.devices", "seed_everything", "name", "model", "data"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("optimizer.lr", "model.init_args.optimizer.init_args.lr"),
        ("lr", "model.init_args.optimizer.init_args.lr"),
        ("learning_rate", "model.init_args.optimizer.init_args.lr"),
        ("max_epochs", "trainer.max_epochs"),
        ("epochs", "trainer.max_epochs"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("batch_size", "data.init_args.batch_size"),
        ("seed", "seed_everything"),
        ("data.seed", "data.init_args.seed"),
        ("student.width", "model.init_args.student.init_args.width"),
        ("model.temperature", "model.init_args.soft_loss.init_args.temperature"),
        ("soft_wieght", "model.init_args.soft_weight"),
        ("zzz", ""),
    ],
)
def test_right_key(name, meant):
    assert right_key(name, CONFIG, KNOWN) == meant


def test_without_a_config():
    assert right_key("max_epochs", {}, KNOWN) == "trainer.max_epochs"
    assert right_key("lr", {}, KNOWN) == ""


def test_hint_for_a_key_of_an_object():
    text = hint_for_key("temperature", ["student", "teacher"], CONFIG, KNOWN)
    assert text == "; did you mean model.init_args.soft_loss.init_args.temperature?"
