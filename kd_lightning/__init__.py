"""Knowledge distillation and learning from few labels with PyTorch Lightning."""

from kd_lightning.batch import Batch
from kd_lightning.callbacks import (
    ActivationCalibration,
    PredictionWriter,
    PseudoLabelRefresh,
    SafetyGate,
    SoftWeightAnnealing,
    StepSeed,
    StudentWriter,
    WeightLevels,
)
from kd_lightning.data import (
    DatasetSource,
    Digits,
    FakeData,
    ImageFolder,
    SemiSupervisedDataModule,
    TorchvisionDataset,
)
from kd_lightning.errors import InputError
from kd_lightning.graph_labels import GraphPseudoLabels
from kd_lightning.modules import (
    ApprenticeModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    PseudoLabelModule,
    SupervisedModule,
)
from kd_lightning.teachers import Teacher, load_weights

__all__ = [
    "SupervisedModule",
    "DistillModule",
    "HintModule",
    "EnsembleDistillModule",
    "ApprenticeModule",
    "PseudoLabelModule",
    "Teacher",
    "load_weights",
    "Batch",
    "SemiSupervisedDataModule",
    "Digits",
    "TorchvisionDataset",
    "ImageFolder",
    "FakeData",
    "DatasetSource",
    "SoftWeightAnnealing",
    "PseudoLabelRefresh",
    "GraphPseudoLabels",
    "SafetyGate",
    "StudentWriter",
    "PredictionWriter",
    "StepSeed",
    "ActivationCalibration",
    "WeightLevels",
    "InputError",
]
