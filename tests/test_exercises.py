"""Notebook 00: with its blanks every check says what is missing, with the solutions all pass and a photograph comes out clean."""
import inspect
import re
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOK = jupytext.read(FOLDER / "00_write_the_backward.py")
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
BLANKS = [i for i, cell in enumerate(CODE) if " = ...\n" in cell.source]
STEPS = [re.match(r"def (\w+)_backward", CODE[i].source)[1] for i in BLANKS]


@pytest.fixture
def solutions(monkeypatch):
    """The module; the workbench that it imports stands beside it, and remembers what has passed."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(FOLDER)
    import solutions
    yield solutions
    del sys.modules["solutions"], sys.modules["workbench"]


@pytest.fixture
def said(solutions, capsys):
    """said(step, source) -> what the cell below a step prints when this source stands in the step's cell."""
    space = vars(sys.modules["workbench"]) | {"sqrt": solutions.sqrt}
    exec(next(cell.source for cell in CODE if "def normalize(" in cell.source).partition("\n\n\nphoto, ")[0], space)

    def said(step, source):
        cell = BLANKS[STEPS.index(step)]
        exec(source, space)
        exec(CODE[cell + 1].source, space)
        return capsys.readouterr().out
    return said


def filled(solutions, step):
    return inspect.getsource(getattr(solutions, f"{step}_backward"))


def test_solutions_fill_every_blank_and_nothing_else(solutions):
    assert STEPS == ["combine", "affinity", "linear", "average", "softmax", "scores", "normalize", "layer"]
    for i, step in zip(BLANKS, STEPS):
        blank, whole = (filter(None, (re.sub(r"\s*#.*", "", line) for line in text.splitlines() if "g = " not in line))
                        for text in (CODE[i].source, filled(solutions, step)))
        assert all(b == a or a.endswith("...") and b.startswith(a[:-3]) for a, b in zip(blank, whole, strict=True))


def test_a_blank_says_what_it_must_hold(said, solutions):
    for i, step in zip(BLANKS[:-1], STEPS):
        out = said(step, CODE[i].source)
        names = re.findall(r"(\w+) = \.\.\.$", CODE[i].source, re.M)
        assert names and all(re.search(rf"^  {name} is blank. It has \w+'s shape, \([\d, ]+\)\.$", out, re.M) for name in names)
        assert "Hint" not in out and "The gradient that comes in has shape" in out
    assert said("layer", CODE[BLANKS[-1]].source).strip() == f"layer_backward waits for the steps above: {', '.join(STEPS[:-1])}."
    for step in STEPS[:-1]:
        said(step, filled(solutions, step))
    assert "layer_backward has a blank left" in said("layer", CODE[BLANKS[-1]].source)


def test_the_solutions_pass(said, solutions):
    for step in STEPS:
        out = said(step, filled(solutions, step))
        assert all(line.endswith("ok") for line in out.splitlines()) and out.count("ok") >= 1, out
    assert sys.modules["workbench"].passed == {f"{step}_backward": True for step in STEPS}


@pytest.mark.parametrize("step, right, wrong, sentence", [
    ("combine", "dS = dY", "dS = -dY", "the sign is turned"),
    ("combine", " @ U.mT / sqrt(len(U))", " @ U.mT", "1/√R is missing"),
    ("combine", "S.mT @ dY", "dY.mT @ S", "dU has shape (5, 3), expected U's, (3, 5): transposed?"),
    ("affinity", "dS @ A / sqrt(A.shape[1])", "dS @ A / A.shape[1]", "1/√C is there twice"),
    ("affinity", "dX = dS @ A", "dX = dS.mT @ A", "is a factor transposed?"),
    ("affinity", "dA = dS.mT @ X", "dA = -1.7 * dS.mT @ X", "the sign is turned and a constant factor is missing"),
    ("average", "P.mT @ dZ", "P.T @ dZ", "is a factor transposed?"),
    ("softmax", " - (dP * P).sum(-1, keepdims=True)", "", "a term is missing"),
    ("scores", "dL.mT @ Q / sqrt(K.shape[-1])", "dL.mT @ Q", "1/√d is missing"),
    ("normalize", "g.mean() - ", "", "a term is missing"),
    ("normalize", ".sum(0)\n    db", "\n    db", "dw has shape (11, 5), expected w's, (5,): a sum is missing"),
    ("normalize", "dXhat.sum(0)", "0 * dXhat.sum(0)", "it is zero"),
    ("linear", "return dZ, dW", "return dZ", "returns 1 gradients, expected 2"),
    ("linear", "dZ = dT", "dZ = dt", "NameError")])
def test_wrong_answers_are_told_apart(step, right, wrong, sentence, said, solutions):
    source = filled(solutions, step)
    assert source.count(right) == 1
    out = said(step, source.replace(right, wrong))
    assert sentence in out and "  Hint: " in out and not sys.modules["workbench"].passed[f"{step}_backward"]


@pytest.mark.parametrize("right, wrong", [
    ("dZ = dZ_U + dZ_A", "dZ = dZ_U"), ("dXhat_V + dXhat_K", "dXhat_V - dXhat_K"), ("dX_skip + dX_S", "dX_S")])
def test_a_forgotten_path_is_seen_in_the_layer(right, wrong, said, solutions):
    for step in STEPS[:-1]:
        said(step, filled(solutions, step))
    out = said("layer", filled(solutions, "layer").replace(right, wrong))
    assert "a term is missing" in out and "Z fed A and U" in out and not sys.modules["workbench"].passed["layer_backward"]


@pytest.mark.slow
def test_the_readers_gradients_clean_a_photograph(solutions):
    nbclient = pytest.importorskip("nbclient")
    notebook = jupytext.read(FOLDER / "00_write_the_backward.py")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for i, step in zip(BLANKS, STEPS):
        code[i].source = filled(solutions, step)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs if output.get("name") == "stdout")
    found = re.search(r"under the lamps ([\d.]+) dB, token MLP ([\d.]+) dB, yours ([\d.]+) dB", printed)
    degraded, rival, yours = map(float, found.groups())
    assert degraded < 10 and rival < 17 and yours > 20
