"""Shard sets made to harm whoever opens them: refused before anything of them is decoded, and nothing runs."""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from forging import (
    FIRST,
    Member,
    assert_refused,
    entry_with,
    forge,
    make,
    remanifest,
    saved,
    virtual,
    with_content,
    with_extra,
)
from PIL import Image

from lgd.base.errors import DataError
from lgd.io.digests import digest_of
from lgd.shards.image import decode
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hostile"), [virtual("png", seed) for seed in range(10)])


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


TYPES = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
TYPES += [tarfile.CONTTYPE, tarfile.AREGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, b"x", b"g", b"Z"]


@pytest.mark.parametrize("place, role", enumerate(("json", "he", "ihc")))
@pytest.mark.parametrize("type_", TYPES)
def test_links_devices_and_other_members_are_refused(out, place, role, type_):
    forge(out, lambda members: [*members[:place], members[place]._replace(type=type_), *members[place + 1 :]])
    key = "" if role == "json" else "p0, "
    told = f"{FIRST}.tar, row 0, p0, {role}: its tar header is of type" if key else f"{role}: its tar header is of type"
    assert_refused(out, told)


@pytest.mark.parametrize(
    "name", ["/p0.he.png", "../p0.he.png", "./p0.he.png", "a/p0.he.png", "p0.he.png.pyd", "p0.HE.png"]
)
def test_a_member_by_another_name_is_refused(out, name):
    forge(out, lambda members: [members[0], members[1]._replace(name=name), *members[2:]])
    assert_refused(out, f"{FIRST}.tar, row 0, p0, he: its tar header names")
    # USTAR puts the folders of a long name elsewhere in the header.
    forge(out, lambda members: [members[0], members[1]._replace(name="d" * 99 + "/p0.he.png"), *members[2:]])
    assert_refused(out, f"{FIRST}.tar, row 0, p0, he: its tar header names")


@pytest.mark.parametrize(
    "key", ["/etc/passwd", "../p0", "a/b", "a.b", ".", "", "p 0", "p0\n", "p\0", "é", "a" * 91, 7, None]
)
def test_a_key_that_leads_elsewhere_is_refused(out, key):
    def change(members):
        meta = json.loads(members[0].content) | {"key": key}
        names = [f"{str(key).replace(chr(0), '')}{member.name[2:]}"[:99] for member in members[:3]]
        renamed = [member._replace(name=name) for member, name in zip(members[:3], names, strict=True)]
        return [renamed[0]._replace(content=json.dumps(meta).encode()), *renamed[1:], *members[3:]]

    forge(out, change)
    assert_refused(out, f"{FIRST}.tar, row 0, json: field 'key': should ")


@pytest.mark.parametrize("place, role", enumerate(("json", "he", "ihc")))
def test_headers_that_rename_the_next_member_are_refused(out, place, role):
    """Readers of tars would see `../p0...`; the plain header says what we expect."""

    def change(members):
        renamed = members[place]._replace(pax={"path": "../" + members[place].name}, format=tarfile.PAX_FORMAT)
        return [*members[:place], renamed, *members[place + 1 :]]

    forge(out, change)
    with tarfile.open(out / f"{FIRST}.tar") as tar:
        assert tar.getnames()[place].startswith("../")
    assert_refused(out, FIRST, f"row 0, {role}: the index places it at byte")
    listed = Member("x", b"27 path=../../etc/passwd.x\n", type=b"x")
    forge(out, lambda members: [*members[:place], listed, *members[place + 1 :]])
    assert_refused(out, FIRST, f"{role}: " + ("Invalid JSON" if place == 0 else "is no png image"))


FILES = [
    "pipe:cat x",
    "pipe:cat x.tar",
    "/etc/passwd",
    "../train-000000.tar",
    "./train-000000.tar",
    "sub/train-000000.tar",
]
FILES += [
    "http://x/train-000000.tar",
    "file:///train-000000.tar",
    "train-000001.tar",
    "train-000000.tar\0",
    "",
    7,
    None,
]
NUMBERS = [0, -1, True, 2.0, "3", None, 1 << 60, 10**300, float("nan"), float("inf")]


@pytest.mark.parametrize(
    "change",
    [
        *[entry_with(file=name) for name in FILES],
        *[entry_with(samples=number) for number in NUMBERS],
        *[entry_with(bytes=number) for number in [*NUMBERS[:6], float("nan")]],
        *[entry_with(sha256=text) for text in ("", "0" * 63, "G" * 64, "../" + "0" * 61, None, 0)],
        lambda manifest: manifest["splits"]["train"]["shards"].reverse(),
        lambda manifest: manifest["splits"]["train"]["shards"].pop(),
        lambda manifest: manifest["splits"]["train"]["shards"].pop(0),
        lambda manifest: manifest["splits"]["train"]["shards"].append(manifest["splits"]["train"]["shards"][0]),
        lambda manifest: manifest["splits"]["train"].update(samples=7),
        lambda manifest: manifest["splits"]["train"].update(shards={}),
        lambda manifest: manifest["splits"].update({"../x": manifest["splits"].pop("train")}),
        lambda manifest: manifest["splits"].update({"pipe:x": manifest["splits"].pop("train")}),
        lambda manifest: manifest.update(splits=[]),
        lambda manifest: manifest.update(extensions={"json": "json", "he": "pkl", "ihc": "png"}),
        lambda manifest: manifest.update(extensions={"json": "pyd", "he": "png", "ihc": "png"}),
        lambda manifest: manifest.update(extensions={"json": "json", "he": "png/../../x", "ihc": "png"}),
        lambda manifest: manifest.update(caveats=["\ud800"]),
    ],
)
def test_a_hostile_manifest_is_refused(out, change):
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest["digest"] = digest_of(manifest) if text.isprintable() and "\ud800" not in text else "0" * 64
    path.write_text(json.dumps(manifest))
    assert_refused(out, str(path))


class Attack:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def in_manifest(extension):
    return lambda out, _: remanifest(
        out, lambda m: m.update(extensions={"json": "json", "he": extension, "ihc": extension})
    )


def as_index(out, payload):
    with (out / f"{FIRST}.idx").open("wb") as stream:
        np.save(stream, np.array([[payload]], object), allow_pickle=True)


PICKLES = {
    **{
        f"extra {suffix}": lambda out, payload, suffix=suffix: forge(
            out, with_extra(3, Member(f"p0.{suffix}", pickle.dumps(payload), listed=False))
        )
        for suffix in ("pyd", "pkl", "pth")
    },
    **{
        f"slot {suffix}": lambda out, payload, suffix=suffix: forge(
            out, lambda m: [m[0], Member(f"p0.he.{suffix}", pickle.dumps(payload)), *m[2:]]
        )
        for suffix in ("pyd", "pickle", "png")
    },
    **{f"manifest {extension}": in_manifest(extension) for extension in ("pyd", "pkl", "pth", "npz")},
    "json": lambda out, payload: forge(out, with_content(0, pickle.dumps(payload))),
    "index of objects": as_index,
    "index": lambda out, payload: (out / f"{FIRST}.idx").write_bytes(pickle.dumps(payload)),
    "manifest": lambda out, payload: (out / "manifest.json").write_bytes(pickle.dumps(payload, protocol=0)),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_refused_and_does_not_run(out, tmp_path, kind):
    payload = Attack(tmp_path / "ran")
    PICKLES[kind](out, payload)
    assert_refused(out, "manifest.json" if "manifest" in kind else FIRST)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "ran").exists(), "the attack must work where it is let in"


def key_json(**changes):
    """A change of the first sample's KEY.json; values are JSON text."""

    def change(members):
        meta = {name: json.dumps(value) for name, value in json.loads(members[0].content).items()} | changes
        text = "{" + ", ".join(f'"{name}": {value}' for name, value in meta.items()) + "}"
        return with_content(0, text.encode())(members)

    return change


BOMBS = {
    "deep lists": "[" * 60000,
    "deep objects": '{"a":' * 12000,
    "many digits": "1" * 60000,
    "a negative of many digits": "-" + "1" * 60000,
    "a huge exponent": "1e999999999",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "long": '"' + "a" * 70000 + '"',
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("field", ["mpp", "label", "extra"])
def test_a_json_bomb_is_refused(out, bomb, field):
    started = time.monotonic()
    forge(out, key_json(**{field: BOMBS[bomb]}))
    if (bomb, field) == ("a huge exponent", "extra"):
        # It reads as an infinite number, in a field that nobody uses.
        assert "field 'extra'" in verify(out)[0]
        return
    assert_refused(out, FIRST)
    assert time.monotonic() - started < 5


def test_a_count_of_samples_takes_no_memory_by_itself(out):
    shard = ShardFolder.open(out).shards[0]
    with pytest.raises(DataError, match=rf"{FIRST}\.idx is no table of {1 << 60} samples"):
        dataclasses.replace(shard, samples=1 << 60).open()


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_json_bomb_in_the_manifest_is_refused(out, bomb):
    path = out / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 3', f'"samples": {BOMBS[bomb]}'))
    assert_refused(out, f"{path}")


@pytest.mark.parametrize("field", ["group", "slide", "source"])
@pytest.mark.parametrize("text", [r"\ud800", r"\u0000", r"a\nb", r"\u001b[2J"])
def test_text_that_cannot_be_printed_is_refused(out, field, text):
    changes = {"group": f'"{text}"', "slide": f'"{text}"'} if field != "source" else {"source": f'"{text}"'}
    if field == "group":
        changes["slide"] = "null"
    forge(out, key_json(**changes))
    reason = "Invalid JSON" if "ud800" in text else f"field '{field}': should be a text that can be printed"
    assert_refused(out, f"{FIRST}.tar, row 0, json: ", reason)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@functools.cache
def packed():
    """256 MB in 256 KB."""
    packer = zlib.compressobj(6)
    return b"".join(packer.compress(bytes(1 << 22)) for _ in range(64)) + packer.flush()


def png_with(kind, start):
    """A PNG with a compressed chunk that unpacks to 256 MB."""
    small = saved("PNG")
    return small[:33] + chunk(kind, start + packed()) + small[33:]


def png_of(width, height):
    small = saved("PNG")
    return small[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + small[33:]


def jpg_of(width, height, progressive=False):
    content = bytearray(saved("JPEG", progressive=progressive))
    place = content.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_of(width, height, animated=False):
    head = bytes([2 * animated, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(head)) + head + saved("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def plain_webp_of(width, height):
    content = bytearray(saved("WEBP"))
    content[26:30] = struct.pack("<HH", width, height)
    return bytes(content)


IMAGES = {
    "jpg": lambda: jpg_of(60000, 60000),
    "progressive jpg": lambda: jpg_of(60000, 60000, True),
    "jpg just too large": lambda: jpg_of(10001, 10000),
    "png": lambda: png_of(60000, 60000),
    "long png": lambda: png_of(2**31 - 1, 1),
    "png of 130 megapixels": lambda: png_of(13000, 10000),
    "webp": lambda: webp_of(60000, 60000),
    "animated webp": lambda: webp_of(60000, 60000, True),
    "largest webp": lambda: webp_of(1 << 24, 255),
    "plain webp": lambda: plain_webp_of(16383, 16383),
}
CHUNKS = {
    "iCCP": lambda: png_with(b"iCCP", b"a\0\0"),
    "zTXt": lambda: png_with(b"zTXt", b"a\0\0"),
    "iTXt": lambda: png_with(b"iTXt", b"a\0\1\0\0\0"),
}


def peak():
    """The most memory that this process has held, in kB."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def put_he(out, content, extension):
    """Give the first sample another H&E, under a name that the manifest allows."""
    forge(out, lambda members: [members[0], Member(f"p0.he.{extension}", content), *members[2:]])
    remanifest(out, lambda manifest: manifest["extensions"].update(he=extension))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bomb", [*IMAGES, *CHUNKS])
def test_an_image_bomb_is_refused_before_it_takes_memory(out, bomb):
    content = (IMAGES | CHUNKS)[bomb]()
    extension = next((name for name in ("jpg", "webp") if name in bomb), "png")
    put_he(out, content, extension)
    # The peak so far is forgotten: another test may have made it.
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak(), time.monotonic()
    reason = "more than 100 megapixels" if bomb in IMAGES else "is truncated or broken"
    assert_refused(out, f"{FIRST}.tar, row 0, p0, he: ", reason)
    assert peak() - before < 100_000
    assert time.monotonic() - started < 5


SMALL = Image.new("RGB", (48, 48))
FORMATS = ("TIFF", "BMP", "GIF", "EPS", "PPM", "JPEG2000", "ICO", "TGA")
OTHERS = {
    **{
        kind: lambda kind=kind: saved(kind, SMALL)
        for kind in ("TIFF", "BMP", "GIF", "EPS", "PPM", "JPEG2000", "ICO", "TGA")
    },
    "PDF": lambda: saved("PDF", SMALL),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "HTML that holds a JPEG": lambda: b"<script>alert(1)</script>" + saved("JPEG"),
    "GIF that holds a JPEG": lambda: saved("GIF", SMALL) + saved("JPEG"),
    "zip that holds a JPEG": lambda: b"PK\3\4" + saved("JPEG"),
    "pickle that holds a JPEG": lambda: pickle.dumps(saved("JPEG")),
    "RIFF that is no WebP": lambda: b"RIFF\x10\0\0\0WAVEfmt " + bytes(16),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("extension", ("jpg", "png", "webp"))
@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_by_any_name(out, kind, extension):
    content = OTHERS[kind]()
    put_he(out, content, extension)
    assert_refused(out, f"{FIRST}.tar, row 0, p0, he: is no {extension} image")


def test_what_follows_an_image_is_left_alone(out, tmp_path):
    """A file that is a JPEG and a pickle at once: it is read as the image that it begins with."""
    payload = pickle.dumps(Attack(tmp_path / "ran"))
    assert (decode(saved("JPEG") + payload, "a") == decode(saved("JPEG"), "a")).all()
    assert not (tmp_path / "ran").exists()
