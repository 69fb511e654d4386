"""Losses between a layer of the student and a layer of the teacher: one file for each paper.

All of them are called as ``loss(student_feature, teacher_feature, batch)``. ``FeatureLoss`` in
:mod:`kd_lightning.losses.protocols` describes what they get, and what they may declare.
"""

from kd_lightning.losses.features.hint import HintLoss

__all__ = ["HintLoss"]
