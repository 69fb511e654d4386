"""Knowledge distillation and learning from few labels with PyTorch Lightning."""

from kd_lightning.active.loop import ActiveLearningLoop
from kd_lightning.batch import Batch
from kd_lightning.callbacks import (
    ActivationCalibration,
    BaselineMonitor,
    CompileNetworks,
    LayerwiseFinetuning,
    PredictionWriter,
    PseudoLabelRefresh,
    QuantizedWeightHistograms,
    SeedEveryStep,
    SoftWeightAnnealing,
    StudentWriter,
)
from kd_lightning.data import (
    ClassSubset,
    CoarseLabels,
    DatasetSource,
    Digits,
    FakeData,
    ImageFolder,
    PairNoise,
    RotatedClasses,
    SemiSupervisedDataModule,
    SymmetricNoise,
    TorchvisionDataset,
    TransitionNoise,
)
from kd_lightning.errors import InputError
from kd_lightning.features.heads import reset_classifier
from kd_lightning.modules import (
    ApprenticeModule,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    PseudoLabelModule,
    SupervisedModule,
)
from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.runs.weights import load_weights
from kd_lightning.teachers.teacher import Teacher

__all__ = [
    "SupervisedModule",
    "DistillModule",
    "HintModule",
    "EnsembleDistillModule",
    "ApprenticeModule",
    "PseudoLabelModule",
    "CoTeachingModule",
    "Teacher",
    "load_weights",
    "reset_classifier",
    "Batch",
    "SemiSupervisedDataModule",
    "Digits",
    "TorchvisionDataset",
    "ImageFolder",
    "FakeData",
    "DatasetSource",
    "ClassSubset",
    "RotatedClasses",
    "SymmetricNoise",
    "PairNoise",
    "TransitionNoise",
    "CoarseLabels",
    "SoftWeightAnnealing",
    "PseudoLabelRefresh",
    "GraphPseudoLabels",
    "BaselineMonitor",
    "LayerwiseFinetuning",
    "CompileNetworks",
    "StudentWriter",
    "PredictionWriter",
    "SeedEveryStep",
    "ActivationCalibration",
    "QuantizedWeightHistograms",
    "ActiveLearningLoop",
    "InputError",
]
