"""`lgd serve` that cannot start: one message with the remedy, before Ray is started."""

import socket

import pytest

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.serve.launch import name_host


@pytest.fixture
def serve(tissue_run, tmp_path, monkeypatch, capsys):
    """`serve(options...)`: status and message; fails where Ray is started."""

    def fail(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("lgd.serve.launch.join_cluster", fail)

    def run(*options, model=tissue_run.student.dir):
        status = main(["serve", f"--model={model}", "--port=0", *map(str, options)])
        out, err = capsys.readouterr()
        assert not out and "Traceback" not in err
        return status, err

    return run


def test_a_port_in_use(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, said = serve(f"--port={taken.getsockname()[1]}")
    assert status == 1 and "cannot be listened on (Address already in use): name another --port or --host" in said


def test_folders_that_are_none(serve, tissue_run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "slides").mkdir()
    for options, model, words in (
        ([], tmp_path / "none", f"there is no folder {tmp_path / 'none'}: name a run"),
        ([], "runs/nothere", "there is no folder runs/nothere: name a run"),
        ([f"--store={tmp_path / 'none'}"], None, "none"),
        ([f"--store={tmp_path}"], None, str(tmp_path)),
        ([f"--slides={tmp_path / 'none'}"], None, "is no folder: name the one that holds the slides"),
        ([f"--slides={tmp_path / 'file'}"], None, "is no folder: name the one that holds the slides"),
        ([f"--slides={tmp_path / 'slides'}", f"--out={tmp_path / 'file' / 'out'}"], None, "name another --out"),
        ([f"--token-file={tmp_path / 'none'}"], None, "is no token file"),
        ([f"--store={tissue_run.latents.dir}", "--teacher=nobody"], None, "nobody"),
    ):
        status, said = serve(*options, **({"model": model} if model else {}))
        assert status == 1 and words in said, (options, said)
    status, said = serve("--slides=s3://bucket/slides")
    assert status in (1, 2) and "local folders only" in said


def test_what_is_loaded_is_named_before_it_is_and_what_cannot_be_used(tissue_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.svs").write_text("no slide")
    monkeypatch.setattr("lgd.serve.launch.join_cluster", lambda *_, **__: (_ for _ in ()).throw(DataError("enough")))
    out = f"--out={tmp_path / 'results'}"
    assert main(["serve", f"--model={tissue_run.student.dir}", "--port=0", f"--slides={tmp_path}", out]) == 1
    said, _, _ = capsys.readouterr().err.partition("enough")
    assert f"loading the network of {tissue_run.student.dir}" in said
    assert f"{tmp_path / 'text.svs'} cannot be used: text is no slide" in said


def test_an_address_is_one_that_others_can_use():
    assert name_host("0.0.0.0") == name_host("::") == socket.gethostname()
    assert [name_host(one) for one in ("127.0.0.1", "::1", "lab")] == ["127.0.0.1", "[::1]", "lab"]


def test_the_address_is_printed_with_the_form_for_a_browser(monkeypatch, capsys):
    monkeypatch.setattr("lgd.serve.launch.serve_until_stopped", lambda options, announce: announce("http://lab:1/"))
    assert main(["serve", "--model=m", "--token-file=tok"]) == 0
    assert "in a browser: http://lab:1/#token=TOKEN, where TOKEN is what tok holds" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--host=0.0.0.0", "--port=70000", "--replicas=0", "--max-mb=x", "--nothing"])
def test_a_command_line_that_is_wrong(serve, option):
    status, said = serve(option)
    assert status == 2 and len(said.splitlines()) < 12
