"""Plots, tables, and one HTML page per run or comparison; reads run directories, knows nothing of training."""

from .diversity import SelfplayRecord, diversity_figure
from .methods import methods_figure
from .page import write_report
from .plots import accuracy_bars, curve, curves, seeds_errorbars
from .read import RunRecord, find_runs, read_run, read_runs
from .tables import AccuracyTable, accuracy_rich, accuracy_table, as_table, seeds_table, table_of_runs

__all__ = [
    "AccuracyTable",
    "RunRecord",
    "SelfplayRecord",
    "accuracy_bars",
    "accuracy_rich",
    "accuracy_table",
    "as_table",
    "curve",
    "curves",
    "diversity_figure",
    "find_runs",
    "methods_figure",
    "read_run",
    "read_runs",
    "seeds_errorbars",
    "seeds_table",
    "table_of_runs",
    "write_report",
]
