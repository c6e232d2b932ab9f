"""README and its annexes keep their word: examples print what they say, tables and figures are those of data/, names exist."""
import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tinycea import cli, degradations
from tinycea.evaluation import format_table
from tinycea.lab import comparison
from tinycea.zoo import WEIGHTS, load_model

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "data/README.md", "data/bench.md", "CONTRIBUTING.md")}
README, RESULTS, BENCH, _ = PAGES.values()
RUN, WITHOUT, SHIPPED = (json.loads(path.read_text()) for path in (
    ROOT / "data/train/cea/result.json", ROOT / "data/train/none/result.json", WEIGHTS.with_suffix(".json")))
RIVALS = ("wider", "static", "mlp", "descriptor", "prompt", "experts-image", "experts-token")


# ---- examples --------------------------------------------------------------------------------------------------------

def example(word):
    """Run README's example that holds the word -> its lines of code, what it printed, and its names."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if word in code)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return code, printed.getvalue().splitlines(), names


def test_the_gradient_example_prints_what_its_comments_say():
    code, printed, names = example("check_gradients")
    said = re.findall(r"print\(.*?# (.*)", code)
    assert printed[0] == said[0]
    assert all(any(line.startswith(name) for line in printed) for name in names["inputs"])
    worst, quoted = max(row.relative_error for row in names["report"]), float(said[1].split()[-1])
    assert all(row.passed for row in names["report"]) and quoted / 10 < worst < 10 * quoted


def test_the_restoring_example_gives_back_what_went_in():
    *_, names = example("restore")
    assert names["restored"].shape == names["hazy"].shape and names["restored"].dtype == names["hazy"].dtype == np.uint8


# ---- what a run gives ------------------------------------------------------------------------------------------------

def average(result, of="psnr_after", entries=("average",)):
    return np.mean([row[of] for row in result["rows"] if row["degradation"] in entries])


HARM = (ROOT / "data/results/harm/test.txt").read_text("utf-8").splitlines()[:-1]
ROWS = {line[:28].strip(): line[28:].split() for line in HARM[1:]}


def test_the_tables_are_the_committed_results():
    assert f"```\n{format_table(RUN['rows'])}\n```" in RESULTS
    assert "\n".join(line.rstrip() for line in HARM) in RESULTS
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| ")]
    shown = {row[0]: [cell for cell in row[1:] if cell] for row in shown if row[0] in ROWS}
    assert len(shown) == 6
    for name, row in shown.items():
        values = ROWS[name]
        assert row == (values[:3] if name == "clean" else [values[0], values[1], values[3], values[4]]), name


def test_the_sentences_around_them_are_too():
    page = " ".join(README.split())
    assert f"{RUN['recipe']['steps']} steps, {RUN['seconds']:.0f} s on two cores" in page and RUN["parameters"] // 1000 == 74
    gains = [f"{average(RUN, entries=[e]) - average(RUN, 'psnr_before', [e]):+.2f}"
             for e in ("noise25", "rain", "haze", "blur", "low")]
    assert f"{', '.join(gains[:4])} and {gains[4]} dB; a clean one returns at {average(RUN, entries=['clean']):.2f} dB" in page
    assert f"ends at {average(RUN):.2f} dB, `--adapter none` at {average(WITHOUT):.2f}: there the layer buys" in page
    assert f"{SHIPPED['parameters']:,} parameters" in RESULTS and SHIPPED["recipe"]["adapter"] in RESULTS
    text = " ".join(RESULTS.split())
    changed = int(ROWS["clean"][2][:-1])
    alike = f"{100 - changed} of 100 clean photographs"
    assert alike in page and f"{alike} return bit for bit, the worst of the others at {ROWS['clean'][1]} dB" in text
    ahead = [float(ROWS[row][1]) - float(re.search(r"means (\S+)", " ".join(ROWS[row]))[1])
             for row in ("noise15", "noise25", "noise50", "gray photograph, noise 25")]
    assert "Noise: {:.2f}, {:.2f} and {:.2f} dB above".format(*ahead) in text and f"photographs {-ahead[3]:.2f} dB below" in text


def test_the_recipe_before_and_now_are_those_of_the_committed_tables():
    for name, row in (("clean, PSNR", "clean"), ("JPEG of quality 90, gain", "jpeg, quality 90"), ("noise 25, gain", "noise25"),
                      ("rain, gain", "rain"), ("haze, gain", "haze"), ("low light, gain", "low"), ("blur, photographs", "blur")):
        cells = []
        for file in "validation-before.txt", "validation.txt":
            text = (ROOT / "data/train" / file).read_text("utf-8")
            found = [line.split() for line in re.findall(rf"^{row} +(.*)", text, re.M)]
            assert len(found) == 3                                # seeds
            cells.append(", ".join(f"{v[0]} ({v[1]})" if row == "clean" else v[4].replace("%", " %") if row == "blur" else v[2]
                                   for v in found))
        assert re.search(rf"^\| {name}.* \| {re.escape(cells[0])} \| {re.escape(cells[1])}", RESULTS, re.M), (name, cells)


def test_bm3d_is_as_far_ahead_as_said():
    table = (ROOT / "data/results/harm/bm3d.txt").read_text("utf-8")
    rows = re.findall(r"^(noise\d+|gray photograph, noise 25) +\S+ +(\S+) .*BM3D (\S+)", table, re.M)
    (a, x), (b, y), (c, z), (d, w) = (row[1:] for row in rows)
    assert "20 photographs of the test split" in table and f"{x}, {y} and {z} dB at σ 15" in " ".join(RESULTS.split())
    assert f"told nothing: {a}, {b} and {c}. Gray: {w} and {d}." in " ".join(RESULTS.split())


def test_there_is_one_test_set():
    degraded = re.search(r"^aio5.*photographs:.*\n.*\ndegraded +(\S+)", headline("table.txt"), re.M)[1]
    assert f"{average(RUN, 'psnr_before'):.2f}" == degraded


# ---- the comparison --------------------------------------------------------------------------------------------------

def headline(name):
    return (ROOT / "data/results/headline" / name).read_text("utf-8")


def photographs(suite):
    """The rows of a suite's table of whole photographs: {adapter: the text after its name}."""
    block = next(block for block in headline("table.txt").split("\n\n") if re.match(f"{suite}, .* photographs:", block))
    return {line[:17].strip(): line[17:] for line in block.splitlines()[2:]}


def means(suite, steps, seeds):
    """{adapter: {entry: mean PSNR on photographs}} of the runs behind the tables."""
    runs = [json.loads(line) for line in headline("runs.jsonl").splitlines()]
    found = {}
    for run in runs:
        recipe = run["recipe"]
        if "parameters" in run and (recipe["suite"], recipe["steps"]) == (suite, steps) and recipe["seed"] < seeds:
            for entry, photos in run["psnr"]["photographs"].items():
                found.setdefault(recipe["adapter"], {}).setdefault(entry, []).append(np.mean(list(photos.values())))
    return {adapter: {entry: np.mean(values) for entry, values in entries.items()} for adapter, entries in found.items()}


def test_the_verdict_s_table_is_the_committed_ones():
    blocks = dict(zip(("apart", "overlapping"), re.split(r"\n\n?stains-overlapping", (
        ROOT / "data/results/stains/test.txt").read_text("utf-8"))))

    def stained(where, row):
        """The last column's gain over none and its interval, as README writes them."""
        line = re.search(rf"^{row} .*$", blocks[where], re.M)[0]
        return re.findall(r"\d ([+-]\S+ \[\S+ \S+\])", line)[-1].replace("+", "")

    lines = README.split("## Does it hold?")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    rates = {"aio3": (", rate 0.03", ", rate 0.03", ""), "aio5": (", rate 0.03", ", rate 0.03", ""),
             "aio5, no SCA": ("", ", rate 0.03", None), "cdd11": ("", ", rate 0.03", ", rate 0.1"), "patchwork": ("", "", "")}
    for title, told, cea, share, descriptor, mlp in rows:
        title, sca = title.replace("`", ""), ":sca=false" if "no SCA" in title else ""
        if title.startswith("stains"):
            where = title.split(", ")[1]
            assert (told, cea, share) == ("", stained(where, "cea" + sca), "")
            assert descriptor == stained(where, "descriptor:norm=image,sca=false" if sca else "descriptor").split()[0]
            assert mlp == ("" if sca else stained(where, "mlp").split()[0])
        else:
            names, usual = ("told", "cea", "descriptor", "mlp"), title.removesuffix(", taught")
            found = {name: longer(title.split(",")[0], name + sca + rate)[1].replace("+", "")
                     for name, rate in zip(names, ("", *rates[usual])) if rate is not None}
            if usual != title:
                found |= {name: taught(TAUGHT[who], "truth*0.3")["none"] for name, who in (
                    ("cea", "CEA"), ("descriptor", "the descriptor"))} | {"mlp": ""}
            assert (told, cea, descriptor) == (found["told"].split()[0], found["cea"], found["descriptor"].split()[0]), title
            assert mlp == found.get("mlp", "").split(" ")[0], title
            assert abs(float(share[:-1]) - 100 * float(cea.split()[0]) / float(told)) < 2, title      # of unrounded gains
    assert len(rows) == 9
    gain = {line.split()[0]: float(re.findall(r" \+?(-?\d+\.\d\d) \[", line)[-1]) for line in blocks["apart"].splitlines()
            if " [" in line}
    guided = {name: dB for name, dB in gain.items() if ":told" in name and "cea" not in name} | {
        "prompt": float(guided_gains("guided-prompt")[0]["prompt:told=15"][2])}
    page = " ".join(README.split())
    assert f"CEA gains {gain['cea:told=15']} dB apart, a rival {max(guided.values())}." in page
    assert f"it gains {gain['cea:sca=false']:.1f} dB, a rival {gain['descriptor:norm=image,sca=false']:.1f};" in page
    for where, text in (("apart", "CEA 4.40 [4.09, 4.70] at twice"), ("overlapping", "Overlapping: CEA 1.41 and")):
        found = [re.findall(r" [+-](\S+) \[", re.search(rf"^{row} .*$", blocks[where], re.M)[0])[1:] for row in (
            "cea:sca=false", "descriptor:norm=image,sca=false", "descriptor:sca=false")]
        assert text in " ".join(RESULTS.split()) and text.split("CEA ")[1][:4] == found[0][0]
        assert all(" and ".join(pair) in " ".join(RESULTS.split()) for pair in found[1:])


def test_three_times_the_steps_are_the_committed_tables():
    cell = re.compile(r" (\d+\.\d\d)(?: ([+-]\d+\.\d\d) (\[\S+ \S+\]))?(?= |$)")
    once, thrice = ([{line.split()[0]: cell.findall(line)[1:] for line in block.splitlines() if len(cell.findall(line)) == 3}
                     for block in (ROOT / f"data/results/stains/{name}.txt").read_text("utf-8").split("\nstains-overlapping")]
                    for name in ("longer", "longer-without-sca"))
    page, bare, rival = " ".join(RESULTS.split()), "cea:sca=false", "descriptor:norm=image,sca=false"

    def of(table, row, column):
        return " and ".join(cells[column].replace("+", "") for cells in table[row])
    (apart, overlapping), (with_sca, _) = thrice, once
    lead, other = ([float(a[1]) - float(b[1]) for a, b in zip(table[bare], table[rival])] for table in thrice)
    two, four = (f"{gain} {spread}".replace("+", "") for _, gain, spread in apart[bare])
    assert f"apart to {two} dB at twice the size and {four} at four times, {lead[0]:.2f} and {lead[1]:.2f} ahead of" in page
    assert f"to {of(overlapping, bare, 1)}, {other[0]:.2f} ahead and {-other[1]:.2f} behind" in page
    assert f"softmax CEA gains {of(with_sca, 'cea-softmax', 1)}, CEA {of(with_sca, 'cea', 1)}" in page
    assert f"{of(with_sca, bare, 0)} dB, the backbone with SCA {of(with_sca, 'none', 0)}." in page
    assert all(float(with_sca[bare][i][0]) == max(float(cells[i][0]) for cells in with_sca.values()) for i in (0, 1))
    said = "three times as long, {:.1f} and {:.1f}.".format(*(float(apart[row][1][1]) for row in (bare, rival)))
    assert said in " ".join(README.split())


def test_self_attention_s_figures():
    text, page = (ROOT / "data/results/layer/attention.txt").read_text("utf-8"), " ".join(RESULTS.split())
    found = [dB for *_, dB in re.findall(r"^(regions|lamps) +(softmax|linear) .*: +(.*)$", text, re.M)]
    assert all(said in page for said in found) and len(found) == 4
    assert "{} and {}; at its best it is level".format(*found[1::2]) in page


def guided_gains(name):
    """Apart and overlapping, row -> gains over none at one, two and four times the training size, as written."""
    blocks = (ROOT / f"data/results/stains/{name}.txt").read_text("utf-8").split("\nstains-overlapping")
    return [{line.split()[0]: re.findall(r" \+?(-?\d+\.\d\d) \[", line) for line in block.splitlines() if " [" in line}
            for block in blocks]


def test_the_rivals_that_are_guided():
    page, tables = " ".join(RESULTS.split()), guided_gains("guided-prompt")
    rival, cea = ([[float(dB) for dB in table[row][1:]] for table in tables] for row in ("prompt:told=15", "cea:told=15"))
    assert "{:.2f} and {:.2f}, overlapping {:.2f} and {:.2f}; CEA is".format(*rival[0], *rival[1]) in page
    ahead = [a - b for c, r in zip(cea, rival) for a, b in zip(c, r)]
    assert "CEA is {:.2f} and {:.2f}, {:.2f} and {:.2f} ahead of it".format(*ahead) in page
    apart, _ = guided_gains("guided")
    behind = [float(apart["cea:told=15"][i]) - float(apart[row][i]) for i in (1, 2)
              for row in ("wider:told=15", "experts-image:told=15", "experts-token:told=15")]
    assert f"by {min(behind):.2f} to {max(behind):.2f} dB apart" in page


def test_told_is_no_ceiling_on_stains():
    lines = {(line["recipe"]["adapter"], line["recipe"]["seed"]): line["psnr"]["stains"] for line in map(json.loads, (
        ROOT / "data/results/stains/runs.jsonl").read_text("utf-8").splitlines())}
    gains = [np.array([np.subtract(lines["none:told=15", seed][side], lines["none", seed][side]) for seed in range(3)])
             for side in ("96", "192")]
    said = ["{:.2f} [{:.2f}, {:.2f}]".format(gain.mean(), *comparison.interval(gain)) for gain in gains]
    assert f"to be told is worth {said[0]} and {said[1]} dB apart" in " ".join(RESULTS.split())


def longer(suite, row):
    """PSNR and the gain over none with its interval of a row at 4000 steps; none for the row none."""
    block = re.search(rf"^{suite}, 4000 .*?\n\n", (ROOT / "data/results/told/longer.txt").read_text("utf-8"), re.M | re.S)[0]
    line = re.search(rf"^{row}  +\d+ +\d+ +\S+ +(\d\d\.\d\d) .*$", block, re.M)
    return line[1], "".join(re.findall(r"([+-]\d\S+ \[\S+ \S+\]) +-?\d+%", line[0]))


def test_the_verdict_is_the_tables():
    suites = "aio3", "aio5", "cdd11", "patchwork"
    for title, names in {"no adapter": ["none"] * 4, "told": ["told"] * 4, "CEA": ["cea, rate 0.03"] * 2 + ["cea"] * 2,
                         "descriptor": ["descriptor, rate 0.03"] * 3 + ["descriptor"],
                         "token MLP": ["mlp", "mlp", "mlp, rate 0.1", "mlp"]}.items():
        assert f"| {title} | {' | '.join(' '.join(longer(*w)).strip() for w in zip(suites, names))} |" in RESULTS
    others = {"static": "static", "prompt": "prompt", "experts-token": "experts per token", "wider": "wider",
              "experts-image": "experts per image"}
    assert ", ".join(f"{title} {longer('aio5', name)[1]}" for name, title in others.items()) in " ".join(RESULTS.split())


def test_the_ceiling_at_1000_steps_is_the_table_s():
    page, text = " ".join(RESULTS.split()), (ROOT / "data/results/told/table.txt").read_text("utf-8")
    blocks = [re.search(rf"^{suite}, 1000 .*?\n\n", text, re.M | re.S)[0] for suite in ("aio5", "cdd11", "patchwork")]
    gains = {row: [re.search(rf"^{row} .* ([+-]\d\S+) \[\S+ \S+ +(-?\d+)%", block, re.M).groups() for block in blocks]
             for row in ("told", "cea", *RIVALS)}
    assert "told gains {}, {} and {} dB.".format(*(gain.removeprefix("+") for gain, _ in gains["told"])) in page
    most = {row: max(int(share) for _, share in found) for row, found in gains.items()}
    assert f"the token MLP takes {max(most[row] for row in RIVALS)} %, wider {most['wider']} %, CEA {most['cea']} %" in page


def test_the_rates_of_the_longer_runs_are_the_best_on_validation():
    for suite, options, best in (("aio5", "", ("cea, rate 0.03", "descriptor, rate 0.03", "mlp")),
                                 ("cdd11", "", ("cea", "descriptor, rate 0.03", "mlp, rate 0.1")),
                                 ("aio5", ":sca=false", ("cea", "descriptor, rate 0.03"))):
        text = (ROOT / "data/results/rates" / ("without-sca.txt" if options else "longer.txt")).read_text("utf-8")
        block = re.search(rf"^{suite}, 4000 .*?\n\n", text, re.M | re.S)[0]
        rows = re.findall(rf"^((?:cea|descriptor|mlp){options}(?:, rate \S+)?)  +\d+ +\d+ +\S+ +(\S+) ", block, re.M)
        found = {name.replace(options, ""): dB for name, dB in rows}
        for name in best:
            assert found[name] == max(dB for other, dB in found.items() if other.split(",")[0] == name.split(",")[0])


def test_what_is_gained_without_sca_is_the_table_s():
    names = "none:sca=false", "told:sca=false", "cea:sca=false", "descriptor:sca=false, rate 0.03"
    none, told, cea, descriptor = (longer("aio5", name) for name in names)
    said = f"none {none[0]}, " + ", ".join(f"{name} {row[0]} ({row[1]})" for name, row in
                                           (("told", told), ("CEA", cea), ("descriptor", descriptor)))
    lines = [line for line in comparison.finished(ROOT / "data/results/told") if (r := line["recipe"])["suite"] == "aio5"
             and r.get("steps") == 4000 and r["seed"] < 3]
    with_sca, without = (np.mean([comparison.mean(line["psnr"]) for line in lines if line["recipe"]["adapter"] == name])
                         for name in ("none", "none:sca=false"))
    page = " ".join(RESULTS.split())
    assert said in page and f"SCA alone gives {with_sca - without:.2f} dB" in page


def taught(row, loss, suite="aio5"):
    """The row in told/taught.txt: PSNR on validation and on test, leads over itself untaught and over none, share."""
    text, lead = (ROOT / "data/results/told/taught.txt").read_text("utf-8"), r"([+-]\S+ \[\S+ \S+\])"
    name = re.escape(f"{row}+{loss}")
    cells = re.search(rf"^{suite} +{name} +(\d) +(\d\S+)? +(\d\S+) +{lead}? +{lead} +(-?\d+)%$", text, re.M).groups()
    names = "seeds", "validation", "test", "untaught", "none", "share"
    return {name: cell and cell.replace("+", "") for name, cell in zip(names, cells)}


TAUGHT = {"CEA": "cea@0.03", "the descriptor": "descriptor@0.03", "the backbone alone": "none@0.1",
          "CEA without SCA": "cea:sca=false@0.1", "the descriptor without SCA": "descriptor:sca=false@0.03"}


def test_summaries_that_are_taught():
    page = " ".join(RESULTS.split())
    for title, row in TAUGHT.items():
        found = [taught(row, f"{loss}*0.3") for loss in ("labels", "truth", *["faded"] * (row in ("cea@0.03", "none@0.1")))]
        named, truth, *faded = (f"{cell['test']} {cell['none']} ({cell['seeds']})" for cell in found)
        assert f"| {title} | {named} | {truth} | {found[1]['share']}% | {''.join(faded)} |" in RESULTS
    text = (ROOT / "data/results/told/default.txt").read_text("utf-8")
    whole, clean, worst = ({row: cells[i] for row, *cells in re.findall(
        r"^(\S+) +2 +(\S+) +\S+ +(\S+) \( ?(\S+)\)", text, re.M)} for i in range(3))
    none, cea, told, told_cea, named = "none+labels*0", "cea+labels*0", "none+truth*0.3", "cea+truth*0.3", "cea+labels*0.3"
    more = float(whole[named]) - float(whole[cea])
    assert (f"{whole[told]} dB on the three photographs instead of {whole[none]}, but clean ones return at {clean[told]} instead "
            f"of {clean[none]} dB, the worst at {worst[told]}, and one loses 18.63 dB under blur. CEA gains nothing by it "
            f"({whole[told_cea]}, untaught {whole[cea]}); named it gains {more:.2f} dB and leaves one clean crop at "
            f"{worst[named]}.") in page and "(-18.63)" in text and f"level ({whole[cea]} and {whole[none]} dB)" in page
    for text, rows in (("gives CEA {} dB, without SCA {}: half", [taught(row, "truth-mean*0.3") for row in (
            "cea@0.03", "cea:sca=false@0.1")]), ("CEA {} against none, the backbone alone {}.", [
            taught(row, "truth*0.3", "cdd11") for row in ("cea@0.1", "none@0.1")])):
        assert text.format(*(row["none"] for row in rows)) in page
    tried = {line["recipe"]["adapter"]: comparison.mean(line["psnr"]) for line in map(json.loads, (
        ROOT / "data/results/told/taught.jsonl").read_text("utf-8").splitlines()) if line["split"].startswith("validation")
        and (line["recipe"]["seed"], line["recipe"]["adapter_lr"]) == (0, 0.1)}
    tried = [f"{tried[f'cea:sca=false+labels*{weight}']:.2f}" for weight in ("0.1", "0.3", "1", "3")]
    assert "Weights of 0.1, 0.3, 1 and 3 gave {}, {}, {} and {} dB".format(*tried) in page and max(tried) == tried[1]
    raised = taught(TAUGHT["CEA"], "truth*0.3"), taught(TAUGHT["CEA without SCA"], "truth*0.3")
    assert ("Truth raises CEA by {} dB, from 0 to {} % of the ceiling; without SCA from 18 to {} %.".format(
        raised[0]["untaught"], *(row["share"] for row in raised)) in page)
    rows = re.findall(r"seed \d  (\S+(?:, \w+)?) +(\d\d\.\d\d) dB", (ROOT / "data/results/told/priors.txt").read_text("utf-8"))
    dB = {name: [value for other, value in rows if other == name] for name, _ in rows}
    assert "{} and {} dB, untaught {} and {}".format(*dB["cea, prior"], *dB["cea"]) in page and len(rows) == 6


def test_what_the_instruments_read_on_aio5():
    page, cells = " ".join(RESULTS.split()), r", aio5 +(\S+) +(\S+) +(\S+) +-(\S+) +-(\S+)$"
    for name, row, said in (("aio5", "cea_sca_false", "rank {}, averaging costs {} dB, A and U of an image under another "
                             "degradation {}:"), ("aio5-sca", "cea", "rank {}, {} and {} dB: less is")):
        text = (ROOT / f"data/results/stains/instruments-{name}.txt").read_text("utf-8")
        rank, _, _, averaged, other = re.search(f"^{row}{cells}", text, re.M).groups()
        assert said.format(rank, averaged, other) in page


def test_compositions_gain_what_is_said():
    lines = comparison.finished(ROOT / "data/results/told")
    table = {(r["adapter"], r["seed"]): comparison.matrix(line) for line in lines if (r := line["recipe"]).get("steps") == 4000
             and r["suite"] == "cdd11" and r["adapter"] in ("none", "cea")}
    ahead = np.array([table["cea", seed] - table["none", seed] for seed in range(5)])
    composed = np.array(["+" in entry for entry in degradations.suite("cdd11")])
    both = ahead[..., composed].mean(-1), ahead[..., ~composed].mean(-1)
    said = ["{:.2f} [{:.2f}, {:.2f}]".format(d.mean(), *comparison.interval(d)) for d in (*both, both[0] - both[1])]
    assert ("gains {} dB on compositions, {} on single degradations; the difference is {}.".format(*said)
            in " ".join(RESULTS.split())) and f"`cdd11`'s compositions: {said[0][:4]}." in README
    assert (ahead.mean((1, 2)) > 0).sum() == 4


def test_the_last_networks_are_those_of_the_validation_table():
    _, *blocks = re.split(r"^runs/.*$", (ROOT / "data/results/harm/validation.txt").read_text("utf-8"), flags=re.M)
    table = re.search(r"^  \| \| clean \| JPEG 90, worst .*?\n\n", RESULTS, re.M | re.S)[0]
    shown = [line.split(" | ")[2:] for line in table.removesuffix(" |\n\n").split(" |\n")[1:]]
    assert len(shown) == len(blocks) - 1 == 28                    # the first is without the mirrored border
    gain = []
    for line, block in zip(shown, blocks[1:]):
        rows = {row[:28].strip(): row[28:].split() for row in block.splitlines()}
        names = "noise25", "haze", "low", "low+snow", "blur"
        gains, worst, lost = np.array([(float(row[2]), float(row[3]), int(row[4][:-1])) for row in rows.values()
                                       if len(row) > 4 and row[4].endswith("%")]).T
        assert line == [rows["clean"][0], rows["jpeg, quality 90"][3], *(rows[name][2] for name in names), f"{worst.min():.2f}",
                        f"{gains.mean():.2f}", f"{lost.mean():.2f} %"]
        gain.append(gains.mean() if worst.min() >= -1.5 else 0)
    assert np.argmax(gain) == 19 and "**mean of this and the sixteenth: taken**" in table.splitlines()[2 + 19]


def test_the_least_change_is_the_first_at_which_few_blurred_photographs_lose():
    lines = [line.split() for line in (ROOT / "data/results/harm/spare.txt").read_text("utf-8").splitlines()[1:-2]]
    rows = {int(n): [changed, *(f"{gain} ({worst}), {lost}" for gain, worst, lost in zip(*[iter(numbers)] * 3))]
            for n, _, changed, _, *numbers in lines}
    lost = {n: float(row[3].split()[-1][:-1]) for n, row in rows.items()}
    spare = load_model(WEIGHTS).config.spare
    assert spare == max(n for n in lost if lost[n] <= 3) and lost[200] > 20
    for n, (changed, *cells) in rows.items():
        name = {200: "none", spare: f"**{spare}**"}.get(n, n)
        shown = " | ".join(x.replace("%", " %") for x in (changed, *cells[:3], cells[4]))
        assert n in (48, 41, 38) or f"  | {name} | {shown} |\n" in RESULTS
    assert rows[spare][0] == "7%" and "1.6 of 255" in RESULTS and "1.6 of 255" in README


def test_rates_and_the_control_are_the_table_s():
    blocks = re.split(r"^(aio5|cdd11|patchwork), 1000 .*", (ROOT / "data/results/rates/table.txt").read_text("utf-8"), flags=re.M)
    rows = {suite: re.findall(r"^(\w+(?:, rate \S+)?) +\d+ .* ([+-]\S+) \[([+-]\S+), ([+-]\S+)\] +[\d.]+ ", block, re.M)
            for suite, block in zip(blocks[1::2], blocks[2::2])}
    gains = {(suite, name): numbers for suite, found in rows.items() for name, *numbers in found}
    page = " ".join(RESULTS.split())
    assert "({} [{}, {}] at 0.03)".format(*gains["aio5", "cea, rate 0.03"]) in page
    best = max(float(numbers[0]) for key, numbers in gains.items() if key[0] == "cdd11" and key[1].startswith("cea"))
    assert f"{-best:.2f} dB behind on `cdd11`" in page
    mean, low, high = (n.lstrip("+-") for n in gains["cdd11", "cea, rate 1e-06"])
    assert f"is {mean} [{high}, {low}] dB behind none on `cdd11`" in page


def test_the_curve_is_that_of_the_committed_tables():
    _, *blocks = re.split(r"^aio5, (\d+) steps", (ROOT / "data/results/length/curve.txt").read_text("utf-8"), flags=re.M)
    recognized = re.findall(r"(\d+) steps.*?in (\S+)", (ROOT / "data/results/length/recognizer.txt").read_text("utf-8"))
    assert len(blocks) == 2 * 4
    for steps, block in zip(blocks[::2], blocks[1::2]):
        psnr = dict(re.findall(r"^(\w+).* \d+ +\d+ +[\d.]+ +([\d.]+) ", block, re.M))
        shares = ", ".join(share for n, share in recognized if n == steps)
        row = [steps, *(psnr[name] for name in ("told", "none", "cea", "descriptor", "mlp")), shares]
        assert f"| {' | '.join(row)} |" in RESULTS


def test_the_intervals_of_gains_are_as_wide_as_said():
    text, page = (ROOT / "data/results/told/table.txt").read_text("utf-8"), " ".join(RESULTS.split())
    for suite in ("aio5", "cdd11", "patchwork"):
        block = re.search(rf"^{suite}, 1000 .*?\n\n", text, re.M | re.S)[0]
        wide = [(float(high) - float(low)) / 2 for low, high in re.findall(r"\[(\S+), (\S+)\] +-?\d+%", block)]
        assert len(wide) == 9
        low, high = re.search(rf"±(\S+) to ±(\S+)(?: dB)? on `{suite}`", page).groups()
        assert abs(min(wide) - float(low)) < 0.0051 and abs(max(wide) - float(high)) < 0.0051, suite


def test_the_four_layers_are_the_committed_table():
    blocks, psnr = (ROOT / "data/results/layer/four.txt").read_text("utf-8").split("\n\n")[:6:2], {}
    for adapter, title in {"none": "no adapter", "cea": "image norm, of X: the default",
                           "cea:norm=token,tokens=X": "token norm, of X", "cea:norm=image,tokens=Xhat": "image norm, of X̂",
                           "cea:norm=token,tokens=Xhat": "token norm, of X̂: the first form"}.items():
        rows = [re.search(rf"^{re.escape(adapter)} +\d+ +\d+ +\S+ +(\S+) .*$", block, re.M) for block in blocks]
        psnr[adapter] = np.array([float(row[1]) for row in rows])
        gains = ["" if adapter == "none" else re.findall(r" [-+]\d\.\d\d \[[^]]*\]", row[0])[-1] for row in rows]
        assert f"| {title} | {' | '.join(row[1] + gain for row, gain in zip(rows, gains))} |" in RESULTS
    pairs = ("cea", "cea:norm=image,tokens=Xhat"), ("cea:norm=token,tokens=X", "cea:norm=token,tokens=Xhat")
    ahead = [psnr[of_X] - psnr[of_Xhat] for of_X, of_Xhat in pairs]
    assert f"ahead of those of X̂ on all three, by {np.min(ahead):.2f} to {np.max(ahead):.2f} dB" in RESULTS


def test_the_mechanism_is_the_committed_table():
    text = (ROOT / "data/results/layer/mechanism.txt").read_text("utf-8")
    assert text.rsplit("\n", 2)[0] in RESULTS
    rows = {line[:24].strip(): [float(n) for n in re.findall(r"(\d+\.\d\d) \(", line)] for line in text.splitlines()[1:-1]}
    rivals = [dB for model, dB in rows.items() if not model.startswith(("CEA", "degraded", "theory"))]
    regions, lamps = (max(column) for column in zip(*rivals))
    assert len(rivals) == 6 and f"from {rows['degraded'][1]} to {rows['CEA'][1]} dB; no rival passes {lamps}" in README
    assert f"none passes {regions:.2f} dB on regions or {lamps} on lamps" in " ".join(RESULTS.split())
    assert regions < rows["CEA"][0] - 4 and lamps < rows["CEA"][1] - 5 and rows["CEA"][1] > rows["CEA, softmax"][1] + 2


def test_the_layer_at_length_is_the_committed_table():
    text, page = (ROOT / "data/results/layer/long.txt").read_text("utf-8"), " ".join(RESULTS.split())
    blocks = [dict(re.findall(r"^(\S.*?\S) +\d+ +0\.\d+ +(\S+ \([ \d.]+\) +\S+ \[\S+ \S+\])$", block, re.M))
              for block in text.split("\n\n")[:3]]
    leads = []
    for block in blocks:
        assert len(block) == 11
        name = max((name for name in block if "CEA" not in name), key=lambda name: float(block[name].split()[0]))
        leads.append((name, re.search(r"-(\d\.\d\d) \[-(\S+), -(\S+)\]", block[name]).groups()))
    assert [name for name, _ in leads] == ["descriptor", "descriptor", "prompt"]
    assert all(f"{mean} [{low}, {high}]" in page for _, (mean, high, low) in leads)
    softmax = [re.search(r"\) +[+-](\S+)", block["CEA, softmax"])[1] for block in blocks]
    assert "Softmax CEA is {} dB ahead of CEA on regions, {} and {} behind".format(*softmax) in page
    sweep = {key: [float(n) for n in line.split()] for key, line in re.findall(
        r"^(lamps +(?:descriptor|CEA)) +((?:\d+\.\d\d *){5})$", text, re.M)}
    one, *_, eight = np.subtract(sweep["lamps      CEA"], sweep["lamps      descriptor"])
    assert f"shrinks from {one:.1f} dB for one lamp to {abs(eight):.1f} for eight" in page


def test_low_light_makes_most_of_the_lead():
    found = means("aio5", 1000, 5)
    share = {}
    for rival in RIVALS:
        lead = {entry: found[rival][entry] - value for entry, value in found["cea"].items()}
        share[rival] = lead["low"] / sum(lead.values())
    static = share.pop("static")
    assert f"{100 * min(share.values()):.0f} to {100 * max(share.values()):.0f} %" in " ".join(RESULTS.split())
    assert f"{static:.0%}" == "99%"


def test_the_gain_of_longer_training():
    gains = []
    for suite in ("aio5", "patchwork"):
        short, long = means(suite, 1000, 2), means(suite, 4000, 2)
        for adapter in ("wider", "mlp", "descriptor", "experts-image", "cea"):
            gains.append(np.mean(list(long[adapter].values())) - np.mean(list(short[adapter].values())))
    assert f"All gain {min(gains):.2f} to {max(gains):.2f} dB" in RESULTS


def test_the_comparison_is_the_committed_one():
    blocks = re.findall(r"```\n(\w+, \d+ steps.*?)```", RESULTS, re.S)
    for block, path in zip(blocks, ("told/table.txt", "headline/table.txt", "length/steps.txt"), strict=True):
        table = (ROOT / "data/results" / path).read_text("utf-8")
        assert len(lines := block.splitlines()) > 10 and all(line in table for line in lines)


# ---- the race --------------------------------------------------------------------------------------------------------

def test_the_bench_rows_are_the_committed_ones():
    *lines, last = (ROOT / "data/bench.txt").read_text().splitlines()[1:]
    number = r"(\S+(?: ms| MB)?)"
    row = re.compile(rf"(\S.*?)\s\s+{number}(?:\s+{number}\s+(\d\S*)\s+(?:(\d\S*-\d\S*)\s+)?(\S.*))?")
    rows = ["| " + " | ".join(cell or "" for cell in row.fullmatch(line).groups()) + " |" for line in lines]
    assert "\n".join(rows) in BENCH and last in " ".join(BENCH.split())
    shown = re.findall(r"^\| .*", README.split("## Speed")[1].split("\n## ")[0], re.M)[1:]
    assert len(shown) == 3 and set(shown) <= set(rows)


def test_the_bench_on_another_machine_is_the_committed_one():
    text, page = (ROOT / "data/bench-intel.txt").read_text("utf-8"), " ".join(BENCH.split())

    def ratios(name, threads):
        return re.findall(rf"^{name}.* (\d\.\d\d) +\d\S+ +PyTorch \S+ {threads}", text, re.M)
    alone = ("{} to {} of its time in the CEA layer, {} in the NAFBlock, {} and {} in the training steps, {}, {} and {} "
             "in inference.")
    for threads, sentence in ("1 thread", alone), ("2 threads", "On all cores: {} to {}, {}, {} and {}, {}, {} and {}."):
        layer = sorted(ratios("CEA", threads))
        others = (ratio for name in ("NAFBlock", "training", "inference") for ratio in ratios(name, threads))
        assert sentence.format(layer[0], layer[-1], *others) in page
    shown = (ratios(name, f"{n} thread")[0] for name, n in ((r"CEA forward\+backward, N 16384", 1),
                                                            ("training step, batch 8, 96", 2), ("inference, batch 1, 512", 2)))
    assert "{}, {} and {} ([all rows]".format(*shown) in README


# ---- names and files -------------------------------------------------------------------------------------------------

def test_lines_of_code_shown_are_lines_of_the_source():
    source = [line.strip() for line in (ROOT / "tinycea/cea.py").read_text("utf-8").splitlines()]
    shown = re.findall(r"`([^`]*ops\.[^`]*)`", README.split("| equation")[1].split("\n\n")[0])
    assert len(shown) == 5 and all(line in source for line in shown)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", PAGES[page])
    assert links
    for path, anchor in links:
        assert (ROOT / page).parent.joinpath(path).exists(), path
        if anchor:                                            # as the hosts of repositories make it of a heading
            assert not path and anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-")
                                           for head in re.findall(r"^#+ (.*)", PAGES[page], re.M)}, anchor


def test_the_tree_is_the_tree():
    tree = README.split("```\ntinycea/\n")[1].split("```")[0]
    inside, beside = tree.split("\ndata/")[0], "data/" + tree.split("\ndata/")[1].split("    ")[0]
    names = re.findall(r"(?<![\w/])(\w+\.py|\w+/)", inside)
    for name in names:
        assert any((ROOT / "tinycea" / room / name).exists() for room in ("", "ops")), name
    assert {path.name for path in (ROOT / "tinycea").glob("[!_]*.py")} <= set(names)
    assert all((ROOT / name).is_dir() for name in beside.split())


def test_programs_of_the_lab_exist():
    texts = "".join(PAGES.values()) + "".join(path.read_text() for path in (ROOT / "data").glob("*.sh"))
    programs = set(re.findall(r"python -m tinycea\.(\w+\.\w+)", texts))
    assert programs and all((ROOT / "tinycea" / f"{name.replace('.', '/')}.py").exists() for name in programs), programs


def test_every_command_is_documented():
    commands = next(action for action in cli.parser()._actions if action.dest == "run" or action.choices).choices
    for name in commands:
        assert f"`tinycea {name}" in README, name


def test_minutes_to_read_a_notebook():
    rows = re.findall(r"^\| \[\d\]\((notebooks/\S+)\.ipynb\) \| .* \| (\d+) \| .* \|$", README, re.M)
    assert [Path(name).name for name, _ in rows] == [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    for name, minutes in rows[1:]:                            # 200 words a minute, code among them; the first is to be written
        assert abs(len((ROOT / f"{name}.py").read_text("utf-8").split()) / 200 - int(minutes)) < 5, name
