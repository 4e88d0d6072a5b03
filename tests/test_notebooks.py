import json
from pathlib import Path

import pytest

from .user import as_a_user


_notebooks = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def _code(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", _notebooks, ids=lambda x: x.stem)
def test_committed_with_outputs(notebook):
    cells = _code(notebook)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", _notebooks, ids=lambda x: x.stem)
def test_runs_from_top_to_bottom(notebook, monkeypatch):
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    # As in the notebook's folder, where `experiments.py` is, and short.
    monkeypatch.syspath_prepend(notebook.parent)
    monkeypatch.setenv("NOTEBOOKS_FULL", "0")
    scope = {"__name__": "notebook"}
    with as_a_user():
        for i, cell in enumerate(_code(notebook), 1):
            name = f"{notebook.name}, {i}"
            exec(compile("".join(cell["source"]), name, "exec"), scope)
            plt.close("all")
