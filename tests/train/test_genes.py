"""Gene counts of spots as a teacher, and real H&E as their only image: spatial transcriptomics of breast cancer.

Three sections of one tumour (Andersson et al., Nat Commun 12:6012, 2021): whether all stages work together on real
tissue whose other modality is no image, and nothing about new patients.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgd import pipeline
from lgd.config_files import load_config
from lgd.models.description import StudentConfig
from lgd.retrieval.queries import query
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.store.importing import ImportOptions
from lgd.store.store import Store

SPLITS = {"C2": "train", "C3": "train", "C4": "test"}
SPOTS, GENES, DIM, SIDE = 40, 250, 32, 256


@pytest.fixture(scope="module")
def her2st(real_data):
    folder = real_data / "her2st"
    if not (folder / "expression.npz").is_file():
        pytest.skip(f"no gene counts: {folder} is missing, as the authors of her2st published it")
    return folder


def choose_spots(data):
    """The first spots of each section."""
    return np.concatenate([np.flatnonzero(data["section"] == section)[:SPOTS] for section in SPLITS])


def reduce_counts(counts_nG, train_n):
    """Principal components of log-normalised counts of the genes that vary most, fitted on the training spots."""
    log_nG = np.log1p(counts_nG / counts_nG.sum(axis=1, keepdims=True) * 1e4)
    log_nG = log_nG[:, np.argsort(-log_nG[train_n].var(axis=0), kind="stable")[:GENES]]
    mean_G = log_nG[train_n].mean(axis=0)
    axes_DG = np.linalg.svd(log_nG[train_n] - mean_G, full_matrices=False)[2][:DIM]
    return ((log_nG - mean_G) @ axes_DG.T).astype(np.float32)


@pytest.fixture(scope="module")
def spots(her2st, tmp_path_factory):
    """A folder with pairs.csv, the patches around some spots, and genes.npz: key and features in another order."""
    folder = tmp_path_factory.mktemp("genes")
    data = dict(np.load(her2st / "expression.npz", allow_pickle=False))
    rows, keys, chosen_n = ["he,key,slide,split,mpp"], [], choose_spots(data)
    for section, split in SPLITS.items():
        with warnings.catch_warnings():
            # Of an image of 92 megapixels, which is known and trusted.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(her2st / f"{section}.jpg")
        with image:
            pixels = np.asarray(image.convert("RGB"))
        for spot in chosen_n[data["section"][chosen_n] == section]:
            x, y = (int(value) - SIDE // 2 for value in data["xy"][spot])
            key = f"{section}_{data['spot'][spot]}"
            Image.fromarray(pixels[y : y + SIDE, x : x + SIDE]).save(folder / f"{key}.png", compress_level=1)
            rows.append(f"{key}.png,{key},{section},{split},0.707")
            keys.append(key)
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    train_n = np.array([SPLITS[key[:2]] == "train" for key in keys])
    features_nD = reduce_counts(data["counts"][chosen_n].astype(np.float64), train_n)
    order = np.random.default_rng(0).permutation(len(keys))
    np.savez(folder / "genes.npz", key=np.array(keys)[order], features=features_nD[order])
    return folder, dict(zip(keys, features_nD, strict=True))


def test_gene_counts_teach_a_student_of_h_and_e(spots, tmp_path):
    folder, vectors = spots
    build(ShardOptions(layout="csv", root=str(folder / "pairs.csv"), out=str(tmp_path / "shards"), shard_size=20))
    options = {
        "run.dir": tmp_path / "run",
        "data.shards": tmp_path / "shards",
        "data.size": 64,
        "data.threads": 1,
        "teacher.name": "genes",
        "teacher.source": "imported",
        "student.epochs": 2,
        "train.workers": 0,
        "train.engine": "torch",
        "train.batch": 10,
        "report.bootstrap": 10,
    }
    config = load_config(overrides=[f"--{name}={value}" for name, value in options.items()])
    asked = ImportOptions(files=[str(folder / "genes.npz")], encoder="gene counts", licence="research only")
    pipeline.import_latents(config, asked)
    store = Store(config.latents.dir)
    assert store.teacher == "genes" and store.verify() == [] and store.recipe.targets.nuclei_grid is None
    stored = {
        key.decode(): row[0]
        for part in store.parts
        for key, row in zip(part.array("key"), part.array("pooled"), strict=True)
    }
    assert stored.keys() == vectors.keys()
    for key, row in stored.items():
        np.testing.assert_allclose(row, vectors[key], rtol=1e-3, atol=2e-3, err_msg=key)
    pipeline.build_index(config)
    pipeline.train_student(config)
    student = StudentConfig.read_folder(config.student.dir)
    assert student.latents["genes"].dim == DIM and student.teachers[0].licence == "research only"
    losses = [json.loads(line) for line in (Path(config.student.dir) / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["hallucination"]) for line in losses if "hallucination" in line)
    answers = query(config.student.dir, config.latents.dir, sorted(map(str, folder.glob("C4_*.png")))[:3], k=4)
    assert all(hit.slide in ("C2", "C3") and hit.level is None for one in answers for hit in one.neighbours)
    # A stored spot finds the spots whose counts are most like its own.
    (key, *_), trained = sorted(stored), [name for name in stored if SPLITS[name[:2]] == "train"]
    (answer,) = query(None, config.latents.dir, keys=[key], k=4)
    assert len(answer.neighbours) == 4 and {hit.key for hit in answer.neighbours} <= {*trained} - {key}
    pipeline.evaluate(config)
    report = json.loads((Path(config.report.dir) / "metrics.json").read_text())
    assert any(one["name"].startswith("IHC teacher, true latents") for one in report["retrieval"]["embeddings"])
    assert (Path(config.report.dir) / "queries.png").stat().st_size > 3_000
