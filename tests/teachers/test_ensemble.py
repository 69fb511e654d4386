"""Ensemble: each mean in float64 by hand, class maps, batched teachers against the loop."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from kd_lightning import Batch, InputError, Teacher
from kd_lightning.models import CifarResNet, DigitsCNN
from kd_lightning.teachers.ensemble import Ensemble

NAN = float("nan")
FULL = [[0, 1, 2, 3]] * 3
PARTIAL = [[2, 0, 1], [3, 1], [0, 1, 2, 3]]  # orders and choices of four classes
ROWS = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.6, 0.0, 0.4], [0.1, 0.1, 0.8], [0.0, 0.0, 1.0]])


class Fixed(nn.Module):
    """A network that gives the logits it was made with, whatever comes in; notes for how many rows."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.rows = nn.Parameter(logits.clone()), []

    def forward(self, x):
        self.rows.append(len(x))
        return self.logits[x[:, 0].long()]


def batch(rows=5):
    """Rows that a Fixed network knows by their number."""
    return Batch(torch.arange(float(rows))[:, None])


def outputs(maps, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, len(classes), generator=generator) for classes in maps]


def ensemble(logits, maps, **kwargs):
    return Ensemble([Teacher(Fixed(z), classes=m) for z, m in zip(logits, maps, strict=True)], **kwargs)


def probabilities(task, z, temperature):
    z = z / temperature
    return 1 / (1 + np.exp(-z)) if task != "multiclass" else np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def by_hand(task, logits, maps, weights, temperature, standardize=False):
    """q(c), entry by entry in float64; logits are each teacher's own (B, C_k), weights (B, K)."""
    q = np.zeros((len(weights), 4))
    for b in range(len(q)):
        softened = [z[b].double().numpy() for z in logits]
        if standardize:
            softened = [(z - z.mean()) / (1e-7 + z.std(ddof=1)) for z in softened]
        softened = [probabilities(task, z, temperature) for z in softened]
        for c in range(4):
            knowing = [k for k, classes in enumerate(maps) if c in classes]
            mass = sum(weights[b][k] for k in knowing)
            q[b, c] = sum(weights[b][k] * softened[k][maps[k].index(c)] for k in knowing) / mass
        if task == "multiclass":
            q[b] /= q[b].sum()
    return q


class TestPool:
    @pytest.mark.parametrize("task", ["multiclass", "multilabel"])
    @pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
    @pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [3, 0, 1], "rows"])
    @pytest.mark.parametrize("maps", [FULL, PARTIAL], ids=["full", "partial"])
    def test_by_hand(self, task, temperature, weights, maps):
        logits, rows = outputs(maps), ROWS if weights == "rows" else None
        given = None if weights == "rows" else weights
        teachers = ensemble(logits, maps, task=task, weights=given)
        each = np.array(given or [1, 1, 1], dtype=float)
        used = [each / each.sum()] * 5 if rows is None else rows.double().numpy().copy()
        if rows is not None and maps is PARTIAL:  # where those that know a class have no weight, the ensemble's count
            rows = ROWS[[0, 2, 3, 4, 4]]
            used = rows.double().numpy()
        pooled = teachers.pool(teachers(batch()), rows, temperature)
        found = probabilities(task, pooled.double().numpy(), temperature)
        assert found == pytest.approx(by_hand(task, logits, maps, used, temperature), rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize("column", [True, False])
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_binary(self, column, temperature):
        logits = [2 * torch.randn(5, generator=torch.Generator().manual_seed(k)) for k in range(3)]
        shaped = [z[:, None] if column or k == 1 else z for k, z in enumerate(logits)]  # mixed where not column
        teachers = Ensemble([Fixed(z) for z in shaped], task="binary", weights=[1, 2, 5])
        pooled = teachers.pool(teachers(batch()), None, temperature)
        assert pooled.shape == (5, 1)
        expected = sum(
            w * probabilities("binary", z.double().numpy(), temperature)
            for w, z in zip([0.125, 0.25, 0.625], logits, strict=True)
        )
        assert probabilities("binary", pooled[:, 0].double().numpy(), temperature) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("maps", [FULL, PARTIAL], ids=["full", "partial"])
    def test_standardised_before_the_mean(self, maps):
        logits = outputs(maps)
        teachers = ensemble(logits, maps)
        pooled = teachers.pool(teachers(batch()), None, 2.0, standardize=True)
        expected = by_hand("multiclass", logits, maps, np.full((5, 3), 1 / 3), 2.0, standardize=True)
        assert probabilities("multiclass", pooled.double().numpy(), 2.0) == pytest.approx(expected, rel=1e-4)

    def test_standardised_of_a_single_class(self):
        """Its deviation is that of one number, which must not make the mean NaN."""
        teachers = ensemble(outputs([[0, 1, 2], [3]]), [[0, 1, 2], [3]])
        assert teachers.pool(teachers(batch()), None, 2.0, standardize=True).isfinite().all()

    def test_a_class_of_rows_without_weight(self):
        """Class 3 is known to teachers 1 and 2 alone: where these have no weight, their equal own ones count."""
        maps = [[0, 1, 2], [3, 1], [0, 1, 2, 3]]
        logits = outputs(maps)
        teachers = ensemble(logits, maps)
        alone = torch.tensor([[1.0, 0.0, 0.0]] * 5)
        softened = [probabilities("multiclass", z.double().numpy(), 2.0) for z in logits]
        q = np.concatenate([softened[0], (softened[1][:, :1] + softened[2][:, 3:]) / 2], axis=1)
        q /= q.sum(1, keepdims=True)
        pooled = teachers.pool(teachers(batch()), alone, 2.0)
        assert probabilities("multiclass", pooled.double().numpy(), 2.0) == pytest.approx(q, rel=1e-5)

    @pytest.mark.parametrize("task", ["multiclass", "multilabel"])
    def test_of_certain_teachers(self, task):
        """Log-odds in float64 by hand, where float32 probabilities would be 0 and 1."""
        one, other = torch.tensor([[80.0, -90.0]]), torch.tensor([[70.0, -60.0]])
        pooled = Ensemble([Fixed(one), Fixed(other)], task=task).pool(torch.stack([one, other])).double()
        if task == "multiclass":  # p(second) = mean of exp(-170) and exp(-130)
            assert pooled[0, 1] - pooled[0, 0] == pytest.approx(np.log(np.exp(-130.0) / 2), rel=1e-5)
        else:
            assert pooled[0, 0].item() == pytest.approx(70 + np.log(2), rel=1e-5)
            assert pooled[0, 1].item() == pytest.approx(-60 - np.log(2), rel=1e-5)

    def test_of_half_precision(self):
        logits = outputs(FULL)
        combined = ensemble([z.bfloat16() for z in logits], FULL)(batch())
        assert combined.dtype == torch.float32
        assert torch.equal(combined, torch.stack([z.bfloat16().float() for z in logits]))
        assert ensemble([z.double() for z in logits], FULL)(batch()).dtype == torch.float64


class TestConfidence:
    @pytest.mark.parametrize("maps", [FULL, PARTIAL, [[0, 1], [2, 3], [0, 1, 2, 3]]])
    def test_multiclass_by_hand(self, maps):
        logits, y = outputs(maps), torch.tensor([0, 1, -100, 2, 3])
        teachers = ensemble(logits, maps, weights=[1, 2, 5])
        expected = np.zeros((5, 3))
        for b, label in enumerate(y.tolist()):
            knowing = [k for k in range(3) if label in maps[k]]
            if label == -100:
                expected[b] = [0.125, 0.25, 0.625]
            elif len(knowing) == 1:
                expected[b, knowing] = 1
            else:
                softened = [probabilities("multiclass", logits[k][b].double().numpy(), 1) for k in knowing]
                losses = np.array([-np.log(p[maps[k].index(label)]) for p, k in zip(softened, knowing, strict=True)])
                expected[b, knowing] = (1 - np.exp(losses) / np.exp(losses).sum()) / (len(knowing) - 1)
        assert teachers.confidence(teachers(batch()), y).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-7)

    @pytest.mark.parametrize("task", ["multilabel", "binary"])
    def test_of_labels_by_hand(self, task):
        shape, y = (5, 4), torch.tensor([[0, 1, 1, 0], [NAN] * 4, [1, NAN, 0, NAN], [1, 1, 1, 1], [NAN, NAN, NAN, 0]])
        if task == "binary":
            shape, y = (5,), torch.tensor([0, 1, -100, 1, 0])
        logits = [2 * torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]
        teachers = Ensemble([Fixed(z) for z in logits], task=task)
        found = teachers.confidence(teachers(batch()), y)
        for b, labels in enumerate(y.reshape(5, -1).tolist()):
            known = [c for c, label in enumerate(labels) if label in (0, 1)]
            softened = [probabilities(task, z.reshape(5, -1)[b].double().numpy(), 1) for z in logits]
            losses = np.array(
                [-np.mean([np.log(p[c] if labels[c] else 1 - p[c]) for c in known or [0]]) for p in softened]
            )
            expected = (1 - np.exp(losses) / np.exp(losses).sum()) / 2 if known else [1 / 3] * 3
            assert found[b].numpy() == pytest.approx(expected, rel=1e-5)

    def test_without_labels(self):
        teachers = ensemble(outputs(FULL), FULL, weights=[1, 2, 5])
        assert teachers.confidence(teachers(batch()), None).tolist() == [[0.125, 0.25, 0.625]] * 5


class TestClasses:
    def check(self, teachers, classes):
        teachers.check_classes(teachers(batch()), classes)

    def test_in_the_students_order(self):
        logits = outputs(PARTIAL)
        combined = ensemble(logits, PARTIAL)(batch())
        assert combined.shape == (3, 5, 4)
        for k, classes in enumerate(PARTIAL):
            for c in range(4):
                expected = logits[k][:, classes.index(c)] if c in classes else torch.full((5,), -torch.inf)
                assert torch.equal(combined[k, :, c], expected)

    @pytest.mark.parametrize(
        ("maps", "weights", "message"),
        [
            ([[0, 1], [1, 3]], None, r"no teacher .* knows the student's classes \[2\]"),
            ([[0, 1], [1, 2]], None, r"no teacher .* knows the student's classes \[3\]"),
            ([[0, 1, 2], [1, 2, 3]], [1, 0], r"no teacher \(of weight above 0\) knows the student's classes \[3\]"),
            ([[0, 1, 2, 3], [1, 2, 4]], None, r"teachers\[1\]: its classes \[1, 2, 4\] exceed the student's, 0 ... 3"),
            (
                [None, [1, 2, 4]],
                None,
                r"teachers\[1\]: its classes \[1, 2, 4\] exceed the 4 outputs of a teacher",
            ),
            ([None, None], None, "same number of outputs, got 3 and 4"),
            ([None, [0, 1]], [0, 1], r"no teacher \(of weight above 0\) knows the student's classes \[2, 3\]"),
        ],
    )
    def test_must_cover_the_students(self, maps, weights, message):
        sizes = [range(4) if m is None and "number" not in message else m or range(3) for m in maps]
        teachers = ensemble(outputs(sizes), maps, weights=weights)
        with pytest.raises(InputError, match=message):
            self.check(teachers, 4)

    def test_unequal_outputs_without_a_map(self):
        teachers = ensemble(outputs([range(3), range(4)]), [None, None])
        message = re.escape("teachers must give outputs of one shape, got [3], [4]; Teacher(classes=...)")
        with pytest.raises(InputError, match=message):
            teachers(batch())
        with pytest.raises(InputError, match=re.escape("of one shape, got [3] from teachers[0], [4] from teachers[1]")):
            teachers.selected_logits(batch(), torch.tensor([0, 1, 0, 1, 0]))


class TestChoose:
    def test_each_computes_its_own_rows(self):
        logits, choice = outputs(FULL), torch.tensor([2, 0, 2, 2, 0])
        teachers = ensemble(logits, FULL)
        selected = teachers.selected_logits(batch(), choice)
        assert torch.equal(selected, torch.stack([logits[k][row] for row, k in enumerate(choice.tolist())]))
        assert [teacher.network.rows for teacher in teachers] == [[2], [], [3]]

    def test_binary_of_two_shapes(self):
        logits = outputs([[0]] * 2)
        teachers = Ensemble([Fixed(logits[0]), Fixed(logits[1][:, 0])], task="binary")
        choice = torch.tensor([1, 0, 0, 1, 1])
        expected = [logits[k][row, 0].item() for row, k in enumerate(choice.tolist())]
        assert teachers.selected_logits(batch(), choice).flatten().tolist() == pytest.approx(expected)


class TestTeachers:
    @pytest.mark.parametrize(
        "teachers", [nn.Sequential(DigitsCNN(4)), Teacher(DigitsCNN(4)), [DigitsCNN(4), None], "net"]
    )
    def test_must_be_a_list_of_networks(self, teachers):
        with pytest.raises(InputError, match="teachers must be a list of networks, got"):
            Ensemble(teachers)

    def test_a_file_names_what_reads_it(self):
        with pytest.raises(InputError, match=r"got 'net.pt2'; kd_lightning.teachers.ExportedNetwork \(arg"):
            Ensemble([DigitsCNN(4), "net.pt2"])

    def test_each_with_its_own_preprocess(self):
        torch.manual_seed(0)
        networks, x = [DigitsCNN(4).eval() for _ in range(3)], torch.rand(4, 1, 8, 8)
        teachers = Ensemble(
            [
                Teacher(networks[0], preprocess=v2.Normalize([0.3], [0.5]), device="cpu"),
                Teacher(networks[1], preprocess=v2.Resize(16)),
                networks[2],
            ]
        )
        with torch.no_grad():
            expected = torch.stack(
                [
                    networks[0]((x - 0.3) / 0.5),
                    networks[1](v2.functional.resize(x, [16])),
                    networks[2](x),
                ]
            )
        assert torch.allclose(teachers(Batch(x)), expected, atol=1e-6)
        selected = teachers.selected_logits(Batch(x), torch.tensor([0, 1, 2, 1]))
        assert torch.allclose(selected, expected[[0, 1, 2, 1], range(4)], atol=1e-6)

    @pytest.mark.parametrize("use_vmap", [True, False])
    def test_stay_frozen_whoever_calls_train(self, use_vmap):
        torch.manual_seed(0)
        networks, x = [DigitsCNN(4) for _ in range(2)], torch.rand(4, 1, 8, 8)
        own = nn.BatchNorm2d(1)
        teachers = Ensemble([Teacher(networks[0], preprocess=own), Teacher(networks[1])], use_vmap=use_vmap)
        expected = teachers(Batch(x))
        for caller in (teachers, *networks, own):
            caller.train()
        assert torch.allclose(teachers(Batch(x)), expected, atol=1e-6)
        assert own.running_mean.item() == 0
        assert not any(module.training for network in networks for module in network.modules())
        assert not any(p.requires_grad for network in networks for p in network.parameters())
        assert not list(teachers.parameters())
        assert not teachers.state_dict()

    def test_copies_share_them(self):
        teachers = ensemble(outputs(FULL), FULL)
        twin = copy.deepcopy(nn.ModuleList([teachers]))[0]
        assert all(one.network is other.network for one, other in zip(twin, teachers, strict=True))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1.0], "teacher_weights must be 2 numbers, one for each teacher, got \\[1.0\\]"),
            ([], "teacher_weights must be 2 numbers, one for each teacher, got \\[\\]"),
            ([1, 2, 3], "teacher_weights must be 2 numbers, one for each teacher, got \\[1, 2, 3\\]"),
            ([2, -1], r"finite, at least 0 and not all 0, got \[2, -1\]"),
            ([0, 0], r"finite, at least 0 and not all 0, got \[0, 0\]"),
            ([1, NAN], r"finite, at least 0 and not all 0, got \[1, nan\]"),
            (0.5, "teacher_weights must be a list of numbers, got 0.5"),
            ([1, np.inf], r"finite, at least 0 and not all 0, got \[1, inf\]"),
        ],
    )
    def test_weights(self, weights, message):
        with pytest.raises(InputError, match=message):
            Ensemble([DigitsCNN(4), DigitsCNN(4)], weights=weights)
        with pytest.raises(InputError, match="teachers must hold at least one teacher, got none"):
            Ensemble([])


def digits_networks(count=3, outputs=10):
    networks = []
    for seed in range(count):
        torch.manual_seed(seed)
        networks.append(DigitsCNN(4, outputs))
        networks[-1](torch.randn(32, 1, 8, 8) + seed)  # statistics of its own
    return networks


class Several(nn.Module):
    """Needs two inputs; one may be in a list."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 3)

    def forward(self, ids, factor):
        ids = ids[0] if isinstance(ids, list) else ids
        return (self.words(ids) * factor.unsqueeze(-1)).sum(dim=1)


def change_of(times, ids, factor):
    return {"factor": times * factor, "ids": ids}


class TestBatched:
    def check(self, make, x):
        """Equal to the loop over copies that nothing has touched, also after the module has moved."""
        loop, batched = Ensemble(make()), Ensemble(make(), use_vmap=True)
        expected = loop(Batch(x))
        assert torch.allclose(batched(Batch(x)), expected, atol=1e-5)
        assert batched.double()(Batch(x.double())).dtype == torch.float64
        assert torch.allclose(batched(Batch(x.double())), loop.double()(Batch(x.double())), atol=1e-10)
        assert torch.allclose(batched.float()(Batch(x)), expected, atol=1e-5)
        alone = batched[0](Batch(x))
        assert torch.allclose(alone, expected[0, :, : alone.shape[1]], atol=1e-5)
        return batched

    def test_digits(self):
        x = torch.randn(5, 1, 8, 8)
        batched = self.check(digits_networks, x)
        networks = [teacher.network for teacher in batched]
        for tensors in zip(*(network.state_dict().values() for network in networks), strict=True):
            (storage,) = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            assert tensors[0].untyped_storage().nbytes() == 3 * tensors[0].nbytes, storage
        fresh = [Teacher(network).fingerprint() for network in networks]
        assert fresh == [Teacher(network).fingerprint() for network in digits_networks()]

    def test_resnets(self):
        def make():
            torch.manual_seed(0)
            return [CifarResNet(8, (4, 4, 8, 8), 5) for _ in range(2)]

        self.check(make, torch.randn(3, 3, 12, 12))

    def test_preprocess_and_classes(self):
        maps, changes = [[2, 0, 1], [3, 1, 2], [0, 1, 3]], [v2.Normalize([0.2], [0.5]), None, v2.Normalize([1], [2])]

        def make():
            networks = digits_networks(outputs=3)
            return [Teacher(n, preprocess=p, classes=c) for n, p, c in zip(networks, changes, maps, strict=True)]

        self.check(make, torch.randn(4, 1, 8, 8))

    @pytest.mark.parametrize(
        ("other", "name"), [(DigitsCNN(8), "DigitsCNN"), (CifarResNet(8, num_classes=10, in_channels=1), "CifarResNet")]
    )
    def test_another_architecture(self, other, name):
        with pytest.raises(InputError, match=rf"use_vmap needs .* teachers\[1\] \({name}\) differs from teachers\[0"):
            Ensemble([DigitsCNN(4), other], use_vmap=True)

    def refused_or_as_the_loop(self, teachers, x):
        expected = Ensemble(teachers)(Batch(x))
        try:
            found = Ensemble(teachers, use_vmap=True)(Batch(x))
        except InputError:
            return
        assert torch.allclose(found, expected, atol=1e-5)

    def test_inputs_of_several_sizes(self):
        teachers = [Teacher(n, preprocess=v2.Resize(8 * k + 8)) for k, n in enumerate(digits_networks(2))]
        self.refused_or_as_the_loop(teachers, torch.randn(3, 1, 8, 8))

    @pytest.mark.parametrize("kind", ["mapping", "tuple", "nested", "teacher_inputs"])
    @pytest.mark.parametrize("preprocess", [False, True])
    def test_inputs_of_each_form(self, kind, preprocess):
        def make():
            networks = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                networks.append(Several())
            if not preprocess:
                return networks
            return [Teacher(n, preprocess=partial(change_of, k + 2)) for k, n in enumerate(networks)]

        ids, factor = torch.arange(12).reshape(3, 4), torch.rand(3, 1)
        x = {"mapping": {"ids": ids, "factor": factor}, "tuple": (ids, factor)}.get(
            kind, {"ids": [ids], "factor": factor}
        )
        batch = Batch(x)
        if kind == "teacher_inputs":
            batch = Batch(torch.zeros(3, 2), teacher_inputs={"ids": ids, "factor": factor})
        loop, batched = Ensemble(make()), Ensemble(make(), use_vmap=True)
        for _ in range(2):
            assert torch.allclose(batched(batch), loop(batch), atol=1e-6)

    def test_networks_that_differ_in_a_plain_number(self):
        """Their repr and their weights' shapes are the same, their forwards are not."""

        class Scaled(DigitsCNN):
            def __init__(self, scale):
                super().__init__(4)
                self.scale = scale

            def forward(self, x):
                return self.scale * super().forward(x)

        self.refused_or_as_the_loop([Scaled(1.0), Scaled(5.0)], torch.randn(3, 1, 8, 8))

    def test_networks_without_parameters(self):
        class Buffers(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("weight", torch.randn(64, 4))

            def forward(self, x):
                return x.flatten(1) @ self.weight

        self.refused_or_as_the_loop([Buffers(), Buffers()], torch.randn(3, 1, 8, 8))

    def test_networks_serve_others_after_inference_mode(self):
        """Lightning validates under inference_mode; the user's networks must not be bound to it for ever."""
        networks, x = digits_networks(2), torch.randn(3, 1, 8, 8)
        with torch.inference_mode():
            Ensemble(networks, use_vmap=True)(Batch(x))
        networks[0].load_state_dict(copy.deepcopy(networks[1].state_dict()))
        networks[1].requires_grad_(True).train()(x).sum().backward()
