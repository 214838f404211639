"""Objectives as values: advantage, ratio, routing, divergence, normaliser, schedule; presets name the methods."""

from vold.objectives.objective import Objective, likelihood, minibatches
from vold.objectives.presets import PRESETS, build_objective

__all__ = ["PRESETS", "Objective", "build_objective", "likelihood", "minibatches"]
