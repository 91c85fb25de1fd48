"""The urls without Ray: what is refused, and that no answer names a place on this machine."""

import asyncio
import hashlib
import io
import resource
import shutil
import struct
import urllib.parse
import zlib

import numpy as np
import pytest
import tifffile
from drawn_slides import damage, find_tile
from PIL import Image

from lgd.scoring.images import SMALL
from lgd.scoring.slides import score_slide
from lgd.serve import network, slide_folder
from lgd.serve.application import create_app
from lgd.serve.network import Network
from lgd.serve.options import ServeOptions
from lgd.serve.replicas import JobsReplica
from lgd.serve.slide_jobs import OTHER_NETWORK, REPLACED
from lgd.store.document import SourcesDocument
from tests.support.serving import TOKEN, ask_app, wait
from tests.support.shades import make_scorer, write_ramp


class App:
    """The application of some options in this process; it checks each answer that it gives."""

    def __init__(self, folder, **options):
        self.folder, self.options = folder, ServeOptions(**{name: str(one) for name, one in options.items()})
        self.network = Network(self.options)
        self.jobs = JobsReplica(self.options) if self.options.slides else None
        self.app = create_app(self.options, TOKEN, self.network, self.jobs)

    def ask(self, path, method="GET", body=b"", **headers):
        answer = ask_app(self.app, f"/{path}", method, body, authorization=f"Bearer {TOKEN}", **headers)
        shown = answer.body + str(answer.headers).encode()
        for place in (self.folder, self.options.model, "latents/", "/home", "site-packages", "Traceback"):
            assert str(place).encode() not in shown, (path, shown[:500])
        if answer.status >= 400 and method != "HEAD":
            assert answer.detail and len(answer.body) < 1200
        return answer

    def find(self, name):
        (found,) = (one["id"] for one in self.ask("slides").json if one["name"] == name)
        return found

    def score(self, name):
        identity = self.find(name)
        assert self.ask(f"slides/{identity}/score", "POST").status == 202
        wait(lambda: self.ask(f"slides/{identity}").json["state"] in ("scored", "failed"), 60)
        return identity


@pytest.fixture(scope="module")
def app(tissue_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("application")
    (folder / "slides" / "deep").mkdir(parents=True)
    write_ramp(folder / "slides" / "a.tif", mpp=0.46, height=400, width=500)
    write_ramp(folder / "slides" / "deep" / "b.tif", mpp=0.46, height=400, width=500)
    write_ramp(folder / "outside.tif", mpp=0.46, height=400, width=500)
    model, store = tissue_run.student.dir, tissue_run.latents.dir
    return App(folder, model=model, store=store, slides=folder / "slides", out=folder / "out")


def compress_zeros(size):
    """A zlib stream of zeros, quickly: of one block that is repeated."""
    block, encoder = 10**6, zlib.compressobj(9, zlib.DEFLATED, -15)
    part = encoder.compress(bytes(block)) + encoder.flush(zlib.Z_FULL_FLUSH)
    rest = encoder.compress(bytes(size % block)) + encoder.flush()
    return b"\x78\xda" + part * (size // block) + rest + struct.pack(">I", size % 65521 << 16 | 1)


def make_png(width, height, chunks=b""):
    """A black image."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = make_chunk(b"IDAT", compress_zeros(height * (1 + 3 * width)))
    return b"\x89PNG\r\n\x1a\n" + make_chunk(b"IHDR", size) + chunks + content + make_chunk(b"IEND", b"")


def make_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def save(kind, size=(128, 128), mode="RGB", **options):
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


def make_scans():
    """A JPEG of 3,000 scans, each of which goes over all of its pixels."""
    content = save("JPEG", (1000, 1000), progressive=True)
    scan = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + scan * 3000 + content[-2:]


NUMBERS = ("-1-0", "1e1-0", "0-9999999999", "99999999-0", "<script>")
BOMBS = {
    "png": lambda: make_png(20_000, 20_000),
    "png of many pixels": lambda: make_png(5001, 5000),
    "text": lambda: make_png(8, 8, make_chunk(b"zTXt", b"k\0\0" + compress_zeros(10**8))),
    "profile": lambda: make_png(8, 8, make_chunk(b"iCCP", b"k\0\0" + compress_zeros(10**8))),
    "webp": lambda: save("WEBP", (16_383, 2500), quality=1, method=0),
    "tiff": lambda: save("TIFF", (12_000, 12_000), "1", compression="tiff_deflate"),
    "jpeg": lambda: save("JPEG", (11_000, 9500), "L"),
    "scans": make_scans,
    "gif": lambda: save("GIF", (3000, 3000), "L"),
    "animation": lambda: save("PNG", save_all=True, append_images=[Image.new("RGB", (128, 128), "red")] * 20),
    "script": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "nothing": lambda: b"",
    "half": lambda: save("PNG", (400, 400))[:-40],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_what_is_no_image_are_refused(app, name):
    content = BOMBS[name]()
    assert len(content) < 3_000_000
    before = resource.getrusage(resource.RUSAGE_SELF)
    for path in ("predict?mpp=unknown", "query?mpp=unknown"):
        answer = app.ask(path, "POST", content)
        assert answer.status == 422 and "image" in answer.detail
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 3 and (after.ru_maxrss - before.ru_maxrss) < 400_000


def test_more_requests_than_can_wait_are_refused(app, tissue, monkeypatch):
    content = next((tissue / "HE" / "test").iterdir()).read_bytes()
    most = 20
    monkeypatch.setattr(network, "MOST_REQUESTS", most)

    async def ask_all():
        asked = [app.network.predict(content, 0.46) for _ in range(most + 5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask_all())
    assert [type(one) for one in answers] == [dict] * most + [network.TooManyError] * 5
    assert app.ask("predict?mpp=0.46", "POST", content).status == 200
    monkeypatch.setattr(network, "MOST_REQUESTS", 0)
    refused = app.ask("predict?mpp=0.46", "POST", content)
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    assert refused.detail == "too many requests wait already: ask again later"


def test_a_form_is_refused_with_the_remedy_and_a_type_means_nothing(app, tissue):
    content = min((tissue / "HE").rglob("*.png")).read_bytes()
    form = app.ask("predict", "POST", b"--x\r\n" + content, content_type="multipart/form-data; boundary=x")
    assert form.status == 422 and "curl --data-binary @FILE" in form.detail
    answers = [
        app.ask("predict", "POST", content, content_type=one) for one in ("image/png", "application/json", "\xff")
    ]
    assert [one.status for one in answers] == [200] * 3 and answers[0].body == answers[1].body == answers[2].body


@pytest.mark.parametrize(
    "name",
    ["..", "../..", "%2e%2e", "..%2f..", "/etc/passwd", "\0", "a" * 5000, "\u0661-0", "\ufffd", "x-0\n", " ", *NUMBERS],
)
def test_no_name_leads_anywhere(app, name):
    slide = app.find("a")
    name = urllib.parse.unquote(name)
    for path in (
        f"slides/{name}",
        f"slides/{name}/rows",
        f"slides/{name}/tiles/0/0_0.jpg",
        f"slides/{name}/region.jpg?x=1&y=1",
        f"slides/{slide}/{name}",
        f"slides/{slide}/overlays/{name}.png",
        f"slides/{slide}/tiles/{name}/0_0.jpg",
        f"slides/{slide}/tiles/0/{name}_0.jpg",
        f"patches/{name}/he.jpg",
        f"patches/0-0/{name}.jpg",
        f"static/{name}",
        f"docs/static/{name}",
    ):
        assert app.ask(path).status in (404, 422), path
    assert app.ask(f"slides/{name}/score", "POST").status == 404


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308", "-1", "1e999", "", "0x1", "1,2", "[]", "x" * 3000])
def test_numbers_that_are_none_are_refused(app, value, tissue):
    slide, content = app.find("a"), min((tissue / "HE").rglob("*.png")).read_bytes()
    for path in (
        f"slides/{slide}/region.jpg?x={value}&y=1",
        f"slides/{slide}/region.jpg?x=1&y={value}",
        f"patches?offset={value}",
        f"patches?limit={value}",
    ):
        assert app.ask(path).status in (404, 422), path
    for path in (f"query?k={value}", f"query?mpp={value or 0}", f"patches/0-0/query?k={value}"):
        assert app.ask(path, "POST", content).status == 422, path


def test_filters_that_mean_nothing_are_refused(app, tissue):
    content = min((tissue / "HE").rglob("*.png")).read_bytes()
    for query in ("label=9%2B", "label=,", "label=%00", "split=no", "split=train,no", "label=10:20"):
        answer = app.ask(f"query?{query}", "POST", content)
        assert answer.status == 422 and ": there are " in answer.detail and "--" not in answer.detail
    assert "1+" in app.ask("patches?label=9").detail and "train" in app.ask("patches?split=../..").detail


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_do_nothing(app, method):
    slide = app.find("a")
    for path in ("model", "predict", "slides", f"slides/{slide}", f"slides/{slide}/score", "patches/0-0/he.jpg"):
        assert app.ask(path, method).detail == "this url takes another method: the page /docs lists all"
    assert app.ask("nothing").detail == "there is no such url: the page /docs lists all"


def test_a_slide_outside_the_folder_is_unknown(app):
    """By each name that it could have; its id is a digest of its place in the folder."""
    assert sorted(one["name"] for one in app.ask("slides").json) == ["a", "b"]
    for place in ("../outside.tif", str(app.folder / "outside.tif"), "outside.tif"):
        identity = hashlib.sha256(place.encode()).hexdigest()[:16]
        assert app.ask(f"slides/{identity}").status == 404
        assert app.ask(f"slides/{urllib.parse.quote(place, safe='')}").status == 404


@pytest.fixture
def own_app(tissue_run, tmp_path, monkeypatch):
    """`own_app(**options)`: an application of a folder of slides of the test's own, which is always looked through."""
    monkeypatch.setattr(slide_folder, "_FRESH", 0)
    monkeypatch.setattr(slide_folder, "_FRESH_UNKNOWN", 0)
    (tmp_path / "slides").mkdir()
    options = {"model": tissue_run.student.dir, "slides": tmp_path / "slides", "out": tmp_path / "out"}
    return lambda **more: App(tmp_path, **(options | more))


def test_slides_that_come_go_and_are_replaced(own_app, tmp_path):
    app, path = own_app(), tmp_path / "slides" / "a.tif"
    assert app.ask("slides").json == []
    write_ramp(path, mpp=0.46, height=400, width=500)
    identity = app.score("a")
    first = app.ask(f"slides/{identity}/tiles/0/0_0.jpg").body
    assert app.ask(f"slides/{identity}").json["state"] == "scored" and app.ask(f"slides/{identity}/rows").json["total"]
    # The same file anew has the same result, which is not that of another file of its name.
    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    assert app.ask(f"slides/{identity}").json["state"] == "scored"
    write_ramp(tmp_path / "other.tif", mpp=0.46, height=420, width=500)
    shutil.copystat(path, tmp_path / "other.tif")
    (tmp_path / "other.tif").replace(path)
    shown = app.ask(f"slides/{identity}").json
    assert (shown["state"], shown["problem"], shown["score"]) == ("failed", REPLACED, None) and shown["height"] == 420
    for name in ("rows", "overlays/score.png", "patches.geojson", "tiles.csv", "heatmap.png"):
        assert app.ask(f"slides/{identity}/{name}").detail == REPLACED
    assert app.ask(f"slides/{identity}/tiles/0/0_0.jpg").body != first
    path.unlink()
    for name in ("", "/rows", "/tiles/0/0_0.jpg", "/region.jpg?x=1&y=1", "/tiles.csv"):
        assert app.ask(f"slides/{identity}{name}").status == 404
    assert app.ask(f"slides/{identity}/score", "POST").status == 404 and app.ask("slides").json == []


def test_a_folder_of_slides_that_is_gone(own_app, tmp_path):
    app = own_app()
    (tmp_path / "slides").rmdir()
    assert "the folder of the slides cannot be read" in app.ask("slides").detail
    assert app.ask("health").status == app.ask("model").status == 200


def test_damaged_files_name_no_place(own_app, tmp_path):
    """By its error each can say where it lies."""
    slides = tmp_path / "slides"
    (slides / "empty.svs").write_bytes(b"")
    (slides / "head.svs").write_bytes(b"II*\0" + bytes(200))
    (slides / "cut.tif").write_bytes(write_ramp(tmp_path / "x.tif", mpp=0.46).read_bytes()[:5000])
    write_ramp(slides / "coarse.tif", mpp=4)
    tile = write_ramp(slides / "tile.tif", mpp=0.46)
    damage(tile, *find_tile(tile, 0))
    app = own_app()
    for one in app.ask("slides").json:
        identity = app.score(one["name"])
        shown = app.ask(f"slides/{identity}").json
        assert shown["state"] == "failed" and shown["problem"].split(" ")[0].rstrip(":") == one["name"], shown
        app.ask(f"slides/{identity}/tiles/0/0_0.jpg")
        app.ask(f"slides/{identity}/region.jpg?x=10&y=10")
        for row in app.ask(f"slides/{identity}/rows").json.get("rows", []):
            assert str(tmp_path) not in row["error"]


def test_slides_that_cannot_be_used_are_listed_with_the_reason(own_app, tmp_path):
    """Cut at any place, without a scale, too coarse, of text; a scored one that is cut later. Patches stay out."""
    slides, whole = tmp_path / "slides", write_ramp(tmp_path / "whole.tif", mpp=0.46).read_bytes()
    for share in (1, 50, 90):
        (slides / f"cut{share}.tif").write_bytes(whole[: len(whole) * share // 100])
    tifffile.imwrite(slides / "noscale.tif", np.full((512, 512, 3), 200, np.uint8), tile=(256, 256))
    tifffile.imwrite(slides / "patch.tif", np.full((128, 128, 3), 200, np.uint8))
    (slides / "cutpatch.tif").write_bytes((slides / "patch.tif").read_bytes()[:-9000])
    (slides / "photo.tif").write_bytes(save("JPEG"))
    (slides / "patch.png").write_bytes(save("PNG"))
    (slides / "text.svs").write_text("no slide")
    (slides / "note.txt").write_text("no slide")
    (slides / "later.tif").write_bytes(whole)
    write_ramp(slides / "coarse.tif", mpp=0.9)
    app = own_app()
    identity = app.score("later")
    (slides / "later.tif").write_bytes(whole[: len(whole) // 2])
    listed = {one["name"]: one for one in app.ask("slides").json}
    words = dict.fromkeys(("cut1", "cut50", "cut90", "later", "cutpatch"), "cut short, damaged, or without tiles")
    words |= {"noscale": "does not say its scale", "text": "is no slide: use a format", "coarse": "so coarse a scan"}
    assert {*listed} == {*words}
    for name, one in listed.items():
        assert one["state"] == "failed" and one["problem"].startswith(f"{name} ") and words[name] in one["problem"]
        shown = app.ask(f"slides/{one['id']}").json
        assert (shown["state"], shown["problem"]) == ("failed", one["problem"])
        assert app.ask(f"slides/{one['id']}/score", "POST").status == 202
    assert app.ask(f"slides/{identity}").json["score"] is None


def test_results_of_another_network_and_of_a_slide_of_the_same_name(own_app, tmp_path):
    write_ramp(tmp_path / "slides" / "a.tif", mpp=0.46, height=400, width=500)
    score_slide(make_scorer(mpp=0.46), tmp_path / "slides" / "a.tif", tmp_path / "out")
    app = own_app()
    identity = app.find("a")
    assert app.ask(f"slides/{identity}").json["problem"] == OTHER_NETWORK
    assert app.ask(f"slides/{identity}/rows").status == 404
    (tmp_path / "slides" / "deep").mkdir()
    shutil.copy(tmp_path / "slides" / "a.tif", tmp_path / "slides" / "deep" / "a.tif")
    shown = [(one["state"], one["problem"]) for one in app.ask("slides").json]
    assert [state for state, _ in shown] == ["failed"] * 2 and "the same name" in shown[0][1]
    assert "the same name" in app.ask(f"slides/{identity}/score", "POST").json["problem"]


def test_results_that_are_broken_or_cannot_be_written(own_app, tmp_path):
    write_ramp(tmp_path / "slides" / "a.tif", mpp=0.46, height=400, width=500)
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "foreign.txt").write_text("")
    app = own_app()
    shown = app.ask(f"slides/{app.score('a')}").json
    assert shown["state"] == "failed" and shown["problem"]
    (tmp_path / "out" / "a" / "slide.json").write_text('{"format": "lgd-slide/1", "secret": 1}')
    shown = app.ask(f"slides/{app.find('a')}").json
    assert shown["state"] == "failed" and "secret" not in str(shown)
    app.ask(f"slides/{app.find('a')}/rows")


def test_hidden_names_are_in_no_answer(own_app, tmp_path):
    write_ramp(tmp_path / "slides" / "Jane_Doe.tif", mpp=0.46, height=400, width=500)
    (tmp_path / "slides" / "John_Roe.svs").write_bytes(b"II*\0" + bytes(200))
    app = own_app(hide_names=True)
    for name in ("slide 1", "slide 2"):
        identity = app.score(name)
        for path in ("", "/rows", "/patches.geojson", "/tiles.csv", "/tiles/0/0_0.jpg", "/overlays/score.png"):
            answer = app.ask(f"slides/{identity}{path}")
            assert b"Doe" not in answer.body and b"Roe" not in answer.body and "Doe" not in str(answer.headers), path
    assert b"Doe" not in app.ask("slides").body


def test_labels_and_macro_images_are_never_shown(own_app, tmp_path, real_data):
    """A scan of Aperio has both, a thumbnail, and the name of who made it."""
    openslide = pytest.importorskip("openslide")
    path = shutil.copy(real_data / "wsi" / "cmu_small_region.svs", tmp_path / "slides" / "scan.svs")
    with openslide.OpenSlide(path) as file:
        assert {"label", "macro"} <= {*file.associated_images}
        texts = [
            one for name, one in file.properties.items() if name in ("aperio.User", "aperio.Filename", "aperio.Date")
        ]
    app, shown = own_app(), b""
    identity = app.find("scan")
    for name in ("label", "macro", "thumbnail", "associated/label", "label.jpg", "macro.png"):
        assert app.ask(f"slides/{identity}/{name}").status == 404
        assert app.ask(f"slides/{identity}/overlays/{name}.png").status == 404
    for path in ("slides", f"slides/{identity}", f"slides/{identity}/tiles/0/0_0.jpg"):
        shown += app.ask(path).body
    assert texts and not [one for one in texts if one.encode() in shown]


def test_a_store_without_its_shards_shows_no_images(tissue_run, tmp_path):
    store = shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    SourcesDocument(shards=(str(tmp_path / "gone"),), teachers={}).write(store / "sources.json")
    app = App(tmp_path, model=tissue_run.student.dir, store=store)
    patches = app.ask("patches").json
    assert patches["total"] == 48 and {one["he"] for one in patches["patches"]} == {None}
    assert "images of the patches are not there" in app.ask("patches/0-0/he.jpg").detail
    assert app.ask("patches/0-0/query", "POST").status == 422


def test_a_parameter_that_a_url_does_not_have_is_named(app, tissue):
    content, slide = min((tissue / "HE").rglob("*.png")).read_bytes(), app.find("a")
    for path, method, known in (
        ("query?lable=3%2B&k=2", "POST", "k, label, split, mpp"),
        ("predict?lable=1", "POST", "mpp"),
        (f"slides/{slide}/query?x=1&y=1&lable=1", "POST", "x, y, k"),
        (f"slides/{slide}/region.jpg?x=1&y=1&lable=1", "GET", "x, y"),
        (f"slides/{slide}/rows?lable=1", "GET", "offset, limit, sort"),
        ("patches?lable=1", "GET", "offset, limit, split, label"),
        ("patches/0-0/query?lable=1", "POST", "k"),
    ):
        answer = app.ask(path, method, content)
        assert (answer.status, answer.detail) == (422, f"there is no parameter lable: there are {known}"), path
    urls = ("model", "health", "slides", f"slides/{slide}", f"slides/{slide}/tiles.csv", "patches/0-0/he.jpg")
    for path in (*urls, f"slides/{slide}/tiles/0/0_0.jpg", f"slides/{slide}/overlays/score.png"):
        answer = app.ask(f"{path}?force=1&v=2")
        assert (answer.status, answer.detail) == (422, "there is no parameter force, v: this url has none"), path
    assert app.ask(f"slides/{slide}/score?force=1", "POST").status == 422
    assert app.ask("?force=1").status == app.ask("docs?force=1").status == 200


def test_without_slides_their_urls_say_so(tissue_run, tmp_path):
    app = App(tmp_path, model=tissue_run.student.dir)
    for path, method in (("slides", "GET"), ("slides/abc", "GET"), ("slides/abc/score", "POST")):
        answer = app.ask(path, method)
        assert answer.status == 404 and "started without --slides" in answer.detail
    assert "/slides" not in str(app.ask("openapi.json").json["paths"])


def test_messages_on_a_request_are_about_it(app):
    slide = app.find("a")
    assert app.ask(f"slides/{slide}/region.jpg?y=1").detail == "x is missing"
    detail = app.ask("predict", "POST", b"text").detail
    assert detail.endswith(": convert it")


def test_a_field_far_smaller_than_the_networks_is_noted(app, tissue):
    with Image.open(min((tissue / "HE").rglob("*.png"))) as image:
        for share, noted in ((1.0, False), (0.8, False), (0.55, True)):
            content = io.BytesIO()
            image.crop((0, 0, round(share * image.width), round(share * image.height))).save(content, "PNG")
            mpp = app.ask("model").json["mpp"]
            answer = app.ask(f"predict?mpp={mpp}", "POST", content.getvalue()).json
            assert (SMALL.format("level") in answer["notes"]) == noted, share
