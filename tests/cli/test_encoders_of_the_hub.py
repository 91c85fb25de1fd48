"""Encoders by their names on a hub: what `lgd doctor` and `lgd train-teacher` say of them, and what is copied."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import serve_hub
from verbs import VERBS

import lgd
from lgd.cli.facts import describe
from lgd.models.description import TeacherConfig


def save_vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=64, patch_size=16)).save_pretrained(folder)
    (folder / "code.py").write_text("raise SystemExit('run')")
    return folder


def run(address: str, cache: Path, *verbs: list[str], **env: str) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of each of some verbs."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    everything = os.environ | own | {"PYTHONPATH": str(Path(lgd.__file__).parents[1])} | env
    command = [sys.executable, "-c", VERBS, json.dumps(verbs)]
    done = subprocess.run(command, env=everything, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def options(tissue_config, run_dir: Path, *more: str) -> list[str]:
    small = ["--data.size=64", "--train.workers=0", "--train.engine=torch", "--latents.map=2", "--student.epochs=0.5"]
    return [f"--data.shards={tissue_config.shard_dirs[0]}", f"--run.dir={run_dir}", *small, *more]


def test_a_model_of_the_table_is_taken_by_its_name_alone(tissue_config, tmp_path):
    """Its repository lacks a preprocessor; mean, std and terms are the table's, and the terms travel."""
    config = options(tissue_config, tmp_path / "run", "--teacher.source=frozen", "--teacher.encoder=hf:owkin/phikon")
    repository, cache = save_vit(tmp_path / "phikon"), tmp_path / "cache"
    with serve_hub({"owkin/phikon": repository}) as (address, asked):
        ((status, out, _),) = run(address, cache, ["doctor", *config])
        assert not [path for path in asked if path.startswith("GET") and path.endswith(".safetensors")]
        ((trained, _, err),) = run(address, cache, ["train-teacher", *config])
        assert not [path for path in asked if path.endswith(".py")]
    (line,) = [line for line in out.splitlines() if "teacher.encoder" in line]
    assert line.startswith("ok") and "32 numbers by pool cls, patches of 16 px, mean 0.485, 0.456, 0.406" in line
    assert "licence: Owkin non-commercial" in line and "from LGD's table (card, slide2vec; 2026-11-25" in line
    told = [line for line in err.splitlines() if line.startswith("teacher.encoder hf:owkin/phikon")]
    assert (status, trained) == (0, 0), err
    assert len(told) == 1 and "from LGD's table" in told[0] and "taken as it is, and centred" in err

    # The hub is gone: what was copied is enough.
    again = ["train-teacher", *config, f"--teacher.dir={tmp_path / 'again'}"]
    done = run("http://127.0.0.1:9", cache, ["cache-latents", *config], ["train", *config], again)
    assert [status for status, *_ in done] == [0, 0, 0], done
    one, other = (TeacherConfig.read_folder(folder) for folder in (tmp_path / "run" / "teacher", tmp_path / "again"))
    assert one.weights_sha256 == other.weights_sha256
    described = TeacherConfig.read_folder(tmp_path / "run" / "teacher")
    assert described.licence == "Owkin non-commercial" and described.encoder.mean == (0.485, 0.456, 0.406)
    store = json.loads((tmp_path / "run" / "latents" / "store.json").read_text())
    assert store["teachers"]["teacher"]["licence"] == "Owkin non-commercial"
    taught = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    # Its weights are not in the student, so they are the teacher's terms alone.
    assert taught["teachers"][0]["licence"] == "Owkin non-commercial" and taught["licence"] is None
    assert describe(tmp_path / "run" / "student")["licence"] == "of the teacher teacher: Owkin non-commercial"


PROBLEMS = {
    "hf:org/absent": "the hub knows no such repository",
    "hf:org/gated": "it is gated: accept its terms at huggingface.co/org/gated, and set HF_TOKEN",
    "hf:org/pickled": "model.safetensors is missing: .* never read: convert them where you trust them",
    "hf:MahmoodLab/CONCH": "LGD cannot load CONCH: its authors' code builds it",
}


def check_problem(looked: tuple[int, str, str], trained: tuple[int, str, str], name: str, problem: str) -> None:
    assert looked[0] == trained[0] == 1
    (line,) = [line for line in looked[1].splitlines() if "student.encoder" in line]
    assert line.startswith("broken")
    for text in (line, trained[2]):
        assert re.search(f"encoder {name}: {problem}", text), text
    assert "Traceback" not in trained[2]


def test_what_cannot_be_had_is_told_before_anything_is_trained(tissue_config, tmp_path):
    pickled = save_vit(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (pickled / "preprocessor_config.json").write_text(json.dumps(normal))
    configs = {name: options(tissue_config, tmp_path / "run", f"--student.encoder={name}") for name in PROBLEMS}
    verbs = [[verb, *config] for config in configs.values() for verb in ("doctor", "train-teacher")]
    with serve_hub({"org/pickled": pickled}, gated=frozenset({"org/gated"})) as (address, _):
        told = run(address, tmp_path / "cache", *verbs)
    for number, (name, problem) in enumerate(PROBLEMS.items()):
        check_problem(told[2 * number], told[2 * number + 1], name, problem)
    assert not (tmp_path / "run" / "teacher").exists()


def test_offline_the_cache_is_all_there_is(tissue_config, tmp_path):
    config = options(tissue_config, tmp_path / "run", "--student.encoder=hf:org/other")
    verbs = ["doctor", *config], ["train-teacher", *config]
    looked, trained = run("http://127.0.0.1:9", tmp_path / "cache", *verbs, HF_HUB_OFFLINE="1")
    check_problem(looked, trained, "hf:org/other", "the hub cannot be reached, and the cache lacks it")
    assert "hub           offline" in looked[1]


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed: make test-encoders")
def test_an_encoder_of_timm_is_taken_from_the_hub_at_a_revision(tissue_config, tmp_path):
    import timm

    torch.manual_seed(3)
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64, "init_values": 1e-5}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    timm.models.save_for_hf(network, tmp_path / "uni", safe_serialization=True)
    name = "timm:hf-hub:MahmoodLab/uni@0123456789abcdef0123456789abcdef01234567"
    config = options(tissue_config, tmp_path / "run", "--teacher.source=frozen", f"--teacher.encoder={name}")
    with serve_hub({"MahmoodLab/uni": tmp_path / "uni"}) as (address, asked):
        ((status, _, err),) = run(address, tmp_path / "cache", ["train-teacher", *config])
    assert status == 0, err
    assert all("/0123456789abcdef" in path for path in asked if "resolve" in path)
    described = TeacherConfig.read_folder(tmp_path / "run" / "teacher")
    assert "no commercial use" in described.licence and described.encoder.mpp == 0.5
    # The patches of 128 px at 0.46 um/px are seen at 64 px.
    assert "made for 0.5 um/px, and sees the patches at 0.92 um/px: data.size 118 would be its scale" in err
