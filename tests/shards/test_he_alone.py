"""Sets without second images: H&E and JSON alone."""

import shutil

import numpy as np
import pytest
from forging import forge, remanifest, virtual

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.shards.builder import build
from lgd.shards.manifest import Origin
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.shards.verify import verify
from lgd.stream.reader import Reader

HEAD = "he,key,label,slide,split,mpp,center,scanner,x,y"
ROWS = [f"he{number}.png,p{number},{number % 3 + 1},S{number},train,0.5,A,B,{number},7" for number in range(4)]
ROWS[3] = ROWS[3].replace("train", "test")


def write(folder, head=HEAD, rows=ROWS):
    folder.mkdir(exist_ok=True)
    for number in range(4):
        (folder / f"he{number}.png").write_bytes(virtual("png", number))
    (folder / "pairs.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


def pack(folder, out="out", **options):
    return build(ShardOptions(layout="csv", root=str(folder), out=str(folder / out), shard_size=2, **options))[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with its set in `out`; tests do not change it."""
    folder = write(tmp_path_factory.mktemp("alone"))
    pack(folder)
    return folder


def test_a_csv_without_second_images_is_packed_and_verified(alone):
    opened = ShardFolder.open(alone / "out")
    assert opened.manifest.extensions.by_role() == {"json": "json", "he": "png"}
    assert {name: split.samples for name, split in opened.manifest.splits.items()} == {"train": 3, "test": 1}
    assert verify(alone / "out") == []
    reader = Reader(opened.shards, ("he",))
    for number in range(4):
        sample = reader.read(number)
        assert sample.images["he"].shape == (48, 48, 3) and sample.key == f"p{number}"
        assert (sample.meta.sha256.ihc, sample.meta.icc.ihc, sample.meta.ihc_slide) == (None, None, None)
        assert (sample.meta.mpp, sample.meta.center, sample.meta.scanner, sample.meta.x) == (0.5, "A", "B", number)
        assert sample.meta.label == number % 3 + 1
    table = opened.read_patches()
    assert not table["ihc"].any() and len(np.unique(table["he"])) == 4
    assert opened.shards[0].index().shape == (2, 2)


def test_an_empty_column_is_no_column(alone, tmp_path):
    for head, add in ((f"{HEAD},ihc", lambda row: f"{row},"), (f"ihc,{HEAD}", lambda row: f",{row}")):
        folder = write(tmp_path / add("x"), head, list(map(add, ROWS)))
        pack(folder)
        for name in ("manifest.json", "train-000000.tar", "train-000000.idx", "patches.npy"):
            assert (folder / "out" / name).read_bytes() == (alone / "out" / name).read_bytes(), name


def test_a_column_that_is_empty_in_some_rows_is_refused(tmp_path):
    rows = [*(f"{row},ihc.png" for row in ROWS[:3]), f"{ROWS[3]},"]
    folder = write(tmp_path / "some", f"{HEAD},ihc", rows)
    (folder / "ihc.png").write_bytes(virtual("png", 9))
    with pytest.raises(DataError, match=r"he3.png: has no IHC, and 3 of 4 have one: name it, or build two sets"):
        pack(folder)
    assert not (folder / "out").exists()
    # Also where those that have one cannot be used: what is left must not become a set of another kind.
    (folder / "ihc.png").unlink()
    with pytest.raises(DataError, match="no pair is left"):
        pack(folder, on_bad="skip")


@pytest.mark.parametrize("options", [{"tile": 24}, {"image": "jpeg:95"}, {"image": "png", "tile": 16}])
def test_such_patches_are_cut_and_encoded(alone, tmp_path, options):
    folder = write(tmp_path / "set")
    manifest = pack(folder, **options)
    assert manifest.extensions.ihc is None and verify(folder / "out") == []
    assert sum(split.samples for split in manifest.splits.values()) == {24: 16, 16: 36}.get(options.get("tile"), 4)


def test_one_patch_under_two_keys_is_a_problem(tmp_path):
    folder = write(tmp_path / "set", rows=[*ROWS, "again.png,p9,1,S0,train,0.5,A,B,0,7"])
    shutil.copy(folder / "he1.png", folder / "again.png")
    with pytest.raises(DataError, match="is the H&E of p1 and, byte for byte, the H&E of p9"):
        pack(folder)


def test_a_sample_that_claims_an_ihc_is_refused(alone, tmp_path):
    out = shutil.copytree(alone / "out", tmp_path / "out")
    digest = f'"ihc": "{"0" * 64}"'.encode()

    def claim(members):
        json = members[0]
        at = json.content.index(b'"ihc": null', json.content.index(b'"sha256"'))
        content = json.content[:at] + digest + json.content[at + len(b'"ihc": null') :]
        return [json._replace(content=content), *members[1:]]

    forge(out, claim, columns=2)
    (problem, *_) = verify(out)
    assert "field sha256 has an IHC, and the set ('he',)" in problem


def test_a_manifest_that_hides_the_ihc_fits_no_shard(tmp_path):
    from forging import make

    out = make(tmp_path, [virtual("png", seed) for seed in range(4)])
    remanifest(out, lambda manifest: manifest["extensions"].update(ihc=None))
    assert verify(out)
    with pytest.raises(DataError):
        Reader(ShardFolder.open(out).shards).read(0)


def test_what_reads_the_ihc_takes_the_sets_that_have_one(alone, tmp_path, caplog):
    from forging import make

    paired = make(tmp_path, [virtual("png", seed) for seed in range(20, 24)])
    both = ShardSet.open([alone / "out", paired])
    assert [one.folder for one in both.with_ihc("the teacher").folders] == [paired]
    assert caplog.messages == [f"{alone}/out holds no second image (IHC): left out by the teacher"]
    caplog.clear()
    assert ShardSet.open([paired]).with_ihc("the teacher").folders[0].folder == paired and not caplog.messages
    message = r"out holds no second image \(IHC\), which the teacher needs: import latents by lgd import-latents, or"
    with pytest.raises(DataError, match=message):
        ShardSet.open([alone / "out"]).with_ihc("the teacher")


def test_the_verbs_say_that_there_is_none(tmp_path, capsys):
    folder = write(tmp_path / "set")
    asked = ["build-shards", "--layout", "csv", "--root", str(folder), "--out", str(tmp_path / "out")]
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert "(from 4 H&E patches)" in out and "so the set holds H&E alone" in err
    assert main(["info", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "H&E png, no IHC" in out and "4 H&E patches" in out
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_all_facts_of_an_origin_pass(tmp_path):
    facts = {"marker": "RNA", "center": "A", "scanner": "B", "alignment": 1.5, "x": 1.0, "y": 2.0, "side": 256.0}
    folder = write(tmp_path / "set", ",".join(["he", *facts]), [f"he0.png,{','.join(map(str, facts.values()))}"])
    pack(folder, split="group:1,0,0")
    meta = Reader(ShardFolder.open(folder / "out").shards).read(0).meta
    assert {name: getattr(meta, name) for name in Origin.model_fields} == dict.fromkeys(Origin.model_fields) | facts
