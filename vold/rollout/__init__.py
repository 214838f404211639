"""Sampling engines, and the weight sync to them."""

from vold.rollout.factory import open_sampler
from vold.rollout.parity import ParityProbe
from vold.rollout.sampler import Sampler
from vold.rollout.transformers.sampler import TransformersSampler

__all__ = ["ParityProbe", "Sampler", "TransformersSampler", "open_sampler"]
