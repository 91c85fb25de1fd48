"""The atlas in a real browser, with a token: every picture below is what Chromium drew."""

import io
import json
import re
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgd.stain.checks import NEARLY_BLANK
from tests.support.serving import SCRIPT, TOKEN, start_service, wait

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
ui = pytest.importorskip("selenium.webdriver.support.ui")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium: apt-get install chromium chromium-driver", allow_module_level=True)

FLAGS = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
FLAGS += " disable-component-update disable-sync force-prefers-reduced-motion force-device-scale-factor=1"


class Page:
    """The page in Chromium."""

    def __init__(self, driver, service):
        self.driver, self.service = driver, service

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, fragment=""):
        """Load the page."""
        self.resize(1280, 800)
        self.driver.get("about:blank")
        self.driver.get(f"{self.service.url}#token={TOKEN}&{fragment}")
        wait(lambda: self.all("#slides button"))

    def all(self, selector):
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def one(self, selector):
        """The element, once there is one that is seen."""
        return wait(lambda: self.all(selector))[0]

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.innerText.trim() ?? ''", selector)

    def texts(self, selector):
        """Of all that there are, at one time."""
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText.trim())"
        return self.run(script, selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def open_slide(self, identity, **view):
        self.open(urllib.parse.urlencode({"slide": identity, **view}))
        wait(lambda: self.text("#place") and self.text("#slide-state"))

    @property
    def view(self):
        """Middle and zoom, as the address has them."""
        found = urllib.parse.parse_qs(self.run("return location.hash.slice(1)"))
        return [float(found[name][0]) for name in ("x", "y", "zoom")]

    def locate(self, x, y):
        """A place of the slide as a pixel of the stage."""
        width, height = self.run("const s = document.getElementById('stage'); return [s.clientWidth, s.clientHeight]")
        middle_x, middle_y, zoom = self.view
        return width / 2 + (x - middle_x) * zoom, height / 2 + (y - middle_y) * zoom

    def draw(self):
        """The stage as it is drawn, uint8 (H, W, 3), once it has come to rest."""
        left, top, width, height = self.run(
            "const s = document.getElementById('stage'), r = s.getBoundingClientRect();"
            "return [r.left + s.clientLeft, r.top + s.clientTop, s.clientWidth, s.clientHeight].map(Math.round)"
        )
        drawn = []

        def rest():
            with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as image:
                drawn.append(np.asarray(image.convert("RGB"))[top : top + height, left : left + width])
            # A query loads, and an image fades in, after a frame that was alike.
            return len(drawn) > 2 and all(np.array_equal(drawn[-1], one) for one in drawn[-3:-1])

        wait(rest)
        return drawn[-1]

    def choose(self, selector, value):
        ui.Select(self.one(selector)).select_by_value(value)

    def read_answer(self, title):
        """The text of the panel, once the answer to this is there with its images."""
        wait(lambda: self.text("#answer [role=status]").startswith(f"{title}: the network expects level "))
        images = "return [...document.querySelectorAll('#answer img')].map((one) => one.naturalWidth)"
        wait(lambda: min(self.run(images)) > 0)
        return self.text("#answer")

    def find_faults(self):
        """The serious faults that axe-core finds."""
        self.run((ROOT / "tests" / "serve" / "axe.min.js").read_text())
        script = "const done = arguments[0]; axe.run().then(done, (error) => done({error: String(error)}))"
        found = self.driver.execute_async_script(script)
        assert len(found["passes"]) > 20
        serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        return [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]

    def read_console(self):
        """Errors since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, service):
    """The page; a test fails for an error on its console, and for a request to anybody but the service."""
    page = Page(driver, service)
    yield page
    assert page.read_console() == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(service.url) for url in urls)
    assert [url for url in urls if not url.startswith((service.url, f"blob:{service.url}", "data:", "about:"))] == []


def mix_colours(legend, grade):
    stops = legend["stops"]
    colours = np.array([[int(one["colour"][at : at + 2], 16) for at in (1, 3, 5)] for one in stops])
    return np.array([np.interp(grade, [one["value"] for one in stops], channel) for channel in colours.T])


def test_overlays_are_drawn_where_their_tiles_lie(page, service, ramp):
    page.open_slide(ramp, x=650, y=450, zoom=0.4)
    page.choose("#overlay", "")
    bare = page.draw()
    page.choose("#overlay", "score")
    page.one("#opacity").send_keys(Keys.END)
    full, seen = page.draw(), 0
    overlay = service.ask(f"slides/{ramp}")["overlays"][0]
    for row in service.ask(f"slides/{ramp}/rows?limit=100")["rows"]:
        colour = mix_colours(overlay["legend"], row["grade"])
        # Beside the cross-hair and the scale bar. Up to its edges a tile has one colour: nothing is smoothed.
        for at in (0.05, 0.4, 0.95):
            x, y = (round(one) for one in page.locate(row["x"] + at * row["side"], row["y"] + at * row["side"]))
            if 0 <= y < full.shape[0] - 50 and 0 <= x < full.shape[1] and max(abs(x - 285), abs(y - 230)) > 40:
                assert abs(full[y, x] - colour).max() <= 2, (row["number"], at)
                seen += 1
    assert seen > 60
    x, y = (round(one) for one in page.locate(50, 450))
    assert np.array_equal(full[y, x], bare[y, x]) and bare[y, x].min() > 230, "glass has no tile"
    page.one("#opacity").send_keys(Keys.HOME)
    assert np.array_equal(page.draw(), bare)
    assert page.texts("#legend .ticks span") == ["0", "1+", "2+", "3+"]
    page.choose("#overlay", "")
    assert np.array_equal(page.draw(), bare) and page.text("#legend") == ""


def test_the_slide_is_drawn_at_its_place(page, ramp):
    page.open_slide(ramp, x=650, y=450, zoom=0.4)
    page.choose("#overlay", "")
    drawn = page.draw()
    left, right = (drawn[round(page.locate(x, 300)[1]), round(page.locate(x, 300)[0])] for x in (150, 1150))
    assert left.mean() > right.mean() + 60, "tissue gets darker from left to right"
    (edge, y), glass = (round(one) for one in page.locate(100, 600)), 235
    assert drawn[y, edge - 3].min() > glass - 15 > drawn[y, edge + 3, 1], "and begins at 100"
    um = 0.46 * page.all("#scale-bar")[0].size["width"] / page.view[2]
    assert page.text("#scale-text") == f"{round(um)} µm" and round(um) in (100, 200)


def test_a_click_queries_its_place(page, service, ramp):
    page.open_slide(ramp, x=650, y=450, zoom=0.4)
    canvas = page.one(".openseadragon-canvas")
    ActionChains(page.driver).move_to_element_with_offset(canvas, 60, -40).click().perform()
    status = wait(lambda: re.match(r"place ([\d,]+), ([\d,]+): ", page.text("#answer [role=status]")))
    x, y = (int(one.replace(",", "")) for one in status.groups())
    assert abs(x - (650 + 60 / 0.4)) <= 5 and abs(y - (450 - 40 / 0.4)) <= 5
    said = page.read_answer(f"place {x:,}, {y:,}")
    answer = service.ask(f"slides/{ramp}/query?x={x}&y={y}&k=5", "POST")
    assert f"expects level {answer['level']}." in said and answer["chance"] in said
    alts = [one.get_attribute("alt") for one in page.all("#answer .neighbours img")]
    near = answer["neighbours"]
    assert alts == [f"IHC of {one['key']}, level {one['level']}, slide {one['slide']}" for one in near]
    assert [f"distance {one['distance']:.3f}".rstrip("0") in said for one in near] == [True] * 5
    box = page.run(
        "const a = document.querySelector('.square').getBoundingClientRect(), s = document.getElementById('stage');"
        "const r = s.getBoundingClientRect(); return [a.left - r.left - 1, a.top - r.top - 1, a.width]"
    )
    assert box == pytest.approx([*page.locate(answer["x"], answer["y"]), answer["side"] * 0.4], abs=2)
    assert page.find_faults() == []


def test_keys_move_and_query(page, ramp):
    page.open_slide(ramp)
    canvas, whole = page.one(".openseadragon-canvas"), page.view
    for key, change in (
        (Keys.ARROW_RIGHT, (1, 0, 0)),
        (Keys.ARROW_UP, (0, -1, 0)),
        ("+", (0, 0, 1)),
        ("-", (0, 0, -1)),
    ):
        before = page.view
        canvas.send_keys(key)
        wait(lambda before=before: page.view != before)
        assert [*np.sign(np.round(np.subtract(page.view, before), 3))] == pytest.approx(change), key
    canvas.send_keys("0")
    wait(lambda: page.view == whole)
    canvas.send_keys(Keys.ENTER)
    assert page.read_answer("place 650, 450")
    assert page.text("#place").startswith("Middle of the view: 650, 450 px (299 µm, 207 µm)")
    with_focus = page.run("return document.activeElement.getAttribute('aria-label')")
    assert with_focus == "Slide ramp", "a query takes no focus away"


def test_a_slide_is_scored_from_the_page_whatever_its_name(page, service):
    identity = service.find(SCRIPT)
    page.open(f"slide={identity}")
    assert page.one("#slide-name").text == SCRIPT and not page.all("#overlays")
    assert not page.run("return document.querySelector('main img, nav img')"), "a name is text"
    page.one("#score-slide").click()
    wait(lambda: page.text("#slide-state") == "scored" and page.all("#score dl"), 60)
    score = service.ask(f"slides/{identity}")["score"]
    assert page.text("#score .label") == f"level {score['answer']['label']}" and score["notes"][0] in page.text(
        "#score"
    )
    answer = score["answer"]
    agree = "agree here" if answer["label"] == answer["area"]["label"] else "differ here"
    assert "more than 10 % of the tiles reach. The two " + agree in page.text("#score .rules")
    assert f"{score['tissue']['area_mm2']:.2f}".rstrip("0") + " mm²" in page.text("#score dl")
    assert page.all("#overlays") and not page.all("#score-slide") and page.all("#legend .title")


def test_a_damaged_slide_says_why(page, service):
    page.open(f"slide={service.find('broken')}")
    wait(lambda: page.text("#slide-state").startswith("failed: broken "))
    problem = page.text("#slide-state").removeprefix("failed: ")
    assert problem in page.texts("#slides .problem"), "and the list does"
    assert (
        not page.all("#stage") and not page.all("#score-slide") and str(service.results.parent) not in page.text("body")
    )


def test_an_answer_about_glass_is_not_claimed(page, service, ramp):
    """The note leads, and neither label, vote nor chance is bold; the numbers stay."""
    page.open_slide(ramp, x=40, y=450, zoom=0.4)
    page.one(".openseadragon-canvas").send_keys(Keys.ENTER)
    status = wait(lambda: (text := page.text("#answer [role=status]")).count("believed") and text)
    answer = service.ask(f"slides/{ramp}/query?x=40&y=450", "POST")
    assert NEARLY_BLANK in answer["notes"] and answer["level"]
    said = f"place 40, 450: {NEARLY_BLANK}. Not to be believed: the network expects level {answer['level']}."
    assert status == said and not page.all("#answer .label")
    text = page.text("#answer")
    assert text.count(NEARLY_BLANK) == 2 and text.rindex(NEARLY_BLANK) < text.index("What the network expects")
    assert f"not to be believed: {answer['level']}" in text and "Not to be believed: vote of" in text
    assert answer["chance"] in text
    weights = "return [...document.querySelectorAll('#answer .vote, #answer .chance, #answer .network p')]"
    assert {*page.run(f"{weights}.map((one) => getComputedStyle(one).fontWeight)")} == {"400"}
    assert page.find_faults() == []


def test_an_address_of_a_slide_without_slides_says_so(driver, tissue_run, tmp_path):
    with start_service(tmp_path, model=tissue_run.student.dir, store=tissue_run.latents.dir, out="") as bare:
        page = Page(driver, bare)
        driver.get("about:blank")
        driver.get(f"{bare.url}#token={TOKEN}&slide=0123456789abcdef")
        images = "return [...document.querySelectorAll('#patches img')].map((one) => one.naturalWidth)"
        wait(lambda: min(page.run(images), default=0) > 0 and page.text("#alert"))
        assert page.text("#alert") == "This address names a slide, and the service was started without --slides."
        assert page.texts("#no-slides code") == [
            "lgd synth runs/drawn --slides-only 1",
            "lgd serve --model RUN --slides runs/drawn/HE",
        ]
        assert page.read_console() == []
        driver.get("about:blank")
        driver.get_log("performance")


def test_downloads_are_the_files_of_the_result(page, service, ramp, tmp_path):
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.open_slide(ramp)
    for name in ("patches.geojson", "tiles.csv", "heatmap.png"):
        page.one(f"[data-file='{name}']").click()
        saved, made = tmp_path / f"ramp-{name}", service.results / "ramp" / name
        assert wait(lambda saved=saved: saved.exists() and saved.read_bytes()) == made.read_bytes()


def test_the_table_is_the_twin_of_the_map(page, service, ramp):
    page.open_slide(ramp)
    grades = "#tiles tbody td:nth-of-type(3)"
    first = wait(lambda: page.texts(grades))
    page.one("#tiles thead button").click()
    wait(lambda: page.all("#tiles th[aria-sort=descending]"))
    rows = service.ask(f"slides/{ramp}/rows?sort=-grade")["rows"]
    assert page.texts(grades) == [f"{round(row['grade'], 2):g}" for row in rows[:20]] != first
    page.one("#tiles .buttons button:last-child").click()
    wait(lambda: page.text("#tiles .buttons [role=status]") == f"21 to {min(40, len(rows))} of {len(rows)}")
    row = rows[20]
    heads = page.texts("#tiles thead th")
    assert heads == ["Tile", "Place (px)", "Level", "Grade", "0", "1+", "2+", "3+", "Tissue"]
    assert "Grade: the mean of the classes by their probability, from 0 for 0 to 3 for 3+." in page.text("#tiles")
    for width in (1280, 820):
        page.resize(width, 900)
        assert page.run("const w = document.querySelector('.wide'); return w.scrollWidth - w.clientWidth") <= 0, width
    page.resize(1280, 800)
    page.one("#tiles tbody button").click()
    middle = [round(row[axis] + row["side"] / 2) for axis in "xy"]
    assert page.read_answer(f"place {middle[0]:,}, {middle[1]:,}")
    wait(lambda: page.view[:2] == middle)


_NOTE_TILES = """
const real = window.fetch;
window.fetch = async (url, options) => {
  const answer = await real(url, options);
  if (!url.includes("/rows?")) return answer;
  const page = await answer.json();
  page.rows[2].notes = arguments[0];
  return new Response(JSON.stringify(page));
};
"""


def test_the_notes_of_a_tile_are_seen_below_it(page, ramp):
    page.open_slide(ramp)
    wait(lambda: page.texts("#tiles tbody td"))
    page.run(_NOTE_TILES, NEARLY_BLANK)
    page.one("#tiles thead button").click()
    note = page.one("#tiles .note td")
    assert note.text.startswith("Tile ") and note.text.endswith(f": {NEARLY_BLANK}")
    assert len(page.all("#tiles tr.doubted")) == 1
    for width in (1280, 820):
        page.resize(width, 900)
        assert page.run("const w = document.querySelector('.wide'); return w.scrollWidth - w.clientWidth") <= 0, width
    assert page.find_faults() == []


def test_the_gallery_shows_the_truth_beside_the_answer(page, service, ramp):
    page.open_slide(ramp)
    page.one("#open-gallery").click()
    page.choose("#label", "3+")
    total = service.ask("model")["store"]["labels"]["3+"]
    wait(lambda: page.text("#gallery-pages [role=status]") == f"1 to {total} of {total}")
    assert {*page.texts("#patches li")} == {"3+"}
    patch = service.ask("patches?label=3%2B")["patches"][0]
    page.one("#patches button").send_keys(Keys.ENTER)
    said = page.read_answer(f"patch {patch['key']}")
    assert "Own IHC, level 3+" in said
    near = service.ask(f"patches/{patch['id']}/query", "POST")["neighbours"]
    assert all(one["key"] in said for one in near) and patch["slide"] not in {one["slide"] for one in near}
    assert page.find_faults() == []
    page.driver.back()
    wait(lambda: page.all("#stage"))
    assert (
        page.text("#slide-name") == "ramp"
        and page.text("#answer p") == "The nearest known IHC stands here after a query."
    )


def test_a_file_is_scored(page, tissue, tmp_path):
    path = min((tissue / "HE" / "test").iterdir())
    page.open()
    page.driver.find_element("id", "file").send_keys(str(path))
    page.one("#upload button").click()
    assert "Nearest known IHC" in page.read_answer(path.name)
    (tmp_path / "none.png").write_bytes(b"no image")
    page.driver.find_element("id", "file").send_keys(str(tmp_path / "none.png"))
    page.one("#upload button").click()
    assert "image" in wait(lambda: page.text("#alert")) and str(tmp_path) not in page.text("#alert")
    (logged,) = page.read_console()
    assert "422" in logged


def test_all_fits_and_has_no_fault(page, ramp):
    for fragment, shown in ((f"slide={ramp}", "#tiles table"), ("view=gallery", "#patches img")):
        page.open(fragment)
        wait(lambda shown=shown: page.all(shown))
        for size in ((1280, 800), (1024, 768), (820, 1180), (768, 1024)):
            page.resize(*size)
            assert page.run("return document.documentElement.scrollWidth") <= size[0]
        assert page.find_faults() == []


def test_on_a_small_screen_slider_and_legend_are_beside_what_they_are_of(page, ramp):
    page.open_slide(ramp)
    page.resize(820, 1180)
    box = "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.top, r.bottom]"
    label, slider, legend, stage = (
        page.run(box, one) for one in ("[for=opacity]", "#opacity", "#legend .ticks", "#stage")
    )
    assert label[0] < slider[1] and slider[0] < label[1] and legend[1] <= stage[0]


def test_without_the_token_it_is_asked_for(page, ramp):
    page.open(f"slide={ramp}&x=300&y=300&zoom=1")
    assert "token" not in page.driver.current_url and page.view == [300, 300, 1]
    page.run("sessionStorage.clear(); location.reload()")
    wait(lambda: page.text("#alert") == "Give the token of this service, which its owner has.")
    assert not page.all("#columns") and page.text("#model") == ""
    page.one("#token").send_keys("a-wrong-token-0123456789", Keys.ENTER)
    wait(lambda: page.text("#alert") == "This token is wrong.")
    assert not page.all("#columns") and page.text("#model") == ""
    page.one("#token").send_keys(TOKEN, Keys.ENTER)
    assert page.one("#slides button") and page.one("#stage")
    logged = page.read_console()
    assert logged and all("401" in one for one in logged)
