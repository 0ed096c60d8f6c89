"""docs/notebook.ipynb runs from top to bottom in a real kernel, and each result shows itself."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    # The kernel of a checkout may have another name than the one that the notebook's reader chose.
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [next((o.data for o in cell.outputs if o.output_type == "execute_result"), None) for cell in code]
    assert all(data is not None for data in shown[1:] if data is not shown[2]) and len(code) >= 8
    html = [data.get("text/html", "") for data in shown if data]
    assert sum("<table" in text for text in html) >= 5 and sum("data:image/png" in text for text in html) == 2
    assert "second_largest" in "".join(html)
