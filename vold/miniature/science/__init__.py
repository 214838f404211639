"""Experiments in miniature by one protocol: parts in YAML, many seeds, intervals, results as files."""
