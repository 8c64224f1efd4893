"""Run notebooks from top to bottom and store their outputs: python notebooks/execute.py [NOTEBOOK ...] (default: all).

Stored are code, outputs and execution counts; no widget state, no timestamps, so that a second run changes only what was
measured. A cell that fails ends the run with its error, and the notebook keeps its old outputs.
"""

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent


def execute(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}, store_widget_state=False
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def joined(outputs: list) -> list:
    """Neighbouring pieces of one stream as one output: where a stream was cut depends on timing."""
    whole = []
    for output in outputs:
        last = whole[-1] if whole else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        else:
            whole.append(output)
    return whole


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        start = time.monotonic()
        execute(pathlib.Path(name))
        print(f"{name}: {time.monotonic() - start:.0f} s")
