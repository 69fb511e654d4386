"""The training modules: one method, one file, one class."""

from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules.abc import ABCModule
from kd_lightning.modules.apprentice import ApprenticeModule
from kd_lightning.modules.co_teaching import CoTeachingModule
from kd_lightning.modules.distill import DistillModule
from kd_lightning.modules.distillation_token import DistillationTokenModule
from kd_lightning.modules.ensemble import EnsembleDistillModule
from kd_lightning.modules.feature_distill import FeatureDistillModule
from kd_lightning.modules.hint import HintModule
from kd_lightning.modules.pseudo_label import PseudoLabelModule
from kd_lightning.modules.simkd import SimKDModule
from kd_lightning.modules.supervised import SupervisedModule

__all__ = [
    "SupervisedModule",
    "DistillModule",
    "DistillationTokenModule",
    "HintModule",
    "SimKDModule",
    "EnsembleDistillModule",
    "ApprenticeModule",
    "PseudoLabelModule",
    "ABCModule",
    "CoTeachingModule",
    "FeatureDistillModule",
    "LossTerm",
]
