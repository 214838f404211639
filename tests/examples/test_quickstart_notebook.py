"""examples/quickstart.ipynb runs from top to bottom in a real Jupyter kernel, on fewer steps and problems."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
TRACES = 'f"data.path={runs}/traces/traces",'
FEWER = {'"steps=25"': '"steps=5"', "limit=200": "limit=8", TRACES: f'{TRACES} "steps=10",'}


@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, 4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without outputs"
    for text, fewer in FEWER.items():
        assert any(text in cell.source for cell in notebook.cells), text
        for cell in notebook.cells:
            cell.source = cell.source.replace(text, fewer)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    ran = NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "'response': '" in printed and "rl 5/5" in printed and "sft 10/10" in printed
    assert set(ast.literal_eval(outputs[-1]["data"]["text/plain"])) == {"base", "SFT", "VOLD"}
