"""ConditionalLoss in the modules: in a sum, annealed, of dense and mixed rows, under teach, without hidden labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import ApprenticeModule, Batch, DistillModule, InputError, SoftWeightAnnealing, teach
from kd_lightning.losses import ConditionalLoss, DKDLoss, KDLoss, NKDLoss, RLDLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers.checks import soft_targets

Y = torch.tensor([0, 1, -100, 2, 1, -100])


def fixed(seed, *shape):
    """A network that gives the same logits whatever comes in."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))

        def forward(self, x):
            return self.logits + 0 * x.sum()

    return Fixed()


def conditional(**kwargs):
    return ConditionalLoss(KDLoss(2.0), 0.25, **kwargs)


def soft_by_hand(student, teacher, y):
    rows = KDLoss(2.0, reduction="none")(student, teacher)
    hard = F.cross_entropy(student, y.clamp(min=0), reduction="none")
    wrong = (y >= 0) & (teacher.argmax(dim=1) != y)
    assert 0 < wrong.sum() < (y >= 0).sum()
    return torch.where(wrong, 0.25 * rows + 0.75 * hard, rows).mean()


def test_in_a_sum():
    student, teacher = fixed(0, 6, 3), fixed(1, 6, 3)
    losses = {"kd": (0.5, KDLoss(1.0)), "own": (2.0, conditional())}
    module = DistillModule(student, teacher, soft_loss=losses, soft_weight=0.9)
    terms = module.losses(Batch(torch.zeros(6, 1), Y))
    torch.testing.assert_close(terms["own"].value, soft_by_hand(student.logits, teacher.logits, Y))
    assert terms["own"].weight == 0.9 * 2.0
    with pytest.raises(InputError, match="soft_loss is for the binary task, but the module's task is multiclass"):
        DistillModule(student, teacher, soft_loss=ConditionalLoss(KDLoss(task="binary")))


def test_dense_rows_that_are_masked_or_void_do_not_count():
    student, teacher = fixed(0, 2, 3, 4), fixed(1, 2, 3, 4)
    y = torch.tensor([[0, 1, -100, 2], [2, 0, 1, 1]])
    mask = torch.tensor([[True] * 4, [True, True, False, True]])
    module = DistillModule(student, teacher, class_dim=1, soft_loss=conditional())
    found = module.losses(Batch(torch.zeros(2, 1), y, mask=mask))["soft"].value
    rows = mask & (y >= 0)
    s, t = (network.logits.movedim(1, -1)[rows] for network in (student, teacher))
    torch.testing.assert_close(found, soft_by_hand(s, t, y[rows]))


def test_mixed_labels():
    student, teacher = fixed(0, 2, 3), fixed(1, 2, 3)
    y = torch.tensor([[0.4, 0.6, 0.0], [float("nan")] * 3])
    module = DistillModule(student, teacher, soft_loss=ConditionalLoss(KDLoss(2.0)))
    found = module.losses(Batch(torch.zeros(2, 1), y, partner=torch.tensor([1, 0])))["soft"].value
    rows = KDLoss(2.0, reduction="none")(student.logits, teacher.logits)
    assert teacher.logits[0].argmax() != 1
    expected = (-(y[0] * student.logits[0].log_softmax(0)).sum() + rows[1]) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scheme", ["joint", "fixed_teacher"])
def test_apprentice(scheme):
    student, teacher = fixed(0, 6, 3), fixed(1, 6, 3)
    module = ApprenticeModule(student, teacher, scheme, soft_loss=conditional())
    found = module.losses(Batch(torch.zeros(6, 1), Y))["soft"].value
    torch.testing.assert_close(found, soft_by_hand(student.logits, teacher.logits, Y))


@pytest.mark.parametrize("attribute", ["soft_loss.temperature", "soft_loss.loss.temperature", "soft_loss.wrong_weight"])
def test_annealing(attribute):
    torch.manual_seed(0)
    module = DistillModule(DigitsCNN(2), DigitsCNN(2), soft_loss=conditional())
    x = torch.randn(8, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, torch.arange(8) % 10), 4)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[SoftWeightAnnealing(1.0, 0.5, attribute=attribute)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    loss = module.soft_loss
    assert (loss.wrong_weight if "weight" in attribute else loss.loss.temperature) == 0.5


def test_doctor_sees_the_inner_loss():
    logits = torch.randn(20, 3)
    assert soft_targets(logits, conditional(), "multiclass") == soft_targets(logits, KDLoss(2.0), "multiclass")


class Own(LightningModule):
    def __init__(self, step=None):
        super().__init__()
        torch.manual_seed(3)
        self.net, self.step = nn.Linear(4, 3), step or (lambda x, y: (x, y))

    def training_step(self, batch, batch_idx):
        x, y = self.step(*batch)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class TestTeach:
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])

    def test_labels_are_the_batchs(self):
        teacher = fixed(1, 6, 3)
        module = teach(Own(), teacher, soft_loss=conditional(), soft_weight=1.0)
        found = module.training_step((self.x, self.y), 0)
        torch.testing.assert_close(found, soft_by_hand(module.net(self.x), teacher.logits, self.y))

    @pytest.mark.parametrize(
        ("step", "y"),
        [
            (lambda x, y: (x.flip(0), y.flip(0)), y),  # the rows are others than those of the batch
            (lambda x, y: (x, y.long()), y.float()),
        ],
    )
    def test_unknown_labels_are_refused(self, step, y):
        module = teach(Own(step), fixed(1, 6, 3), soft_loss=conditional())
        with pytest.raises(InputError, match="ConditionalLoss needs labels; teach finds them where net is called"):
            module.training_step((self.x, y), 0)

    def test_labels_under_other_keys_are_those_of_unpack(self):
        class Keys(Own):
            def training_step(self, batch, batch_idx):
                return super().training_step((batch["image"], batch["digit"]), batch_idx)

        class Named(Keys):
            def unpack(self, batch):
                return Batch(batch["image"], batch["digit"])

        teacher, batch = fixed(1, 6, 3), {"image": self.x, "digit": self.y, "number": torch.arange(6)}
        module = teach(Named(), teacher, soft_loss=conditional(), soft_weight=1.0)
        found = module.training_step(batch, 0)
        torch.testing.assert_close(found, soft_by_hand(module.net(self.x), teacher.logits, self.y))
        for loss in (conditional(), DKDLoss(), NKDLoss(), RLDLoss()):
            teach(Named(), teacher, soft_loss=loss).training_step(batch, 0)
            with pytest.raises(InputError, match=rf"^soft_loss: {type(loss).__name__} needs labels; .* unpack"):
                teach(Keys(), teacher, soft_loss=loss).training_step(batch, 0)

    def test_labels_of_positions_are_refused(self):
        class Tokens(Own):
            def training_step(self, batch, batch_idx):
                return self.net(batch[0]).sum()

        module = teach(Tokens(), nn.Linear(4, 3), soft_loss=conditional(), class_dim=-1)
        with pytest.raises(InputError, match="ConditionalLoss needs labels"):
            module.training_step((torch.randn(2, 5, 4), torch.zeros(2, dtype=torch.long)), 0)


def test_hidden_labels_do_not_count():
    """Two batches that differ in nothing but hidden labels are one batch for the loss: their rows have -100."""
    student, teacher = fixed(0, 6, 3), fixed(1, 6, 3)
    module = DistillModule(student, teacher, soft_loss=ConditionalLoss(KDLoss(2.0)))
    rows = KDLoss(2.0, reduction="none")(student.logits, teacher.logits).detach().numpy()
    found = module.losses(Batch(torch.zeros(6, 1), torch.full((6,), -100)))["soft"].value
    assert found.item() == pytest.approx(np.mean(rows), rel=1e-6)
