"""Proves the notebooks: every one runs from its source and prints what the committed form shows, links lead somewhere."""
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cudacpu import cudacpu

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("0*.py") if not path.stem.endswith("_solutions"))
HEADLESS = os.environ | {"MPLBACKEND": "agg"}
every = pytest.mark.parametrize("name", NAMES)
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?%?"
TIME = rf"(?<=measured at ){NUMBER}|{NUMBER}(?= ?(?:s|ms|μs|seconds)\b)"


def complaints(notebook):
    """Errors, and whatever was written to stderr: a warning."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])
            if output.output_type == "error" or output.get("name") == "stderr"]


def printed(cell):
    """A cell's output as text, without times."""
    outputs = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    return re.sub(TIME, "TIME", "\n".join(outputs))


def near(a, b):
    """Two printed numbers: within 2 %, or 2 units of the last digit, or both no more than rounding. Counts are exact."""
    x, y = (float(number.rstrip("%")) for number in (a, b))
    digits, _, exponent = a.rstrip("%").partition("e")
    if digits.lstrip("+-").isdigit() and not exponent and "%" not in a:
        return x == y
    unit = 10.0**(int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(x - y) <= max(2.01 * unit, 0.02 * abs(x)) or max(abs(x), abs(y)) < 1e-5


def alike(a, b):
    """Same words, and numbers that are near each other."""
    return (re.sub(NUMBER, " # ", a).split() == re.sub(NUMBER, " # ", b).split()
            and all(map(near, re.findall(NUMBER, a), re.findall(NUMBER, b))))


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
    if name != "09_one_kernel" or not (cudacpu.missing() or find_spec("cupy")):              # its outputs are the emulator's
        for fresh, old in zip(notebook.cells, jupytext.read(FOLDER / f"{name}.ipynb").cells, strict=True):
            assert alike(printed(fresh), printed(old)), f"stale, execute again: {old.source}\n{printed(old)}\n{printed(fresh)}"


@pytest.mark.parametrize("a, b, same", [
    ("gain +1.26 dB", "gain +1.27 dB", True), ("gain +1.26 dB", "gain +1.36 dB", False), ("gain 1.26 dB", "loss 1.26 dB", False),
    ("72 pairs", "73 pairs", False), ("96% of 48", "95% of 48", True), ("error 2e-11", "error 7e-12", True),
    ("error 3e-03", "error 3e-05", False), ("+1.00", "-1.00", False), ("1 2", "1", False), ("nan dB", "1.0 dB", False)])
def test_a_stale_output_is_seen(a, b, same):
    assert alike(a, b) == same
    assert printed({"outputs": [{"text": "took 1.5 s, crossing measured at 2.7 R, 3.1 dB"}]}) == (
        "took TIME s, crossing measured at TIME R, 3.1 dB")


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
    assert all("assert" in cells[i].source for i in folded if cells[i].source.startswith(("# Solution\n", "# Check:")))
    solutions = [i for i in folded if cells[i].source.startswith("# Solution\n")]
    assert len(exercises) == 3 and solutions == [i + 1 for i in exercises]


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
    ("dX + dX_S +", "dX - dX_S +")])
def test_a_sign_broken_in_cea_is_seen_by_notebook_2(right, wrong, tmp_path):
    shutil.copytree(ROOT / "tinycea", tmp_path / "tinycea", ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "tinycea" / "cea.py").read_text("utf-8")
    assert source.count(right) == 1
    (tmp_path / "tinycea" / "cea.py").write_text(source.replace(right, wrong), "utf-8")
    shutil.copy(FOLDER / "02_hyper_adapter.py", tmp_path)                      # a script finds the package beside it first
    ran = subprocess.run([sys.executable, "02_hyper_adapter.py"], cwd=tmp_path, env=HEADLESS, capture_output=True, text=True)
    assert ran.returncode and ran.stderr.endswith("AssertionError\n"), ran.stderr
