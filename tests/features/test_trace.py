"""Traces: what one pass of a network finds, what it leaves unchanged, and what it refuses."""

import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import swin_t

from kd_lightning.errors import InputError
from kd_lightning.features.trace import are_frozen, check_gradients, check_rows, trace_student, trace_teacher
from tests.features.conftest import DEEP, MID, STEM, WAVES, Network, Sequences, Student, X, sequences


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Student()


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return Network().eval().requires_grad_(False)


class Opaque(nn.Module):
    """No operation shows the channels."""

    def forward(self, x):
        return torch.einsum("bcl,cd->bdl", x.cumsum(1), torch.eye(3))


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.mix, self.head = Opaque(), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.mix(x * self.scale).sum(2))


class TestOutputs:
    def test_of_both_networks_by_hand(self, student, teacher):
        found = trace_student(student, X, ["mid", "stem.0", "head", "", "mid"])
        assert {name: found.shape(name) for name in found.outputs} == {
            "mid": [5, 4, 4],
            "stem.0": [4, 8, 8],
            "head": [5],
            "": [5],
        }
        student.eval()
        torch.testing.assert_close(found.outputs["stem.0"], student.stem[0](X).detach())
        torch.testing.assert_close(found.outputs["mid"], student.mid(student.stem(X).relu()).detach())
        assert torch.equal(found.outputs[""], student(X).detach())
        assert not any(output.requires_grad for output in found.outputs.values())
        found = trace_teacher(teacher, X, ["top", "body", ""])
        assert found.shape("top") == [8, 4, 4] and not found.parameters
        torch.testing.assert_close(found.outputs["top"], teacher.top(teacher.body(X)))
        assert torch.equal(found.outputs[""], teacher(X))

    def test_layouts(self):
        found = trace_student(sequences(8), WAVES, ["conv", "conv.2", "pool", "block", "head"])
        assert [*found.layouts.values()] == ["first", "first", "first", "last", "first"]
        assert [found.shape(name) for name in ("conv", "block")] == [[8, 8], [8, 8]]  # the shapes do not show it
        torch.manual_seed(0)
        found = trace_teacher(swin_t().eval(), torch.zeros(1, 3, 32, 32), ["features.1"])
        assert found.layouts == {"features.1": "last"} and found.shape("features.1") == [8, 8, 96]
        assert trace_student(Sums(), WAVES, ["mix"]).layouts == {"mix": None}
        assert trace_teacher(Sums(), WAVES, ["mix"]).layouts == {"mix": None}

    def test_by_the_function_that_calls_them(self, student, teacher):
        def run(network, x):
            return network(x["image"])

        expected = trace_student(student, X, ["mid"]).outputs["mid"], trace_teacher(teacher, X, ["top"]).outputs["top"]
        assert torch.equal(trace_student(student, {"image": X}, ["mid"], run).outputs["mid"], expected[0])
        assert torch.equal(trace_teacher(teacher, {"image": X}, ["top"], run).outputs["top"], expected[1])

    def test_not_in_half_precision(self, student, teacher):
        with torch.autocast("cpu", torch.bfloat16):
            found = trace_student(student, X, ["mid"]), trace_teacher(teacher, X, ["top"])
        assert {output.dtype for part in found for output in part.outputs.values()} == {torch.float32}


class TestParametersBelow:
    @pytest.mark.parametrize(
        ("layers", "below"),
        [
            (["stem.0"], {"stem.0.weight", "stem.0.bias"}),
            (["mid"], MID),  # not the side branch, though it runs first
            (["deep"], DEEP),
            (["stem", "deep"], DEEP),
            (["deep", "stem"], DEEP),
            (["side"], {"side.weight", "side.bias"}),
            (["side", "stem"], STEM | {"side.weight", "side.bias"}),
            (["head"], DEEP | {"side.weight", "side.bias", "head.weight", "head.bias"}),
            ([""], DEEP | {"side.weight", "side.bias", "head.weight", "head.bias"}),
        ],
    )
    @pytest.mark.parametrize("grad", [True, False])
    def test_of_layers(self, student, layers, below, grad):
        with torch.set_grad_enabled(grad):
            assert trace_student(student, X, layers).parameters == below
        assert all(p.grad is None for p in student.parameters())

    def test_frozen_ones_count_and_stay_frozen(self, student):
        student.stem.requires_grad_(False)
        student.mid.bias.requires_grad_(False)
        flags = [p.requires_grad for p in student.parameters()]
        assert trace_student(student, X, ["mid"]).parameters == MID
        assert [p.requires_grad for p in student.parameters()] == flags
        with pytest.raises(InputError):
            trace_student(student, X, ["unused"])
        assert [p.requires_grad for p in student.parameters()] == flags
        assert are_frozen(student, frozenset(STEM)) and not are_frozen(student, frozenset(MID))

    def test_whole_numbers_among_them(self, student):
        """As weights of few bits, which take no gradient."""
        student.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        assert trace_student(student, X, ["mid"]).parameters == MID
        assert not student.codes.requires_grad

    def test_compiled_student(self, student):
        torch._dynamo.reset()
        wrapped = torch.compile(student, backend="eager")
        wrapped(X)
        plain = trace_student(student, X, ["mid"])
        found = trace_student(wrapped, X, ["mid"])
        assert torch.equal(found.outputs["mid"], plain.outputs["mid"]) and found.layouts == plain.layouts
        assert found.parameters == {f"_orig_mod.{name}" for name in MID}  # as its named_parameters has them
        student.compile(backend="eager")
        assert trace_student(student, X, ["mid"]).parameters == MID


@pytest.mark.parametrize("fault", [None, "unused", "nowhere"])
def test_leaves_everything_as_it_was(student, teacher, fault):
    student.stem[0].eval()  # BatchNorm and dropout train
    networks = {"student": student, "teacher": teacher}
    layers = [layer for network in networks.values() for layer in network.modules()]
    modes = [layer.training for layer in layers]
    state = {(n, k): v.clone() for n, network in networks.items() for k, v in network.state_dict().items()}
    gradients = [torch.full_like(p, n) for n, p in enumerate(student.parameters())]
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        parameter.grad = gradient
    generator, images = torch.get_rng_state(), X.clone()
    for trace, network in ((trace_student, student), (trace_teacher, teacher)):
        if fault:
            with pytest.raises(InputError):
                trace(network, X, [fault])
        else:
            trace(network, X, ["mid" if network is student else "top"])
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(X, images)
    assert [layer.training for layer in layers] == modes
    assert all(torch.equal(state[n, k], v) for n in networks for k, v in networks[n].state_dict().items())
    assert all(
        p.grad is g and (g == n).all() for n, (p, g) in enumerate(zip(student.parameters(), gradients, strict=True))
    )
    assert not any(layer._forward_hooks for layer in layers)
    assert not any(p.requires_grad for p in teacher.parameters())


class TestRefused:
    @pytest.mark.parametrize(
        ("trace", "layers", "message"),
        [
            (trace_student, ["stem.9"], r"^layer 'stem\.9': Student has none of that name; nearest: stem"),
            (trace_teacher, ["top", "bodi"], "^layer 'bodi': Network has none of that name; nearest: body"),
            (trace_student, ["mid", "unused"], "^the student's layer unused is never called in its forward pass$"),
            (trace_teacher, ["unused"], "^the teacher's layer unused is never called in its forward pass$"),
        ],
    )
    def test_layers(self, student, teacher, trace, layers, message):
        with pytest.raises(InputError, match=message):
            trace(student if trace is trace_student else teacher, X, layers)

    @pytest.mark.parametrize("trace", [trace_student, trace_teacher])
    def test_an_output_without_a_row_for_each_sample(self, trace):
        class Tokens(nn.Module):
            def __init__(self, batch_first):
                super().__init__()
                self.lstm, self.head = nn.LSTM(3, 4, batch_first=batch_first), nn.Linear(4, 5)
                self.batch_first = batch_first

            def forward(self, x):
                x = x.transpose(1, 2)
                out = self.lstm(x if self.batch_first else x.transpose(0, 1))[0]
                return self.head(out.mean(1 if self.batch_first else 0))

        of = trace.__name__.removeprefix("trace_")
        message = f"^the {of}'s layer lstm must return a row for each of 3 samples, got [8, 3, 4]; use another layer"
        with pytest.raises(InputError, match=re.escape(message)[1:]):
            trace(Tokens(False), WAVES, ["lstm"])
        assert trace(Tokens(True), WAVES, ["lstm"]).layouts == {"lstm": "last"}

    def test_rows_of_the_networks_own_output(self):
        with pytest.raises(
            InputError, match=r"^the teacher's output must return a row for each of 3 samples, got \[\]"
        ):
            check_rows("teacher", {"": torch.zeros(())}, [""], 3)
        with pytest.raises(InputError, match="^the student's output is never called"):
            check_rows("student", {}, [""], 3)
        check_rows("teacher", {"": torch.zeros(3), "other": torch.zeros(2)}, [""], 3)


class TestGradients:
    MESSAGE = "^the output of the student's layer conv has no gradient, so that nothing below it learns"

    def test_inside_gradient_checkpointing(self):
        student = sequences(8, cut=lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True))
        with pytest.raises(InputError, match=self.MESSAGE.replace("conv", "conv.1")):
            trace_student(student, WAVES.clone(), ["conv.1"])
        student = sequences(8, cut=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
        names = {"conv.0.weight", "conv.0.bias", "conv.1.weight", "conv.1.bias"}
        assert trace_student(student, WAVES, ["conv.1"]).parameters == names

    def test_detached_above_the_layer(self):
        student = sequences(8, cut=lambda layer, x: layer(x).detach())
        assert "conv.0.weight" in trace_student(student, WAVES, ["conv"]).parameters

    def test_reentrant_below_the_layer(self):
        """As in a network that always checkpoints its blocks; its parameters count."""
        student = sequences(8, cut=lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True))
        plain = sequences(8)
        for n, parameter in enumerate(student.parameters()):
            parameter.grad = torch.full_like(parameter, n)
        expected = trace_student(plain, WAVES, ["block"]).parameters
        assert trace_student(student, WAVES.clone(), ["block"]).parameters == expected
        assert all((p.grad == n).all() for n, p in enumerate(student.parameters()))

    def test_detached_below_or_nothing_to_train(self):
        class Cut(Sequences):
            def forward(self, x):
                return self.head(self.pool(self.conv(x).detach()).mean(2))

        with pytest.raises(InputError, match=self.MESSAGE.replace("conv", "pool")):
            trace_student(Cut(8), WAVES, ["conv", "pool"])

    def test_of_a_step(self):
        outputs = {"": torch.zeros(2), "a": torch.zeros(2, requires_grad=True)}
        with pytest.raises(InputError, match="^the student's output has no gradient, so that nothing below it learns"):
            check_gradients(outputs.items())
        check_gradients(outputs.items(), lambda: True)
        check_gradients([("a", outputs["a"])])

    def test_whole_numbers(self):
        class Rounded(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.round = nn.Linear(8, 8), nn.Identity()

            def forward(self, x):
                return self.round(self.linear(x).round().long()).float()

        with pytest.raises(InputError, match=self.MESSAGE.replace("conv", "round")):
            trace_student(Rounded(), WAVES, ["round"])
        assert trace_teacher(Rounded(), WAVES, ["round"]).outputs["round"].dtype == torch.int64
