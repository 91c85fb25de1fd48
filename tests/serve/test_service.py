"""`lgd serve` under Ray: each url answers as its documentation, and as the command line; and what is no request."""

import csv
import io
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from lgd.cli import main
from lgd.models.description import StudentConfig
from lgd.scoring.slide_plan import find_scale
from lgd.serve.gallery import encode_jpeg
from lgd.slides.slide import open_slide
from tests.support.serving import SCRIPT, TOKEN
from tests.support.sockets import list_listening

MB = 10**6


@pytest.fixture(scope="module")
def patch(tissue):
    """An H&E as a file."""
    return min((tissue / "HE").rglob("*.png"))


def run(capsys, *args):
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read_pixels(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def send(service, head, parts=(), seconds=20.0, token=TOKEN):
    """Status and body of what comes for a request as it is written here."""
    with socket.create_connection(("127.0.0.1", service.port), seconds) as connection:
        mark = f"\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nConnection: close" if token else ""
        connection.sendall(head.replace("HTTP/1.1", f"HTTP/1.1{mark}", 1).encode("latin-1") + b"\r\n\r\n")
        for part in parts:
            connection.sendall(part)
        content = b""
        while part := connection.recv(65536):
            content += part
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def test_predict_and_query_answer_as_the_command_line(service, tissue_run, patch, capsys):
    student, content = tissue_run.student.dir, patch.read_bytes()
    (row,) = run(capsys, "predict", patch, "--model", student)
    predicted = service.ask("predict", "POST", content)
    assert predicted == {name: value for name, value in row.items() if name != "image"}
    for query, options in (
        ("k=3", ["-k", 3]),
        ("k=2&label=2%2B,3%2B&mpp=unknown", ["-k", 2, "--label", "2+,3+", "--mpp", "unknown"]),
    ):
        (row,) = run(capsys, "query", patch, "--model", student, "--store", tissue_run.latents.dir, *options)
        answer = service.ask(f"query?{query}", "POST", content)
        more = {"id", "hub", "he", "ihc"}
        assert [set(one) >= more for one in answer["neighbours"]] == [True] * options[1]
        for neighbour in answer["neighbours"]:
            assert service.fetch(neighbour["ihc"]).status == 200 and not neighbour["he"].startswith("/")
            for name in more:
                del neighbour[name]
        # The service computes with other threads, which add in another order.
        distances = [[one.pop("distance") for one in found["neighbours"]] for found in (answer, row)]
        assert distances[0] == pytest.approx(distances[1], abs=1e-5)
        assert answer.pop("chance") and answer == {name: value for name, value in row.items() if name != "image"}


def test_requests_at_once_are_each_answered(service, tissue):
    contents = [path.read_bytes() for path in sorted((tissue / "HE").rglob("*.png"))[:12]]
    with ThreadPoolExecutor(12) as pool:
        together = [*pool.map(lambda content: service.ask("predict", "POST", content), contents)]
    assert together == [service.ask("predict", "POST", content) for content in contents]
    assert len({json.dumps(one) for one in together}) > 6


def test_model_and_gallery_are_those_of_the_store(service, tissue_run):
    model, gallery = service.ask("model"), service.ask("patches?limit=500")
    assert model["target"]["classes"] == ["0", "1+", "2+", "3+"] and model["slides"] is True
    assert model["store"]["patches"] == gallery["total"] == len(gallery["patches"]) == 48
    assert sum(model["store"]["labels"].values()) == 48 and {*model["store"]["splits"]} == {"train", "val", "test"}
    page = service.ask("patches?offset=3&limit=4&split=test&label=2%2B")
    chosen = [one for one in gallery["patches"] if one["split"] == "test" and one["level"] == "2+"]
    assert page == {"total": len(chosen), "patches": chosen[3:7]} and chosen
    one = chosen[0]
    answer = service.ask(f"patches/{one['id']}/query?k=4", "POST")
    assert answer["stored"]["key"] == one["key"] and answer["stored"]["ihc"] == one["ihc"]
    assert one["slide"] not in [hit["slide"] for hit in answer["neighbours"]]
    assert read_pixels(service.fetch(one["he"]).body).shape == (128, 128, 3)


def test_a_slide_is_shown_as_it_is_read(service, ramp, tissue_run):
    shown = service.ask(f"slides/{ramp}")
    with open_slide(service.folder / "slides" / "ramp.tif") as slide:
        assert (shown["width"], shown["height"], shown["mpp"]) == (slide.width, slide.height, slide.mpp)
        assert shown["max_level"] == 2 and shown["tile_size"] == 512
        for level, column, row, x, y, wide, high, step in (
            (2, 1, 1, 512, 512, 512, 388, 1),
            (1, 1, 0, 1024, 0, 138, 450, 2),
            (0, 0, 0, 0, 0, 325, 225, 4),
        ):
            drawn = service.fetch(f"slides/{ramp}/tiles/{level}/{column}_{row}.jpg").body
            assert drawn == encode_jpeg(slide.read(x, y, wide, high, slide.mpp * step), 80, "420"), level
        config = StudentConfig.read_folder(tissue_run.student.dir)
        scale = find_scale(config.training, config.size)
        row = service.ask(f"slides/{ramp}/rows?limit=1")["rows"][0]
        place = f"x={row['x'] + row['side'] / 2}&y={row['y'] + row['side'] / 2}"
        seen = slide.read(row["x"], row["y"], scale.pixels, scale.pixels, scale.mpp)
    answer = service.ask(f"slides/{ramp}/query?{place}&k=3", "POST")
    assert [answer[name] for name in ("x", "y", "side")] == [row[name] for name in ("x", "y", "side")]
    assert shown["field"] == row["side"]
    # The scorer saw the same: its probabilities are those of the query.
    assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=2e-3)
    assert service.fetch(f"slides/{ramp}/region.jpg?{place}").body == encode_jpeg(seen)


def test_rows_and_files_are_those_of_the_result(service, ramp):
    folder = service.results / "ramp"
    with (folder / "tiles.csv").open(newline="") as file:
        tiles = [*csv.DictReader(file)]
    page = service.ask(f"slides/{ramp}/rows?limit=500")
    assert page["total"] == len(tiles) > 5
    for row, tile in zip(page["rows"], tiles, strict=True):
        assert (row["x"], row["y"], row["label"]) == (int(tile["x"]), int(tile["y"]), tile["level"])
        # The file is rounded.
        assert row["tissue"] == pytest.approx(float(tile["tissue"]), abs=1e-4)
    grades = [row["grade"] for row in service.ask(f"slides/{ramp}/rows?sort=-grade&offset=1&limit=4")["rows"]]
    assert grades == sorted((row["grade"] for row in page["rows"]), reverse=True)[1:5]
    for name in ("tiles.csv", "patches.geojson", "heatmap.png"):
        answer = service.fetch(f"slides/{ramp}/{name}")
        assert answer.body == (folder / name).read_bytes()
        assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''ramp-{name}"
    shown = service.ask(f"slides/{ramp}")
    assert shown["score"]["tiles"] == len(tiles)
    for overlay in shown["overlays"]:
        drawn = service.fetch(f"slides/{ramp}/overlays/{overlay['name']}.png")
        assert drawn.headers["content-type"] == "image/png" and drawn.body[:4] == b"\x89PNG"


def test_a_slide_is_scored_once_whatever_its_name(service):
    identity = service.find(SCRIPT)
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: service.fetch(f"slides/{identity}/score", "POST"), range(8))]
    assert [one.status for one in answers] == [202] * 8
    assert {one.json["state"] for one in answers} <= {"queued", "scoring", "scored"}
    assert service.score(SCRIPT) == identity
    # What a second job wrote would be newer.
    (folder,) = (one for one in service.results.iterdir() if one.is_dir() and one.name != "ramp")
    written = (folder / "slide.json").stat().st_mtime_ns
    assert service.ask(f"slides/{identity}/score", "POST")["state"] == "scored"
    time.sleep(0.5)
    assert (folder / "slide.json").stat().st_mtime_ns == written
    answer = service.fetch(f"slides/{identity}/patches.geojson")
    assert re.fullmatch(r"attachment; filename\*=UTF-8''[\w.%-]+", answer.headers["content-disposition"])
    assert "<" not in answer.body.decode() and answer.headers["content-type"] == "application/geo+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert service.fetch("slides").headers["content-type"] == "application/json"


def test_a_damaged_slide_says_so(service):
    identity = service.find("broken")
    shown = service.ask(f"slides/{identity}")
    assert shown["state"] == "failed" and shown["problem"].startswith("broken ") and shown["score"] is None
    answer = service.fetch(f"slides/{identity}/tiles/0/0_0.jpg")
    assert answer.status == 422 and answer.detail == shown["problem"]


def find_processes(service):
    # The name of a process that is busy ends with what it does.
    return {
        one.name().split(".")[0]: one
        for one in psutil.Process(service.process.pid).children(recursive=True)
        if one.name().startswith(("ray::ProxyActor", "ray::ServeReplica"))
    }


def list_memory(service):
    return {name: process.memory_info().rss for name, process in find_processes(service).items()}


def test_large_bodies_are_refused_and_not_held(service):
    before, block = list_memory(service), bytes(10**6)
    answers, most = [], dict(before)
    chunk = f"{10**6:x}\r\n".encode() + block + b"\r\n"
    for token in (TOKEN, "a-wrong-token-0123456789"):
        for head, parts in (
            (f"POST /predict HTTP/1.1\r\nContent-Length: {300 * MB}", [block] * 300),
            ("POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked", [chunk] * 300 + [b"0\r\n\r\n"]),
        ):
            answers.append(send(service, head, parts, token=token))
            most = {name: max(size, most[name]) for name, size in list_memory(service).items()}
    assert [status for status, _ in answers] in ([413, 413, 413, 401], [413, 413, 413, 413])
    # One that asks first sends nothing.
    status, _ = send(service, f"POST /predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {300 * MB}")
    assert status == 413
    assert json.loads(answers[0][1])["detail"] == (
        "the body is larger than 50 MB, the most that is taken: start the service with a larger --max-mb"
    )
    assert len(most) == 3
    # Up to the bound it is held, as pieces and as a whole.
    assert {name: (most[name] - size) // MB for name, size in before.items() if most[name] - size > 170 * MB} == {}


def test_large_heads_are_refused(service):
    proxy = next(one for name, one in find_processes(service).items() if "Proxy" in name)
    before = proxy.memory_info().rss
    for start in ("GET /health HTTP/1.1\r\nX: ", "GET /health?", "GET /health HTTP/1.1\r\nX: a\r\nY: a"):
        began, sent = time.monotonic(), 0
        with socket.create_connection(("127.0.0.1", service.port), 20) as connection:
            connection.sendall(start.encode())
            part = (b"a" if "Y" not in start else b"\r\nZ: a") * 20_000
            with pytest.raises(ConnectionError):
                while sent < 30 * MB:
                    sent += len(part)
                    connection.sendall(part)
                connection.recv(1 << 16)
                connection.recv(1 << 16)
                raise ConnectionError
        assert time.monotonic() - began < 10
    assert proxy.is_running() and proxy.memory_info().rss - before < 30 * MB
    assert service.fetch("health").status == 200


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: -1",
        "Content-Length: 1e3",
        "Content-Length: 99999999999999999999999",
        "X-A: a\x00b",
        "X A: b",
    ],
)
def test_what_is_no_request_is_refused(service, lines):
    status, body = send(service, f"POST /predict HTTP/1.1\r\n{lines}")
    assert status == 400 and len(body) < 200


def test_a_body_that_ends_early_is_no_image(service):
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000\r\n\r\nabc"
        connection.sendall(head.encode())
        connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in connection.recv(1 << 16)


def test_slow_clients_keep_nobody_waiting(service, patch):
    """15 connections have sent part of a head, 15 part of a body."""
    connections = [socket.create_connection(("127.0.0.1", service.port), 10) for _ in range(30)]
    heads = [
        b"GET /mo",
        f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\na".encode(),
    ]
    for number, connection in enumerate(connections):
        connection.sendall(heads[number % 2])
    for _ in range(3):
        for connection in connections:
            connection.sendall(b"a")
        began = time.monotonic()
        assert service.ask("predict", "POST", patch.read_bytes()) and service.ask("slides")
        assert time.monotonic() - began < 10
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("path", ["static/../guard.py", "static/%2e%2e/guard.py", "static/..%2f..%2fguard.py"])
@pytest.mark.parametrize("before", ["/", "//", "/static/", "/docs/"])
def test_no_path_leads_out_of_the_folder_of_the_page(service, path, before):
    status, body = send(service, f"GET {before}{path} HTTP/1.1")
    assert status == 404 and b"import" not in body
    assert service.fetch("static/api.js", token="").status == 200


def test_it_listens_on_loopback_only(service):
    listening = {ip for _, ip, port in list_listening(service.process.pid) if port == service.port}
    assert listening == {"127.0.0.1"}


def test_no_web_socket_is_opened(service):
    lines = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    status, _ = send(service, f"GET /model HTTP/1.1\r\n{lines}\r\nConnection: Upgrade")
    assert status >= 400
