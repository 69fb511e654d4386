import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import nn

from kd_lightning import CompileNetworks, InputError
from kd_lightning.__main__ import main
from kd_lightning.callbacks.compile_networks import find_networks
from kd_lightning.cli import fast
from kd_lightning.cli.baseline import baseline_of, with_seed
from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.parse import parse_config
from kd_lightning.cli.record_run import dump_config
from kd_lightning.runs.config_identity import identity_of
from kd_lightning.runs.run import Run

RUN = Path("runs/tiny/version_0")


class Unbuilt(DistillCLI):
    def instantiate_classes(self):
        pass


class Theirs(LightningModule):
    def __init__(self, student: nn.Module):
        super().__init__()
        self.net = student

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch.x), batch.y.clamp(min=0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def lines(monkeypatch):
    """The lines that are printed."""
    found = []
    monkeypatch.setattr(fast, "rank_zero_info", found.append)
    return found


@pytest.fixture
def bf16(monkeypatch):
    """Sets whether the device has bfloat16."""

    def set_bf16(has):
        monkeypatch.setattr(fast, "_why_no_bf16", lambda device: "" if has else "not here")

    set_bf16(True)
    return set_bf16


@pytest.fixture
def cuda(bf16, monkeypatch):
    """A GPU that Triton supports, and a fit that is long enough to compile for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("kd_lightning.cli.fast.is_installed", lambda name: True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    return {"accelerator": "cuda", "max_epochs": 50}


def write(config):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "config.yaml"]


def pick(config):
    cli = Unbuilt(deepcopy(config), run=False)  # the parser changes it
    cli.config.fast = True
    fast.pick_settings(cli.config, cli.parser, "fit", Path("runs"))
    return yaml.safe_load(dump_config(cli.parser, cli.config))


def networks(picked):
    return [c["init_args"] for c in picked["trainer"]["callbacks"] or [] if c["class_path"].endswith("CompileNetworks")]


def fused(picked):
    return picked["model"]["init_args"]["optimizer"]["init_args"].get("fused")


UNCOMPILED = {"mode": None, "backend": None, "channels_last": True, "network": "student"}
COMPILED = UNCOMPILED | {"backend": "inductor"}


class TestPicks:
    def test_cpu(self, config, bf16, lines):
        picked = pick(config)
        assert networks(picked) == [UNCOMPILED]
        assert fused(picked) is True
        assert picked["trainer"]["precision"] == "bf16-mixed"
        why = "not compiled: on a CPU that gains little beyond channels last"
        assert lines == [f"fast, on cpu: channels last, fused AdamW, bf16-mixed; {why}"]

    def test_no_bf16(self, config, bf16, lines):
        bf16(False)
        assert pick(config)["trainer"]["precision"] is None
        assert "fused AdamW; no bf16: not here; not compiled" in lines[0]

    @pytest.mark.parametrize(
        ("has", "threads", "why"), [(False, 1, "no instructions"), (True, 2, "one thread"), (True, 1, "")]
    )
    def test_bf16_on_a_cpu(self, monkeypatch, has, threads, why):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        found = fast._why_no_bf16("cpu")
        assert why in found
        assert bool(why) == bool(found)

    def test_without_it_nothing_is_picked(self, config):
        picked = parse_config(write(config), "experiment")
        assert (networks(picked), fused(picked), picked["trainer"]["precision"]) == ([], None, None)

    def test_picked_twice_is_picked_once(self, config, bf16):
        picked = pick(config)
        assert pick(picked) == picked

    @pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
    def test_precision_of_the_config_stays(self, config, bf16, precision):
        config["trainer"]["precision"] = precision
        assert pick(config)["trainer"]["precision"] == precision

    @pytest.mark.usefixtures("bf16")
    def test_precision_of_the_command_line_stays(self, config):
        args = [*write(config | {"fast": True}), "--trainer.precision", "32-true"]
        assert parse_config(args, "experiment")["trainer"]["precision"] == "32-true"
        assert parse_config(args[:2], "experiment")["trainer"]["precision"] == "bf16-mixed"

    def test_a_plugin_for_precision_stays(self, config, bf16):
        plugin = {"class_path": "lightning.pytorch.plugins.DoublePrecision"}
        config["trainer"]["plugins"] = [plugin]
        assert pick(config)["trainer"]["precision"] is None

    def test_own_compilation_stays(self, config, bf16):
        own = {"mode": None, "backend": "eager", "channels_last": False, "network": "student"}
        config["trainer"]["callbacks"] = [{"class_path": "CompileNetworks", "init_args": own}]
        assert networks(pick(config)) == [own]

    @pytest.mark.parametrize("own", [{"fused": False}, {"foreach": True}, {"foreach": False}])
    def test_own_form_of_the_optimizer_stays(self, config, bf16, own):
        config["model"]["init_args"]["optimizer"]["init_args"] |= own
        assert fused(pick(config)) is own.get("fused")

    def test_sgd(self, config, bf16, lines):
        config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        assert fused(pick(config)) is None
        assert "no fused optimiser: only Adam and AdamW of the config gain by it" in lines[0]

    def test_every_optimizer_of_a_module(self, config, bf16):
        arguments = config["model"]["init_args"]
        config["model"]["class_path"] = "HintModule"
        adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
        arguments |= {"hints": {"5": "5"}, "hint_epochs": 1, "hint_optimizer": adam}
        picked = pick(config)["model"]["init_args"]
        assert [picked[name]["init_args"]["fused"] for name in ("optimizer", "hint_optimizer")] == [True, True]

    def test_gradients_under_16_mixed_can_be_clipped(self, config, lines):
        config["trainer"]["precision"] = "16-mixed"
        assert fused(pick(config)) is None
        assert "no fused optimiser: its gradients cannot be clipped under 16-mixed" in lines[0]

    def test_a_module_that_is_not_ours(self, config, bf16, lines):
        config["model"] = {"class_path": f"{__name__}.Theirs", "init_args": {"student": {"class_path": "DigitsCNN"}}}
        picked = pick(config)
        assert networks(picked) == []
        assert picked["trainer"]["precision"] == "bf16-mixed"
        assert f"not channels last, not compiled: {__name__}.Theirs is not of kd_lightning" in lines[0]
        assert DistillCLI(["fit", *write(config), "--fast", "true"]).trainer.precision == "bf16-mixed"

    @pytest.mark.parametrize(("key", "value"), [("accelerator", "mps"), ("strategy", "fsdp"), ("strategy", "ddp_fork")])
    def test_where_nothing_is_known_to_help(self, config, bf16, lines, key, value):
        config["trainer"][key] = value
        picked = pick(config)
        assert (networks(picked), fused(picked), picked["trainer"]["precision"]) == ([], None, None)
        assert re.search(f"nothing; nothing is known to help .*{value}", lines[0])


class TestGPU:
    """What is picked on a GPU, which need not be there."""

    def test_compiled(self, config, cuda, lines):
        config["trainer"] |= cuda
        picked = pick(config)
        assert networks(picked) == [COMPILED]
        assert (fused(picked), picked["trainer"]["precision"]) == (True, "bf16-mixed")
        assert lines == ["fast, on cuda: channels last, compiled, fused AdamW, bf16-mixed"]

    @pytest.mark.parametrize(("key", "value"), [("max_epochs", 49), ("max_steps", 4999)])
    def test_short_fit(self, config, cuda, lines, key, value):
        config["trainer"] |= cuda | {key: value}
        assert networks(pick(config)) == [UNCOMPILED]
        assert "not compiled: that takes minutes, and pays from 50 epochs or 5000 steps on" in lines[0]

    @pytest.mark.parametrize(
        ("patch", "why"),
        [
            (("shutil.which", lambda name: None), "there is no C compiler"),
            (("kd_lightning.cli.fast.is_installed", lambda name: False), "there is no Triton"),
            (("torch.cuda.get_device_capability", lambda: (6, 1)), "Triton does not support this GPU"),
        ],
    )
    def test_no_compiler(self, config, cuda, lines, monkeypatch, patch, why):
        monkeypatch.setattr(*patch)
        config["trainer"] |= cuda
        assert networks(pick(config)) == [UNCOMPILED]
        assert f"not compiled: {why}" in lines[0]

    def test_quantised_student(self, config, cuda, lines):
        config["trainer"] |= cuda
        arguments = config["model"]["init_args"]
        inner = {"model": arguments["student"], "weight_bits": 8}
        arguments["student"] = {"class_path": "kd_lightning.quantization.quantize", "init_args": inner}
        assert networks(pick(config)) == [UNCOMPILED]
        assert "not compiled: quantised layers" in lines[0]


class TestRuns:
    def test_run_stores_the_picks_and_is_evaluated_with_them(self, config, bf16, lines):
        args = write(config | {"fast": True})
        main(["fit", *args])
        stored = Run(RUN).config
        assert (networks(stored), fused(stored), stored["trainer"]["precision"]) == ([UNCOMPILED], True, "bf16-mixed")
        bf16(False)  # another device
        main(["test", *args])
        assert "fast, as runs/tiny/version_0: channels last, fused AdamW, bf16-mixed" in lines
        assert Run(RUN).result("test") is not None
        with pytest.raises(SystemExit):
            main(["test", *args, "--trainer.precision", "32-true"])

    @pytest.mark.slow
    def test_resume_on_another_device(self, config, bf16):
        bf16(False)
        args = write(config | {"fast": True})
        main(["fit", *args])
        bf16(True)
        for last in ("last", str(RUN / "checkpoints/last.ckpt")):
            assert DistillCLI(["fit", *args, "--ckpt_path", last]).trainer.precision == "32-true"
        assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
        assert DistillCLI(["fit", *args]).trainer.precision == "bf16-mixed"  # a new run

    def test_resume_of_another_config_names_what_differs_alone(self, config, bf16, fails):
        args = write(config | {"fast": True})
        main(["fit", *args])
        bf16(False)
        other = fails("fit", *args, "--ckpt_path", "last", "--model.init_args.soft_weight", "0.3")
        assert "has another config: model.init_args.soft_weight: 0.3, not 0.5;" in other

    def test_compiled_run_needs_a_compiler_to_resume_and_none_to_be_tested(self, config, bf16, fails, monkeypatch):
        args = write(config | {"fast": True})
        main(["fit", *args])
        text = (RUN / "config.yaml").read_text()
        assert "backend: null" in text
        (RUN / "config.yaml").write_text(text.replace("backend: null", "backend: inductor"))
        monkeypatch.setattr("shutil.which", lambda name: None)
        message = fails("fit", *args, "--ckpt_path", "last")
        assert "trains compiled networks, but there is no C++ compiler; install one, or start a new run" in message
        cli = DistillCLI(["test", *args])
        (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, CompileNetworks))
        assert callback.backend is None
        assert find_networks(cli.model)
        assert Run(RUN).result("test") is not None

    def test_baseline_gets_the_same(self, config, bf16):
        method = with_seed(parse_config([*write(config), "--fast", "true"], "experiment"), 0)
        alone = parse_config(baseline_of(method), "experiment")
        assert networks(alone) == networks(method) == [UNCOMPILED]
        assert alone["trainer"]["precision"] == method["trainer"]["precision"] == "bf16-mixed"
        assert fused(alone) is fused(method) is True
        bf16(False)  # the plan is fixed
        assert identity_of(parse_config(deepcopy(method), "experiment"), {}) == identity_of(method, {})

    def test_fast_itself_is_no_difference(self, config):
        picked = parse_config(write(config), "experiment")
        assert identity_of(picked, {}) == identity_of({k: v for k, v in picked.items() if k != "fast"}, {})

    def test_no_boolean(self, config):
        with pytest.raises(InputError, match="fast"):
            DistillCLI(["fit", *write(config), "--fast", "very"])
