"""Strategies that shard weights are refused by what reads or writes whole ones."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from kd_lightning import (
    ActivationCalibration,
    CompileNetworks,
    DistillModule,
    InputError,
    LayerwiseFinetuning,
    PseudoLabelRefresh,
    QuantizedWeightHistograms,
    StudentWriter,
    SupervisedModule,
)
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.strategies import require_whole_weights

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def trainer_with(strategy, module=None):
    """What a strategy needs to exist (GPUs, packages) is not there, so its constructor is not called."""
    return SimpleNamespace(
        strategy=object.__new__(strategy), lightning_module=module, state=SimpleNamespace(fn=None), callbacks=[]
    )


@pytest.mark.parametrize("strategy", SHARDING)
def test_refused(strategy):
    with pytest.raises(InputError, match=f"trainer.strategy: {strategy.__name__} .*Thing.*allowed: auto, ddp"):
        require_whole_weights(trainer_with(strategy), "Thing")


@pytest.mark.parametrize("strategy", [DDPStrategy, SingleDeviceStrategy])
def test_whole_weights(strategy):
    require_whole_weights(trainer_with(strategy), "Thing")


@pytest.mark.parametrize(
    "make",
    [
        ActivationCalibration,
        CompileNetworks,
        LayerwiseFinetuning,
        PseudoLabelRefresh,
        QuantizedWeightHistograms,
        StudentWriter,
    ],
)
def test_callbacks_refuse(make, student):
    module = SupervisedModule(student)
    with pytest.raises(InputError, match=f"FSDPStrategy.*{make.__name__}"):
        make().setup(trainer_with(FSDPStrategy, module), module, "fit")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_modules_refuse(student, stage):
    module = DistillModule(student, DigitsCNN(4))
    module._trainer = trainer_with(FSDPStrategy, module)
    with pytest.raises(InputError, match="FSDPStrategy.*DistillModule"):
        module.setup(stage)
