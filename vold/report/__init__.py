"""Plots, tables, and one HTML page per run or comparison; reads run directories alone, not the training code."""

from .page import accuracies, write_report
from .plots import accuracy_bars, curve, curves, seeds_errorbars
from .read import RunRecord, find_runs, read_run, read_runs
from .tables import AccuracyTable, accuracy_table, as_table, seeds_table, table_of_runs

__all__ = [
    "AccuracyTable",
    "RunRecord",
    "accuracies",
    "accuracy_bars",
    "accuracy_table",
    "as_table",
    "curve",
    "curves",
    "find_runs",
    "read_run",
    "read_runs",
    "seeds_errorbars",
    "seeds_table",
    "table_of_runs",
    "write_report",
]
