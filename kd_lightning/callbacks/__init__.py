"""Callbacks: one file each; they work on anybody's LightningModule that has what they name."""

from kd_lightning.callbacks.annealing import SoftWeightAnnealing
from kd_lightning.callbacks.calibration import ActivationCalibration
from kd_lightning.callbacks.compilation import CompileNetworks
from kd_lightning.callbacks.layerwise_finetuning import LayerwiseFinetuning
from kd_lightning.callbacks.prediction_writer import PredictionWriter
from kd_lightning.callbacks.pseudo_label_refresh import PseudoLabelRefresh
from kd_lightning.callbacks.safety_gate import SafetyGate
from kd_lightning.callbacks.step_seed import StepSeed
from kd_lightning.callbacks.student_writer import StudentWriter
from kd_lightning.callbacks.weight_levels import WeightLevels

__all__ = [
    "SoftWeightAnnealing",
    "PseudoLabelRefresh",
    "SafetyGate",
    "LayerwiseFinetuning",
    "CompileNetworks",
    "StepSeed",
    "StudentWriter",
    "PredictionWriter",
    "ActivationCalibration",
    "WeightLevels",
]
