"""teach: what a step may do with its batch and its network, and what is left on the network after a fit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, InputError, teach

ROWS = 6
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def network(size=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, 3))


def random(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Steps(LightningModule):
    """A module whose step is a function of module and batch."""

    def __init__(self, step, net=None):
        super().__init__()
        self.net = network() if net is None else net
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def plain(module, batch):
    x, y = batch
    return F.cross_entropy(module.net(x), y)


def pairs(count=2 * ROWS):
    return DataLoader([(x, n % 3) for n, x in enumerate(random(count, 4))], ROWS)


def fit(module, loader, **options):
    trainer = Trainer(accelerator="cpu", **SILENT | {"max_epochs": 1} | options)
    trainer.fit(module, loader)
    return trainer


class Recorder(nn.Module):
    """A teacher that notes its inputs."""

    def __init__(self, size=4):
        super().__init__()
        self.net, self.seen = network(size, 1), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.net(x)


LARGE = random(ROWS, 7, seed=9)


def popped(module, batch):
    batch.pop("teacher_inputs")
    return F.cross_entropy(module.net(batch["x"]), batch["y"])


def of_pair(module, batch):
    return F.cross_entropy(module.net(batch[0]["x"]), batch[1])


def anew(module, batch):
    return F.cross_entropy(module.net(batch.x * 1), batch.y)


X, Y = random(ROWS, 4), torch.arange(ROWS) % 3


@pytest.mark.parametrize(
    ("step", "batch"),
    [
        (popped, {"x": X, "y": Y, "teacher_inputs": LARGE}),
        (of_pair, ({"x": X, "teacher_inputs": LARGE}, Y)),
        (anew, Batch(X, Y, teacher_inputs=LARGE)),
    ],
)
def test_the_teacher_gets_its_inputs_whatever_the_step_does_with_the_batch(step, batch):
    teacher = Recorder(7)
    fit(teach(Steps(step), teacher), DataLoader([batch], batch_size=None))
    assert [seen.shape for seen in teacher.seen] == [(ROWS, 7)]
    assert torch.equal(teacher.seen[0], LARGE)


def test_teacher_inputs_of_one_of_several_batches_are_refused():
    module = teach(Steps(lambda module, batch: module.net(batch["a"]["x"]).mean()), Recorder(7))
    batch = {"a": {"x": X, "teacher_inputs": LARGE}, "b": {"x": X}}
    with pytest.raises(InputError, match="teacher_inputs are for one batch of a step"):
        fit(module, DataLoader([batch], batch_size=None))


def test_a_pair_holds_its_teacher_inputs_beside_its_inputs():
    batch = Batch.from_any(({"x": X, "teacher_inputs": LARGE}, Y))
    assert torch.equal(batch.x, X)
    assert torch.equal(batch.teacher_x, LARGE)


def test_outputs_that_the_step_changes_in_place_are_refused():
    def step(module, batch):
        logits = module.net(batch[0])
        logits /= 4
        return F.cross_entropy(logits, batch[1])

    with pytest.raises(InputError, match="changes its outputs in place after the call"):
        fit(teach(Steps(step), network(seed=1)), pairs())


def mask_loader(mask, key="mask"):
    return DataLoader([{"x": X, "y": Y, key: mask}], batch_size=None)


def masked_step(module, batch):
    return F.cross_entropy(module.net(batch["x"]), batch["y"])


def test_labels_are_no_mask():
    with pytest.raises(InputError, match="mask must name positions that count, but 'labels' names labels"):
        teach(Steps(plain), network(seed=1), mask="labels")
    module = teach(Steps(masked_step), network(seed=1), mask="target_ids")
    with pytest.raises(InputError, match="mask must be at least 0 everywhere, got -100"):
        fit(module, mask_loader(torch.tensor([1, 2, -100, 0, 1, 1]), "target_ids"))


def test_a_mask_that_leaves_out_all_is_warned_of():
    module = teach(Steps(masked_step), network(seed=1), mask="mask")
    with pytest.warns(UserWarning, match="no position of this epoch counts"):
        fit(module, mask_loader(torch.zeros(ROWS, dtype=torch.long)))


def test_a_mask_among_the_inputs_of_a_batch():
    def step(module, batch):
        return F.cross_entropy(module.net(batch.x["x"]), batch.y)

    values = []
    for mask in (torch.tensor([1, 1, 0, 0, 0, 1]), torch.ones(ROWS, dtype=torch.long)):
        batch = Batch({"x": X, "attention_mask": mask}, Y)
        module = teach(Steps(step), network(seed=1), mask="attention_mask")
        values.append(fit(module, DataLoader([batch], batch_size=None)).callback_metrics["teach/soft"])
    assert values[0] != values[1]


def test_copies_of_the_network_that_a_step_makes_teach_nothing():
    teacher = Recorder()

    def step(module, batch):
        module.copied = [copy.deepcopy(module.net)]
        return plain(module, batch)

    module = teach(Steps(step), teacher)
    fit(module, pairs())
    count = len(teacher.seen)
    assert count == 2
    module.copied[0](X)
    assert len(teacher.seen) == count


def test_a_copy_of_the_module_is_taught():
    module = copy.deepcopy(teach(Steps(plain), network(seed=1)))
    assert fit(module, pairs()).callback_metrics["teach/soft"] > 0
    assert not module.net._forward_hooks


def test_no_hook_is_left_on_the_network(tmp_path):
    module = teach(Steps(plain), network(seed=1))
    fit(module, pairs())
    assert not module.net._forward_hooks
    assert not module.net._forward_pre_hooks
    torch.jit.script(module.net)
    torch.save(module.net, tmp_path / "net.pt")
    torch.save(network(), tmp_path / "plain.pt")
    assert (tmp_path / "net.pt").stat().st_size < (tmp_path / "plain.pt").stat().st_size + 200


def test_a_step_of_validation_may_be_that_of_training():
    class Both(Steps):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    module = teach(Both(plain), network(seed=1))
    alone = Both(plain)
    alone.load_state_dict(module.state_dict())
    trainers = [Trainer(accelerator="cpu", **SILENT) for _ in range(2)]
    values = [
        t.validate(m, pairs(), verbose=False)[0]["val_loss"] for t, m in zip(trainers, (module, alone), strict=True)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("unlabeled", [False, True])
def test_a_step_may_skip_a_batch_before_it_calls_the_network(unlabeled):
    seen = []

    def step(module, batch):
        seen.append(1)
        return None if len(seen) == 1 else plain(module, batch)

    trainer = fit(teach(Steps(step), network(seed=1), unlabeled=unlabeled), pairs())
    assert len(seen) == 2
    assert trainer.callback_metrics["teach/soft"] > 0


def test_manual_optimization_that_setup_turns_on():
    class Manual(Steps):
        def setup(self, stage):
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(plain(self, batch))
            optimizer.step()

    assert fit(teach(Manual(None), network(seed=1)), pairs()).callback_metrics["teach/soft"] > 0


class Centred(nn.Module):
    """A soft loss with a buffer that it changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(3))

    def forward(self, student, teacher):
        self.center.mul_(0.9).add_(0.1 * teacher.mean(dim=0))
        return F.mse_loss(student, teacher - self.center)


def test_buffers_of_a_soft_loss_are_resumed_and_are_no_weights_of_the_module(tmp_path):
    def run(epochs, path=None):
        module = teach(Steps(plain), network(seed=1), soft_loss=Centred())
        saver = ModelCheckpoint(tmp_path / str(epochs), filename="last")
        options = {"enable_checkpointing": True, "callbacks": [saver], "max_epochs": epochs}
        trainer = Trainer(accelerator="cpu", **SILENT | options)
        trainer.fit(module, pairs(), ckpt_path=path)
        return module, tmp_path / str(epochs) / "last.ckpt"

    whole, _ = run(2)
    _, path = run(1)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == Steps(plain).state_dict().keys()
    resumed, _ = run(2, path)
    assert torch.equal(resumed.teaching.soft_loss.center, whole.teaching.soft_loss.center)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_soft_losses_with_parameters_or_of_probabilities_are_refused():
    class Scaled(nn.MSELoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(InputError, match="soft_loss: Scaled has parameters"):
        teach(Steps(plain), network(seed=1), soft_loss=Scaled())
    for loss in (nn.CrossEntropyLoss(), nn.KLDivLoss(), nn.BCEWithLogitsLoss()):
        with pytest.raises(InputError, match="needs probabilities or classes as its target"):
            teach(Steps(plain), network(seed=1), soft_loss=loss)


def test_a_soft_loss_that_is_not_finite_is_named_as_in_the_chart():
    module = teach(Steps(plain), network(seed=1), soft_loss=Infinite())
    with pytest.raises(InputError, match="teach/soft is not a finite number at step 0"):
        fit(module, pairs())


class Infinite(nn.Module):
    def forward(self, student, teacher):
        return student.sum() * torch.inf
