import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from scipy.special import softmax

from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.labels.conformal import calibrate
from lgd.models.loading import load_student
from lgd.scoring.images import find_images, read_image
from lgd.scoring.notes import count_notes, join_notes
from lgd.scoring.predict import load_scorer, predict, score_images, score_shards
from lgd.scoring.slide_rows import as_json, join_slides, slides_of_images
from lgd.shards.image import decode
from lgd.shards.pairs import read_slides
from lgd.shards.shard_set import ShardSet
from lgd.stain.checks import NEARLY_BLANK, NO_HE
from lgd.stream.reader import Reader


@pytest.fixture(scope="module")
def scorer(tissue_run):
    return load_scorer(tissue_run.student.dir)


@pytest.fixture
def images(tissue, tmp_path):
    """Five H&E patches in a folder of their own."""
    (tmp_path / "patches" / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted((tissue / "HE" / "train").iterdir())[:5]):
        shutil.copy(path, tmp_path / "patches" / ("deep" if number > 2 else "") / f"p{number}.png")
    return tmp_path / "patches"


def test_files_folders_and_patterns_are_found_once_and_sorted(images):
    everything = sorted(images.rglob("*.png"))
    assert find_images([str(images)]) == everything and len(everything) == 5
    assert find_images([str(images / "*.png")]) == everything[-3:]
    assert find_images([str(images / "**" / "*.png")]) == everything
    assert find_images([str(images / "p1.png"), str(images), str(images / "p?.png")]) == everything
    (images / "notes.txt").write_text("no image")
    assert find_images([str(images)]) == everything
    assert find_images([str(images / "notes.txt")]) == [images / "notes.txt"], "who names a file means it"


def test_what_cannot_be_found_is_named(images, tmp_path):
    with pytest.raises(DataError, match="p9.png is no file, no folder, and no pattern"):
        find_images([str(images / "p9.png")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no JPEG, .* file$"):
        find_images([str(tmp_path / "empty")])
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    shutil.copy(images / "p0.png", tmp_path / "empty" / ".p.png")
    with pytest.raises(DataError, match=r"empty holds no JPEG, .* file, only .*notes.txt; 1 \(hidden\): .*/.p.png$"):
        find_images([str(tmp_path / "empty")])


@pytest.mark.parametrize("url", ["s3://bucket/patches", "http://127.0.0.1:1/p.png"])
def test_images_at_urls_are_refused(url):
    with pytest.raises(ConfigError, match=f"^{url}: images are read from local files only"):
        find_images([url])


def test_a_folder_is_read_as_people_have_them(images, tmp_path, caplog):
    """Litter of systems is nobody's; links are followed; one note names what is left out."""
    everything = find_images([str(images)])
    for name in (".ipynb_checkpoints/p0.PNG", ".p1.png", "._p0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (images / name).parent.mkdir(exist_ok=True)
        shutil.copy(images / "p0.png", images / name)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(images / "p0.png", tmp_path / "elsewhere" / "scan")
    shutil.copy(images / "p0.png", tmp_path / "elsewhere" / "SCAN.JFIF")
    (images / "slide4").symlink_to(tmp_path / "elsewhere")
    (images / "slide4" / "back").symlink_to(images)
    (images / "round.png").symlink_to("round.png")
    added = [images / name for name in ("round.png", "slide4/SCAN.JFIF", "slide4/scan")]
    assert find_images([str(images)]) == sorted([*everything, *added])
    (images / "c.doc").write_bytes(b"GIF89a")
    os.mkfifo(images / "pipe.png")
    (images / "again.png").symlink_to("p0.png")
    (images / "gone.png").symlink_to("nowhere.png")
    caplog.clear()
    found = find_images([str(images), f"{images}/deep/../p1.png", f"{images}/Thumbs.db"])
    expected = [path for path in everything if path.name != "p0.png"]
    expected += [images / name for name in ("again.png", "gone.png")] + added
    assert sorted(map(os.path.abspath, found)) == sorted(map(str, expected))
    hidden = f"{images}/.ipynb_checkpoints/p0.PNG, {images}/.p1.png"
    assert caplog.messages == [
        f"left out 2 (no image): {images}/c.doc, {images}/pipe.png; 2 (hidden): {hidden}; "
        f"1 (another name of an image): {images}/p0.png"
    ]
    (images / "a").mkdir()
    shell = [str(path) for path in images.iterdir() if path.name[0] != "."]
    assert images / "deep" / "p3.png" in find_images([f"{images}/*"]) == find_images(shell), "a folder is what it holds"


LOCKED = """
import os, sys
from pathlib import Path
from lgd.scoring.images import find_images, read_image
folder = Path(sys.argv[1])
for name in ("folder/b.png", "listed/c.png", "no.png"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
(folder / "no.png").chmod(0)
(folder / "folder").chmod(0)
(folder / "listed").chmod(0o444)
if os.getuid() == 0:
    os.setuid(65534)
for path in find_images([folder, folder / "folder" / "b.png"]):
    try:
        read_image(path, 8)
    except ValueError as error:
        print(str(error).removeprefix(f"{folder}/"))
"""


def test_what_may_not_be_read_costs_its_own_row():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run([sys.executable, "-c", LOCKED, folder], capture_output=True, text=True, check=False)
        for name in ("folder", "listed"):
            (Path(folder) / name).chmod(0o755)
    names = ("folder", "folder/b.png", "listed/c.png", "no.png")
    assert done.stdout.splitlines() == [f"{name} cannot be read (Permission denied)" for name in names], done.stderr


def test_a_shown_link_into_a_hidden_folder_is_followed(images):
    (images / ".store").mkdir()
    (images / "deep").rename(images / ".store" / "deep")
    (images / "z" / "z").mkdir(parents=True)
    (images / "z" / "z" / "deep").symlink_to(images / ".store" / "deep")
    assert {f"{images}/z/z/deep/p3.png", f"{images}/z/z/deep/p4.png"} < {*map(str, find_images([images]))}


def test_a_file_scores_as_the_network_says(scorer, tissue_run, images):
    model, config = load_student(tissue_run.student.dir)
    paths = find_images([str(images)])
    rows = {Path(said.image): values for said, values in score_images(scorer, paths, batch=2)}
    assert list(rows) == paths
    for path in paths:
        image = torch.from_numpy(decode(path.read_bytes(), "x", 64))[None].permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model(image)["logits"][0].double()
        expected = torch.softmax(logits / config.temperature, dim=0).numpy()
        np.testing.assert_allclose(rows[path]["output"], expected, atol=1e-5)
        assert rows[path]["output"].sum() == pytest.approx(1)


def test_shards_score_as_their_files(scorer, tissue_run, tissue):
    shards = ShardSet.open(tissue_run.shard_dirs).of_split("test")
    predictions, vectors = score_shards(scorer, shards, threads=2, batch=7)
    reader = Reader(shards, ())
    samples = [reader.read(number) for number in range(reader.total)]
    assert predictions.keys == [sample.key for sample in samples]
    assert predictions.label.tolist() == [sample.label for sample in samples]
    assert predictions.groups == [sample.meta.group for sample in samples]
    assert {name: array.shape for name, array in vectors.items()} == dict.fromkeys(
        ("pooled", "query"), (20, scorer.config.latents["teacher"].dim)
    )
    files = [tissue / sample.meta.source for sample in samples]
    rows = [values for _, values in score_images(scorer, files)]
    np.testing.assert_allclose(predictions.output, [row["output"] for row in rows], atol=1e-5)
    for name, array in vectors.items():
        np.testing.assert_allclose(array, [row[name] for row in rows], atol=1e-4)


def test_the_teacher_reads_the_ihc(tissue_run):
    teacher = load_scorer(tissue_run.teacher.dir, "teacher")
    predictions, vectors = score_shards(teacher, ShardSet.open(tissue_run.shard_dirs).of_split("val"), threads=1)
    reader = Reader(ShardSet.open(tissue_run.shard_dirs).of_split("val"), ("he", "ihc"), 64)
    one = reader.read(2)
    row = teacher.score(one.images["ihc"][None])
    np.testing.assert_allclose(predictions.output[2], row["output"][0], atol=1e-5)
    assert not np.allclose(row["output"], teacher.score(one.images["he"][None])["output"], atol=1e-5)
    assert vectors["pooled"].shape[1] == teacher.model.dim and [*vectors] == ["pooled"]


def test_training_wrote_the_scores_of_the_exported_network(scorer, tissue_run):
    predictions, _ = score_shards(scorer, ShardSet.open(tissue_run.shard_dirs).of_split("val"), threads=1)
    # Without the temperature, as during training.
    chances = softmax(np.log(predictions.output) * scorer.config.temperature, axis=1)
    again = predictions.measures.score(predictions.label, chances)
    written = scorer.config.validation
    assert written and written == pytest.approx({name: again[name] for name in written}, abs=1e-4)
    known = predictions.labelled()
    sets = calibrate(known.target.kind, known.output, known.label, known.groups)
    for by in ("patch", "slide"):
        found, kept = getattr(sets, by), getattr(predictions.conformal, by)
        assert (found is None) == (kept is None)
        assert found is None or (found.slides, found.highest) == (kept.slides, pytest.approx(kept.highest, abs=1e-4))


def test_what_is_no_image_is_named(scorer, images):
    bad = images / "text.png"
    bad.write_text("these are words")
    with pytest.raises(DataError, match=r"text\.png: is no JPEG, .* image .*convert or remove it"):
        predict(scorer, find_images([str(images)]))
    with pytest.raises(DataError, match=r"gone\.png cannot be read .No such file"):
        read_image(images / "gone.png", 64)


def test_grey_and_large_images_are_scored(scorer, images):
    Image.new("L", (300, 200), 230).save(images / "grey.png")
    (row,) = predict(scorer, [images / "grey.png"], mpp="unknown")
    assert row.label == row.level in row.target.classes
    assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-3)


@pytest.fixture
def odd_images(images, tissue):
    """The five H&E patches, two IHC patches and a picture of glass."""
    for number, path in enumerate(sorted((tissue / "IHC" / "train").glob("*_3+.png"))[:2]):
        shutil.copy(path, images / f"ihc{number}.png")
    Image.new("RGB", (128, 128), (243, 241, 244)).save(images / "glass.png")
    return images


def of_the_patch(notes):
    """Those of a row's notes that are about what the patch shows."""
    return [note for note in notes if note.endswith((NEARLY_BLANK, NO_HE))]


def test_notes_stand_beside_the_results_which_they_do_not_change(scorer, odd_images):
    rows = {Path(row.image).stem: row for row in predict(scorer, find_images([str(odd_images)]))}
    notes = {name: of_the_patch(row.notes) for name, row in rows.items()}
    assert notes == {**{f"p{n}": [] for n in range(5)}, "ihc0": [NO_HE], "ihc1": [NO_HE], "glass": [NEARLY_BLANK]}
    for name, row in rows.items():
        (path,) = odd_images.rglob(f"{name}.png")
        chances = scorer.score(read_image(path, 64)[None])["output"][0]
        assert list(row.probabilities.values()) == pytest.approx(chances.tolist(), abs=1e-4)


def predict_slides(scorer, paths, slides):
    return join_slides(scorer.config, predict(scorer, paths), slides_of_images(slides, paths))


def test_a_slide_says_how_many_of_its_patches_have_a_note(scorer, odd_images, tmp_path):
    slides = tmp_path / "slides.csv"
    slides.write_text("key,slide\n" + "".join(f"p{n},A\n" for n in range(5)) + "ihc0,B\nihc1,B\nglass,B\n")
    rows = predict_slides(scorer, find_images([str(odd_images)]), slides)
    assert [list(as_json(row)) for row in rows] == [
        ["slide", "patches", "level", "probabilities", "label_set", "notes"]
    ] * 2
    assert [of_the_patch(row.notes) for row in rows] == [
        [],
        [f"1 of 3 patches: {NEARLY_BLANK}", f"2 of 3 patches: {NO_HE}"],
    ]


@pytest.mark.parametrize("form", ["--json", "--csv", ""])
def test_the_command_counts_the_notes_on_standard_error(tissue_run, odd_images, capsys, form):
    assert main(["predict", "--model", tissue_run.student.dir, *([form] if form else []), str(odd_images)]) == 0
    out, err = capsys.readouterr()
    counts = [f"1 of 8 images: {NEARLY_BLANK}", f"2 of 8 images: {NO_HE}"]
    assert of_the_patch(err.splitlines()) == counts
    assert out.count(NO_HE) == 2 and out.count(NEARLY_BLANK) == 1
    if form == "--csv":
        cells = [row["notes"].split("; ") for row in csv.DictReader(io.StringIO(out))]
        assert sorted(map(of_the_patch, cells)) == [*[[]] * 5, [NO_HE], [NO_HE], [NEARLY_BLANK]]


def test_a_teacher_reads_ihc_so_that_it_gets_no_note_for_it(tissue_run, odd_images):
    teacher = load_scorer(tissue_run.teacher.dir, "teacher")
    ((said, _),) = score_images(teacher, [odd_images / "ihc0.png"])
    assert of_the_patch(said.notes) == []


def test_an_image_is_scored_upright(scorer, images):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(images / "p0.png") as image:
        image.save(images / "upright.webp", lossless=True)
        image.transpose(Image.Transpose.ROTATE_90).save(images / "turned.webp", lossless=True, exif=exif)
        image.transpose(Image.Transpose.ROTATE_90).save(images / "lying.webp", lossless=True)
    upright, turned, lying = (read_image(images / f"{name}.webp", 64) for name in ("upright", "turned", "lying"))
    # Shrinking rows first or columns first rounds differently.
    assert np.abs(turned.astype(int) - upright).max() <= 1 < np.abs(turned.astype(int) - lying).max()
    rows = predict(scorer, [images / f"{name}.webp" for name in ("turned", "upright")])
    chances = [list(row.probabilities.values()) for row in rows]
    assert chances[0] == pytest.approx(chances[1], abs=0.02)


def test_slides_are_the_mean_of_their_patches(scorer, images, tmp_path):
    paths = find_images([str(images)])
    slides = tmp_path / "slides.csv"
    # As a spreadsheet writes it: with a byte order mark, and columns that are not asked for.
    slides.write_text("\ufeffkey,slide,note\np0,B,\np1,A,x\np2,B,\np3,A,\np4,B,\nother,C,\n", encoding="utf-8")
    rows = predict_slides(scorer, paths, slides)
    by_name = {Path(said.image).stem: values["output"] for said, values in score_images(scorer, paths)}
    assert [(row.slide, row.patches) for row in rows] == [("A", 2), ("B", 3)]
    for row, members in zip(rows, (("p1", "p3"), ("p0", "p2", "p4")), strict=True):
        mean = np.mean([by_name[name] for name in members], axis=0)
        assert list(row.probabilities.values()) == pytest.approx(mean.tolist(), abs=1e-4)
        assert row.label == row.target.classes[int(mean.argmax())]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key,slide\np0,A\n", "names no slide for 4 of 5 images, the first of them .*p3.png: add a row p3,SLIDE"),
        ("name,slide\np0,A\n", "has no column key"),
        ("", "has no column key, slide"),
        ("key,slide\np0,A\np0,B\n", "row 3: slide B of p0 was A"),
        ("key,slide\np0\n", "row 2 has not 2 values"),
    ],
)
def test_a_wrong_list_of_slides_is_told(scorer, images, tmp_path, text, told):
    (tmp_path / "slides.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        predict_slides(scorer, find_images([str(images)]), tmp_path / "slides.csv")


def test_a_list_of_slides_cannot_tell_equal_names_apart(scorer, images, tmp_path):
    shutil.copy(images / "p1.png", images / "deep" / "p0.png")
    (tmp_path / "slides.csv").write_text("key,slide\n" + "".join(f"p{n},A\n" for n in range(5)))
    with pytest.raises(DataError, match="slides.csv names slides by file name, and .*p0.png and .*p0.png have"):
        predict_slides(scorer, find_images([str(images)]), tmp_path / "slides.csv")
    assert len(predict(scorer, find_images([str(images)]))) == 6


def test_a_missing_list_of_slides_is_told(tmp_path):
    with pytest.raises(DataError, match="gone.csv: cannot be read"):
        read_slides(tmp_path / "gone.csv")


def test_the_command_prints_one_json_document(tissue_run, scorer, images, capsys):
    assert main(["predict", "--model", tissue_run.student.dir, "--json", str(images)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [as_json(row) for row in predict(scorer, images)]
    assert [list(row) for row in rows] == [["image", "level", "probabilities", "label_set", "notes"]] * 5


def test_the_command_prints_a_table_and_csv(tissue_run, images, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(tissue_run.as_yaml())
    assert main(["predict", "--config", str(tmp_path / "config.yaml"), str(images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].split() == ["image", "level", "0", "1+", "2+", "3+", "label_set", "notes"]
    assert main(["predict", "--config", str(tmp_path / "config.yaml"), "--csv", str(images)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["image"]).name for row in rows] == ["p3.png", "p4.png", "p0.png", "p1.png", "p2.png"]
    assert all(float(row["3+"]) <= 1 for row in rows)


@pytest.mark.parametrize("form", ["--json", "--csv", ""])
def test_a_bad_file_costs_its_own_row(tissue_run, images, capsys, form, tmp_path):
    command = ["predict", "--model", tissue_run.student.dir, *([form] if form else []), str(images)]
    assert main(command) == 0
    whole = capsys.readouterr().out
    (images / "p1.png").write_bytes((images / "p1.png").read_bytes()[:500])
    (images / "p2.png").write_text("words")
    (images / "z.png").symlink_to("nowhere")
    assert main(command) == 1
    told = capsys.readouterr()
    lines = told.err.splitlines()
    (head,) = [number for number, line in enumerate(lines) if "3 of 6 images have no answer" in line]
    assert lines[head] == "lgd: 3 of 6 images have no answer:" and len(lines[head:]) == 4
    for line, words in zip(
        lines[head + 1 :], ("p1.png: is truncated", "p2.png: is no JPEG", "z.png: cannot be read"), strict=True
    ):
        assert line.startswith(f"  {images}/{words}")
    if form == "--json":
        rows, before = json.loads(told.out), {row["image"]: row for row in json.loads(whole)}
        assert len(rows) == 6
        for row in rows:
            if Path(row["image"]).name in ("p1.png", "p2.png", "z.png"):
                assert row["level"] is None and set(row["probabilities"].values()) == {None} and len(row["notes"]) == 1
            else:
                assert row == before[row["image"]]
    (tmp_path / "slides.csv").write_text("key,slide\n" + "".join(f"p{n},{'AB'[n % 2]}\n" for n in range(5)))
    for name in ("p0.png", "deep/p4.png"):
        (images / name).write_text("words")
    (images / "z.png").unlink()
    (images / "deep" / "p3.png").unlink()
    assert main([*command, "--slides", str(tmp_path / "slides.csv")]) == 1
    assert "lgd: 4 of 4 images have no answer:" in capsys.readouterr().err


def test_the_command_fails_with_one_message(tissue_run, images, capsys, tmp_path):
    assert main(["predict", str(images)]) == 2
    assert capsys.readouterr().err == (
        "lgd: name the student: --model DIR (its folder or its run's), or --config FILE of its run\n"
    )
    assert main(["predict", "--model", str(tmp_path), str(images)]) == 1
    assert "holds no trained student" in capsys.readouterr().err
    assert main(["predict", "--model", tissue_run.student.dir, str(images / "gone.png")]) == 1
    assert "gone.png is no file" in capsys.readouterr().err


def test_other_formats_and_mixed_profiles(tissue_run, scorer, images, capsys):
    """TIFF, BMP and JPEG 2000 score as the PNG does; profiles that differ are noted once."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (expected,) = predict(scorer, [images / "p0.png"])
    with Image.open(images / "p0.png") as image:
        for name, fields in (("a.tif", {"icc_profile": profile}), ("b.BMP", {}), ("c", {"format": "JPEG2000"})):
            image.convert("RGB").save(images / name, **fields)
    assert (
        main(["predict", "--model", tissue_run.student.dir, "--json", *(str(images / n) for n in ("a.tif", "*"))]) == 0
    )
    out, err = capsys.readouterr()
    rows = {Path(row["image"]).name: row for row in json.loads(out)}
    assert len(rows) == 8 and rows["b.BMP"]["probabilities"] == rows["c"]["probabilities"]
    assert rows["c"]["probabilities"] == pytest.approx(expected.probabilities, abs=0.02)
    (note,) = [line for line in err.splitlines() if "profiles" in line]
    assert note.endswith(
        "8 images carry different colour profiles, 7 none, 1 'sRGB built-in': their colours are read as they are "
        "stored, so equal stains may look unlike"
    )


def test_a_teacher_is_no_student(tissue_run, images, capsys):
    assert main(["predict", "--model", tissue_run.teacher.dir, str(images)]) == 1
    assert "config.json: field 'kind': should be 'student'" in capsys.readouterr().err


def test_real_patches_are_scored_whatever_their_names_say(scorer, real_data):
    """BCI's `.png` files hold JPEG streams of 1024 pixels; the level means nothing here."""
    rows = predict(scorer, find_images([str(real_data / "bci-native" / "HE")]), mpp="unknown")
    assert [Path(row.image).suffix for row in rows] == [".png", ".png"]
    assert rows[0].probabilities != rows[1].probabilities


def test_notes_are_counted_by_image_in_the_order_in_which_they_came():
    notes = [["pale", "small"], [], ["small", "small"], ["small"]]
    assert count_notes(iter(notes), "images") == ["1 of 4 images: pale", "3 of 4 images: small"]
    assert count_notes([[], []], "images") == count_notes([], "images") == []


def test_a_cell_has_all_notes():
    assert join_notes(["pale", "small"]) == "pale; small" and join_notes([]) == ""
