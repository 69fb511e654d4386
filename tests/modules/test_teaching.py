"""teach: any LightningModule learns from a teacher. The step by hand, and the kinds of modules that projects have."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule, SoftWeightAnnealing, Teacher, teach
from kd_lightning.losses import KDLoss
from kd_lightning.modules import teaching_steps

W, T = 0.7, 4.0  # soft weight and temperature
ROWS = 6


def network(out=3, width=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, out))


def kd(student, teacher):
    """The soft loss of rows (N, C), in float64."""
    s, t = ((z.double() / T).log_softmax(-1) for z in (student, teacher))
    return T * T * (t.exp() * (t - s)).sum(-1).mean()


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


class Classifier(LightningModule):
    """As in Lightning's own examples: ``(x, y)``, a network ``net``, metrics of its own."""

    def __init__(self, net=None):
        super().__init__()
        self.net = network() if net is None else net
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self.net(x), y)
        self.log("val/acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def pairs(count=2 * ROWS):
    x = torch.randn(count, 4, generator=generator())
    return [(one, n % 3) for n, one in enumerate(x)]


def fit(module, batches, quiet_trainer, **kwargs):
    loader = batches if isinstance(batches, DataLoader | CombinedLoader) else DataLoader(batches, ROWS)
    trainer = quiet_trainer(**kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
    return trainer


def by_hand(module, teacher, batches, losses, lr=0.1):
    """SGD in float64 on ``(1 - w) * hard + w * soft``; ``losses`` gives both. Returns the state after it."""
    module, teacher = copy.deepcopy(module).double(), copy.deepcopy(teacher).double().eval()
    optimizer = torch.optim.SGD(module.parameters(), lr)
    for batch in batches:
        hard, soft = losses(module, teacher, batch)
        optimizer.zero_grad()
        ((1 - W) * hard + W * soft).backward()
        optimizer.step()
    return module.state_dict()


def assert_same(module, expected, tolerance=1e-6):
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance)


def test_pairs_as_by_hand(quiet_trainer):
    module, teacher = Classifier(), network(width=9, seed=1)

    def losses(module, teacher, batch):
        x, y = batch
        logits = module.net(x.double())
        return F.cross_entropy(logits, y), kd(logits, teacher(x.double()).detach())

    expected = by_hand(module, teacher, DataLoader(pairs(), ROWS), losses)
    taught = teach(module, teacher, soft_weight=W)
    assert taught is module
    assert type(taught) is Classifier
    trainer = fit(taught, pairs(), quiet_trainer)
    assert_same(module, expected)
    assert {"train_loss", "teach/hard", "teach/soft"} <= trainer.callback_metrics.keys()


def test_the_teacher_is_no_part_of_the_module(quiet_trainer, tmp_path):
    module = teach(Classifier(), network(width=9, seed=1))
    keys = Classifier().state_dict().keys()
    assert module.state_dict().keys() == keys
    assert {*module.net.parameters()} == {*module.parameters()}
    saver = ModelCheckpoint(tmp_path)
    fit(module, pairs(), quiet_trainer, enable_checkpointing=True, callbacks=[saver])
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["state_dict"].keys() == keys
    alone = Classifier.load_from_checkpoint(saver.best_model_path)
    assert_same(alone, module.state_dict(), 0)


def test_a_weight_of_0_is_the_module_alone_and_validation_is_its_own(quiet_trainer):
    alone, module = Classifier(), Classifier()
    loader = DataLoader(pairs(), ROWS)
    quiet_trainer().fit(alone, loader, loader)
    taught = teach(module, network(seed=1), soft_weight=0.0)
    trainer = quiet_trainer()
    trainer.fit(taught, loader, loader)
    assert_same(module, alone.state_dict(), 0)
    assert "val/acc" in trainer.callback_metrics


def test_annealing(quiet_trainer):
    module = teach(Classifier(), network(seed=1))
    trainer = fit(module, pairs(), quiet_trainer, max_epochs=3, callbacks=[SoftWeightAnnealing(1.0, 0.0)])
    assert module.soft_weight == 0.0
    assert trainer.callback_metrics["soft_weight"] == 0.0


# The kinds of modules that projects have. Each is taught in one line.


class Tokens(LightningModule):
    """A network of Hugging Face: the batch is what its tokenizer and collator return."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def hugging_face(kind, width, seed, **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    name = "GPT2" if kind == "CausalLM" else "Bert"
    size = (
        {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 16}
        if name == "GPT2"
        else {
            "hidden_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 2 * width,
            "max_position_embeddings": 16,
        }
    )
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    dropout |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    settings = getattr(transformers, f"{name}Config")(vocab_size=20, **size, **dropout, **config)
    classes = {"CausalLM": "GPT2LMHeadModel", "Sequence": "BertForSequenceClassification"}
    return getattr(transformers, classes.get(kind, "BertForTokenClassification"))(settings)


def texts(labels):
    """Samples as a tokenizer returns them: padded, with a mask."""
    samples = []
    for n in range(ROWS):
        length = 3 + n % 4
        ids = torch.randint(1, 20, (8,), generator=generator(n)) * (torch.arange(8) < length)
        samples.append(
            {"input_ids": ids, "attention_mask": (torch.arange(8) < length).long(), "labels": labels(n, ids)}
        )
    return samples


@pytest.mark.parametrize("kind", ["Sequence", "Token", "CausalLM"])
def test_hugging_face(kind, quiet_trainer):
    labels = {
        "Sequence": lambda n, ids: n % 3,
        "Token": lambda n, ids: torch.where(ids > 0, ids % 3, -100),
        "CausalLM": lambda n, ids: torch.where(ids > 0, ids, -100),
    }[kind]
    count = {} if kind == "CausalLM" else {"num_labels": 3}
    student, teacher = hugging_face(kind, 8, 0, **count), hugging_face(kind, 16, 1, **count)
    module = Tokens(student)
    mask = None if kind == "Sequence" else "attention_mask"

    def losses(module, teacher, batch):
        output, target = module.model(**batch), teacher(**batch).logits.detach()
        rows = slice(None) if mask is None else batch["attention_mask"] == 1
        return output.loss, kd(output.logits[rows], target[rows])

    loader = DataLoader(texts(labels), ROWS)
    expected = by_hand(module, teacher, loader, losses)
    dense = {} if mask is None else {"class_dim": -1, "mask": mask}
    taught = teach(module, teacher, "model", soft_weight=W, **dense)
    fit(taught, loader, quiet_trainer)
    assert_same(module, expected, 1e-4)


class Segmentation(LightningModule):
    """As torchgeo's: batches are dicts of image, mask and more, and the network is ``model``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch["image"]), batch["mask"], ignore_index=255)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fields():
    return [
        {
            "image": torch.randn(2, 6, 6, generator=generator(n)),
            "mask": torch.randint(0, 3, (6, 6), generator=generator(n)),
            "bounds": "somewhere",
        }
        for n in range(ROWS)
    ]


def test_segmentation(quiet_trainer):
    torch.manual_seed(0)
    module, teacher = Segmentation(nn.Conv2d(2, 3, 3, padding=1)), nn.Conv2d(2, 3, 5, padding=2)

    def losses(module, teacher, batch):
        x, y = batch["image"].double(), batch["mask"]
        logits = module.model(x)
        s, t = (z.permute(0, 2, 3, 1).reshape(-1, 3) for z in (logits, teacher(x).detach()))
        return F.cross_entropy(logits, y), kd(s, t)

    expected = by_hand(module, teacher, DataLoader(fields(), ROWS), losses)
    taught = teach(module, teacher, "model", soft_weight=W, class_dim=1)
    fit(taught, fields(), quiet_trainer)
    assert_same(module, expected)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network(1)

    def training_step(self, batch, batch_idx):
        return {"loss": F.mse_loss(self.net(batch["x"]).squeeze(1), batch["value"]), "more": 1}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_regression_with_a_dict_of_outputs(quiet_trainer):
    module, teacher = Regression(), network(1, 9, 1)
    samples = [{"x": x, "value": float(n)} for n, (x, _) in enumerate(pairs())]

    def losses(module, teacher, batch):
        x = batch["x"].double()
        found = module.net(x)
        return F.mse_loss(found.squeeze(1), batch["value"].double()), F.mse_loss(found, teacher(x).detach())

    expected = by_hand(module, teacher, DataLoader(samples, ROWS), losses)
    fit(teach(module, teacher, soft_loss=nn.MSELoss(), soft_weight=W), samples, quiet_trainer)
    assert_same(module, expected)


class Scores(nn.Module):
    """Returns its logits beside a feature, under a name of its own."""

    def __init__(self, width=5, seed=0):
        super().__init__()
        self.layers = network(width=width, seed=seed)

    def forward(self, x):
        return {"feature": self.layers[0](x), "scores": self.layers(x)}


class WithScores(Classifier):
    def __init__(self):
        super().__init__(Scores())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x)["scores"], y)


def test_a_dict_of_outputs_with_other_names(quiet_trainer):
    module, teacher = WithScores(), Scores(9, 1)
    with pytest.raises(InputError, match=r"the teacher must return logits: .*; teach\(output=\.\.\.\) names the part"):
        fit(teach(WithScores(), teacher), pairs(), quiet_trainer)
    with pytest.raises(InputError, match=r"the network must return logits: .*; teach\(output=\.\.\.\) names the part"):
        fit(teach(WithScores(), network(seed=1)), pairs(), quiet_trainer)

    def losses(module, teacher, batch):
        x, y = batch[0].double(), batch[1]
        logits = module.net(x)["scores"]
        return F.cross_entropy(logits, y), kd(logits, teacher(x)["scores"].detach())

    expected = by_hand(module, teacher, DataLoader(pairs(), ROWS), losses)
    fit(teach(module, teacher, output="scores", soft_weight=W), pairs(), quiet_trainer)
    assert_same(module, expected)


class TwoLoaders(Classifier):
    """Labeled and unlabeled batches in one step, with two calls of the network."""

    def training_step(self, batch, batch_idx):
        (x, y), (more, _) = batch["labeled"], batch["unlabeled"]
        return F.cross_entropy(self.net(x), y) + 0 * self.net(more).sum()


def test_two_data_loaders_and_two_calls(quiet_trainer):
    module, teacher = TwoLoaders(), network(width=9, seed=1)
    loaders = {"labeled": DataLoader(pairs(4), 4), "unlabeled": DataLoader(pairs(6), 6)}

    def losses(module, teacher, batch):
        (x, y), (more, _) = ([part[0].double(), part[1]] for part in batch)
        every = torch.cat([x, more])  # each row counts the same
        return F.cross_entropy(module.net(x), y), kd(module.net(every), teacher(every).detach())

    expected = by_hand(module, teacher, [[next(iter(loader)) for loader in loaders.values()]], losses)
    fit(teach(module, teacher, soft_weight=W), CombinedLoader(loaders, "max_size"), quiet_trainer)
    assert_same(module, expected)


def test_bf16_mixed(quiet_trainer):
    full, module = Classifier(), Classifier()
    fit(teach(full, network(width=9, seed=1)), pairs(), quiet_trainer)
    fit(teach(module, network(width=9, seed=1)), pairs(), quiet_trainer, precision="bf16-mixed")
    assert_same(module, full.state_dict(), 1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(module.parameters(), full.parameters(), strict=True))


class Manual(LightningModule):
    """Manual optimisation of two networks; the loss of the second does not depend on the first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = network(), network(seed=2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        for optimizer, part in ((first, self.net), (second, self.other)):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(part(x), y))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net, self.other)]


def test_manual_optimisation(quiet_trainer):
    module, teacher = Manual(), network(width=9, seed=1)
    module_before = copy.deepcopy(module)

    def losses(module, teacher, batch):
        x, y = batch[0].double(), batch[1]
        logits = module.net(x)
        # the second network learns alone: its gradient must not be scaled by 1 - w
        return F.cross_entropy(logits, y) + F.cross_entropy(module.other(x), y) / (1 - W), kd(
            logits, teacher(x).detach()
        )

    expected = by_hand(module_before, teacher, DataLoader(pairs(), ROWS), losses)
    fit(teach(module, teacher, soft_weight=W), pairs(), quiet_trainer)
    assert_same(module, expected)


def test_manual_optimisation_with_a_part_of_the_output(quiet_trainer):
    modules = [Manual(), Manual()]
    for module, output in zip(modules, (None, lambda output: output[:, [0, 1, 2]]), strict=True):
        fit(teach(module, network(width=9, seed=1), output=output), pairs(), quiet_trainer)
    assert_same(modules[1], modules[0].state_dict(), 0)


class Alternating(Manual):
    """As a GAN: the network is called without a gradient of its own in every other step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        if batch_idx % 2:
            self.net(x)  # this loss does not depend on it
            self.manual_backward(F.cross_entropy(self.other(x), y))
            second.step()
        else:
            self.manual_backward(F.cross_entropy(self.net(x), y))
            first.step()


def test_steps_that_do_not_train_the_network(quiet_trainer):
    taught, alone = Alternating(), Alternating()
    fit(alone, pairs(), quiet_trainer)
    trainer = fit(teach(taught, network(width=9, seed=1), soft_weight=W), pairs(), quiet_trainer)
    assert "teach/soft" in trainer.callback_metrics
    by_name = dict(alone.named_parameters())
    changed = {name.split(".")[0] for name, p in taught.named_parameters() if not torch.equal(p, by_name[name])}
    assert changed == {"net"}  # the other network's loss stays its own


class Late(Classifier):
    """Builds its network when the fit begins."""

    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = network()


def test_a_network_that_is_built_late(quiet_trainer):
    early, late = Classifier(), Late()
    for module in (early, late):
        fit(teach(module, network(width=9, seed=1)), pairs(), quiet_trainer)
    assert_same(late, early.state_dict(), 0)


class Itself(Classifier):
    """Calls itself."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_the_module_itself(quiet_trainer):
    by_net, itself = Itself(), Itself()
    for module, path in ((by_net, "net"), (itself, "")):
        fit(teach(module, network(width=9, seed=1), path, soft_weight=W), pairs(), quiet_trainer)
    assert_same(itself, by_net.state_dict(), 0)


# Batches without labels.


class Unlabeled(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        if self.how == "raises" and (y < 0).any():
            raise KeyError("labels")
        if self.how == "none" and (y < 0).any():
            return None
        return F.cross_entropy(logits, y)  # NaN if all are -100


@pytest.mark.parametrize("how", ["nan", "raises", "none"])
def test_batches_without_labels(how, quiet_trainer):
    module, teacher = Unlabeled(), network(width=9, seed=1)
    module.how = how
    samples = [(x, y if n < ROWS else -100) for n, (x, y) in enumerate(pairs())]

    def losses(module, teacher, batch):
        x, y = batch[0].double(), batch[1]
        logits = module.net(x)
        hard = F.cross_entropy(logits, y) if (y >= 0).all() else 0 * logits.sum()
        return hard, kd(logits, teacher(x).detach())

    expected = by_hand(module, teacher, DataLoader(samples, ROWS), losses)
    trainer = fit(teach(module, teacher, soft_weight=W, unlabeled=True), samples, quiet_trainer)
    assert_same(module, expected)
    assert trainer.callback_metrics["teach/unlabeled"] == 0.5


def test_a_warning_if_no_batch_has_a_hard_loss(quiet_trainer):
    module = Unlabeled()
    module.how = "raises"
    trainer = quiet_trainer()
    with pytest.warns(UserWarning, match="no batch of this epoch had a hard loss"):
        trainer.fit(teach(module, network(seed=1), unlabeled=True), DataLoader([(x, -100) for x, _ in pairs()], ROWS))
    assert trainer.callback_metrics["teach/unlabeled"] == 1.0


def test_no_warning_if_another_process_has_a_hard_loss(quiet_trainer, monkeypatch):
    """The counts are those of all processes: steps, soft losses, hard losses, rows."""
    monkeypatch.setattr(teaching_steps, "sum_over_ranks", lambda counts: counts + torch.tensor([1, 1, 1, 1]))
    module = Unlabeled()
    module.how = "raises"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "teach: no batch")
        quiet_trainer().fit(
            teach(module, network(seed=1), unlabeled=True), DataLoader([(x, -100) for x, _ in pairs()], ROWS)
        )


@pytest.mark.parametrize("mixed", [True, False])
def test_a_warning_if_labels_are_lost(mixed, quiet_trainer):
    """A step that fails on a batch with rows of both kinds loses the labels of the others."""
    module = Unlabeled()
    module.how = "raises"
    samples = [(x, y if n < ROWS or (mixed and n == ROWS) else -100) for n, (x, y) in enumerate(pairs())]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        quiet_trainer().fit(teach(module, network(seed=1), unlabeled=True), DataLoader(samples, ROWS))
    lost = [str(one.message) for one in found if "labels, but no hard loss" in str(one.message)]
    assert len(lost) == mixed
    assert not mixed or f"a batch of {ROWS} rows has 1 labels, but no hard loss (KeyError: 'labels')" in lost[0]


def test_an_error_of_the_step_is_no_missing_label_unless_asked(quiet_trainer):
    module = Unlabeled()
    module.how = "raises"
    with pytest.raises(KeyError):
        fit(teach(module, network(seed=1)), [(x, -100) for x, _ in pairs()], quiet_trainer)


# What is wrong is said.


class NeverCalled(Classifier):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net(batch[0])
        return sum(p.sum() for p in self.parameters())


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x).detach()


class WithHead(Classifier):
    def __init__(self):
        super().__init__(Detached())
        self.head = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])


class OwnBackward(Manual):
    def training_step(self, batch, batch_idx):
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        self.optimizers()[0].step()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (NeverCalled, {}, "training_step never called net with a gradient"),
        (WithHead, {}, "outputs of net have no gradient"),
        (OwnBackward, {}, "no manual_backward of this epoch had a loss that depends on net"),
        (Classifier, {"network": "nat"}, "network: layer 'nat': Classifier has none of that name; nearest: net"),
        (Classifier, {"teacher": network(4)}, r"outputs of one shape, got \[6, 4\] from the teacher and \[6, 3\]"),
        (Classifier, {"mask": "attention_mask"}, "mask: the batch has no 'attention_mask'"),
        (Classifier, {"mask": lambda batch: torch.ones(5)}, "mask must be boolean"),
        (Classifier, {"mask": lambda batch: torch.ones(5) > 0}, r"shape of the positions, \[6, 3\], got \[5\]"),
        (Classifier, {"class_dim": 0}, "class_dim must be a dimension of the outputs after the first, got 0"),
        (Classifier, {"output": "logits", "teacher": Classifier()}, "output"),
        (Classifier, {"soft_loss": KDLoss(reduction="none")}, "its reduction must be mean"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refuses_in_training(module, arguments, message, quiet_trainer):
    if "output" in arguments:
        arguments = {"output": lambda output: "no tensor"}
        message = "output must pick a tensor, got str"
    taught = teach(module(), **({"teacher": network(seed=1)} | arguments))
    with pytest.raises(InputError, match=message):
        fit(taught, pairs(), quiet_trainer)


def test_dense_outputs_need_the_dimension_of_classes(quiet_trainer):
    module = teach(Segmentation(nn.Conv2d(2, 3, 1)), nn.Conv2d(2, 3, 1), "model")
    with pytest.raises(InputError, match="class_dim must be set"):
        fit(module, fields(), quiet_trainer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"soft_weight": 1.5}, "soft_weight must lie in"),
        ({"mask": "key_padding_mask"}, "seems to name padding"),
        ({"teacher": Teacher(network(), classes=[0, 2, 3])}, r"does not know the classes \[1\]"),
        ({"module": network()}, "module must be a LightningModule, got Sequential"),
    ],
)
def test_refuses_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        teach(**({"module": Classifier(), "teacher": network()} | arguments))


def test_shared_parameters_and_a_second_teacher_are_refused():
    module = Classifier()
    with pytest.raises(InputError, match="must be two networks"):
        teach(module, module.net)
    taught = teach(Classifier(), network(seed=1))
    with pytest.raises(InputError, match="has a teacher already"):
        teach(taught, network(seed=1))


def test_resumes_with_the_same_teacher_alone(quiet_trainer, tmp_path):
    whole, part = Classifier(), Classifier()
    fit(teach(whole, network(width=9, seed=1)), pairs(), quiet_trainer, max_epochs=2)
    saver = ModelCheckpoint(tmp_path)
    fit(teach(part, network(width=9, seed=1)), pairs(), quiet_trainer, enable_checkpointing=True, callbacks=[saver])
    path = saver.best_model_path
    resumed = teach(Classifier(), network(width=9, seed=1))
    quiet_trainer(max_epochs=2).fit(resumed, DataLoader(pairs(), ROWS), ckpt_path=path)
    assert_same(resumed, whole.state_dict(), 0)
    other = teach(Classifier(), network(width=9, seed=2))
    with pytest.raises(InputError, match="the checkpoint was trained with another teacher"):
        quiet_trainer(max_epochs=2).fit(other, DataLoader(pairs(), ROWS), ckpt_path=path)


class InPlace(nn.Module):
    """Changes its inputs in place, as a network that begins with nn.ReLU(inplace=True)."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = network(seed=seed)

    def forward(self, x):
        return self.net(x.mul_(2))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_network_that_changes_its_inputs_in_place(who, quiet_trainer):
    module = Classifier(InPlace() if who == "student" else network())
    teacher = InPlace(1) if who == "teacher" else network(seed=1)

    def losses(module, teacher, batch):
        x, y = batch[0].double(), batch[1]
        logits = module.net(x.clone())
        return F.cross_entropy(logits, y), kd(logits, teacher(x.clone()).detach())

    expected = by_hand(module, teacher, DataLoader(pairs(), ROWS), losses)
    fit(teach(module, teacher, soft_weight=W), pairs(), quiet_trainer)
    assert_same(module, expected)


def test_copies_are_modules_of_their_own(quiet_trainer):
    module = teach(Classifier(), network(width=9, seed=1))
    copied = copy.deepcopy(module)
    before = copy.deepcopy(module.state_dict())
    fit(copied, pairs(), quiet_trainer)
    assert_same(module, before, 0)
    fit(module, pairs(), quiet_trainer)
    assert_same(copied, module.state_dict(), 0)


def test_a_compiled_module(quiet_trainer):
    plain, module = Classifier(), Classifier()
    fit(teach(plain, network(width=9, seed=1)), pairs(), quiet_trainer)
    fit(torch.compile(teach(module, network(width=9, seed=1)), backend="eager"), pairs(), quiet_trainer)
    assert_same(module, plain.state_dict(), 0)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing(how, quiet_trainer):
    class Checkpointed(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(checkpoint(self.net, x.requires_grad_(), use_reentrant=how == "reentrant"), y)

    plain, module = Classifier(), Checkpointed()
    fit(teach(plain, network(width=9, seed=1)), pairs(), quiet_trainer)
    if how == "reentrant":
        with pytest.raises(InputError, match="never called net with a gradient"):
            fit(teach(module, network(width=9, seed=1)), pairs(), quiet_trainer)
        return
    fit(teach(module, network(width=9, seed=1)), pairs(), quiet_trainer)
    assert_same(module, plain.state_dict(), 0)


@pytest.mark.parametrize("how", ["in place", "wrapper"])
def test_compiled_networks(how, quiet_trainer):
    plain, module = Classifier(), Classifier()
    fit(teach(plain, network(width=9, seed=1)), pairs(), quiet_trainer)
    if how == "in place":
        module.net.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    fit(teach(module, network(width=9, seed=1)), pairs(), quiet_trainer)
    state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_modules_of_pytorch_lightning(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Mirror(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        training_step = Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    module, ours = Mirror(), Classifier()
    loader = DataLoader(pairs(), ROWS)
    for one, trainer in ((module, pl.Trainer), (ours, Trainer)):
        teach(one, network(width=9, seed=1))
        trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[SoftWeightAnnealing(1.0, 0.0)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(one, loader)
    assert module.soft_weight == 0.0
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), ours.parameters(), strict=True))


# With our own data, and on two processes.


def samples():
    x = torch.randn(24, 4, generator=generator(9))
    parts = TensorDataset(x[:16], torch.arange(16) % 3), TensorDataset(x[16:], torch.arange(8) % 3)
    return SemiSupervisedDataModule(
        DatasetSource(*parts), train_transform=nn.Identity(), batch_size=4, val_size=0, num_views=2, seed=1
    )


def test_a_cached_teacher_and_batches_of_our_datamodule(quiet_trainer, tmp_path):
    weights, computed = [], []
    for cache in (None, tmp_path / "cache"):
        counting = network(width=9, seed=1)
        counting.register_forward_hook(lambda *_: computed.append(1))
        module = teach(Classifier(), Teacher(counting, cache=cache, cache_dtype="float32"), soft_weight=W)
        computed.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(max_epochs=4).fit(module, samples())
        weights.append(module.state_dict())
        if cache is None:
            assert len(computed) == 16
    assert_same(module, weights[0])  # to rounding, since the place of a row in the batch counts in a linear layer
    assert len(computed) < 16 + 3  # each view once, and a sample for checks


class Named(Classifier):
    """Calls its network with a mapping, as our datamodule gives it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(**x), y)


class Sum(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.layers = network(seed=seed)

    def forward(self, a, b):
        return self.layers(a + b)


def test_a_cached_teacher_of_mappings(quiet_trainer, tmp_path):
    x = torch.randn(16, 4, generator=generator(9))
    items = [({"a": one, "b": 2 * one}, n % 3) for n, one in enumerate(x)]
    data = SemiSupervisedDataModule(DatasetSource(items, items[:4]), batch_size=4, val_size=0, num_views=1, seed=1)
    computed, teacher = [], Sum(1)
    teacher.register_forward_hook(lambda *_: computed.append(1))
    module = teach(Named(Sum()), Teacher(teacher, cache=tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(max_epochs=4).fit(module, data)
    assert len(computed) < 4 + 3  # each view once, and a sample for checks


_SCRIPT = """
import json, sys, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader
from lightning.pytorch import LightningModule, Trainer
from kd_lightning import teach

warnings.simplefilter("ignore")
processes = int(sys.argv[1])


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return self.net(batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def samples():
    x = torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(1))
    # a batch holds all samples, since Lightning shuffles those of several processes; their masks differ
    return [{"x": one, "mask": torch.arange(5) < (5 if n < 4 else 1)} for n, one in enumerate(x)]


torch.manual_seed(1)
module = teach(Module(), nn.Linear(4, 3), soft_weight=1.0, class_dim=-1, mask="mask")
trainer = Trainer(
    accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=4, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, DataLoader(samples(), 16 // processes))
with open(f"{trainer.global_rank}_of_{processes}.json", "w") as file:
    json.dump([p.tolist() for p in module.parameters()], file)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(_SCRIPT)
    for world in (1, 2):
        processes.run_ranks(["train.py", str(world)], world=world)
    one, first, second = (json.loads(Path(f"{name}.json").read_text()) for name in ("0_of_1", "0_of_2", "1_of_2"))
    assert first == second
    for expected, found in zip(one, first, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_loss_that_needs_all_logits_is_refused_with_a_cache_of_few(tmp_path):
    few = Teacher(network(), cache=tmp_path, cache_top_k=2)
    teach(Classifier(), few, soft_loss=KDLoss())
    with pytest.raises(InputError, match="soft_loss: .* needs all logits, but a teacher's cache_top_k"):
        teach(Classifier(), few, soft_loss=nn.MSELoss())
