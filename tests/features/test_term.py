"""Terms: what building gives and leaves unchanged, the values by hand, and real networks."""

import copy
import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, vit_b_16
from torchvision.models.vision_transformer import VisionTransformer

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.arrange import to_map
from kd_lightning.features.capture import capture
from kd_lightning.features.mlp_projector import MLPProjector
from kd_lightning.features.review_fusion import ReviewFusion
from kd_lightning.features.standardization import ChannelStandardization
from kd_lightning.features.term import FeatureTerm
from kd_lightning.features.trace import trace_student, trace_teacher
from kd_lightning.losses import HintLoss
from kd_lightning.teachers.teacher import Teacher
from tests.features.conftest import WAVES, Network, Student, X, random_tensor, sequences

CPU = torch.device("cpu")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Student()


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return Teacher(Network())


def built(student, teacher, layers, given=None, x=X, loss=None, **kwargs):
    """Build a term from a pass of both networks."""
    term = FeatureTerm(layers, loss or HintLoss(), projector=given, **kwargs)
    mine = trace_student(student, x, layers)
    theirs = trace_teacher(teacher.network, teacher.prepare(x), layers.values())
    pairs = [*layers.items()]
    term.build(
        [(mine.shape(one), theirs.shape(other)) for one, other in pairs],
        [(mine.layouts[one], theirs.layouts[other]) for one, other in pairs],
        len(x),
        CPU,
        mine.outputs[pairs[0][0]].dtype,
    )
    return term


def outputs(term, student, teacher, x=X):
    with capture(student, [*term.layers]) as mine:
        student(x)
    with capture(teacher.network, [*term.layers.values()]) as theirs:
        teacher(Batch(x))
    return mine, theirs


def run(term, student, teacher, x=X):
    return term.features(*outputs(term, student, teacher, x), len(x))


def projectors(term):
    return [pair.projector for pair in term.pairs]


LAYERS = {"stem.0": "body.0", "mid": "top.1", "deep": "body.2"}


class Relation(nn.Module):
    """A loss of features of any shapes, which notes what it is built for."""

    needs_projector: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.built = []

    def build(self, student, teacher, samples):
        self.built.append(([*student], [*teacher], samples))
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, student, teacher, batch):
        return self.scale * (student.flatten(1).mean(1) - teacher.flatten(1).mean(1)).square().mean()


class TestBuild:
    def test_features_by_hand(self, student, teacher):
        term = built(student, teacher, {"mid": "top.2", "stem.0": "body.0", "head": "fc"})
        assert [pair.shapes for pair in term.pairs] == [
            ([5, 4, 4], [8, 4, 4]),
            ([4, 8, 8], [7, 8, 8]),
            ([5], [5]),
        ]
        assert [type(projector[0]) for projector in projectors(term)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
        size = (5 + 1) * 8 + (4 + 1) * 7 + (5 + 1) * 5
        assert term.size() == parameters(term) == size
        assert term.describe() == (
            "mid [5, 4, 4] -> top.2 [8, 4, 4]; stem.0 [4, 8, 8] -> body.0 [7, 8, 8]; head [5] -> fc [5]; "
            f"{size} parameters in projectors"
        )
        student.eval()
        features = run(term, student, teacher)
        assert [*features] == ["mid", "stem.0", "head"]
        network, (one, two, _) = teacher.network, projectors(term)
        z = student.stem[0](X)
        torch.testing.assert_close(features["stem.0"][0], F.conv2d(z, two[0].weight, two[0].bias))
        z = student.mid(student.stem[1](z).relu())
        torch.testing.assert_close(features["mid"][0], F.conv2d(z, one[0].weight, one[0].bias))
        torch.testing.assert_close(features["mid"][1], network.top(network.body(X)))
        torch.testing.assert_close(features["stem.0"][1], network.body[0](X))
        torch.testing.assert_close(features["head"][1], network(X))
        values = term(*outputs(term, student, teacher), Batch(X))
        assert [*values] == [*features]
        for name, (mine, theirs) in features.items():
            expected = (mine - theirs).square().flatten(1).sum(1).mean() / 2
            torch.testing.assert_close(values[name], expected)

    def test_the_networks_own_outputs(self, student, teacher):
        term = built(student, teacher, {"": "", "mid": "top"})
        student.eval()
        mine, theirs = run(term, student, teacher)[""]
        torch.testing.assert_close(mine, projectors(term)[0](student(X)))
        assert torch.equal(theirs, teacher(Batch(X)))
        assert term.describe().startswith("output [5] -> output [5]; mid")

    def test_own_ones_are_used_and_others_built(self, student, teacher):
        mine = nn.Conv2d(5, 8, 3, padding=1)
        term = built(student, teacher, LAYERS, {"mid": mine})
        assert term.pairs[1].projector is mine
        assert {key.split(".projector")[0] for key in term.state_dict()} == {"pairs.0", "pairs.1", "pairs.2"}
        student.eval()
        features = run(term, student, teacher)
        torch.testing.assert_close(features["mid"][0], mine(student.mid(student.stem(X).relu())))

    def test_one_module_for_one_pair(self, student, teacher):
        mine = nn.Conv2d(5, 8, 1)
        assert projectors(built(student, teacher, {"mid": "top"}, mine)) == [mine]

    def test_tokens_of_an_own_projector_have_their_channels_first(self):
        own = nn.Conv1d(8, 6, 1)
        student, teacher = sequences(8), Teacher(sequences(6))
        term = built(student, teacher, {"block": "block", "conv": "block"}, {"block": own}, x=WAVES)
        assert [pair.layouts for pair in term.pairs] == [("last", "last"), ("first", "last")]
        mine, theirs = outputs(term, student.eval(), teacher, WAVES)
        features = term.features(mine, theirs, 3)
        torch.testing.assert_close(features["block"][0], own(mine["block"].mT))
        conv = projectors(term)[1][0]
        torch.testing.assert_close(features["conv"][0], F.conv1d(mine["conv"], conv.weight, conv.bias))
        assert all(torch.equal(theirs["block"].mT, target) for _, target in features.values())

    def test_projectors_with_build(self, student, teacher):
        given = {"mid": MLPProjector(3), "stem.0": MLPProjector()}
        term = built(student, teacher, LAYERS, given)
        assert [type(projector).__name__ for projector in projectors(term)] == [
            "MLPProjector",
            "MLPProjector",
            "Regressor",
        ]
        for mine, theirs in run(term, student, teacher).values():
            assert mine.shape == theirs.shape

    def test_train_and_depend_on_the_seed_alone(self, student, teacher):
        layers = {"mid": "top", "deep": "top"}
        torch.manual_seed(5)
        one = built(student, teacher, layers)
        torch.rand(7)  # the generator's state does not matter
        generator = torch.get_rng_state()
        other = built(student, teacher, layers, x=X + 1)
        assert torch.equal(torch.get_rng_state(), generator) and torch.initial_seed() == 5
        for mine, same in zip(projectors(one), projectors(other), strict=True):
            assert torch.equal(mine[0].weight, same[0].weight)
        assert not torch.equal(projectors(one)[0][0].bias, projectors(one)[1][0].bias)  # one after the other
        assert all(module.training for module in one.modules())
        assert all(p.requires_grad for p in one.parameters())
        torch.manual_seed(6)
        third = built(student, teacher, {"mid": "top"})
        assert not torch.equal(projectors(third)[0][0].weight, projectors(one)[0][0].weight)

    @pytest.mark.parametrize("fault", [None, "shape", "crash"])
    def test_leaves_what_is_given_as_it_was(self, student, teacher, fault):
        width = 9 if fault == "shape" else 8
        given = nn.Sequential(nn.BatchNorm2d(6 if fault == "crash" else 5), nn.Conv2d(5, width, 1), nn.Dropout(0.5))
        given[2].eval()
        state, generator = copy.deepcopy(given.state_dict()), torch.get_rng_state()
        if fault:
            with pytest.raises(InputError):
                built(student, teacher, {"mid": "top", "deep": "body.0"}, {"mid": given})
        else:
            built(student, teacher, {"mid": "top", "deep": "body.0"}, {"mid": given})
        assert torch.equal(torch.get_rng_state(), generator)
        assert [layer.training for layer in given.modules()] == [True, True, True, False]
        assert all(torch.equal(state[key], value) for key, value in given.state_dict().items())

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("tokens", [True, False])
    def test_state_dict_round_trip_by_shapes_and_layouts(self, student, teacher, own, tokens, tmp_path):
        layers = {"block": "block", "conv": "conv", "conv.2": "block"} if tokens else LAYERS
        if tokens:
            student, teacher = sequences(8), Teacher(sequences(6))
        x, name = (WAVES, "block") if tokens else (X, "mid")

        def given():
            return {name: MLPProjector()} if own else None

        term = built(student, teacher, layers, given(), x=x)
        pairs = [pair.shapes for pair in term.pairs], [pair.layouts for pair in term.pairs]
        torch.save({"pairs": pairs, "state": term.state_dict()}, tmp_path / "t.pt")
        saved = torch.load(tmp_path / "t.pt", weights_only=True)
        again = FeatureTerm(layers, HintLoss(), projector=given())
        assert not again.is_built
        torch.manual_seed(9)
        again.build(*saved["pairs"], None, CPU)
        again.load_state_dict(saved["state"])
        assert again.is_built and again.describe() == term.describe() and repr(again) == repr(term)
        student.eval()
        one, other = run(term, student, teacher, x), run(again, student, teacher, x)
        assert all(torch.equal(one[layer][0], other[layer][0]) for layer in layers)

    @pytest.mark.parametrize(
        ("device", "dtype"),
        [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.float16), ("cpu", torch.bfloat16)],
    )
    def test_device_and_dtype(self, device, dtype):
        term = FeatureTerm({"a.b": "c"}, Relation(), projector=MLPProjector())
        built_in = FeatureTerm({"a.b": "c"}, HintLoss())
        generator = torch.get_rng_state()
        for part in (term, built_in):
            with torch.device("meta"):  # whatever the default is
                part.build([([4, 3, 3], [2, 2, 2])], [("first", "first")], None, torch.device(device), dtype)
            assert {(p.device.type, p.dtype) for p in part.parameters()} == {(device, dtype)}
        assert torch.equal(torch.get_rng_state(), generator)

    def test_a_double_projector_stays_exact(self):
        own = nn.Conv2d(4, 2, 1).double()
        weight = own.weight.clone()
        term = FeatureTerm({"a": "b"}, HintLoss(), projector=own)
        term.build([([4, 3, 3], [2, 3, 3])], [("first", "first")], None, CPU, torch.float64)
        assert torch.equal(own.weight, weight)

    def test_images_that_the_teacher_preprocesses(self, student):
        network = Network()
        teacher = Teacher(network, preprocess=nn.Upsample(scale_factor=2))
        term = built(student, teacher, {"mid": "body"})
        assert term.pairs[0].shapes == ([5, 4, 4], [7, 16, 16])
        expected = network.body(F.interpolate(X, scale_factor=2))
        torch.testing.assert_close(run(term, student, teacher)["mid"][1], expected)

    @pytest.mark.parametrize("size", [4, 8, 12, 9])
    def test_images_of_another_size(self, student, teacher, size):
        term = built(student, teacher, {"mid": "body", "stem": "top"})
        images = torch.randn(2, 3, size, size)
        if size == 4:  # the kernel for stem is 5 x 5
            with pytest.raises(InputError, match=r"^stem -> top: a map of \[4, 4\] is smaller than the projector's"):
                run(term, student, teacher, images)
            return
        for mine, theirs in run(term, student, teacher, images).values():
            assert mine.shape == theirs.shape


class TestLosses:
    @pytest.mark.parametrize("pool", [None, "mean"])
    def test_each_pair_has_its_own_loss(self, student, teacher, pool):
        loss = Relation()
        term = built(student, teacher, {"mid": "top", "stem": "body"}, loss=loss, pool=pool)
        assert term.loss is loss and term.losses[1] is not loss
        sizes = ([], []) if pool else ([4, 4], [8, 8])
        assert loss.built == [([5, *sizes[0]], [8, *sizes[0]], 3)]
        assert term.losses[1].built == [([4, *sizes[1]], [7, *sizes[1]], 3)]
        assert not torch.equal(loss.scale, term.losses[1].scale)
        assert {*term.state_dict()} == {"losses.0.scale", "losses.1.scale"}
        assert projectors(term) == [None, None]
        values = term(*outputs(term, student.eval(), teacher), Batch(X))
        mine, theirs = run(term, student, teacher)["stem"]
        expected = term.losses[1].scale * (mine.flatten(1).mean(1) - theirs.flatten(1).mean(1)).square().mean()
        torch.testing.assert_close(values["stem"], expected)

    def test_a_loss_is_built_for_projected_shapes(self, student, teacher):
        class Needy(Relation):
            needs_projector = True

        loss = Needy()
        built(student, teacher, {"mid": "body"}, loss=loss)
        assert loss.built == [([7, 8, 8], [7, 8, 8], 3)]
        loss = Relation()
        built(student, teacher, {"mid": "body"}, nn.Conv2d(5, 2, 3), loss=loss)
        assert loss.built == [([2, 2, 2], [7, 8, 8], 3)]

    def test_losses_without_parts_of_their_own_are_one(self):
        loss = HintLoss()
        term = FeatureTerm({"a": "b", "c": "d"}, loss)
        assert [*term.losses] == [loss, loss]
        loss.register_buffer("mean", torch.zeros(2))
        term = FeatureTerm({"a": "b", "c": "d"}, loss)
        assert term.losses[0] is loss and term.losses[1] is not loss

    @pytest.mark.parametrize(("value", "shown"), [(torch.zeros(3), r"\[3\]"), (1.0, "float")])
    def test_a_value_that_is_no_scalar(self, student, teacher, value, shown):
        class Wrong(HintLoss):
            def forward(self, *args):
                return value

        term = built(student, teacher, {"mid": "top"}, loss=Wrong())
        with pytest.raises(InputError, match=rf"^loss: Wrong must return a scalar, got {shown}$"):
            term(*outputs(term, student, teacher), Batch(X))

    def test_rows_of_each_batch(self, student, teacher):
        term = built(student, teacher, {"mid": "top"})
        features = {"mid": torch.zeros(4, 5, 4, 4)}, {"top": torch.zeros(4, 8, 4, 4)}
        term.features(*features, 4)
        with pytest.raises(InputError, match="^the student's layer mid must return a row for each of 2 samples, got"):
            term.features(*features, 2)
        with pytest.raises(InputError, match="^the teacher's layer top is never called"):
            term.features(features[0], {}, 4)

    def test_no_samples(self, student, teacher):
        term = built(student, teacher, {"mid": "top", "stem": "top"})
        mine = {"mid": torch.zeros(0, 5, 4, 4, requires_grad=True), "stem": torch.zeros(0, 4, 8, 8)}
        values = term(mine, {"top": torch.zeros(0, 8, 4, 4)}, Batch(torch.zeros(0, 3, 8, 8)))
        assert [value.item() for value in values.values()] == [0, 0]
        values["mid"].backward()
        assert mine["mid"].grad.shape == (0, 5, 4, 4)

    def test_a_teacher_of_whole_numbers(self, student, teacher):
        term = built(student, teacher, {"mid": "top"})
        mine, theirs = {"mid": torch.randn(3, 5, 4, 4)}, {"top": torch.randint(9, (3, 8, 4, 4))}
        expected = term(mine, {"top": theirs["top"].float()}, Batch(X))["mid"]
        assert torch.equal(term(mine, theirs, Batch(X))["mid"], expected)


class Doubled(nn.Module):
    """A joint projector: each stage has its own layer, and the next one is added."""

    joint: ClassVar[bool] = True

    def build(self, students, teachers):
        self.seen = students, teachers
        self.layers = nn.ModuleList(
            nn.Conv2d(one[0], other[0], 1) for one, other in zip(students, teachers, strict=True)
        )

    def forward(self, features):
        return [layer(feature) for layer, feature in zip(self.layers, features, strict=True)]


class TestJoint:
    def test_all_pairs_in_one_call(self, student, teacher):
        own = Doubled()
        term = built(student, teacher, {"stem": "body.0", "mid": "top"}, own)
        assert own.seen == ([[4, 8, 8], [5, 4, 4]], [[7, 8, 8], [8, 4, 4]])
        assert term.joint is own and projectors(term) == [None, None]
        student.eval()
        mine, theirs = outputs(term, student, teacher)
        features = term.features(mine, theirs, 3)
        for layer, (name, (projected, target)) in zip(own.layers, features.items(), strict=True):
            torch.testing.assert_close(projected, layer(mine[name]))
            assert torch.equal(target, theirs[term.layers[name]])

    def test_the_fusion_of_reviewkd(self, student, teacher):
        term = built(student, teacher, {"stem": "body", "mid": "top", "head": "fc"}, ReviewFusion(4))
        for mine, theirs in run(term, student, teacher).values():
            assert mine.shape == theirs.shape
        assert term.size() == parameters(term.joint) > 0

    def test_tokens_are_maps_beside_maps(self):
        own = Doubled()
        term = FeatureTerm({"block": "body"}, HintLoss(), projector=own)
        term.build([([9, 8], [7, 3, 3])], [("last", "first")], None, CPU)
        tokens = torch.randn(2, 9, 8)
        projected, _ = term.features({"block": tokens}, {"body": torch.zeros(2, 7, 3, 3)}, 2)["block"]
        torch.testing.assert_close(projected, own.layers[0](to_map(tokens)))

    def test_masked_positions_are_0(self):
        term = FeatureTerm({"a": "b"}, HintLoss(), projector=Doubled())
        term.build([([2, 2, 2], [3, 2, 2])], [("first", "first")], None, CPU)
        mask = torch.tensor([[[1, 0], [1, 1]]])
        pair = term.features({"a": torch.ones(1, 2, 2, 2)}, {"b": torch.ones(1, 3, 2, 2)}, 1, mask)["a"]
        assert all((part[:, :, 0, 1] == 0).all() and part.abs().sum() > 0 for part in pair)

    def test_refused(self, student, teacher):
        class Narrow(Doubled):
            def forward(self, features):
                return [feature[:, :1] for feature in super().forward(features)]

        with pytest.raises(InputError, match=r"^the projector gives \[1, 8, 8\] for one sample of stem, but the teac"):
            built(student, teacher, {"stem": "body", "mid": "top"}, Narrow())
        with pytest.raises(InputError, match="^projector: Doubled joins all pairs; give it alone, not in a dict$"):
            FeatureTerm({"a": "b", "c": "d"}, HintLoss(), projector={"c": Doubled()})


class TestRefused:
    def test_no_pairs(self):
        message = "layers must name at least one pair, {student's layer: teacher's layer}, got none"
        with pytest.raises(InputError, match=message):
            FeatureTerm({}, HintLoss())

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"loss": "mse"}, "^loss must be a module, got str$"),
            ({"begin_epoch": -1}, "^begin_epoch must be at least 0, got -1$"),
            ({"ramp_epochs": -2}, "^ramp_epochs must be at least 0, got -2$"),
            ({"weight": -1.0}, "^weight must be finite and at least 0, got -1.0$"),
            ({"weight": float("nan")}, "^weight must be finite and at least 0, got nan$"),
            ({"pool": "max"}, r"^pool must be one of \('mean', 'first'\) or None, got 'max'$"),
            ({"standardize": nn.LayerNorm(3)}, "^standardize must be fitted, .* got LayerNorm$"),
            ({"projector": nn.Identity()}, "^projector must be a dict by layer of the student where there are 3 pairs"),
            (
                {"projector": {"mid": nn.Identity(), "top.1": nn.Identity()}},
                r"^projector: 'top\.1' is no layer of the student; layers has stem\.0, mid, deep$",
            ),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(InputError, match=message):
            FeatureTerm(LAYERS, **{"loss": HintLoss(), **kwargs})

    def test_pair_that_does_not_join(self, student, teacher):
        message = (
            "no built-in projector maps head [5] to body.0 [7, 8, 8] (for one sample): [5] is no map (C, ...); pool: "
            "mean makes vectors of both; set other layers, or your own projector"
        )
        with pytest.raises(InputError, match="^" + re.escape(message)):
            built(student, teacher, {"mid": "top", "head": "body.0"})
        own = nn.Sequential(nn.Linear(5, 7 * 8 * 8), nn.Unflatten(1, (7, 8, 8)))
        assert built(student, teacher, {"head": "body.0"}, own).pairs[0].shapes == ([5], [7, 8, 8])
        assert built(student, teacher, {"head": "body.0"}, pool="mean").size() == (5 + 1) * 7

    @pytest.mark.parametrize("own", [nn.Conv2d(6, 8, 1), nn.Linear(3, 8), nn.Module()])
    def test_own_projector_that_crashes(self, student, teacher, own):
        with pytest.raises(InputError, match=r"^projector: one does not fit its layer: \S[^\n]+$"):
            built(student, teacher, {"stem": "body", "mid": "top"}, {"mid": own})

    def test_own_projector_of_another_output_shape(self, student, teacher):
        message = (
            "the projector of mid gives [9, 4, 4] for one sample, but the teacher's top is [8, 4, 4], with the "
            "channels first"
        )
        with pytest.raises(InputError, match="^" + re.escape(message)):
            built(student, teacher, {"stem": "body", "mid": "top"}, {"mid": nn.Conv2d(5, 9, 1)})


class TestWeight:
    @pytest.mark.parametrize(
        ("begin", "ramp", "weights"),
        [
            (0, 0, [3, 3, 3, 3, 3]),
            (2, 0, [0, 0, 3, 3, 3]),
            (0, 3, [1, 2, 3, 3, 3]),
            (1, 2, [0, 1.5, 3, 3, 3]),
            (1, 1, [0, 3, 3, 3, 3]),
        ],
    )
    def test_warm_up(self, begin, ramp, weights):
        term = FeatureTerm({"a": "b"}, HintLoss(), 3.0, begin_epoch=begin, ramp_epochs=ramp)
        assert [term.weight_in(epoch) for epoch in range(5)] == pytest.approx(weights)
        term.weight = 6.0  # as a callback does
        assert term.weight_in(4) == 6

    def test_set_to_a_wrong_one(self):
        term = FeatureTerm({"a": "b"}, HintLoss())
        term.weight = float("inf")
        with pytest.raises(InputError, match="^weight must be finite and at least 0, got inf$"):
            term.weight_in(0)


def standardized(student, teacher, layouts, pool=None):
    term = FeatureTerm({"a": "b"}, Relation(), standardize=ChannelStandardization(), pool=pool)
    term.build([([*student], [*teacher])], [layouts], None, CPU)
    return term


class TestStandardization:
    def test_each_pair_has_its_own(self, student, teacher):
        layers = {"mid": "top", "stem": "body"}
        term = built(student, teacher, layers, standardize=ChannelStandardization())
        mine, theirs = outputs(term, student.eval(), teacher)
        term.fit_standardizations(theirs)
        for layer, (_, target) in term.features(mine, theirs, 3).items():
            rows = theirs[layers[layer]].movedim(1, -1).flatten(0, 2)
            expected = (rows - rows.mean(0)) / rows.std(0, correction=0)
            torch.testing.assert_close(target.movedim(1, -1).flatten(0, 2), expected, rtol=1e-4, atol=1e-4)
        before = copy.deepcopy(term.state_dict())
        term.fit_standardizations({name: feature + 1 for name, feature in theirs.items()})  # once
        assert all(torch.equal(before[key], value) for key, value in term.state_dict().items())

    @pytest.mark.parametrize(
        ("student", "layout"), [((5, 3, 3), "first"), ((3, 3, 5), "last"), ((17, 5), "last"), ((16, 5), "last")]
    )
    def test_a_class_token_that_the_loss_does_not_get_does_not_count(self, student, layout):
        term = standardized(student, (10, 4), (layout, "last"))
        tokens = random_tensor(8, 10, 4).float()
        tokens[:, 0] += 1000
        term.fit_standardizations({"b": tokens})
        torch.testing.assert_close(term.standardizations[0].mean, tokens[:, 1:].mean((0, 1)))

    @pytest.mark.parametrize("pool", [None, "mean"])
    def test_padding_does_not_count(self, pool):
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
        tokens = random_tensor(3, 3, 4).float()
        found = []
        for padding in (0.0, 1000.0):
            term = standardized((3, 5), (3, 4), ("last", "last"), pool)
            term.fit_standardizations({"b": tokens.masked_fill(mask.unsqueeze(-1) == 0, padding)}, mask)
            found.append(term.standardizations[0])
        rows = tokens[mask == 1]
        if pool:
            rows = torch.stack([row[real == 1].mean(0) for row, real in zip(tokens, mask, strict=True)])
        for standardize in found:
            torch.testing.assert_close(standardize.mean, rows.mean(0))
            torch.testing.assert_close(standardize.scale, 1 / rows.std(0, correction=0))

    def test_masked_positions_are_0_after_it(self):
        mask = torch.tensor([[1, 1, 0]])
        term = standardized((3, 5), (3, 4), ("last", "last"))
        tokens = random_tensor(1, 3, 4).float() + 5
        term.fit_standardizations({"b": tokens})
        mine, theirs = term.features({"a": torch.ones(1, 3, 5)}, {"b": tokens}, 1, mask)["a"]
        assert (mine[..., 2] == 0).all() and (theirs[..., 2] == 0).all() and (theirs[..., :2] != 0).all()

    def test_checked_before_it_is_fitted(self, student, teacher):
        term = built(student, teacher, {"mid": "top"}, standardize=ChannelStandardization())
        mine, theirs = outputs(term, student, teacher)
        assert torch.equal(term.projected(mine, theirs, 3)[0][1], theirs["top"])
        with pytest.raises(InputError, match="ChannelStandardization is not fitted"):
            term.features(mine, theirs, 3)


@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(0)
    return resnet18(num_classes=5), Teacher(resnet18(num_classes=5))


@pytest.fixture(scope="module")
def vits():
    torch.manual_seed(0)
    vit = vit_b_16(image_size=64, num_classes=5)
    return vit, Teacher(copy.deepcopy(vit))


LAYER = "encoder.layers.encoder_layer_{}".format
R1, R2, R3, R4 = (("layer1", (64, 16, 16)), ("layer2", (128, 8, 8)), ("layer3", (256, 4, 4)), ("layer4", (512, 2, 2)))
V0, V1, PATCHES = ((LAYER(0), (17, 768)), (LAYER(1), (17, 768)), ("conv_proj", (768, 4, 4)))


class TestRealNetworks:
    """Images of 64 x 64, so 4 x 4 patches."""

    IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def check(self, student, teacher, pairs, first, size):
        student.zero_grad()
        layers = {mine: theirs for (mine, _), (theirs, _) in pairs}
        term = built(student, teacher, layers, x=self.IMAGES)
        assert [pair.shapes for pair in term.pairs] == [([*g], [*h]) for (_, g), (_, h) in pairs]
        assert term.size() == size
        values = term(*outputs(term, student, teacher, self.IMAGES), Batch(self.IMAGES))
        loss = torch.stack([*values.values()]).sum()
        loss.backward()
        assert loss.isfinite() and loss > 0
        reached = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        below = trace_student(student, self.IMAGES, layers).parameters
        assert reached.keys() == below
        assert all(g.isfinite().all() for g in reached.values()) and reached[first].abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in term.parameters())
        return below

    @pytest.mark.parametrize(
        ("pairs", "size"),
        [
            ([(R1, R1)], (64 + 1) * 64),
            ([(R2, R3)], (128 * 25 + 1) * 256),
            ([(R3, R2)], (256 + 1) * 128),
            ([(R2, R2), (R4, R3)], (128 + 1) * 128 + (512 + 1) * 256),
            ([(("avgpool", (512, 1, 1)), R4)], (512 + 1) * 512),
            ([(("fc", (5,)), ("fc", (5,)))], 30),
        ],
    )
    def test_resnets(self, resnets, pairs, size):
        below = self.check(*resnets, pairs, "conv1.weight", size)
        assert ("fc.weight" in below) == (pairs[0][0][0] == "fc")

    @pytest.mark.parametrize(
        ("pairs", "size"),
        [
            ([(R3, V0)], (256 + 1) * 768),
            ([(R2, V1), (R4, PATCHES)], (128 * 25 + 1) * 768 + (512 + 1) * 768),
        ],
    )
    def test_resnet_learns_from_a_transformer(self, resnets, vits, pairs, size):
        self.check(resnets[0], vits[1], pairs, "conv1.weight", size)

    @pytest.mark.parametrize(
        ("pairs", "size"), [([(V1, R3)], (768 + 1) * 256), ([(V0, R2), (PATCHES, R4)], 769 * 128 + (9 * 768 + 1) * 512)]
    )
    def test_transformer_learns_from_a_resnet(self, resnets, vits, pairs, size):
        below = self.check(vits[0], resnets[1], pairs, "conv_proj.weight", size)
        block = {name for name, _ in vits[0].named_parameters() if "encoder_layer_1." in name}
        assert block and (block <= below) == (pairs[0][0] is V1)

    def test_transformers_of_the_same_tokens(self, vits):
        self.check(*vits, [(V0, V1)], "conv_proj.weight", 769 * 768)

    def test_transformers_of_other_tokens(self, vits):
        torch.manual_seed(0)
        fine = VisionTransformer(64, 8, 1, 2, hidden_dim=16, mlp_dim=8, num_classes=5)  # 8 x 8 patches
        self.check(fine, vits[1], [((LAYER(0), (65, 16)), V0)], "conv_proj.weight", (16 * 25 + 1) * 768)
        self.check(vits[0], Teacher(fine), [(V0, (LAYER(0), (65, 16)))], "conv_proj.weight", 769 * 16)
