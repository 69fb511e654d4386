import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import nn

from kd_lightning import (
    ApprenticeModule,
    CompileNetworks,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    Teacher,
)
from kd_lightning.callbacks.compile_networks import find_networks
from kd_lightning.models import DigitsCNN


@pytest.fixture
def fitted(quiet_trainer, loader):
    def fit(module, *callbacks):
        seed_everything(0, verbose=False)
        quiet_trainer(max_epochs=2, callbacks=[*callbacks]).fit(module, loader())
        return module.student.state_dict()

    return fit


def nets(count=3):
    torch.manual_seed(0)
    return [DigitsCNN(4) for _ in range(count)]


def distill(nets):
    return DistillModule(nets[0], nets[1])


def test_all_networks_are_compiled_while_fitting(fitted):
    class Seen(CompileNetworks):
        def on_train_batch_end(self, trainer, module, *args):
            self.compiled = [network._compiled_call_impl is not None for network in find_networks(module)]

    module = EnsembleDistillModule(nets()[0], nets()[1:])
    seen = Seen(backend="eager")
    names = set(module.state_dict())
    fitted(module, seen)
    assert seen.compiled == [True] * 3
    assert [network._compiled_call_impl for network in find_networks(module)] == [None] * 3
    assert set(module.state_dict()) == names


def test_a_fault_leaves_no_network_compiled(fitted):
    class Fault(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            raise RuntimeError("fault")

    module = distill(nets())
    with pytest.raises(RuntimeError, match="fault"):
        fitted(module, CompileNetworks(backend="eager"), Fault())
    assert [network._compiled_call_impl for network in find_networks(module)] == [None] * 2


def test_the_same_training(fitted):
    expected = fitted(distill(nets()))
    for backend in ("eager", None):
        found = fitted(distill(nets()), CompileNetworks(backend=backend))
        for name, value in expected.items():
            assert torch.equal(value, found[name])


def test_channels_last(fitted):
    expected = fitted(distill(nets()))
    module = distill(nets())
    found = fitted(module, CompileNetworks(backend=None, channels_last=True))
    for network in find_networks(module):
        assert network[3].weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture
def graphs():
    """For each compiled graph, whether it serves batches of any size."""
    found = []

    def record(graph, inputs):
        found.append(any(isinstance(x, int | torch.SymInt) for x in inputs))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(record, "record")
    yield found
    torch._dynamo.backends.registry._COMPILER_FNS.pop("record")


def test_each_shape_has_code_of_its_own(graphs, quiet_trainer, loader):
    """Code for any size would serve the shapes that come later; then results depend on which shape came first."""
    limit = torch._dynamo.config.recompile_limit
    quiet_trainer(callbacks=[CompileNetworks(backend="record")]).fit(distill(nets()), loader(count=11))
    assert graphs == [False] * 4  # two networks, two sizes
    assert torch._dynamo.config.recompile_limit == limit


def test_many_shapes_of_one_class_are_all_compiled(graphs, quiet_trainer, loader):
    """More than torch's limit: the rest would run uncompiled, and which these are depends on a resume."""
    module = EnsembleDistillModule(DigitsCNN(4), [DigitsCNN(width) for width in range(5, 11)])
    quiet_trainer(callbacks=[CompileNetworks(backend="record")]).fit(module, loader(count=11))
    assert len(graphs) == 2 * 7


def test_hints_under_compilation(fitted):
    def hint(nets):
        return HintModule(nets[0], nets[1], {"5": "5"}, 1)

    expected = fitted(hint(nets()))
    found = fitted(hint(nets()), CompileNetworks(backend="eager"))
    for name, value in expected.items():
        assert torch.equal(value, found[name])


def test_a_compiled_network_is_not_compiled_again(fitted):
    student, teacher = nets(2)
    compiled = torch.compile(student, backend="eager")

    class Seen(CompileNetworks):
        def on_train_batch_end(self, *args):
            self.compiled = list(self._compiled)

    seen = Seen(backend="eager")
    fitted(DistillModule(compiled, teacher), seen)
    assert seen.compiled == [teacher]


def test_compilation_does_not_change_a_teachers_identity():
    def make():
        torch.manual_seed(0)
        return DigitsCNN(4)

    part = make()
    part[0] = torch.compile(part[0], backend="eager")
    in_place = make()
    in_place.compile(backend="eager")
    plain = Teacher(make())
    for network in (torch.compile(make(), backend="eager"), part, in_place):
        teacher = Teacher(network)
        assert teacher.fingerprint() == plain.fingerprint()
        assert teacher.architecture() == plain.architecture()


def test_a_teacher_that_learns():
    student, teacher = nets(2)
    assert find_networks(ApprenticeModule(student, teacher)) == [student, teacher]


@pytest.mark.slow
def test_inductor_agrees(fitted):
    def tiny():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]

    expected = fitted(distill(tiny()))
    found = fitted(distill(tiny()), CompileNetworks())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_a_module_without_networks(quiet_trainer):
    with pytest.raises(InputError, match="CompileNetworks: network: LightningModule has no network 'student'"):
        CompileNetworks().setup(quiet_trainer(), LightningModule(), "fit")


@pytest.mark.parametrize("kwargs", [{"mode": "fast"}, {"backend": "fast"}])
def test_what_torch_does_not_have(kwargs):
    with pytest.raises(InputError, match=f"{next(iter(kwargs))} must be one of .*, got 'fast'"):
        CompileNetworks(**kwargs)


@pytest.mark.parametrize(("backend", "count"), [("inductor", 1), ("eager", 0), (None, 0)])
def test_a_line_before_a_cpu_compiles(backend, count, quiet_trainer, caplog, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **kwargs: None)
    callback, module = CompileNetworks(backend=backend), distill(nets())
    trainer = quiet_trainer()
    with caplog.at_level("INFO"):
        callback.setup(trainer, module, "fit")
        callback.setup(trainer, module, "validate")
    callback.teardown(trainer, module, "fit")
    assert sum("takes a minute or more on a CPU" in message for message in caplog.messages) == count
