"""Sampling engines and the hand-over of weights to them."""

from vold.rollout.parity import ParityProbe
from vold.rollout.sampler import Sampler
from vold.rollout.select import open_sampler
from vold.rollout.transformers.sampler import TransformersSampler

__all__ = ["ParityProbe", "Sampler", "TransformersSampler", "open_sampler"]
