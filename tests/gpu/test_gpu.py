"""Training on a GPU: precisions, devices, caches, synchronization, memory format, compilation, quantisation."""

import dataclasses
import importlib.util
import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from kd_lightning import (
    ApprenticeModule,
    Batch,
    CompileNetworks,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.losses import DISTLoss, DKDLoss, GeneralizedCrossEntropyLoss, MLKDLoss, RLDLoss, WTTMLoss
from kd_lightning.models import DigitsCNN

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
gentle = partial(torch.optim.SGD, lr=0.0005)  # hints are sums over all entries of a map


def net(seed, width=8):
    torch.manual_seed(seed)
    return DigitsCNN(width)


def weights(module):
    """The student's weights, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.student.state_dict().items()}


def largest_difference(one, other):
    """Largest difference of two states' floating-point values, over the largest value of each tensor."""
    floats = [name for name, value in one.items() if value.is_floating_point()]
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-3)) for n in floats)


def assert_finite(module, trainer):
    assert all(value.isfinite().all() for value in weights(module).values())
    assert all(value.isfinite() for name, value in trainer.callback_metrics.items() if name.startswith("train/"))


class Stages(Callback):
    """Records the student's weights, the stage and the scale of the gradients after each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *args):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else None
        self.steps.append((module.distilling, scale, weights(module)))


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}], ids=str)
def test_gradient_scaler_over_the_switch_of_hint_stages(fit, device, options):
    """The scaler outlives the first stage's optimiser, and both stages train what they should."""
    module = HintModule(net(0), net(1), {"5": "5"}, 1, optimizer=sgd, hint_optimizer=gentle)
    before, stages = weights(module), Stages()
    trainer = fit(module, stages, precision="16-mixed", limit_train_batches=12, **options)
    assert_finite(module, trainer)
    assert [distilling for distilling, *_ in stages.steps] == [False] * 12 + [True] * 12
    first, last = stages.steps[11][2], stages.steps[-1][2]
    body, head = "0.weight", [name for name in before if name.endswith("weight")][-1]
    assert not torch.equal(first[body], before[body])
    assert torch.equal(first[head], before[head])  # nothing above the guided layer trains in stage 1
    assert not torch.equal(last[head], first[head])
    if device == "cuda":
        scales = [scale for _, scale, _ in stages.steps]
        assert all(scale is not None and scale > 0 for scale in scales)
        assert scales[12] <= scales[11]  # goes on from there, and does not start again


@pytest.mark.parametrize(
    "make",
    [
        lambda: DistillModule(net(0), net(1), optimizer=sgd),
        lambda: EnsembleDistillModule(net(0), [net(1), net(2)], optimizer=sgd),
        lambda: HintModule(net(0), net(1), {"5": "5"}, 1, optimizer=sgd, hint_optimizer=gentle),
        lambda: ApprenticeModule(net(0), net(1), "joint", optimizer=sgd),
    ],
    ids=["distill", "ensemble", "hints", "apprentice"],
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_low_precision_stays_close(fit, make, precision, device):
    losses = []
    lower = {"precision": precision}
    if precision == "16-mixed" and device == "cuda":  # so small a scale that no step is left out
        lower = {"plugins": [MixedPrecision(precision, device, torch.amp.GradScaler(device, init_scale=64.0))]}
    for options in ({}, lower):
        module = make()
        trainer = fit(module, **options)
        assert_finite(module, trainer)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_teacher_on_the_cpu(fit, device):
    """Its logits come to the student's device; the student learns the same."""
    ends = []
    for place in (None, "cpu"):
        teacher = Teacher(net(1), device=place)
        module = DistillModule(net(0), teacher, soft_weight=0.9, optimizer=sgd)
        trainer = fit(module)
        if place == "cpu":
            assert {parameter.device.type for parameter in teacher.network.parameters()} == {"cpu"}
            x = torch.rand(3, 1, 8, 8, device=device)
            assert teacher(Batch(x)).device.type == device
        assert_finite(module, trainer)
        ends.append(weights(module))
    assert largest_difference(*ends) < 0.01
    other = DistillModule(net(0), net(2), soft_weight=0.9, optimizer=sgd)
    fit(other)
    assert largest_difference(ends[0], weights(other)) > 0.01  # the comparison can fail


def test_a_teacher_on_the_gpu_of_a_student_on_the_cpu(fit, device):
    ends = []
    for place in (None, device):
        teacher = Teacher(net(1), device=place)
        module = DistillModule(net(0), teacher, soft_weight=0.9, optimizer=sgd)
        fit(module, accelerator="cpu")
        if place is not None:
            assert {parameter.device.type for parameter in teacher.network.parameters()} == {device}
            assert teacher(Batch(torch.rand(3, 1, 8, 8))).device.type == "cpu"
        ends.append(weights(module))
    assert largest_difference(*ends) < 0.01


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_cached_outputs_equal_live_ones(fit, tmp_path, precision):
    """To rounding: a GPU may sum the rows of other batch sizes in another order."""

    def train(teacher):
        data = SemiSupervisedDataModule(Digits(), labeled=20, batch_size=64, num_views=2)
        module = DistillModule(net(0), teacher, soft_weight=0.9, optimizer=sgd)
        fit(module, data=data, precision=precision)
        return weights(module)

    live = train(Teacher(net(1)))
    filled = train(Teacher(net(1), cache=tmp_path / "cache", cache_dtype="float32"))
    assert list((tmp_path / "cache").iterdir())
    read = train(Teacher(net(1), cache=tmp_path / "cache", cache_dtype="float32"))
    assert all(torch.equal(filled[name], read[name]) for name in filled)
    near = 0.01 if precision == "32-true" else 0.1
    assert largest_difference(live, filled) < near
    assert largest_difference(live, train(Teacher(net(2)))) > near  # the comparison can fail


STEPS = {
    "supervised": lambda: SupervisedModule(net(0)),
    "robust": lambda: SupervisedModule(net(0), hard_loss=GeneralizedCrossEntropyLoss()),
    "distill": lambda: DistillModule(net(0), net(1)),
    "DKD": lambda: DistillModule(net(0), net(1), soft_loss=DKDLoss()),
    "DIST": lambda: DistillModule(net(0), net(1), soft_loss=DISTLoss()),
    "RLD": lambda: DistillModule(net(0), net(1), soft_loss=RLDLoss()),
    "WTTM": lambda: DistillModule(net(0), net(1), soft_loss=WTTMLoss()),
    "MLKD": lambda: DistillModule(net(0), net(1), soft_loss=MLKDLoss()),
    "ensemble": lambda: EnsembleDistillModule(net(0), [net(1), net(2)]),
    "confidence": lambda: EnsembleDistillModule(net(0), [net(1), net(2)], teacher_weights="confidence"),
    "apprentice": lambda: ApprenticeModule(net(0), net(1), "joint", mutual=True),
    "hints": lambda: HintModule(net(0), net(1), {"5": "5"}, 1, input_shape=[1, 8, 8]),
    "joint hints": lambda: HintModule(net(0), net(1), {"5": "5"}, 0, hint_weight=0.1, input_shape=[1, 8, 8]),
}


def moved(batch, device):
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in tensors.items()})


@pytest.fixture
def no_synchronization(device):
    """Calls a function in which waiting for the GPU is an error."""

    def call(function):
        if device != "cuda":
            return function()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labeled", [None, 10])
@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_no_step_synchronizes(make, labeled, dtype, device, no_synchronization, monkeypatch):
    """Forward pass, loss, backward pass and optimiser; float16 needs a gradient scaler, which must synchronize."""
    module = make().to(device).train()
    monkeypatch.setattr(type(module), "_may_synchronize", lambda self, x: False)  # a step without logging
    data = SemiSupervisedDataModule(Digits(), labeled=labeled, batch_size=64)
    data.setup("fit")
    batches = [moved(batch, device) for batch, _ in zip(data.train_dataloader(), range(3), strict=False)]
    optimizer = sgd([parameter for parameter in module.parameters() if parameter.requires_grad])

    def step(batch):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step(batches[0])  # the first one may load libraries
    losses = [no_synchronization(lambda batch=batch: step(batch)) for batch in batches[1:]]
    assert all(loss.isfinite() for loss in losses)


class Forbid(Callback):
    """Makes waiting for the GPU an error while a step runs; not in the first ones, nor in the last, which logs."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if 2 <= batch_idx < 5:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, *args):
        if torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("default")
            self.steps += 1

    def on_exception(self, trainer, module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("cached", [False, True])
def test_no_step_of_a_trainer_synchronizes(fit, device, tmp_path, precision, cached):
    """The same under Lightning, with the datamodule, and with cached outputs."""
    teacher = Teacher(net(1), cache=tmp_path / "cache" if cached else None)
    module = DistillModule(net(0), teacher, optimizer=sgd)
    data = SemiSupervisedDataModule(Digits(), labeled=20, batch_size=64, num_views=2)
    callbacks = [Forbid()] if device == "cuda" else []
    fit(module, *callbacks, data=data, precision=precision, limit_val_batches=0, log_every_n_steps=1000)
    assert all(callback.steps == 6 for callback in callbacks)


def test_a_step_that_synchronizes_is_found(device, no_synchronization):
    if device != "cuda":
        return
    with pytest.raises(RuntimeError, match="synchronizing"):
        no_synchronization(lambda: torch.ones(1, device=device).item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_channels_last(fit, precision):
    """Weights of all convolutions lie so, and the student learns the same to rounding."""
    ends = []
    for callbacks in ([], [CompileNetworks(backend=None, channels_last=True)]):
        module = DistillModule(net(0), net(1), soft_weight=0.9, optimizer=sgd)
        fit(module, *callbacks, precision=precision)
        ends.append(weights(module))
    for network in (module.student, module.teacher.network):
        assert network[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert largest_difference(*ends) < (0.01 if precision == "32-true" else 0.2)


def missing_compiler(device):
    """Name of what torch.compile needs and does not find; None if it finds all."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "a C compiler"
    return "triton" if device == "cuda" and importlib.util.find_spec("triton") is None else None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compile(fit, device, precision):
    if missing := missing_compiler(device):
        pytest.skip(f"torch.compile needs {missing}")
    losses = []
    for callbacks in ([], [CompileNetworks()]):
        module = DistillModule(net(0), net(1), soft_weight=0.9, optimizer=sgd)
        trainer = fit(module, *callbacks, precision=precision, limit_val_batches=0)
        assert_finite(module, trainer)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("bits", [8, "ternary"])
def test_quantized_students(fit, device, bits, precision):
    """They train on the device, and a copy on the CPU predicts the same."""
    pytest.importorskip("brevitas", reason="quantised students need brevitas")
    from kd_lightning.quantization import quantize

    module = ApprenticeModule(quantize(net(0), bits), net(1), "fixed_teacher", optimizer=sgd)
    trainer = fit(module, precision=precision)
    assert_finite(module, trainer)
    student = module.student.to(device).eval()
    x = torch.rand(256, 1, 8, 8)
    with torch.no_grad():
        here, there = deepcopy(student).cpu()(x).argmax(dim=1), student(x.to(device)).argmax(dim=1).cpu()
    assert float((here == there).float().mean()) > 0.97  # a rounding may decide a level of an activation
