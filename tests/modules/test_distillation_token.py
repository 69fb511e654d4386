"""DistillationTokenModule: which head learns what, timm's distilled models, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from kd_lightning import (
    Batch,
    Digits,
    DistillationTokenModule,
    ExactResume,
    InputError,
    SeedEveryStep,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.data.transforms import MixUp
from kd_lightning.losses import HardDistillationLoss, KDLoss
from kd_lightning.models import DigitsCNN

NAN = float("nan")


def vit(**kwargs):
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return VisionTransformerDistilled(**(size | {"num_classes": 10} | kwargs))


class TwoHeads(nn.Module):
    """A network of somebody's own, with fixed logits: two in training mode, their mean in eval mode."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.Parameter(first.clone()), nn.Parameter(second.clone())

    def forward(self, x):
        first, second = self.first[: len(x)], self.second[: len(x)]
        return (first, second) if self.training else (first + second) / 2


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[: len(x)]


class TestObjective:
    Y = torch.tensor([0, -100, 3, 1])

    def module(self, **kwargs):
        torch.manual_seed(0)
        first, second, teacher = torch.randn(3, 4, 5)
        return DistillationTokenModule(TwoHeads(first, second), Fixed(teacher), **kwargs), first, second, teacher

    @pytest.mark.parametrize("weight", [0.5, 0.2, 0.0, 1.0])
    def test_hard_labels_by_hand(self, weight):
        module, first, second, teacher = self.module(soft_weight=weight)
        known = self.Y != -100
        hard = -first.double().log_softmax(1)[known, self.Y[known]].mean()
        soft = -second.double().log_softmax(1)[range(4), teacher.argmax(1)].mean()
        loss = module.training_step((torch.zeros(4, 1), self.Y), 0)
        assert loss.item() == pytest.approx(((1 - weight) * hard + weight * soft).item(), rel=1e-5)

    def test_soft_labels_by_hand(self):
        module, first, second, teacher = self.module(soft_loss=KDLoss(3.0))
        soft = 9 * F.kl_div((second / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
        hard = F.cross_entropy(first, self.Y)
        loss = module.training_step((torch.zeros(4, 1), self.Y), 0)
        assert loss.item() == pytest.approx((hard / 2 + soft / 2).item(), rel=1e-5)

    def test_each_head_has_the_gradient_of_its_own_term(self):
        module, first, second, teacher = self.module()
        module.training_step((torch.zeros(4, 1), self.Y), 0).backward()
        for head, logits, target in (("first", first, self.Y), ("second", second, teacher.argmax(1))):
            logits = logits.clone().requires_grad_()
            (0.5 * F.cross_entropy(logits, target)).backward()
            assert torch.allclose(getattr(module.student, head).grad, logits.grad, atol=1e-7)

    def test_without_labels_the_distillation_head_learns_alone(self):
        module, *_ = self.module()
        module.training_step((torch.zeros(4, 1), torch.full((4,), -100)), 0).backward()
        assert module.student.first.grad.abs().max() == 0
        assert module.student.second.grad.abs().min() > 0

    @pytest.mark.parametrize(
        ("task", "shape", "y"),
        [
            ("multilabel", (2, 3), torch.tensor([[0.0, 1, NAN], [1, 1, 0]])),
            ("binary", (2,), torch.tensor([0, -100])),
            ("regression", (2, 3), torch.tensor([[0.5, 1, 2], [1, NAN, 0]])),
        ],
    )
    def test_other_tasks(self, task, shape, y):
        first, second, teacher = torch.randn(3, *shape)
        module = DistillationTokenModule(TwoHeads(first, second), Fixed(teacher), task=task)
        known = ~y.isnan() if y.is_floating_point() else y != -100
        if task == "regression":
            hard, soft = (first - y)[known].square().mean(), (second - teacher).square().mean()
        else:
            hard = F.binary_cross_entropy_with_logits(first[known], y[known].float())
            soft = F.binary_cross_entropy_with_logits(second, (teacher > 0).float())
        loss = module.training_step((torch.zeros(2, 1), y), 0)
        assert loss.item() == pytest.approx((hard / 2 + soft / 2).item(), rel=1e-5)

    def test_dense(self):
        first, second, teacher = torch.randn(3, 2, 4, 3, 3)
        y = torch.randint(4, (2, 3, 3))
        y[0, 0] = -100
        module = DistillationTokenModule(TwoHeads(first, second), Fixed(teacher), class_dim=1)
        counted = y != -100
        hard = F.cross_entropy(first, y)
        soft = F.cross_entropy(second, teacher.argmax(1), reduction="none")[counted].mean()
        loss = module.training_step((torch.zeros(2, 1), y), 0)
        assert loss.item() == pytest.approx((hard / 2 + soft / 2).item(), rel=1e-5)

    def test_mixed_labels(self):
        module, first, second, teacher = self.module()
        y = torch.rand(4, 5).softmax(1)
        loss = module.training_step(Batch(torch.zeros(4, 1), y), 0)
        expected = F.cross_entropy(first, y) / 2 + F.cross_entropy(second, teacher.argmax(1)) / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


class TestTimm:
    def test_heads_and_mean(self):
        student, teacher = vit(), DigitsCNN(4).eval()
        x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, -100, 3])
        module = DistillationTokenModule(student, teacher)
        tokens = student.forward_features(x)
        first, second = student.head(tokens[:, 0]), student.head_dist(tokens[:, 1])
        loss = module.training_step((x, y), 0)
        expected = (F.cross_entropy(first, y) + F.cross_entropy(second, teacher(x).argmax(1))) / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        module.eval()
        assert torch.allclose(module(x), (first + second) / 2, atol=1e-6)
        assert torch.allclose(module.predict_step((x, y), 0), ((first + second) / 2).softmax(1), atol=1e-6)

    def test_default_loss_has_the_module_s_task(self):
        assert isinstance(DistillationTokenModule(vit(), DigitsCNN(4)).soft_loss, HardDistillationLoss)
        assert DistillationTokenModule(vit(), DigitsCNN(4)).soft_weight == 0.5

    def test_under_compilation(self):
        x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, -100, 3])
        student, teacher = vit(), DigitsCNN(4)
        expected = DistillationTokenModule(copy.deepcopy(student), teacher).training_step((x, y), 0)
        compiled = DistillationTokenModule(torch.compile(copy.deepcopy(student), backend="eager"), teacher)
        assert compiled.training_step((x, y), 0).item() == pytest.approx(expected.item(), rel=1e-6)
        assert compiled.eval()(x).shape == (4, 10)

    def test_nothing_of_a_step_stays(self):
        module = DistillationTokenModule(vit(), DigitsCNN(4))
        module.training_step((torch.randn(2, 1, 8, 8), torch.tensor([0, 1])), 0)
        copy.deepcopy(module)  # a tensor of the graph cannot be copied


class Plain(nn.Linear):
    """One head."""

    def __init__(self):
        super().__init__(1, 5)


class Auxiliary(nn.Module):
    """A head that helps in training, as GoogLeNet has; it has no part in the mean."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 5)

    def forward(self, x):
        return {"logits": self.fc(x), "aux": self.fc(x)} if self.training else self.fc(x)


class Features(Auxiliary):
    def forward(self, x):
        return self.fc(x), x


class TestRefused:
    @pytest.mark.parametrize("network", [Plain, Auxiliary, Features])
    def test_no_second_head(self, network):
        module = DistillationTokenModule(network(), Fixed(torch.zeros(2, 5)))
        message = rf"^student: in training mode it must return the logits of two heads, .* {network.__name__} does not$"
        with pytest.raises(InputError, match=message):
            module.training_step((torch.zeros(2, 1), torch.tensor([0, 1])), 0)

    def test_one_head_after_a_step_of_two(self):
        module = DistillationTokenModule(vit(), DigitsCNN(4))
        batch = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
        module.training_step(batch, 0)
        module.student.set_distilled_training(False)
        with pytest.raises(InputError, match="two heads"):
            module.training_step(batch, 0)

    def test_two_logits_in_evaluation(self):
        class Always(TwoHeads):
            def forward(self, x):
                return self.first, self.second

        module = DistillationTokenModule(Always(*torch.zeros(2, 4, 5)), Fixed(torch.zeros(4, 5))).eval()
        message = r"^student: in eval mode it must return the mean of its two heads, got \(\[4, 5\], \[4, 5\]\)$"
        with pytest.raises(InputError, match=message):
            module.validation_step((torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)), 0)

    def test_teacher_with_other_outputs(self):
        module = DistillationTokenModule(vit(), DigitsCNN(4, num_classes=9))
        with pytest.raises(InputError, match="same number of outputs"):
            module.training_step((torch.randn(2, 1, 8, 8), torch.tensor([0, 1])), 0)

    def test_without_a_teacher(self, quiet_trainer, loader):
        module = DistillationTokenModule(vit(), None)
        quiet_trainer().test(module, loader(), verbose=False)
        with pytest.raises(InputError, match="training needs the teacher"):
            quiet_trainer().fit(module, loader())


class StoppedError(Exception):
    pass


class TestFit:
    def fit(self, trainer, teacher, path=None, **data):
        torch.manual_seed(0)
        module = DistillationTokenModule(vit(proj_drop_rate=0.1), teacher, optimizer=partial(torch.optim.Adam, lr=1e-3))
        settings = {"labeled": 10, "batch_size": 128, "val_size": 0.5, "num_views": 2}
        data = SemiSupervisedDataModule(Digits(), **settings | data)
        trainer.fit(module, datamodule=data, ckpt_path=path)
        return module

    def test_cached_teacher_changes_nothing(self, quiet_trainer, tmp_path):
        torch.manual_seed(7)
        network = DigitsCNN(4)
        teachers = [Teacher(network), Teacher(network, cache=tmp_path / "cache", cache_top_k=2)]
        live, cached = (
            self.fit(quiet_trainer(max_epochs=2, callbacks=[SeedEveryStep(seed=3)]), teacher, mix=MixUp(0.4))
            for teacher in teachers
        )
        state = cached.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in live.state_dict().items())

    def test_mixed_precision(self, quiet_trainer):
        trainer = quiet_trainer(precision="bf16-mixed", limit_train_batches=2)
        self.fit(trainer, DigitsCNN(4))
        assert {"train/hard", "train/soft", "soft_weight", "val/accuracy", "val/agreement"} <= {
            *trainer.callback_metrics
        }
        assert trainer.callback_metrics["train/soft"].isfinite()

    def test_resumes_exactly(self, quiet_trainer, tmp_path):
        def trainer(epochs):
            callbacks = [SeedEveryStep(seed=3), ExactResume()]
            return quiet_trainer(max_epochs=epochs, callbacks=callbacks, limit_train_batches=3)

        teacher = DigitsCNN(4)
        whole = self.fit(trainer(3), teacher)
        first = trainer(2)
        self.fit(first, teacher)
        first.save_checkpoint(tmp_path / "c.ckpt")
        resumed = self.fit(trainer(3), teacher, path=tmp_path / "c.ckpt").state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.state_dict().items())
