"""Knowledge distillation and learning from few labels with PyTorch Lightning."""

from kd_lightning.active_learning import ActiveLearningLoop
from kd_lightning.batch import Batch
from kd_lightning.callbacks import (
    ActivationCalibration,
    CompileNetworks,
    LayerwiseFinetuning,
    PredictionWriter,
    PseudoLabelRefresh,
    SafetyGate,
    SoftWeightAnnealing,
    StepSeed,
    StudentWriter,
    WeightLevels,
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
from kd_lightning.graph_labels import GraphPseudoLabels
from kd_lightning.heads import replace_head
from kd_lightning.modules import (
    ApprenticeModule,
    CoTeachingModule,
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
    "CoTeachingModule",
    "Teacher",
    "load_weights",
    "replace_head",
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
    "SafetyGate",
    "LayerwiseFinetuning",
    "CompileNetworks",
    "StudentWriter",
    "PredictionWriter",
    "StepSeed",
    "ActivationCalibration",
    "WeightLevels",
    "ActiveLearningLoop",
    "InputError",
]
