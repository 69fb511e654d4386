"""Callbacks, one file each. A callback works on any LightningModule that has the attributes that the callback names."""

from kd_lightning.callbacks.activation_calibration import ActivationCalibration
from kd_lightning.callbacks.baseline_monitor import BaselineMonitor
from kd_lightning.callbacks.board_writer import BoardWriter
from kd_lightning.callbacks.compile_networks import CompileNetworks
from kd_lightning.callbacks.evaluation_writer import EvaluationWriter
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.gradient_balance import GradientBalance
from kd_lightning.callbacks.layerwise_finetuning import LayerwiseFinetuning
from kd_lightning.callbacks.prediction_writer import PredictionWriter
from kd_lightning.callbacks.pseudo_label_refresh import PseudoLabelRefresh
from kd_lightning.callbacks.quantized_weight_histograms import QuantizedWeightHistograms
from kd_lightning.callbacks.sample_figures import SampleFigures
from kd_lightning.callbacks.seed_every_step import SeedEveryStep
from kd_lightning.callbacks.soft_weight_annealing import SoftWeightAnnealing
from kd_lightning.callbacks.student_writer import StudentWriter

__all__ = [
    "ActivationCalibration",
    "BaselineMonitor",
    "BoardWriter",
    "CompileNetworks",
    "EvaluationWriter",
    "ExactResume",
    "GradientBalance",
    "LayerwiseFinetuning",
    "PredictionWriter",
    "PseudoLabelRefresh",
    "QuantizedWeightHistograms",
    "SampleFigures",
    "SeedEveryStep",
    "SoftWeightAnnealing",
    "StudentWriter",
]
