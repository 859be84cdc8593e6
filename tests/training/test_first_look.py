"""The notebook runs from its first cell to its last, and draws what it says."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[2] / "training" / "first_look.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_small_and_without_outputs():
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


@pytest.mark.slow
def test_all_cells_run_in_order_in_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {}
    for cell in CELLS:
        exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "student: 12 steps" in printed and "phases: [(0, 2), (2, 5), (5, 12)]" in printed
    assert "R2 on the photograph" in printed
    drawn = names["axes"][1, -1].images[0].get_array()
    assert drawn.shape == (32, 32, 3) and drawn.std() > 0.05
    assert not list(tmp_path.iterdir())
