"""The commands and the code of docs/handing-on.md: the copied folder and the ONNX file give what the student gives."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from small_students import save_student

import lgd
from lgd.cli import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "handing-on.md").read_text()


def read_blocks(heading, language):
    section = re.split("(?m)^## ", TEXT.split(f"\n## {heading}\n", 1)[1])[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def folder(tissue, tmp_path, monkeypatch):
    """The working folder of the page, with a student and an H&E."""
    save_student(tmp_path / "runs" / "mine" / "student")
    (tmp_path / "runs" / "mine" / "student" / "README.md").write_text("the card\n")
    with Image.open(next((tissue / "HE" / "test").iterdir())) as image:
        image.convert("RGB").resize((64, 64)).save(tmp_path / "he.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(block):
    for line in block.splitlines():
        name, *args = shlex.split(line, comments=True)
        if name == "lgd":
            assert main(args) == 0, line
        else:
            subprocess.run([name, *args], check=True)


def test_the_page(folder, capsys):
    copy, upload = read_blocks("To another place", "sh")
    run_shell(copy)
    assert "no problems" in capsys.readouterr().out
    (python,) = read_blocks("To another place", "python")
    exec(compile(python, "docs/handing-on.md", "exec"), {})
    # Nothing of the run is needed.
    own = lgd.predict("runs/mine/student", "he.png")[0].probabilities
    shutil.rmtree(folder / "runs")
    assert capsys.readouterr().out == f"{own}\n"
    assert [line.split()[:2] for line in upload.splitlines()] == [["hf", "auth"], ["hf", "upload"]]

    pytest.importorskip("onnxruntime")
    run_shell(read_blocks("Without LGD", "sh")[0])
    capsys.readouterr()
    (python,) = read_blocks("Without LGD", "python")
    assert len(python.split("\n\n", 2)[2].splitlines()) <= 10
    exec(compile(python, "docs/handing-on.md", "exec"), {})
    told = eval(capsys.readouterr().out)
    assert told == pytest.approx(own, abs=1e-4) and len({*told.values()}) == len(own)
