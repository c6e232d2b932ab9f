"""README keeps its word: the example prints what it says, the tables are those of data/, every name and file it shows exists."""
import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from tinycea import cli
from tinycea.restore import WEIGHTS, format_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_example_prints_what_its_comments_say():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    shapes, error = printed.getvalue().splitlines()
    said = re.findall(r"print\(.*# (.*)", code)
    assert shapes == said[0]
    assert float(said[1].split(",")[0]) / 10 < float(error) < 10 * float(said[1].split(",")[0])


@pytest.mark.parametrize("path", [ROOT / "data" / "train" / "cea" / "result.json", WEIGHTS.with_suffix(".json")])
def test_the_tables_are_the_committed_results(path):
    assert format_table(json.loads(path.read_text())["rows"]) in README


def test_the_comparison_without_an_adapter_is_the_committed_one():
    none = json.loads((ROOT / "data" / "train" / "none" / "result.json").read_text())
    assert f"{none['rows'][-1]['psnr_after']:.2f} dB after" in README and none["recipe"]["adapter"] == "none"


def test_the_comparison_is_the_committed_one():
    blocks = re.findall(r"```\n(.*?)```", README.split("## Does it hold?")[1].split("\n## ")[0], re.S)
    for block, path in zip(blocks, ("headline/table.txt", "length/steps.txt"), strict=True):
        table = (ROOT / "data" / "results" / path).read_text("utf-8")
        assert len(lines := block.splitlines()) > 10 and all(line in table for line in lines)


def test_lines_of_code_shown_are_lines_of_the_source():
    source = (ROOT / "tinycea" / "cea.py").read_text("utf-8")
    lines = re.findall(r"`([^`]*ops\.[^`]*)`", README.split("| equation")[1].split("\n\n")[0])
    assert len(lines) == 5
    for line in lines:
        start, _, end = line.rpartition("... ")
        assert re.search(re.escape(start) + ".*" + re.escape(end), source), line


def test_files_linked_or_listed_exist():
    names = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    tree = README.split("```\ntinycea/\n")[1].split("```")[0]
    inside, beside = tree.split("data/ ")[0], re.findall(r"^(\w+/)", tree, re.M)
    names += beside + ["tinycea/" + name for name in re.findall(r"\b(\w+\.py|\w+/)(?=\s)", inside)]
    for name in names:
        path = ROOT / name
        assert path.exists() or (ROOT / "tinycea" / "ops" / path.name).exists(), name


def test_every_command_is_documented():
    commands = next(action for action in cli.parser()._actions if action.dest == "run" or action.choices).choices
    for name in commands:
        assert f"`tinycea {name}" in README, name


def test_the_bench_table_is_the_committed_one():
    assert (ROOT / "data" / "bench.txt").read_text() in README
