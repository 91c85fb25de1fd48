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

import lgd
from lgd.models.description import TeacherConfig


def save_vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=64, patch_size=16)).save_pretrained(folder)
    (folder / "code.py").write_text("raise SystemExit('run')")
    return folder


def run(address: str, cache: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    here = {"PYTHONPATH": str(Path(lgd.__file__).parents[1])}
    command = [sys.executable, "-m", "lgd", *args]
    everything = os.environ | own | here | env
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=300)


def test_a_model_of_the_table_is_taken_by_its_name_alone(tissue_config, tmp_path):
    """Its repository lacks a preprocessor; mean, std and terms are the table's, and the terms travel."""
    config = [
        f"--data.shards={tissue_config.shard_dirs[0]}", "--data.size=64", "--train.workers=0", "--train.engine=torch",
        f"--run.dir={tmp_path / 'run'}", "--teacher.source=frozen", "--teacher.encoder=hf:owkin/phikon", "--latents.map=2",
    ]  # fmt: skip
    repository = save_vit(tmp_path / "phikon")
    with serve_hub({"owkin/phikon": repository}) as (address, asked):
        looked = run(address, tmp_path / "cache", "doctor", *config)
        (line,) = [line for line in looked.stdout.splitlines() if "teacher.encoder" in line]
        assert line.startswith("ok") and "32 numbers by pool cls, patches of 16 px, mean 0.485, 0.456, 0.406" in line
        assert "licence: Owkin non-commercial" in line and "from LGD's table (card, slide2vec; 2026-11-25" in line
        assert not [path for path in asked if path.startswith("GET") and path.endswith(".safetensors")]

        trained = run(address, tmp_path / "cache", "train-teacher", *config)
        assert trained.returncode == 0, trained.stderr
        told = [line for line in trained.stderr.splitlines() if line.startswith("teacher.encoder hf:owkin/phikon")]
        assert len(told) == 1 and "from LGD's table" in told[0] and "taken as it is, and centred" in trained.stderr
        assert not [path for path in asked if path.endswith(".py")]
    # The hub is gone, and is not asked again.
    cached = run("http://127.0.0.1:9", tmp_path / "cache", "cache-latents", *config)
    assert cached.returncode == 0, cached.stderr
    described = TeacherConfig.read_folder(tmp_path / "run" / "teacher")
    assert described.licence == "Owkin non-commercial" and described.encoder.mean == (0.485, 0.456, 0.406)
    store = json.loads((tmp_path / "run" / "latents" / "store.json").read_text())
    assert store["teachers"]["teacher"]["licence"] == "Owkin non-commercial"
    student = run("http://127.0.0.1:9", tmp_path / "cache", "train", *config, "--student.epochs=0.5")
    assert student.returncode == 0, student.stderr
    taught = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert taught["teachers"][0]["licence"] == "Owkin non-commercial" and "Owkin" in taught["licence"]


PROBLEMS = {
    "hf:org/absent": ("the hub knows no such repository", {}),
    "hf:org/gated": ("it is gated: accept its terms at huggingface.co/org/gated, and set HF_TOKEN", {}),
    "hf:org/pickled": ("model.safetensors is missing: .* never read: convert them where you trust them", {}),
    "hf:org/other": ("the hub cannot be reached, and the cache lacks it", {"HF_HUB_OFFLINE": "1"}),
    "hf:MahmoodLab/CONCH": ("LGD cannot load CONCH: its authors' code builds it", {}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_cannot_be_had_is_told_before_anything_is_trained(name, tissue_config, tmp_path):
    problem, env = PROBLEMS[name]
    pickled = save_vit(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (pickled / "preprocessor_config.json").write_text(json.dumps(normal))
    config = [
        f"--data.shards={tissue_config.shard_dirs[0]}", "--data.size=64", "--train.workers=0", "--train.engine=torch",
        f"--run.dir={tmp_path / 'run'}", f"--student.encoder={name}",
    ]  # fmt: skip
    with serve_hub({"org/pickled": pickled}, gated=frozenset({"org/gated"})) as (address, _):
        looked = run(address, tmp_path / "cache", "doctor", *config, **env)
        trained = run(address, tmp_path / "cache", "train-teacher", *config, **env)
    assert looked.returncode == trained.returncode == 1
    (line,) = [line for line in looked.stdout.splitlines() if "student.encoder" in line]
    assert line.startswith("broken")
    for text in (line, trained.stderr):
        assert f"encoder {name}: " in text
        assert re.search(problem, text), text
    assert "Traceback" not in trained.stderr and not (tmp_path / "run" / "teacher").exists()


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed: make test-encoders")
def test_an_encoder_of_timm_is_taken_from_the_hub_at_a_revision(tissue_config, tmp_path):
    import timm

    torch.manual_seed(3)
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64, "init_values": 1e-5}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    timm.models.save_for_hf(network, tmp_path / "uni", safe_serialization=True)
    name = "timm:hf-hub:MahmoodLab/uni@0123456789abcdef0123456789abcdef01234567"
    config = [
        f"--data.shards={tissue_config.shard_dirs[0]}", "--data.size=64", "--train.workers=0", "--train.engine=torch",
        f"--run.dir={tmp_path / 'run'}", "--teacher.source=frozen", f"--teacher.encoder={name}",
    ]  # fmt: skip
    with serve_hub({"MahmoodLab/uni": tmp_path / "uni"}) as (address, asked):
        trained = run(address, tmp_path / "cache", "train-teacher", *config)
    assert trained.returncode == 0, trained.stderr
    assert all("/0123456789abcdef" in path for path in asked if "resolve" in path)
    described = TeacherConfig.read_folder(tmp_path / "run" / "teacher")
    assert "no commercial use" in described.licence and described.encoder.mpp == 0.5
    # The patches of 128 px at 0.46 um/px are seen at 64 px.
    assert "made for 0.5 um/px, and sees the patches at 0.92 um/px: data.size 118 would be its scale" in trained.stderr
