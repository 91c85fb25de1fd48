"""Options of the service, on the command line and as arguments of an application."""

import pytest

from lgd.base.errors import ConfigError, DataError
from lgd.serve.options import ServeOptions
from lgd.serve.replicas import build


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": ""}, "--model DIR"),
        ({"port": 65536}, "--port"),
        ({"port": -1}, "--port"),
        ({"replicas": 0}, "--replicas"),
        ({"cpus": -1}, "--cpus"),
        ({"gpus": 1.5}, "--gpus"),
        ({"max_mb": 0}, "--max-mb"),
        ({"max_pixels": 101}, "--max-pixels"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(options, said):
    with pytest.raises(ConfigError, match=said):
        ServeOptions(**({"model": "m"} | options))


@pytest.mark.parametrize(
    ("host", "private"),
    [
        *((host, True) for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.0.1", "lab.example", "", "localhost.evil.example")),
    ],
)
def test_only_loopback_is_private(host, private):
    options = ServeOptions(model="m", host=host)
    assert options.is_private == private
    if not private:
        with pytest.raises(ConfigError, match=r"secrets\.token_hex.*--token-file FILE"):
            options.read_token(needed=True)


def test_arguments_of_an_application_are_read():
    options = ServeOptions.read(
        {"model": "m", "replicas": 2, "gpus": 0.5, "code": ["python:a.b:c"], "hide_names": True}
    )
    assert (options.replicas, options.gpus, options.code, options.hide_names) == (2, 0.5, ("python:a.b:c",), True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "args.model"),
        ({"model": "m", "modle": 1}, "args.modle"),
        ({"model": "m", "replicas": "many"}, "args.replicas"),
        ({"model": 1}, "args.model"),
    ],
)
def test_arguments_that_are_none_are_named(arguments, said):
    with pytest.raises(ConfigError) as error:
        ServeOptions.read(arguments)
    assert any(line.startswith(said) for line in error.value.args[1:]), error.value.args


@pytest.mark.parametrize(
    "content", ["", "short", "x" * 15, "a token with blanks", "a-token-of-\u00e9-0123456789", "\x00" * 20]
)
def test_a_token_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "token").write_text(content)
    for needed in (False, True):
        with pytest.raises(DataError, match=r"chmod 600 FILE"):
            ServeOptions(model="m", token_file=str(tmp_path / "token")).read_token(needed)
    with pytest.raises(DataError, match="is no token file"):
        ServeOptions(model="m", token_file=str(tmp_path)).read_token(needed=True)


def test_a_token_is_read_without_its_line_break(tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert ServeOptions(model="m", token_file=str(tmp_path / "token")).read_token(needed=True) == "0123456789abcdef"
    assert ServeOptions(model="m").read_token(needed=False) == ""


def test_a_token_that_others_can_read_is_named_once(tmp_path, caplog):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    for mode, count in ((0o644, 1), (0o640, 1), (0o600, 0), (0o400, 0)):
        path.chmod(mode)
        caplog.clear()
        ServeOptions(model="m", token_file=str(path)).read_token(needed=True)
        assert [f"others on this machine can read {path}" in one for one in caplog.messages] == [True] * count


def test_an_application_of_a_cluster_needs_a_token(tmp_path):
    with pytest.raises(ConfigError, match="--token-file FILE"):
        build({"model": str(tmp_path)})
    (tmp_path / "token").write_text("0123456789abcdef")
    assert build({"model": str(tmp_path), "token_file": str(tmp_path / "token")}) is not None
