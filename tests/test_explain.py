"""The microscope's page: every handler does what it should in a real browser; it is small, self-contained, whole or not there."""
import base64
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest

from tinycea import cli
from tinycea.ablations import CEAConfig
from tinycea.images import write_image
from tinycea.lab.explain import silenced
from tinycea.nafnet import NAFNetConfig, anatomies, centered, init
from tinycea.ops import cpu
from tinycea.restoration import restore_rgb
from tinycea.zoo import load_model, save_model

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CONFIG = NAFNetConfig(width=8, middle=1, adapter=CEAConfig(rank=3, heads=2), slots=("encoders.0", "middle_blks"))
H, W = 48, 64


def model(path, config=CONFIG):
    """A network with random weights, W_U and all."""
    p, rng = init(config, np.random.default_rng(0)), np.random.default_rng(1)
    for name, value in p.items():
        if name.endswith("W_U"):
            value[...] = rng.normal(0, 0.5, value.shape)
    save_model(path, p, config)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page, its file, the measurements in it, and what they are made of."""
    folder = tmp_path_factory.mktemp("explain")
    image = np.random.default_rng(2).random((H // 8, W // 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.float32)
    write_image(folder / "<photo>.png", image)
    weights, out = model(folder / "model.safetensors"), folder / "page.html"
    assert cli.main(["explain", str(folder / "<photo>.png"), "-o", str(out), "--weights", str(weights)]) == 0
    page = out.read_text("utf-8")
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*)</script>', page)[1])
    return SimpleNamespace(out=out, page=page, data=data, image=np.rint(255 * image).astype(np.float32) / 255,
                           model=load_model(weights), photo=folder / "<photo>.png", weights=weights)


# ---- without a browser -----------------------------------------------------------------------------------------------

def test_the_page_stands_alone_and_holds_every_component(made):
    assert not re.search(r"https?:|//\w+\.\w|src=|@import", made.page.replace(json.dumps(made.data), ""))
    assert "<photo>" not in made.page and made.data["name"] == "<photo>.png"
    assert [layer["stage"] for layer in made.data["layers"]] == list(CONFIG.slots)
    assert all(len(layer["changes"]) == len(layer["U"]) == len(layer["moved"]) == 3 for layer in made.data["layers"])


def test_a_component_switched_off_adds_nothing_and_the_others_as_before(made):
    rng = np.random.default_rng(3)
    x, A, U = rng.normal(size=(1, 7, 4)), rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 3, 4))
    S, _ = cpu.affinity(x, A)
    for name, given in (("assembly", (x, x, A, U)), ("combine", (x, S, U))):
        assemble = getattr(silenced(1, 2), name)
        whole, less, again = (assemble(*given)[0] for _ in range(3))
        np.testing.assert_allclose(whole - less, S[..., 2:] @ U[:, 2:] / 3**0.5, atol=1e-12)
        np.testing.assert_array_equal(whole, again)
    np.testing.assert_array_equal(restore_rgb(made.image, *made.model, silenced(9, 0)),
                                  restore_rgb(made.image, *made.model))


def test_a_large_photograph_is_reduced_and_its_page_under_5_mb(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_image(tmp_path / "noise.png", rng.random((700, 900, 3)))
    small = replace(CONFIG, slots=("encoders.0",))
    arguments = [str(tmp_path / "noise.png"), "-o", str(tmp_path / "a.html"), "--weights", str(model(tmp_path / "m", small))]
    assert cli.main(["explain", *arguments]) == 0
    page = (tmp_path / "a.html").read_text("utf-8")
    assert '"file": [900, 700], "size": [512, 396]' in page and len(page) < 5e6


@pytest.mark.parametrize("name, arguments", [
    ("the name of an .html file", ("-o", "page.png")), ("the name of an .html file", ("-o", ".")),
    ("is the input itself", ("-o", "photo.html")), ("cannot be read", ("-o", "a.html", "--weights", "none")),
    ("no CEA layer", ("-o", "a.html", "--weights", "plain")), ("expected at least 4 a side", ("-o", "a.html", "--weights", "m"))])
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, name, arguments):
    monkeypatch.chdir(tmp_path)
    write_image("photo.png", np.zeros((3, 9, 3)))
    (tmp_path / "photo.png").rename("photo.html")
    model("m")
    model("plain", replace(CONFIG, adapter=None, slots=None))
    before = sorted(tmp_path.iterdir())
    assert cli.main(["explain", "photo.html", *arguments]) == 2
    assert name in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before


# ---- in a browser ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is opened with playwright")
    if BROWSER is None:
        pytest.skip("no Chromium here to open the page with")
    with playwright.sync_playwright() as p:
        yield (opened := p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]))
        opened.close()


@pytest.fixture
def tab(browser, made):
    """The page, opened; whatever its console said, or it asked of a network, fails the test at the end."""
    tab, said = browser.new_page(viewport={"width": 1366, "height": 768}, has_touch=True), []
    tab.set_default_timeout(120_000)
    tab.on("console", lambda message: message.type == "error" and said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
    tab.goto(made.out.as_uri())
    tab.wait_for_selector("body[data-ready]", timeout=120_000)
    yield tab
    tab.close()
    assert not said


def photo(tab):
    """The pixels of the photograph that is shown, (H,W,3)."""
    flat = tab.evaluate("[...document.querySelector('#photo').getContext('2d').getImageData(0, 0, ...data.size).data]")
    return np.reshape(flat, (H, W, 4))[..., :3] / 255


def decoded(url):
    """The picture in a data URL, (H,W,3) in [0,255]."""
    return iio.imread(base64.b64decode(url.partition(",")[2]), extension=".webp")[..., :3].astype(float)


def shows(tab, made, off, line):
    """Whether left of the line stands the photograph as given, right of it the restored one, without a component (layer, r)."""
    change = 0 if off is None else 255 * (decoded(made.data["layers"][off[0]]["changes"][off[1]]) - 128) / 127
    expected = np.clip(decoded(made.data["restored"]) + change, 0, 255)
    expected[:, :line] = decoded(made.data["degraded"])[:, :line]
    return abs(255 * photo(tab) - expected).max() < 3


def state(tab):
    return tab.evaluate("[state.x, state.y]")


def test_the_slider_moves_the_border(tab, made):
    assert shows(tab, made, None, W // 2)
    tab.focus("#wipe")
    for key, line in (("Home", 0), ("End", W)):
        tab.keyboard.press(key)
        assert shows(tab, made, None, line)


@pytest.mark.parametrize("by", ["mouse", "keyboard", "touch"])
def test_a_switch_shows_the_photograph_without_the_component(tab, made, by):
    tab.fill("#wipe", "0")
    button = tab.locator(".layer").nth(1).locator("button").nth(2)
    press = {"mouse": button.click, "touch": button.tap, "keyboard": lambda: button.press("Space")}[by]
    press()
    assert button.text_content() == "off" and button.get_attribute("aria-pressed") == "false"
    assert "middle_blks, r = 3" in tab.text_content("#right") and tab.locator(".tile.off").count() == 1
    assert shows(tab, made, (1, 2), 0) and not shows(tab, made, None, 0)
    tab.locator(".layer").nth(0).locator("button").nth(0).click()     # the other one is on again
    assert shows(tab, made, (0, 0), 0) and tab.locator(".tile.off").count() == 1
    tab.keyboard.press("Escape")
    assert shows(tab, made, None, 0) and tab.locator(".tile.off").count() == 0


def test_a_click_shows_the_affinities_of_that_token_and_what_each_adds(tab, made):
    box = tab.locator("#photo").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 10.5 / W, box["y"] + box["height"] * 33.5 / H)
    assert state(tab) == [10, 33] and "pixel 10, 33" in tab.text_content("#pixel")
    layers = anatomies(centered(made.image[None], *made.model)[1])
    for element, layer in zip(tab.locator(".layer").all(), layers.values()):
        side = round((H * W / layer["S"].shape[1])**0.5)
        S = layer["S"][0].reshape(H // side, W // side, 3)[33 // side, 10 // side]
        terms = S[:, None] * layer["U"][0] / 3**0.5
        residual = terms.sum(0)
        share = 100 * terms @ residual / (residual @ residual)
        shown = [[float(text.replace("−", "-").rstrip(" %")) for text in element.locator(name).all_text_contents()]
                 for name in (".affinity", ".share")]
        np.testing.assert_allclose(shown[0], S, atol=0.006 + abs(layer["S"]).max() / 250)
        np.testing.assert_allclose(shown[1], share, atol=8)
        widths = [bar.evaluate("bar => bar.style.width") for bar in element.locator(".bar i").all()]
        assert len(set(widths)) > 3


def test_a_drag_on_a_map_and_a_touch_pick_pixels(tab):
    box = tab.locator(".map").nth(4).bounding_box()
    tab.mouse.move(box["x"] + 2, box["y"] + 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.25)
    assert state(tab) == [W * 3 // 4, H // 4]
    tab.mouse.up()
    tab.mouse.move(box["x"] + 2, box["y"] + 2)
    assert state(tab) == [W * 3 // 4, H // 4]
    box = tab.locator("#photo").bounding_box()
    tab.touchscreen.tap(box["x"] + box["width"] / 4 + 1, box["y"] + box["height"] / 2 + 1)
    assert state(tab) == [W // 4, H // 2]


def test_arrow_keys_move_the_pixel_and_stop_at_the_border(tab):
    tab.focus("#photo")
    for key, place in (("ArrowRight", [33, 24]), ("ArrowUp", [33, 23]), ("Shift+ArrowDown", [33, 39]),
                       ("Shift+ArrowLeft", [17, 39]), ("Shift+ArrowDown", [17, 47]), ("Home", [17, 47])):
        tab.keyboard.press(key)
        assert state(tab) == place


def test_the_maps_change_to_where_the_probe_looks(tab):
    def first():
        return tab.evaluate("document.querySelector('.map canvas').toDataURL()")
    before = first()
    tab.locator("[name=map]").nth(1).check()
    assert first() != before
    tab.locator("[name=map]").nth(0).check()
    assert first() == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_in_light_and_dark_and_on_a_phone(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    back, text = (tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    dark, light = sorted(sum(map(int, re.findall(r"\d+", color))) for color in (back, text))
    assert light - dark > 500 and (sum(map(int, re.findall(r"\d+", back))) == dark) == (scheme == "dark")
    for width in (360, 1366):
        tab.set_viewport_size({"width": width, "height": 740})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
