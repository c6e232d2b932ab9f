"""Proves the notebooks: every one runs from its source, the committed form is that source executed, links lead somewhere."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = ["00_write_the_backward", "01_token_assembly", "02_hyper_adapter", "03_linear_attention", "04_gradient_checking",
         "05_training_by_hand", "06_does_it_hold"]
HEADLESS = os.environ | {"MPLBACKEND": "agg"}
every = pytest.mark.parametrize("name", NAMES)


def complaints(notebook):
    """Errors, and whatever was written to stderr: a warning."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])
            if output.output_type == "error" or output.get("name") == "stderr"]


def test_the_set_is_whole():
    for suffix in ("py", "ipynb"):
        assert sorted(path.stem for path in FOLDER.glob(f"0*.{suffix}")) == NAMES
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert listed == NAMES


@pytest.mark.slow
@every
def test_it_runs_from_its_source(name):
    nbclient = pytest.importorskip("nbclient")                            # seconds, which only these tests have to spend
    notebook = jupytext.read(FOLDER / f"{name}.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert not complaints(notebook)


@every
def test_the_committed_form_is_the_source_executed(name):
    source, committed = (jupytext.read(FOLDER / f"{name}.{suffix}") for suffix in ("py", "ipynb"))
    cells = [[(cell.cell_type, cell.source, cell.metadata.get("jupyter")) for cell in notebook.cells]
             for notebook in (source, committed)]
    assert cells[0] == cells[1]
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)) and not complaints(committed)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 2**20


@every
def test_three_exercises_with_folded_solutions(name):
    cells = jupytext.read(FOLDER / f"{name}.py").cells
    exercises = [i for i, cell in enumerate(cells)
                 if cell.cell_type == "markdown" and re.search(r"^\*\*\d\.\*\*", cell.source, re.M)]
    folded = [i for i, cell in enumerate(cells) if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert len(exercises) == 3 and folded == [i + 1 for i in exercises]
    assert all("assert" in cells[i].source for i in folded)


@pytest.mark.parametrize("path", [*sorted(FOLDER.glob("0*.py")), FOLDER / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = "\n".join(line for line in path.read_text("utf-8").splitlines() if path.suffix == ".md" or line.startswith("#"))
    links = re.findall(r"\[([^\]]*)\]\((?!http)([^)#]+)\)", text)
    assert links
    for text, target in links:
        assert (FOLDER / target).exists(), target
        if re.fullmatch(r"`\w+`", text) and target.endswith(".py"):       # `name` links to the file that defines it
            assert re.search(rf"^(def|class) {text[1:-1]}\b", (FOLDER / target).read_text("utf-8"), re.M), (text, target)


def test_docstrings_point_back():
    pointers = [n for path in (ROOT / "tinycea").rglob("*.py") for n in re.findall(r"notebooks/(\w+)", path.read_text("utf-8"))]
    assert set(pointers) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("right, wrong", [
    ("dZ = dZ + accumulate(", "dZ = dZ - accumulate("), ("dXhat = accumulate(", "dXhat = -accumulate("),
    ("dX + dX_S + accumulate(", "dX + dX_S - accumulate("), ("dX + dX_S +", "dX - dX_S +"),
    ("linear_backward(dU, c_U)", "linear_backward(-dU, c_U)")])
def test_a_sign_broken_in_cea_is_seen_by_notebook_2(right, wrong, tmp_path):
    shutil.copytree(ROOT / "tinycea", tmp_path / "tinycea", ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "tinycea" / "cea.py").read_text("utf-8")
    assert source.count(right) == 1
    (tmp_path / "tinycea" / "cea.py").write_text(source.replace(right, wrong), "utf-8")
    shutil.copy(FOLDER / "02_hyper_adapter.py", tmp_path)                      # a script finds the package beside it first
    ran = subprocess.run([sys.executable, "02_hyper_adapter.py"], cwd=tmp_path, env=HEADLESS, capture_output=True, text=True)
    assert ran.returncode and ran.stderr.endswith("AssertionError\n"), ran.stderr
