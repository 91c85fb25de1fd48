import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import lgd
from lgd.models.pretrained import find_weights, read_normalisation, read_settings

GOOD = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def write(path, fields) -> None:
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))


def test_a_configuration_may_hold_what_other_programs_need(tmp_path):
    labels = {str(number): "x" * 20 for number in range(21_841)}
    fields = {"model_type": "dinov2", "hidden_size": 32, "id2label": labels, "pad_token_id": -1, "text": "x" * 1000}
    write(tmp_path / "config.json", fields)
    assert read_settings(tmp_path) == fields


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (None, "is missing: copy the encoder again, whole"),
        ("", "is not valid JSON"),
        ('{"model_type": "resnet"', "is not valid JSON"),
        ('{"model_type": "resnet", "a": NaN}', r"is not valid JSON \(expected value at line 1 column"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "should be a JSON object"),
        ("x" * 5_000_000, "has 5000000 bytes, 4000000 at most"),
        ({}, "field 'model_type' is missing: choose an encoder of beit, "),
        ({"architecture": "vit_small_patch16_224"}, "field 'model_type' is missing"),
        ({"model_type": "clip"}, "field 'model_type' is 'clip', which is not supported as an encoder: choose .* vit$"),
        ({"model_type": "timm_backbone", "backbone": "hf-hub:evil/repo"}, "field 'model_type' is 'timm_backbone'"),
        ({"model_type": "evil", "auto_map": {"AutoModel": "evil.M"}}, "field 'auto_map' names code"),
        ({"model_type": "resnet", "auto_map": {"AutoModel": "evil.M"}}, "field 'auto_map' names code"),
        (
            {"model_type": "dinov2", "num_hidden_layers": 10**6},
            "field 'num_hidden_layers' holds 1000000: an encoder has 0 to 100",
        ),
        ({"model_type": "dinov2", "quantization_config": {"quant_method": "x"}}, "field 'quantization_config'"),
    ],
)
def test_a_configuration_that_is_not_accepted_is_told_in_one_line(tmp_path, fields, problem):
    if fields is not None:
        write(tmp_path / "config.json", fields)
    with pytest.raises(ValueError, match=f"^config.json(:)? {problem}") as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json is missing"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        GOOD,
        GOOD
        | {"image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255, "size": 224},
        GOOD | {"do_normalize": True, "rescale_factor": 0.00392156862745098, "feature_extractor_type": "X"},
    ],
)
def test_mean_and_deviation_are_those_of_the_preprocessor(tmp_path, fields):
    write(tmp_path / "preprocessor_config.json", fields)
    assert read_normalisation(tmp_path) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_without_normalisation_images_are_only_scaled(tmp_path):
    write(tmp_path / "preprocessor_config.json", GOOD | {"do_normalize": False})
    assert read_normalisation(tmp_path) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (None, "is missing"),
        ('{"image_mean": [0.1,0.1', "is not valid JSON"),
        ("[]", "should be a JSON object"),
        ({}, "field 'image_mean': Field required; field 'image_std': Field required"),
        (GOOD | {"image_mean": [124, 116, 104]}, "field 'image_mean.0': should be less than or equal to 1"),
        (GOOD | {"image_mean": [0.5]}, "field 'image_mean.1'"),
        (GOOD | {"image_mean": 0.5}, "field 'image_mean'"),
        (GOOD | {"image_mean": ["0.5"] * 3}, "field 'image_mean.0'"),
        (GOOD | {"image_std": [0, 0, 0]}, "field 'image_std.0': should be greater than or equal to 0.001"),
        (GOOD | {"image_std": [0.5] * 4}, "field 'image_std'"),
        (GOOD | {"rescale_factor": 1 / 127.5}, "field 'rescale_factor'"),
        (GOOD | {"do_rescale": False}, "field 'do_rescale'"),
    ],
)
def test_a_broken_preprocessor_is_an_error_and_says_what_to_do(tmp_path, fields, problem):
    if fields is not None:
        write(tmp_path / "preprocessor_config.json", fields)
    with pytest.raises(ValueError, match=f"^preprocessor_config.json(:)? {problem}.*: copy it from .*image_mean"):
        read_normalisation(tmp_path)


def test_code_of_a_preprocessor_is_refused(tmp_path):
    write(tmp_path / "preprocessor_config.json", GOOD | {"auto_map": {"AutoImageProcessor": "evil.Processor"}})
    with pytest.raises(ValueError, match="^preprocessor_config.json: field 'auto_map' names code"):
        read_normalisation(tmp_path)


def test_weights_are_one_file_or_the_shards_of_an_index(tmp_path):
    shards = {
        "a": "model-00002-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    write(tmp_path / "model.safetensors.index.json", {"metadata": {"total_size": 3}, "weight_map": shards})
    assert [path.name for path in find_weights(tmp_path)] == sorted(set(shards.values()))
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin", "..", "", "a\n.safetensors",
     "..\\x.safetensors", ".safetensors", "C:x.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_leads_nowhere_else(tmp_path, name):
    write(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "b.safetensors", "c": name}})
    with pytest.raises(ValueError, match=r"index.json: field 'weight_map.c': .* of the folder only: copy"):
        find_weights(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, [], "{"])
def test_a_broken_index_is_refused(tmp_path, index):
    write(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=r"^model\.safetensors\.index\.json.*: copy the encoder again, whole"):
        find_weights(tmp_path)


def test_weights_of_other_formats_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"^model.safetensors is missing: .* never read: convert them where you trust"):
        find_weights(tmp_path)


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a hub that a copy of one repository needs."""

    folder: Path

    def do_GET(self):
        name = self.path.split("?")[0]
        for repository, error, status in (
            ("absent", "RepoNotFound", 404), ("gated", "GatedRepo", 403), ("broken", "Other", 400),
        ):  # fmt: skip
            if f"org/{repository}" in name:
                return self.answer(status, b"{}", {"X-Error-Code": error})
        files = sorted(path.name for path in self.folder.iterdir())
        if name.startswith("/api/models/org/good/tree/"):
            tree = [
                {"type": "file", "path": f, "size": (self.folder / f).stat().st_size, "oid": "0" * 40} for f in files
            ]
            return self.answer(200, json.dumps(tree).encode())
        if name.startswith("/api/models/org/good"):
            return self.answer(
                200, json.dumps({"id": "org/good", "sha": SHA, "siblings": [{"rfilename": f} for f in files]}).encode()
            )
        file = self.folder / name.rsplit("/", 1)[-1]
        if not file.exists():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


FETCH = """
import sys
from lgd.models.pretrained import find_folder
for name in sys.argv[1:]:
    try:
        print(find_folder(name, weights=True))
    except ValueError as error:
        print(error)
"""


def fetch(*names: str, **env: str) -> list[str]:
    env = os.environ | env | {"PYTHONPATH": str(Path(lgd.__file__).parents[1]), "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", FETCH, *names], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return run.stdout.splitlines()


def test_a_repository_of_the_hub_becomes_a_folder_and_its_errors_are_one_line(tmp_path):
    Hub.folder = tmp_path / "repository"
    Hub.folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "evil.py", "pytorch_model.bin"):
        (tmp_path / "repository" / name).write_text(f"content of {name}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    try:
        names = ["hf:org/good", "hf:org/absent", "hf:org/gated", "hf:org/broken", "hf:../trap", "hf:"]
        told = fetch(*names, **env, HF_HUB_OFFLINE="0")
    finally:
        server.shutdown()
        server.server_close()
    files = {path.name: path.read_text() for path in Path(told[0]).iterdir()}
    assert sorted(files) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert files["model.safetensors"] == "content of model.safetensors"
    assert told[1].startswith("the hub knows no such repository: check the name")
    assert told[2].startswith("it is gated: accept its terms at huggingface.co/org/gated")
    assert told[3].endswith("or name a folder that holds a copy of it")
    assert told[4:] == ["this is no name of a repository of the hub: use hf:ORG/NAME"] * 2

    # The server is gone: what was copied is found, and nothing else.
    good, other = fetch("hf:org/good", "hf:org/other", **env, HF_HUB_OFFLINE="1")
    assert good == told[0]
    assert other.startswith("the hub cannot be reached, and the cache lacks it: ")
