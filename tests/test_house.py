"""The house stays small and its arrows run one way: lines of code, columns, README's length, imports in DESIGN's order.

`python tests/test_house.py` prints the figures; so does `pytest -s tests/test_house.py`.
"""
import ast
import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinycea"
MOST = {"outside lab": 2900, "lab": 1200}                  # lines of code, without blanks, comments and docstrings
COLUMNS, README = 130, 160
TEXT = {".py", ".md", ".sh", ".cu", ".cuh", ".h", ".cpp", ".toml", ".yml", ".cff"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# A module imports only what stands below it.
ORDER = ("__main__ cli lab training restoration evaluation feed cases zoo nafnet adapters ablations cea gradcheck degradations "
         "scenes images plots checkpoints params optim ops runtime __init__").split()


def lines_of_code(source):
    """Lines that hold code: no blank, no comment, no docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def room(path):
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def counts():
    """Room -> lines of code."""
    found = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        found[room(path)] += lines_of_code(path.read_text("utf-8"))
    return found


def totals():
    found = counts()
    return {"outside lab": found.total() - found["lab"], "lab": found["lab"]}


def imported(path):
    """The rooms that a file of the package imports, at its top or inside a function."""
    here = ["tinycea", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [base + [alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        for name in names:
            if name[0] == "tinycea" and len(name) > 1:
                yield name[1] if name[1] in ORDER else "__init__"


def tracked(suffixes):
    """Files under version control, or all where there is none, as in a source archive."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = map(ROOT.joinpath, listed.stdout.splitlines()) if listed.returncode == 0 else ROOT.rglob("*")
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def test_lines_of_code_stay_within_the_budget():
    found = totals()
    print(f"\nlines of code: {', '.join(f'{name} {n}' for name, n in counts().most_common())}; "
          + ", ".join(f"{name} {n} of {MOST[name]}" for name, n in found.items()))
    assert all(n <= MOST[name] for name, n in found.items()), found


def test_no_line_is_too_wide_and_readme_is_short():
    wide = [f"{path.relative_to(ROOT)}:{i}" for path in tracked(TEXT)
            for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, wide
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_one_way(path):
    above = {name for name in imported(path) if ORDER.index(name) < ORDER.index(room(path))}
    assert not above, f"{path.name} imports {above}, which stand above it"
    alone = {"cea": {"ops", "params", "runtime"}, "ops": {"ops", "runtime"}, "gradcheck": set(), "runtime": set()}
    beside = alone.get(room(path))
    assert beside is None or set(imported(path)) <= beside, f"{path.name} may import {beside} alone"


def test_every_room_has_a_place():
    assert set(counts()) == set(ORDER)


def test_cupy_is_imported_in_one_place():
    users = [path.name for path in PACKAGE.rglob("*.py") if any(line.startswith(("import cupy", "from cupy"))
                                                                for line in path.read_text("utf-8").splitlines())]
    assert users == ["cuda.py"]


def test_the_counter_counts():
    source = '"""Doc."""\nimport math\n\n# a comment\ndef f(x):\n    """Doc\n    string."""\n    return (x +\n            1)\n'
    assert lines_of_code(source) == 4


if __name__ == "__main__":
    for name, n in counts().most_common():
        print(f"{n:5d}  {name}")
    print(totals())
