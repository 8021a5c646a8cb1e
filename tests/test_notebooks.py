"""The notebooks run from beginning to end without a network, and put out what is committed."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_NOTEBOOK_BYTES = 150_000


def read(file: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def kinds(notebook: nbformat.NotebookNode) -> list[list[tuple]]:
    """Of each code cell, what was put out: printed text with its numbers masked, and the formats of anything else."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        found = []
        for output in cell.outputs:
            if output.output_type != "stream":
                found.append((output.output_type, *sorted(output.data)))
            elif found and found[-1][0] == output.name:  # text comes in pieces, as the process happened to flush it
                found[-1] = (output.name, found[-1][1] + output.text)
            else:
                found.append((output.name, output.text))
        cells.append([(kind, masked(first), *rest) for kind, first, *rest in found])
    return cells


def masked(text: str) -> str:
    return re.sub(r" *[\d,]*\d(\.\d+)?(e-?\d+)?", " #", text)


def test_all_are_here():
    assert [file.stem for file in NOTEBOOKS] == ["bring_your_own_kernel", "kernels", "quickstart"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_to_the_end(file, tmp_path):
    committed, fresh = read(file), read(file)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    client = NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    assert kinds(fresh) == kinds(committed)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_committed_outputs_are_small_and_complete(file):
    assert file.stat().st_size < LARGEST_NOTEBOOK_BYTES
    cells = [cell for cell in read(file).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    names = {output.get("name", output.output_type) for cell in cells for output in cell.outputs}
    assert names and not names & {"stderr", "error"}


def test_an_output_of_another_kind_is_noticed():
    notebook = read(NOTEBOOKS[0])
    before = kinds(notebook)
    stream = next(o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream")
    stream.text = stream.text.replace("16", "8")
    assert kinds(notebook) == before
    stream.text += "another line\n"
    assert kinds(notebook) != before
