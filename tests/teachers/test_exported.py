"""Programs of torch.export as teachers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything
from torch import nn
from torch.export import Dim, export
from torch.utils.data import TensorDataset

from kd_lightning import Batch, DatasetSource, Digits, DistillModule, InputError, SemiSupervisedDataModule, Teacher
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.exported import ExportedNetwork, is_exported

DYNAMIC = ({0: Dim.DYNAMIC},)


class Net(nn.Module):
    """Has all that a graph holds: weights, both kinds of buffers, constants, devices, a graph inside the graph."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 10)
        self.scale = torch.linspace(1, 2, 10)
        self.register_buffer("shift", torch.ones(10), persistent=False)
        self.norm.running_mean.normal_()

    def forward(self, x):
        hidden = self.dropout(F.relu(self.norm(self.conv(x)))).mean((2, 3))
        with torch.no_grad():
            hidden = hidden * 2 + torch.zeros(4, device=x.device)
        return self.head(hidden) * self.scale + self.shift + torch.ones(10, device=x.device) + torch.tensor(0.5)


X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def program(network=None, x=X, shapes=DYNAMIC):
    return export((network or Net()).eval(), (x,), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def exported():
    return program()


@pytest.fixture(scope="module")
def file(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "teacher.pt2"
    torch.export.save(exported, path)
    return path


def forms(exported, file):
    module = exported.module()
    return [exported, module, copy.deepcopy(module), file, str(file)]


def test_a_program_returns_what_the_network_returns(exported, file):
    network = Net().eval()
    for form in forms(exported, file):
        wrapped = ExportedNetwork(form)
        for rows in (6, 3, 1):
            assert torch.equal(wrapped(X[:rows]), network(X[:rows]))
        for mode in (True, False):
            assert wrapped.train(mode) is wrapped and wrapped.training is mode
            assert torch.equal(wrapped(X), network(X))
        assert not any(part.training for part in wrapped.eval().modules())
        assert torch.equal(copy.deepcopy(wrapped)(X), network(X))


def test_programs_are_recognised(exported):
    assert is_exported(exported) and is_exported(exported.module()) and is_exported(copy.deepcopy(exported.module()))
    others = [Net(), torch.fx.symbolic_trace(nn.ReLU()), torch.jit.trace(nn.ReLU(), X), "teacher.pt2", None]
    assert not any(map(is_exported, others))
    with pytest.raises(InputError, match="program must be an ExportedProgram, .* got ReLU"):
        ExportedNetwork(nn.ReLU())


def test_outputs_and_arguments_of_any_form():
    class Nested(nn.Module):
        def forward(self, words, *, mask, pair=None):
            return {"logits": words["a"] - 2 * words["b"], "rest": (mask * 3, [pair[0] - pair[1]])}

    a, b = torch.rand(2, 3), torch.rand(2, 3)
    wrapped = ExportedNetwork(export(Nested(), ({"a": a, "b": b},), {"mask": a, "pair": (a, b)}))
    found, wanted = wrapped({"b": b, "a": a}, pair=(a, b), mask=a), Nested()({"a": a, "b": b}, mask=a, pair=(a, b))
    assert torch.equal(found["logits"], wanted["logits"]) and torch.equal(found["rest"][0], wanted["rest"][0])
    assert torch.equal(found["rest"][1][0], wanted["rest"][1][0])
    for words in ({"a": a}, {"a": a, "b": b, "c": b}, {"a": a, "c": b}, a):
        with pytest.raises(InputError, match="program: words must have the form"):
            wrapped(words, mask=a, pair=(a, b))
    with pytest.raises(InputError, match="program: pair must have the form"):
        wrapped({"a": a, "b": b}, mask=a, pair=(a, b, b))
    with pytest.raises(InputError, match=r"for the arguments \(words, mask=, pair=\), got"):
        wrapped({"a": a, "b": b}, a, (a, b))


def test_parameters_are_frozen_and_state_dict_holds_all_tensors(exported):
    teacher = Teacher(ExportedNetwork(exported))
    assert [*teacher.network.parameters()] and not any(p.requires_grad for p in teacher.network.parameters())
    held = {name.removeprefix("program.content."): value for name, value in teacher.network.state_dict().items()}
    wanted = Net().state_dict() | {"scale": Net().scale, "shift": Net().shift}
    assert held.keys() - wanted.keys() == {"lifted_tensor_0"}
    assert all(torch.equal(held[name], value) for name, value in wanted.items())
    assert not teacher(X).requires_grad and torch.equal(teacher(X), Net().eval()(X))


def test_a_program_moves_with_its_constants_and_devices(exported):
    moved = copy.deepcopy(ExportedNetwork(exported)).to("meta")  # operators refuse tensors of two devices
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert moved(X.to("meta")).device.type == "meta"
    assert torch.equal(ExportedNetwork(exported)(X), Net().eval()(X))


def test_a_program_is_cast_unless_its_graph_names_a_type(exported):
    wrapped = copy.deepcopy(ExportedNetwork(exported)).double()
    network = Net().double().eval()
    network.scale = network.scale.double()
    assert torch.equal(wrapped(X.double()), network(X.double()))
    with pytest.raises(
        InputError, match=r"x must be torch.float64 \[any, 1, 8, 8\], as exported, got torch.float32 \["
    ):
        wrapped(X)

    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    named = ExportedNetwork(program(Named(3, 2), torch.ones(2, 3)))
    named.float()
    with pytest.raises(
        InputError, match=r"cannot change to torch.float64, since its node aten[.\w]+ names a type of numbers"
    ):
        named.double()
    assert all(parameter.dtype == torch.float32 for parameter in named.parameters())


def test_a_program_with_autocast_inside_stays_on_its_type_of_device():
    class Cast(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    wrapped = ExportedNetwork(program(Cast(3, 2), torch.ones(2, 3)))
    assert wrapped.to("cpu")(torch.ones(2, 3)).dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"cannot change to meta, since its node \w*autocast names a type of device"):
        wrapped.to("meta")


@pytest.mark.parametrize("rows", [1, 4])
def test_a_fixed_batch_size_is_refused_in_one_line(rows):
    wrapped = ExportedNetwork(program(x=X[:rows], shapes=None))
    assert torch.equal(wrapped(X[:rows]), Net().eval()(X[:rows]))
    with pytest.raises(InputError) as error:
        wrapped(X)
    text = str(error.value)
    assert f"must be torch.float32 [{rows}, 1, 8, 8], as exported, got torch.float32 [6, 1, 8, 8]; for any" in text
    assert "\n" not in text
    assert "export it with dynamic_shapes that have {0: torch.export.Dim.DYNAMIC} for x" in text
    assert ("at least 2 rows" in text) == (rows == 1)
    Teacher(ExportedNetwork(program(x=X[:rows], shapes=None)))(X[:rows])


def test_other_inputs_are_refused_in_one_line(exported):
    wrapped = ExportedNetwork(exported)
    limited = ExportedNetwork(program(x=X[:4], shapes=({0: Dim("batch", min=3, max=4)},)))
    cases = [
        (
            wrapped,
            (X[..., :7],),
            r"x must be torch.float32 \[any, 1, 8, 8\], as exported, got torch.float32 \[6, 1, 8, 7\]$",
        ),
        (wrapped, (X[0],), r"x must be torch.float32 \[any, 1, 8, 8\], as exported, got torch.float32 \[1, 8, 8\]$"),
        (
            wrapped,
            (X.double(),),
            r"x must be torch.float32 \[any, 1, 8, 8\], as exported, got torch.float64 \[6, 1, 8, 8\]$",
        ),
        (wrapped, ("text",), r"x must be torch.float32 \[any, 1, 8, 8\], as exported, got str$"),
        (wrapped, (), r"for the arguments \(x\), got \(\)"),
        (wrapped, (X, X), r"for the arguments \(x\), got \(\[6, 1, 8, 8\], \[6, 1, 8, 8\]\)"),
        (limited, (X,), "dimension 0 of x must be from 3 to 4, as exported, got 6"),
        (limited, (X[:2],), "dimension 0 of x must be from 3 to 4, as exported, got 2"),
    ]
    for network, inputs, message in cases:
        with pytest.raises(InputError, match=message) as error:
            network(*inputs)
        assert "\n" not in str(error.value)


def test_conditions_on_lengths_and_values_hold():
    class Branch(nn.Module):
        def forward(self, ids, mask, scale=1.0, flag=None):
            return ids * mask * scale if ids.shape[1] % 2 == 0 and flag is None else ids + mask

    dims, a = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, torch.rand(4, 6)
    shapes = {"ids": dims, "mask": dims, "scale": None, "flag": None}
    wrapped = ExportedNetwork(export(Branch(), (a, a, 3.0, None), dynamic_shapes=shapes))
    assert torch.equal(wrapped(a[:2, :4], mask=a[:2, :4], scale=3.0, flag=None), a[:2, :4] * a[:2, :4] * 3)
    for inputs, message in [
        ((a[:, :5], a[:, :5], 3.0, None), r"not exported for inputs of \[4, 5\].*: Guard failed: .* % 2 == 0"),
        ((a[:, :4], a, 3.0, None), "dimension 1 of mask must be as long as dimension 1 of ids, 4, as exported, got 6"),
        ((a, a, 2.0, None), "scale must be 3.0, as exported, got 2.0"),
        ((a, a, 3.0, 5), "flag must be None, as exported, got 5"),
    ]:
        with pytest.raises(InputError, match=message):
            wrapped(*inputs)


class DropInside(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x = F.dropout(x * 3, 0.3, self.training)
        return x * 2


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


DECOMPOSITIONS = ("no", "functional", "core", "all")
BUILDS = {
    "dropout": (lambda: nn.Dropout(0.5), (2, 4)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (2, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (2, 4, 5)),
    "rrelu": (lambda: nn.RReLU(), (2, 4)),
    "encoder": (encoder, (2, 4, 8)),
    "drop inside": (DropInside, (2, 4)),
}
HALF = {(build, way) for n, build in enumerate(BUILDS) for m, way in enumerate(DECOMPOSITIONS) if (n + m) % 2 == 0}


@pytest.mark.parametrize(
    ("build", "shape", "decomposed"),
    [
        pytest.param(*BUILDS[name], way, id=f"{name}-{way}", marks=[] if (name, way) in HALF else pytest.mark.slow)
        for name in BUILDS
        for way in DECOMPOSITIONS
    ],
)
def test_training_mode_is_refused_however_it_is_written(build, shape, decomposed):
    def exported(network):
        found = export(network, (torch.rand(shape),))
        tables = {"functional": {}, "core": None, "all": {**torch._decomp.decomposition_table}}
        return found.run_decompositions(tables[decomposed]) if decomposed != "no" else found

    with pytest.raises(InputError, match=r"its node [\w.]+ \([\w.]+\) .* call model.eval\(\) before") as error:
        ExportedNetwork(exported(build().train()))
    assert "\n" not in str(error.value)
    network, x = build().eval(), torch.rand(shape)
    assert torch.allclose(ExportedNetwork(exported(network))(x), network(x), atol=1e-6)


def test_messages_name_the_node():
    for network, message in [
        (nn.Dropout(0.5), r"its node dropout \(aten.dropout.default\) draws random numbers"),
        (nn.BatchNorm1d(4), r"its node add_ \(aten.add_.Tensor\) changes num_batches_tracked"),
        (DropInside(), r"its node submod_1.dropout \(aten.dropout.default\) draws"),
    ]:
        with pytest.raises(InputError, match=message):
            ExportedNetwork(export(network.train(), (torch.rand(2, 4),)))


def test_what_is_the_same_in_both_modes_is_allowed():
    for network in (nn.Dropout(0.0), nn.BatchNorm1d(4, track_running_stats=False)):
        x = torch.rand(3, 4)
        assert torch.equal(ExportedNetwork(export(network.train(), (x,)))(x), network(x))


def test_a_graph_with_a_branch_on_values():
    class Branch(nn.Linear):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: F.linear(x, self.weight), lambda x: x * 3, (x,))

    network, x = Branch(3, 3).eval(), torch.ones(2, 3)
    wrapped = ExportedNetwork(export(network, (x,)))
    with torch.no_grad():
        assert torch.equal(wrapped(x), F.linear(x, network.weight)) and torch.equal(wrapped(-x), -x * 3)


def test_files_that_cannot_be_read(file, tmp_path, capfd):
    content = file.read_bytes()
    with pytest.raises(InputError, match="program: there is no file .*none.pt2"):
        ExportedNetwork(tmp_path / "none.pt2")
    damaged = tmp_path / "damaged.pt2"
    for data in (b"", b"junk", content[: len(content) // 2], content[:3000] + b"XXXXXXXX" + content[3008:]):
        damaged.write_bytes(data)
        with pytest.raises(InputError, match="damaged.pt2 cannot be read as a program of torch.export: .") as error:
            ExportedNetwork(damaged)
        assert "\n" not in str(error.value)
    torch.save(Net().state_dict(), damaged)
    with pytest.raises(InputError, match="cannot be read as a program"):
        ExportedNetwork(str(damaged))
    assert capfd.readouterr().err == ""


def test_yaml_names_the_file(file):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    path = "kd_lightning.teachers.exported.ExportedNetwork"
    config = parser.parse_object({"network": {"class_path": path, "init_args": {"program": str(file)}}})
    assert str(file) in parser.dump(config)
    assert torch.equal(parser.instantiate_classes(config).network(X), Net().eval()(X))


def fingerprints(form):
    teacher = Teacher(ExportedNetwork(form))
    return teacher.fingerprint(), teacher.architecture()


def test_fingerprints_are_equal_for_equal_programs_alone(exported, file):
    first = fingerprints(exported)
    assert fingerprints(file) == fingerprints(file) == fingerprints(program()) == first
    assert fingerprints(copy.deepcopy(exported.module())) == fingerprints(exported.module()) == first

    class Twice(Net):
        def forward(self, x):
            return super().forward(x) * 2

    class Thrice(Net):
        def forward(self, x):
            return super().forward(x) * 3

    others = [*map(fingerprints, (program(Net(1)), program(Twice()), program(Thrice())))]
    assert len({one for one, _ in others} | {first[0]}) == 4
    assert len({two for _, two in others[1:]} | {first[1]}) == 3  # the seed changes weights alone
    teacher = Teacher(ExportedNetwork(copy.deepcopy(exported)))
    before = teacher.fingerprint()
    teacher(X)
    assert teacher.double().fingerprint(anew=True) == before


def test_the_fingerprint_is_the_same_in_another_process(file, tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    code = f"""
from kd_lightning import Teacher
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.exported import ExportedNetwork
teacher = Teacher(ExportedNetwork({str(file)!r}))

print(teacher.fingerprint(), teacher.architecture())
"""
    (tmp_path / "script.py").write_text(code)
    codes, (output,) = processes.run((["script.py"], {}))
    assert codes == [0], output
    copy.deepcopy(ExportedNetwork(file))  # changes no fingerprint
    assert tuple(output.split()) == fingerprints(file)


def digits(**kwargs):
    images = Digits().load().train
    source = DatasetSource(TensorDataset(images.images.tensors[0][:150], images.targets[:150]))
    source.train_transform = Digits().train_transform
    return SemiSupervisedDataModule(source, **{"labeled": 3, "num_views": 2, "batch_size": 32, "val_size": 2} | kwargs)


def test_distillation_and_cache_equal_those_of_the_network(quiet_trainer, tmp_path):
    torch.manual_seed(5)
    network = DigitsCNN(8).eval()
    x = torch.rand(4, 1, 8, 8)
    path = tmp_path / "teacher.pt2"
    torch.export.save(program(network, x), path)

    def weights(net, **kwargs):
        seed_everything(3, verbose=False)
        module = DistillModule(DigitsCNN(4), Teacher(net, **kwargs))
        quiet_trainer(max_epochs=2).fit(module, datamodule=digits())
        return {name: value.clone() for name, value in module.student.state_dict().items()}

    wanted = weights(copy.deepcopy(network))
    cache = {"cache": tmp_path / "cache", "cache_dtype": "float32"}
    assert_same(weights(ExportedNetwork(path)), wanted)
    assert_same(weights(ExportedNetwork(path), **cache), wanted)
    files = {file: file.stat().st_mtime_ns for file in cache["cache"].rglob("outputs")}
    assert files
    assert_same(
        weights(ExportedNetwork(program(network, x)), **cache), wanted
    )  # reads the outputs that the file's program has written
    assert files == {file: file.stat().st_mtime_ns for file in cache["cache"].rglob("outputs")}


def assert_same(one, other):
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_programs_in_an_ensemble():
    networks = [Net(seed).eval() for seed in (0, 1)]
    expected = torch.stack([network(X) for network in networks])
    for forms in ([program(n) for n in networks], [program(n).module() for n in networks]):
        assert torch.equal(Ensemble(forms)(Batch(X)), expected)
        with pytest.raises(
            InputError, match=r"use_vmap: these teachers cannot be computed as one; set it to false: .+$"
        ):
            Ensemble(forms, use_vmap=True)(Batch(X))


def test_a_program_that_shares_weights_with_the_student_is_refused():
    network = nn.Linear(4, 3)
    shared = export(network, (torch.rand(2, 4),))
    for form in (shared, shared.module(), Teacher(shared)):
        with pytest.raises(InputError, match="teacher and student must"):
            DistillModule(nn.Sequential(network, nn.Linear(3, 3)), form)
    assert network.weight.requires_grad
