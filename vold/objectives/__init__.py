"""Objectives as values: advantages, routing, presets."""

from vold.objectives.objective import PRESETS, Objective, build_objective, likelihood

__all__ = ["PRESETS", "Objective", "build_objective", "likelihood"]
