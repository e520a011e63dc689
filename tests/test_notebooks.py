"""The notebooks as they are committed: executed, with pictures, and tidy.

Executing them anew is ``pytest --nbmake notebooks``.
"""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def outputs(path):
    return [output for cell in cells(path) for output in cell["outputs"]]


def test_their_numbers():
    assert [path.name[:2] for path in NOTEBOOKS] == [
        "01",
        "02",
        "03",
        "04",
        "05",
        "06",
        "07",
        "08",
        "09",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_executed_from_top_to_bottom(path):
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_installs(path):
    assert "%pip install -q .." in "".join(cells(path)[0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs(path):
    kinds = [output["output_type"] for output in outputs(path)]
    assert "error" not in kinds
    assert not [o for o in outputs(path) if o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs(path))
    text = path.read_text()
    assert not [word for word in ("site-packages", "/tmp/", "/home/", "Warning") if word in text]
