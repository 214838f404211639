"""Strict schemas and their loader."""

from vold.config.load import dump_config, load_config, load_training_config

__all__ = ["dump_config", "load_config", "load_training_config"]
