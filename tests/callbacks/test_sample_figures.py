"""SampleFigures: when pictures are drawn, of what, and that nothing else changes."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kd_lightning import DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher
from kd_lightning.batch import Batch
from kd_lightning.callbacks import SampleFigures
from kd_lightning.callbacks.sample_figures import draw_outputs, draw_views
from kd_lightning.data.sources import Digits
from kd_lightning.models import DigitsCNN

BOTH = {"samples/augmentation": [0], "samples/teacher_and_student": [4]}


@pytest.fixture
def fit(tmp_path):
    """Fits two epochs of two steps; returns the events of figures, and the student's weights."""

    def run(module, callback=True, **options):
        torch.manual_seed(0)
        board = TensorBoardLogger(tmp_path, name=f"board_{len([*tmp_path.iterdir()])}", version=0)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            limit_train_batches=2,
            limit_val_batches=1,
            logger=board,
            callbacks=[SampleFigures()] if callback else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        data = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=16, seed=0)
        trainer.fit(module, datamodule=data)
        events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
        return {tag: [one.step for one in events.Images(tag)] for tag in events.Tags()["images"]}

    return run


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def distill(dropout=0.5):
    torch.manual_seed(1)
    student = nn.Sequential(DigitsCNN(2), nn.Dropout(dropout))
    return DistillModule(student, DigitsCNN(4), optimizer=optimizer)


def test_both_figures_and_nothing_else_changes(fit):
    one, other = distill(), distill()
    assert fit(one) == BOTH
    assert fit(other, callback=False) == {}
    for (name, a), b in zip(one.student.state_dict().items(), other.student.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert one.student.training == other.student.training


def test_a_module_without_a_teacher_has_one_figure(fit):
    assert fit(SupervisedModule(DigitsCNN(2), optimizer=optimizer)) == {"samples/augmentation": [0]}


def test_a_teacher_may_ask_which_samples_they_are(fit):
    class Asking(Teacher):
        """Knows samples by their index, as a CrossFittedTeacher does."""

        def compute(self, batch):
            assert batch.index is not None and len(batch.index) == len(batch)
            return super().compute(batch)

    assert fit(DistillModule(DigitsCNN(2), Asking(DigitsCNN(4)), optimizer=optimizer)) == BOTH


def test_a_failing_drawing_is_a_warning(fit, monkeypatch):
    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr("kd_lightning.callbacks.sample_figures.draw_views", fail)
    monkeypatch.setattr("kd_lightning.callbacks.sample_figures.draw_outputs", fail)
    with pytest.warns(UserWarning, match="no ink"):
        assert fit(distill()) == {}


def test_views_show_only_the_labels_that_training_sees():
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([-100, 2, -100, 0])

    class Data:
        class_names = ("ant", "bee", "cat")

        def image(self, index):
            return torch.rand(3, 6, 9)

    batch = Batch(x, y, index=torch.arange(4), view=torch.tensor([0, 3, 1, 0]), x_strong=torch.rand(4, 3, 8, 8))
    axes = draw_views(batch, Data()).axes
    assert [panel.get_title() for panel in axes[::3]] == ["label cat", "label ant", "no label", "no label"]
    assert [panel.get_xlabel() for panel in axes[:3]] == ["as in the data", "view 3", "strong view"]
    assert len(draw_views(Batch(x), None).axes) == 4


def test_outputs_show_the_samples_that_differ_most():
    student = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    teacher = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    axes = draw_outputs(Batch(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, -100])), student, teacher, ["a", "$b$"]).axes
    assert [panel.get_title() for panel in axes[::2]] == ["label $b$", "no label", "label a"]
    widths = [bar.get_width() for bar in axes[1].patches]
    assert widths == pytest.approx([90, 10, 10, 90])  # the teacher's of both classes, then the student's


@pytest.mark.parametrize("x", [torch.rand(4, 2, 8, 8), torch.rand(4, 8), {"input_ids": torch.ones(4, 3)}])
def test_other_inputs_have_no_figures(x):
    from kd_lightning.callbacks.sample_figures import _is_picture

    assert not _is_picture(x)
