"""Objectives as values: advantage, ratio, routing, divergence, normaliser, schedule; presets name the methods."""

from vold.objectives.objective import Objective, assign_sft_weights, split_minibatches
from vold.objectives.presets import PRESETS, build_objective

__all__ = ["PRESETS", "Objective", "assign_sft_weights", "build_objective", "split_minibatches"]
