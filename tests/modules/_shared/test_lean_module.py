"""LeanModule does what Lightning's module does."""

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import SGD

from kd_lightning import SupervisedModule
from kd_lightning.modules._shared.lean_module import LeanModule


class TestAttributes:
    def test_of_every_kind(self):
        module, plain = LeanModule(), LightningModule()
        for one in (module, plain):
            one.number = 1
            one.number = 2.5
            one.text = None
            one.text = "a"
            one.layer = nn.Linear(2, 2)
            one.text = nn.Parameter(torch.ones(2))  # a plain attribute becomes a parameter
            one.register_buffer("held", torch.zeros(1))
            one.held = torch.ones(1)
            one.held = None
            one.layer = None
            one.automatic_optimization = False  # a property
        assert module.state_dict().keys() == plain.state_dict().keys() == {"text"}
        assert (module.number, module.held, module.layer, module.automatic_optimization) == (2.5, None, None, False)
        assert vars(module).keys() - {"_epoch_means"} == vars(plain).keys()
        assert "layer" in module._modules
        assert "held" in module._buffers

    def test_what_is_no_parameter_is_refused_in_its_place(self):
        module = LeanModule()
        module.weight = nn.Parameter(torch.ones(2))
        with pytest.raises(TypeError, match="cannot assign"):
            module.weight = 1.0


class TestGradients:
    def test_are_removed(self):
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = SGD([{"params": layer.parameters()} for layer in layers], lr=0.1)
        layers(torch.ones(1, 2)).sum().backward()
        LeanModule().optimizer_zero_grad(0, 0, optimizer)
        assert [parameter.grad for parameter in layers.parameters()] == [None] * 4

    def test_as_the_optimizer_removes_them(self):
        """Some optimisers do more."""
        calls = []

        class Own(SGD):
            def zero_grad(self, set_to_none=True):
                calls.append("class")

        own, replaced = (make([nn.Parameter(torch.ones(1))], lr=0.1) for make in (Own, SGD))
        replaced.zero_grad = lambda: calls.append("instance")
        for optimizer in (own, replaced):
            LeanModule().optimizer_zero_grad(0, 0, optimizer)
        assert calls == ["class", "instance"]

    @pytest.mark.parametrize("settings", [{"gradient_clip_val": 1e-3}, {"gradient_clip_val": 1e-9}, {}])
    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_are_clipped_if_the_trainer_says_so(self, quiet_trainer, loader, student, settings, algorithm):
        seen = []

        class Watch(SupervisedModule):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
                seen.append(max(float(p.grad.abs().max()) for p in self.parameters()))

        trainer = quiet_trainer(gradient_clip_algorithm=algorithm, **settings)
        trainer.fit(Watch(student, optimizer=partial(SGD, lr=0.1)), loader())
        assert (max(seen) <= 1.001 * settings.get("gradient_clip_val", 1e-3)) == bool(settings)

    def test_one_call_may_set_the_limit(self):
        module, calls = LeanModule(), []
        module._trainer = SimpleNamespace(gradient_clip_val=None)
        module.clip_gradients = lambda optimizer, **options: calls.append(options)
        module.configure_gradient_clipping(None, 0.5, "norm")
        module.configure_gradient_clipping(None)
        assert calls == [{"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}]


def test_the_signature_of_a_step_is_stored(monkeypatch, student):
    """Lightning asks for it in each step."""
    step = SupervisedModule(student).training_step
    monkeypatch.setattr(inspect, "_signature_from_function", None)  # what takes the time
    assert is_param_in_hook_signature(step, "batch_idx", min_args=2)
