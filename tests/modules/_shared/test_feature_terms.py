"""Feature terms of a module: how they are built, with several teachers, from a checkpoint; standardizations."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.mlp_projector import MLPProjector
from kd_lightning.features.standardization import ChannelStandardization
from kd_lightning.features.term import FeatureTerm
from kd_lightning.inputs import call
from kd_lightning.losses import HintLoss
from kd_lightning.modules._shared import term_building
from kd_lightning.modules._shared.feature_terms import FeatureTerms
from kd_lightning.teachers.teacher import Teacher

CPU = torch.device("cpu")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width, seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 5))


def module_of(student):
    return SimpleNamespace(student=student, device=CPU, call=call, _trainer=None)


def term(layers=None, **kwargs):
    return FeatureTerm(layers or {"0": "0"}, HintLoss(), **kwargs)


def built(terms, student=None, teachers=None, x=X, **kwargs):
    terms = FeatureTerms(terms, **kwargs)
    terms.build(module_of(student or network(4)), teachers or [Teacher(network(6, 1))], Batch(x))
    return terms


def values(terms, student, teachers, x=X):
    batch = Batch(x)
    with terms.capturing(student, teachers, batch, dict.fromkeys(terms.all, 1.0)) as captured:
        student(x)
        for teacher in teachers:
            teacher(batch)
    return {name: terms.pair_values(name, captured, batch, student) for name in terms.all}


class TestBuild:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_in_the_type_of_the_student(self, dtype):
        student, teachers = network(4).to(dtype), [Teacher(network(6, 1).to(dtype))]
        parts = {"maps": term(), "ends": term({"": ""}, projector=MLPProjector())}
        terms = built(parts, student, teachers, X.to(dtype))
        assert {p.dtype for p in terms.parameters()} == {dtype}
        found = values(terms, student, teachers, X.to(dtype))
        projector = terms.all["maps"].pairs[0].projector
        gap = projector(student[0](X.to(dtype))) - teachers[0].network[0](X.to(dtype))
        torch.testing.assert_close(found["maps"]["0"], gap.square().flatten(1).sum(1).mean() / 2)
        assert found["ends"][""].dtype == dtype

    def test_a_second_one_leaves_them(self):
        terms = built({"one": term(projector=MLPProjector()), "two": term({"2": "2"})})
        before = {name: value.clone() for name, value in terms.state_dict().items()}
        torch.manual_seed(7)
        terms.build(module_of(network(4)), [Teacher(network(6, 1))], Batch(X))
        assert all(torch.equal(before[name], value) for name, value in terms.state_dict().items())

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({"9": "0"}, "layer '9': Sequential has none of that name"),
            ({"0": "9"}, "layer '9': Sequential has none of that name"),
            ({"5": "0"}, "no built-in projector maps 5 \\[5\\] to 0 \\[6, 8, 8\\]"),
        ],
    )
    @pytest.mark.parametrize(("name", "prefix"), [("at", "features.at"), ("hint", "hints")])
    def test_errors_name_the_term(self, layers, message, name, prefix):
        terms = FeatureTerms({"good": term()})
        terms[name] = term(layers)
        with pytest.raises(InputError, match=f"^{prefix}: {message}"):
            terms.build(module_of(network(4)), [Teacher(network(6, 1))], Batch(X))


class TestSeveralTeachers:
    def test_each_layer_is_of_its_teacher(self):
        student, teachers = network(4), [Teacher(network(6, 1)), Teacher(network(7, 2))]
        parts = {"a": term({"0": "0.0", "2": "1.2"}), "b": term({"2": "1.2"}), "c": term({"": "1."})}
        terms = built(parts, student, teachers, several=True)
        assert terms.teacher_layers(2) == [{"0": "0.0"}, {"2": "1.2", "": "1."}]
        found = values(terms, student, teachers)
        targets = teachers[0].network[:1](X), teachers[1].network[:3](X)
        for layer, target, pair in zip((1, 3), targets, terms.all["a"].pairs, strict=True):
            gap = pair.projector(student[:layer](X)) - target
            expected = gap.square().flatten(1).sum(1).mean() / 2
            torch.testing.assert_close(found["a"][str(layer - 1)], expected)
        projector = terms.all["c"].pairs[0].projector
        expected = (projector(student(X)) - teachers[1](Batch(X))).square().sum(1).mean() / 2
        torch.testing.assert_close(found["c"][""], expected)

    @pytest.mark.parametrize("layer", ["2.0", "x.0", "", "0", "00.0", "-1.0"])
    def test_a_layer_of_no_teacher(self, layer):
        """ "0" and "00." would be further names of what "0." names."""
        terms = FeatureTerms({"one": term({"0": layer})}, several=True)
        with pytest.raises(
            InputError, match=r"^features\.one: a teacher's layer must begin with its number, from 0 to 1"
        ):
            terms.teacher_layers(2)


class TestRestore:
    LAYERS = {"0": "0", "1": "1"}  # of equal shapes

    def test_round_trip(self, tmp_path):
        def terms():
            projector = {"0": MLPProjector()}
            return {"a": term(self.LAYERS, projector=projector), "b": term(standardize=ChannelStandardization())}

        student, teachers = network(4).double(), [Teacher(network(6, 1).double())]
        first = built(terms(), student, teachers, X.double())
        first.all["b"].fit_standardizations({"0": teachers[0].network[0](X.double())})
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.add_(1 / 3)  # not exact in float32
        state = {f"features.{name}": value for name, value in first.state_dict().items()}
        torch.save([first.shapes(), state], tmp_path / "t.pt")
        shapes, state = torch.load(tmp_path / "t.pt", weights_only=True)
        again = FeatureTerms(terms())
        again.restore(shapes, state, CPU, torch.float64)
        again.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
        assert again.shapes() == first.shapes() and repr(again) == repr(first)
        one, other = (values(part, student, teachers, X.double()) for part in (first, again))
        assert one == other

    @pytest.mark.parametrize(
        "layers", [{"1": "1", "0": "0"}, {"0": "1", "1": "0"}, {"0": "0"}, {"0": "0", "1": "1", "2": "2"}]
    )
    def test_other_layers(self, layers):
        """Pairs go by number, so another order would give each projector the weights of another one."""
        shapes = built({"one": term(self.LAYERS)}).shapes()
        with pytest.raises(InputError, match=r"^features: the checkpoint was trained with \{'one': \{'0': '0', '1'"):
            FeatureTerms({"one": term(layers)}).restore(shapes, {}, CPU, torch.float32)

    def test_other_terms(self):
        shapes = built({"one": term(self.LAYERS)}).shapes()
        with pytest.raises(InputError, match="^features: the checkpoint was trained with .*, got none$"):
            FeatureTerms(None).restore(shapes, {}, CPU, torch.float32)
        with pytest.raises(InputError, match="^features: the checkpoint was trained with none, got "):
            FeatureTerms({"one": term(self.LAYERS)}).restore({}, {}, CPU, torch.float32)


class Tokens(nn.Module):
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(9, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.embed(x)).mean(1)


class TestStandardizations:
    def test_padding_does_not_count(self, monkeypatch):
        ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
        batch = Batch(ids, mask=ids != 0)
        teachers = [Teacher(Tokens(4, 1))]
        terms = FeatureTerms({"one": term({"embed": "embed"}, standardize=ChannelStandardization())})
        module = module_of(Tokens(4, 0))
        terms.build(module, teachers, batch)
        strategy = SimpleNamespace(broadcast=lambda state: state, root_device=torch.device("cpu"))
        module.trainer = SimpleNamespace(strategy=strategy)
        monkeypatch.setattr(term_building, "first_inputs", lambda module, samples: batch)
        term_building.fit_standardizations(terms, module, teachers)
        rows = teachers[0].network.embed(ids[ids != 0])
        (standardize,) = terms.all["one"].standardizations
        torch.testing.assert_close(standardize.mean, rows.mean(0))
        torch.testing.assert_close(standardize.scale, 1 / rows.std(0, correction=0))
