"""Teachers stay frozen and hidden; load_weights takes every kind of file, and names what it refuses."""

import copy
import hashlib
import json
import pickle
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn

from kd_lightning import Batch, DistillModule, InputError, SupervisedModule, Teacher, load_weights
from kd_lightning.models import DigitsCNN


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("build", [Teacher, lambda file: DistillModule(DigitsCNN(4), file)])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_in_place_of_a_network(build, kind):
    with pytest.raises(InputError, match=r"teachers.ExportedNetwork \(argument program: a/net.pt2\)") as error:
        build(kind("a/net.pt2"))
    assert str(error.value).startswith(f"teacher must be a network, got {type(kind('a')).__name__}; ")
    with pytest.raises(
        InputError, match="must be a network, got .*; kd_lightning.load_weights .*path: net.safetensors"
    ):
        build(kind("net.safetensors"))
    with pytest.raises(InputError, match="teacher must be a network, got [A-Za-z]+$"):
        build(kind("resnet18"))


class TestFrozen:
    @pytest.mark.parametrize("who", ["module", "teacher", "network", "a part", "all, every step"])
    def test_whoever_calls_train(self, quiet_trainer, loader, student, teacher, who):
        teacher.append(nn.Dropout(0.5))  # in train mode its logits would be random
        before = copy.deepcopy(teacher.state_dict())
        module = DistillModule(student, teacher)
        callers = {"module": [module], "teacher": [module.teacher], "network": [teacher], "a part": [teacher[-1]]}
        seen = []

        class Nag(DistillModule):
            def losses(self, batch):
                for one in callers.get(who, [self, self.teacher, teacher]):
                    one.train()
                seen.append([self.teacher_logits(batch), self.teacher_logits(batch)])
                return super().losses(batch)

        module.__class__ = Nag
        quiet_trainer(max_epochs=2).fit(module, loader(), loader())
        assert is_equal(before, teacher.state_dict())  # BatchNorm's statistics and counters are among them
        assert all(torch.equal(one, two) for one, two in seen)
        assert not any(m.training for m in teacher.modules())
        assert not seen[0][0].requires_grad
        assert not seen[0][0].is_inference()  # losses save it for backward

    def test_is_hidden(self, quiet_trainer, loader, student, teacher, tmp_path):
        module = DistillModule(student, teacher, optimizer=lambda p: torch.optim.SGD(p, 0.1))
        own = {id(p) for p in student.parameters()}
        assert {id(p) for p in module.parameters()} == own
        assert set(module.state_dict()) == {f"student.{key}" for key in student.state_dict()}
        assert not [m for m in module.modules() if m is teacher]
        assert not any(p.requires_grad for p in teacher.parameters())
        trainer = quiet_trainer()
        trainer.fit(module, loader())
        assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == own
        assert all(p.grad is None for p in teacher.parameters())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        content = torch.load(tmp_path / "c.ckpt", weights_only=True)
        assert set(content["state_dict"]) == set(module.state_dict())
        assert content["teacher_fingerprint"] == module.teacher.fingerprint()

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_moves_with_the_module(self, student, teacher, device):
        module = DistillModule(student, Teacher(teacher, preprocess=nn.BatchNorm2d(1), device=device))
        x = torch.randn(3, 1, 8, 8)
        module.double()
        tensors = [*teacher.parameters(), *module.teacher._hidden[0].buffers()]
        assert {t.dtype for t in tensors} == {torch.float64, torch.int64}
        assert module.teacher(Batch(x.double())).dtype == torch.float64
        module.to("meta")
        where = {t.device.type for t in teacher.parameters()}
        assert where == ({"meta"} if device is None else {"cpu"})  # its own device is not the student's

    def test_copies_share_it(self, student, teacher):
        module = DistillModule(student, teacher)
        twin = copy.deepcopy(module)
        assert twin.teacher is not module.teacher
        assert twin.teacher.network is teacher
        assert twin.student is not student

    def test_preprocess_comes_first(self, teacher):
        x = torch.rand(3, 1, 8, 8)
        teacher.eval()

        class Normalise(nn.Module):
            def forward(self, x):
                return (x - 0.3) / 0.5

        expected = teacher((x - 0.3) / 0.5)
        assert torch.equal(Teacher(teacher, preprocess=Normalise())(Batch(x)), expected)
        assert torch.equal(Teacher(teacher, preprocess=Normalise(), device="cpu")(Batch(x)), expected)
        assert not torch.equal(expected, teacher(x))


class TestClasses:
    def test_reorders(self, teacher):
        x, classes = torch.randn(3, 1, 8, 8), [3, 1, 0, 2, 9, 8, 6, 5, 4, 7]  # not its own inverse
        plain, mapped = Teacher(teacher)(Batch(x)), Teacher(teacher, classes=classes)(Batch(x))
        for row in range(3):
            for output in range(10):
                assert mapped[row, classes[output]] == plain[row, output]

    @pytest.mark.parametrize("classes", [[0, 0, 1], [-1, 0], [2, 5, 2], [0, 1, -2], []])
    def test_must_be_distinct_classes(self, teacher, classes):
        got = str(classes).replace("[", r"\[")
        with pytest.raises(InputError, match=f"at least one class, from 0 on, and none twice, got {got}"):
            Teacher(teacher, classes=classes)

    @pytest.mark.parametrize(
        ("classes", "missing"), [([1, 2, 3], [0]), ([5, 0, 2], [1, 3, 4]), ([0, 1, 2], []), ([2, 0, 1], [])]
    )
    def test_may_leave_some_out(self, classes, missing):
        torch.manual_seed(1)
        network, x = DigitsCNN(4, 3).eval(), torch.randn(4, 1, 8, 8)
        teacher = Teacher(network, classes=classes)
        assert teacher.missing_classes == missing
        found, plain = teacher(Batch(x)), network(x)
        assert torch.equal(found, teacher.arrange(plain))
        assert found.shape == (4, max(classes) + 1)
        for row in range(4):
            for output, student_class in enumerate(classes):
                assert found[row, student_class] == plain[row, output]
            assert {found[row, left].item() for left in missing} <= {-torch.inf}
        assert teacher.arrange(plain.bfloat16()).dtype == torch.bfloat16
        assert Teacher(network).missing_classes == []

    def test_a_single_teacher_must_know_all(self, quiet_trainer, loader, student):
        network = DigitsCNN(4, 3)
        with pytest.raises(InputError, match=r"teacher does not know the classes \[1, 2, 3, 4, 5, 6, 7, 8\], but must"):
            DistillModule(student, Teacher(network, classes=[9, 0, 10]))
        module = DistillModule(student, Teacher(network, classes=[2, 0, 1]))  # what the student has is known later
        with pytest.raises(InputError, match=r"same number of outputs, got \[3\] from the teacher and \[10\]"):
            quiet_trainer().fit(module, loader())

    @pytest.mark.parametrize("network", [DigitsCNN(4), nn.Flatten(0)])
    def test_must_fit_the_network(self, network):
        with pytest.raises(InputError, match=r"classes has 3 entries, but the teacher's output is \[1?[0-9]+"):
            Teacher(network, classes=[2, 1, 0])(Batch(torch.randn(2, 1, 8, 8)))


class TestFingerprint:
    def of(self, network, **kwargs):
        return Teacher(copy.deepcopy(network), **kwargs).fingerprint()

    def test_any_weight_or_buffer_changes_it(self, teacher):
        prints = {self.of(teacher)}
        for key in teacher.state_dict():
            other = copy.deepcopy(teacher)
            other.state_dict()[key].view(-1)[-1] += 1
            prints.add(self.of(other))
        assert len(prints) == 1 + len(teacher.state_dict())

    def test_preprocess_and_classes_change_it(self, teacher):
        normed, other = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        other.running_mean += 0.5
        settings = [{}, {"classes": [*range(10)]}, {"classes": [*range(1, 10), 0]}]
        settings += [{"preprocess": p} for p in (nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=3))]
        settings += [{"preprocess": p} for p in (normed, other)]
        assert len({self.of(teacher, **kwargs) for kwargs in settings}) == len(settings)

    def test_is_stable(self, teacher, student):
        first = self.of(teacher)
        torch.manual_seed(1)
        assert self.of(DigitsCNN(width=8)) == first  # the fixture's seed
        module = DistillModule(student, teacher)
        module.teacher(Batch(torch.randn(4, 1, 8, 8)))
        assert module.teacher.fingerprint() == first
        module.to(torch.bfloat16)  # as a precision plugin does
        assert module.teacher.fingerprint() == module.teacher.fingerprint(anew=True) == first

    @pytest.mark.parametrize("change", ["in place", "loaded", "replaced"])
    def test_anew_notices_changed_weights(self, teacher, change):
        stored = Teacher(teacher)
        first = stored.fingerprint()
        state = {
            name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in teacher.state_dict().items()
        }
        if change == "in place":
            teacher.state_dict()["0.weight"].view(-1)[-1] += 1
        elif change == "loaded":
            teacher.load_state_dict(state)
        else:
            teacher.load_state_dict(state, assign=True)
        stored.to(torch.float64)  # does not hide it
        stored.to(torch.float32)
        assert stored.fingerprint() == first
        assert stored.fingerprint(anew=True) == self.of(teacher) != first

    def test_attributes_unsaved_buffers_and_extra_state_change_it(self):
        prints = [self.of(Stateful(**{name: value})) for name in Stateful.STATE for value in (1, 2)]
        assert len({*prints}) == 1 + len(Stateful.STATE)  # 1 is the default

    def test_an_attribute_that_changes_between_two_fits(self, student):
        module = DistillModule(student, Teacher(Stateful()))
        teacher, prints = module.teacher, []
        for _ in range(2):
            prints.append(teacher.fingerprint(anew=True))
            teacher(Batch(torch.randn(2, 3)))
            module.to(torch.bfloat16), module.to(torch.float32)
        assert prints[0] == prints[1]
        for name in Stateful.STATE:
            teacher.network.change(name, 2)
            module.to(torch.float64), module.to(torch.float32)  # does not hide it
            assert teacher.fingerprint() == prints[-1]
            prints.append(teacher.fingerprint(anew=True))
        assert len({*prints}) == 1 + len(Stateful.STATE)
        assert prints[-1] == self.of(Stateful(**dict.fromkeys(Stateful.STATE, 2)))

    def test_what_a_run_changes_does_not_count(self):
        """Mode, hooks, compilation, memory layout, and what a forward pass changes."""
        network = DigitsCNN(4)
        first, teacher = self.of(network), Teacher(network)
        assert teacher.fingerprint() == first
        network.train()
        network.register_forward_hook(lambda *_: None)
        network.to(memory_format=torch.channels_last)
        network.compile(backend="eager")
        assert teacher.fingerprint(anew=True) == first
        assert Teacher(torch.compile(network, backend="eager")).fingerprint() == first

    def test_what_a_forward_pass_changes(self):
        class Caching(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2)
                self.sizes, self.count = [], 0
                self.register_buffer("grid", torch.zeros(0), persistent=False)

            def forward(self, x):
                self.sizes.append(len(x))
                self.count += 1
                self.grid = torch.arange(len(x))
                self.table = {len(x): x}  # a new attribute
                return self.layer(x)

        teacher = Teacher(Caching())
        first = teacher.fingerprint(anew=True)
        for size in (2, 3):
            teacher(Batch(torch.randn(size, 3)))
        assert teacher.fingerprint() == teacher.fingerprint(anew=True) == first
        teacher.network.scale = 2
        assert teacher.fingerprint(anew=True) != first

    @pytest.mark.parametrize("classes", [None, [*range(10)]])
    @pytest.mark.parametrize("preprocess", [None, nn.Upsample(scale_factor=2)])
    def test_of_the_version_before(self, teacher, classes, preprocess):
        """In checkpoints: of weights, classes and the text of the preprocessing."""
        made = Teacher(teacher, classes=classes, preprocess=preprocess)
        about = (classes, *([] if preprocess is None else [repr(preprocess)]), made.weights())
        earlier = hashlib.sha256(repr(about).encode()).hexdigest()
        assert made.fingerprint().startswith("v2:")
        made.to(torch.bfloat16)
        assert made.matches(earlier)
        assert made.matches(made.fingerprint())
        other = copy.deepcopy(teacher).float()
        other[-1].bias.data[0] += 1
        assert not Teacher(other, classes=classes, preprocess=preprocess).matches(earlier)

    def test_the_hash_of_the_weights(self):
        """Fingerprints of the version before hold it, so it never changes."""
        network = nn.Linear(2, 1)
        nn.init.constant_(network.weight, 0.5), nn.init.zeros_(network.bias)
        halves, zeros = np.full(2, 0.5, np.float32).tobytes(), np.zeros(1, np.float32).tobytes()
        reference = b"weight torch.float32 [1, 2]" + halves + b"bias torch.float32 [1]" + zeros
        assert Teacher(network).weights() == hashlib.sha256(reference).hexdigest()

    @pytest.mark.filterwarnings("ignore:")
    def test_any_tensor_and_extra_state(self):
        class Odd(nn.Module):
            def __init__(self, gain=1.0):
                super().__init__()
                for name, tensor in {
                    "empty": torch.empty(0),
                    "scalar": torch.tensor(1.0),
                    "bool": torch.tensor([True, False]),
                    "halves": torch.ones(2, 3, dtype=torch.bfloat16).t(),
                    "sparse": torch.tensor([[gain, 0.0]]).to_sparse(),
                    "rows": torch.tensor([[gain, 0.0]]).to_sparse_csr(),
                    "meta": torch.ones(2, device="meta"),
                    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                    "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
                    "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
                    "complex": torch.ones(2, dtype=torch.complex64),
                    "eighth": torch.ones(2).to(torch.float8_e4m3fn),
                }.items():
                    self.register_buffer(name, tensor)

            def get_extra_state(self):
                return {"version": 1}

        assert Teacher(Odd()).fingerprint() == Teacher(Odd()).fingerprint() != Teacher(Odd(2.0)).fingerprint()
        assert Teacher(Odd()).weights() != Teacher(Odd(2.0)).weights()
        assert Teacher(Odd()).architecture() == Teacher(Odd()).architecture()

    def test_networks_made_by_torch(self, tmp_path):
        def of_script(gain):
            network = torch.jit.script(Gain(gain)).eval()
            torch.jit.save(network, tmp_path / "net.pt")
            return Teacher(torch.jit.load(tmp_path / "net.pt")).fingerprint()

        def traced(gain):
            return torch.fx.symbolic_trace(nn.Sequential(DigitsCNN(4), Gain(gain)))

        assert of_script(1.0) == of_script(1.0) != of_script(2.0)
        torch.manual_seed(0)
        network = traced(1.0)
        assert self.of(network) == self.of(network)
        torch.manual_seed(0)
        assert self.of(traced(2.0)) != self.of(network)

    @pytest.mark.filterwarnings("ignore:")
    def test_quantized_networks(self):
        def quantized(bias):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(3, 2))
            network[0].bias.data += bias
            return torch.ao.quantization.quantize_dynamic(network, {nn.Linear})

        assert Teacher(quantized(0)).fingerprint() == Teacher(quantized(0)).fingerprint()
        assert Teacher(quantized(0)).fingerprint() != Teacher(quantized(1)).fingerprint()

    def test_deep_attributes_end(self):
        network, chain = nn.Linear(2, 2), None
        for _ in range(3000):
            chain = [chain]
        network.chain = chain
        assert Teacher(network).fingerprint() == Teacher(network).fingerprint()

    @pytest.mark.slow
    def test_all_processes_agree(self, tmp_path, monkeypatch, processes):
        monkeypatch.chdir(tmp_path)
        Path("users.py").write_text(
            textwrap.dedent(
                """
                import pathlib, random, sys, threading
                import numpy as np, torch
                from torch import nn
                from kd_lightning import Teacher

                class Net(nn.Module):
                    def __init__(self):
                        super().__init__()
                        torch.manual_seed(0)
                        self.layer = nn.Linear(3, 2)
                        self.act, self.scale = nn.functional.relu, lambda x: x * 2
                        self.names, self.lock = {"b", "a", "c"}, threading.Lock()
                        self.generator, self.other = np.random.default_rng(), random.Random()
                        self.folder, self.device = pathlib.Path.cwd() / sys.argv[1], torch.device("cpu")
                        self.register_buffer("grid", torch.arange(3), persistent=False)

                if __name__ == "__main__":
                    torch.jit.script(nn.Linear(2, 2)).save("script.pt") if sys.argv[1] == "old" else None
                    print(Teacher(Net()).fingerprint(), Teacher(torch.jit.load("script.pt")).fingerprint())
                """
            )
        )
        first, (old,) = processes.run((["users.py", "old"], {}))
        codes, (again, new) = processes.run((["users.py", "again"], {}), (["users.py", "new"], {}))
        assert first + codes == [0, 0, 0], (old, again, new)
        prints = {output.splitlines()[-1] for output in (old, again, new)}  # below warnings of torch.jit
        assert len(prints) == 1 and len(prints.pop().split()) == 2  # sets are in another order in the last process


class Gain(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return x * self.gain


class Options:
    def __init__(self, value):
        self.value = value


class Stateful(nn.Module):
    """State of every kind, which can be set and changed by name."""

    STATE = ("number", "inner", "listed", "kept", "extra", "buffer", "weight")

    def __init__(self, **values):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        nn.init.ones_(self.layer.weight), nn.init.zeros_(self.layer.bias)
        self.register_buffer("buffer", torch.ones(2), persistent=False)
        self.inner, self.kept, self.listed = Gain(1), Options(1), [1, "a"]
        self.number = 1
        for name, value in {"extra": 1, **values}.items():
            self.change(name, value)

    def change(self, name, value):
        if name == "extra":
            EXTRA[id(self.layer.weight)] = value  # where no attribute shows it
        elif name == "buffer":
            self.buffer[0] = value
        elif name == "weight":
            self.layer.weight.data[0, 0] = value
        elif name == "listed":
            self.listed[0] = value
        elif name == "inner":
            self.inner.gain = value
        elif name == "kept":
            self.kept.value = value
        else:
            self.number = value

    def get_extra_state(self):
        return {"extra": EXTRA.get(id(self.layer.weight), 1)}

    def set_extra_state(self, state):
        EXTRA[id(self.layer.weight)] = state["extra"]

    def __deepcopy__(self, memo):
        return Stateful(
            number=self.number,
            inner=self.inner.gain,
            listed=self.listed[0],
            kept=self.kept.value,
            buffer=float(self.buffer[0]),
            weight=float(self.layer.weight[0, 0]),
            extra=self.get_extra_state()["extra"],
        )

    def forward(self, x):
        return self.layer(x)


EXTRA = {}


@pytest.fixture
def fresh():
    torch.manual_seed(9)
    return DigitsCNN(8)


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def zeroed(state):
    return {key: 0 * tensor for key, tensor in state.items()}


class TestLoadWeights:
    @pytest.mark.parametrize(
        "content",
        [
            lambda s: s,
            lambda s: {"model": s},
            lambda s: {"model_state_dict": s, "optimizer_state_dict": {"lr": 1}},
            lambda s: {"state_dict": prefixed(s, "student."), "epoch": 3},
            lambda s: {"state_dict": prefixed(s, "net.") | {"loss.weight": torch.ones(3)}},
            lambda s: prefixed(s, "module."),
            lambda s: {"state_dict": prefixed(s, "module.")},
            lambda s: prefixed(s, "_orig_mod."),
            lambda s: {"state_dict": prefixed(s, "student._orig_mod.")},
            lambda s: {"state_dict": prefixed(zeroed(s), "teacher.") | prefixed(s, "student.")},
            lambda s: {"state_dict": prefixed(zeroed(s), "a.") | prefixed(s, "student.")},
        ],
    )
    def test_finds_the_networks_weights(self, tmp_path, teacher, fresh, content):
        torch.save(content(teacher.state_dict()), tmp_path / "w.pt")
        assert load_weights(fresh, tmp_path / "w.pt") is fresh
        assert is_equal(fresh.state_dict(), teacher.state_dict())

    def test_lightning_checkpoints(self, quiet_trainer, loader, tmp_path, student, teacher):
        class Theirs(LightningModule):
            def __init__(self, net):
                super().__init__()
                self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))
                self.backbone = net

            def training_step(self, batch, batch_idx):
                return self.criterion(self.backbone(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters())

        for module, network in ((Theirs(teacher), teacher), (SupervisedModule(student), student)):
            trainer = quiet_trainer()
            trainer.fit(module, loader())
            trainer.save_checkpoint(tmp_path / "w.ckpt")
            loaded = load_weights(DigitsCNN(network[0].out_channels), str(tmp_path / "w.ckpt"))
            assert is_equal(loaded.state_dict(), network.state_dict())

    def test_prefix_by_name(self, tmp_path, teacher, fresh):
        state = prefixed(zeroed(teacher.state_dict()), "student.") | prefixed(teacher.state_dict(), "teacher.")
        torch.save(state, tmp_path / "w.pt")
        load_weights(fresh, tmp_path / "w.pt", prefix="teacher.")
        assert is_equal(fresh.state_dict(), teacher.state_dict())
        with pytest.raises(InputError, match="missing: 0.weight, 1.weight, 1.bias, ..."):
            load_weights(fresh, tmp_path / "w.pt", prefix="ema.")

    def test_safetensors(self, tmp_path, teacher, fresh):
        save_file(prefixed(teacher.state_dict(), "module."), tmp_path / "w.safetensors")
        load_weights(fresh, tmp_path / "w.safetensors")
        assert is_equal(fresh.state_dict(), teacher.state_dict())

    def test_names_the_first_few_that_do_not_fit(self, tmp_path, teacher):
        state = teacher.state_dict() | {"3.extra": torch.ones(1)}
        del state["0.weight"]
        torch.save(state, tmp_path / "w.pt")
        before = DigitsCNN(4)
        stored = copy.deepcopy(before.state_dict())
        message = (
            r"w.pt do not fit DigitsCNN: 1 missing: 0.weight; 1 unexpected: 3.extra; 15 of another shape: 1.weight "
            r"\[8\] in the file, \[4\] in the model, 1.bias \[8\].*, 1.running_mean [^,]*, [^,]*, \.\.\.$"
        )
        with pytest.raises(InputError, match=message):
            load_weights(before, tmp_path / "w.pt")
        assert is_equal(before.state_dict(), stored)

    @pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
    def test_malicious_file_is_refused_and_not_run(self, tmp_path, fresh, kind):
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "evil",)

        file = tmp_path / "w.pt"
        if kind == "bare pickle":
            file.write_bytes(pickle.dumps(Evil()))
        else:
            torch.save({"state_dict": Evil()}, file, _use_new_zipfile_serialization=kind == "zip")
        with pytest.raises(InputError, match="w.pt was refused: .* could run code"):
            load_weights(fresh, file)
        assert not (tmp_path / "evil").exists()
        run = pickle.loads if kind == "bare pickle" else lambda _: torch.load(file, weights_only=False)
        run(file.read_bytes())
        assert (tmp_path / "evil").exists()  # it would have run

    @pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
    def test_damaged_files(self, tmp_path, teacher, fresh, kind):
        file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
        with pytest.raises(InputError, match=f"no weights file at .*{file.name}"):
            load_weights(fresh, file)
        if kind == "safetensors":
            save_file(teacher.state_dict(), file)
        else:
            torch.save(teacher.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
        whole = file.read_bytes()
        for cut in (0, 10, 50, 100, 200, 400, len(whole) // 2, len(whole) - 30):
            file.write_bytes(whole[:cut])
            with pytest.raises(InputError, match=file.name):
                load_weights(fresh, file)

    @pytest.mark.parametrize(
        "content",
        [b"hello world, this is text\n", b"a,b,c\n1,2,3\n", b"<!DOCTYPE html>", b"trainer:\n  a: 1\n", bytes(500)],
        ids=["text", "csv", "html", "yaml", "zeros"],
    )
    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.ckpt"])
    def test_files_of_another_kind(self, tmp_path, fresh, content, name):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_weights(fresh, tmp_path / name)

    def test_archives_of_another_kind(self, tmp_path, fresh):
        (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
        with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
            archive.write(tmp_path / "a.json", "a.json")
        with tarfile.open(tmp_path / "tar.pt", "w") as archive:
            archive.add(tmp_path / "a.json", "a.json")
        for name in ("zip.pt", "tar.pt"):
            with pytest.raises(InputError, match=f"{name} cannot be read as weights"):
                load_weights(fresh, tmp_path / name)
        with pytest.raises(InputError, match="no weights file at"):
            load_weights(fresh, tmp_path)

    @pytest.mark.parametrize(
        ("content", "got"),
        [([1, 2], "list"), (3, "int"), ({"state_dict": {"a": 1}}, "dict"), ({1: torch.ones(1)}, "dict")],
    )
    def test_file_without_a_state_dict(self, tmp_path, fresh, content, got):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(InputError, match=f"w.pt holds no state dict, but {got}"):
            load_weights(fresh, tmp_path / "w.pt")
