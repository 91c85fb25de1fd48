"""What `lgd serve` is asked for, on the command line or as the arguments of a Ray Serve application."""

import ipaddress
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lgd.base.errors import ConfigError, DataError, require
from lgd.config_files import find_in_run
from lgd.io.location import Location, as_output_location, require_local

logger = logging.getLogger(__name__)

PORT = 8400
DEFAULT_MB = 50
_LEAST_TOKEN = 16
_MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """Options of the service."""

    model: str
    """The student's folder, or its run's."""
    store: str = ""
    """The feature store's folder, or its run's; by default that of the run that --model names."""
    teacher: str = ""
    """Latents of this teacher are searched; by default the student's first."""
    slides: str = ""
    """Folder of the slides that may be seen and scored, searched deep and through links; no other is."""
    out: str = ""
    """Folder of their results, as `lgd predict --out` writes them; by default `slides` in the model's run."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs --token-file."""
    port: int = PORT
    """Port to listen on."""
    token_file: str = ""
    """File with the token that each request must bear."""
    replicas: int = 1
    """Copies of the network."""
    cpus: int = 0
    """CPUs that each copy reserves and computes with; 0 reserves none and computes with all."""
    gpus: float | None = None
    """Share of a GPU that each copy reserves, and the scoring of slides too; by default half of one where there are
    any."""
    max_mb: int = DEFAULT_MB
    """Largest body of a request, in megabytes."""
    max_pixels: int = 25
    """Largest image of a request, in megapixels."""
    hide_names: bool = False
    """Show slides by number, where the names of their files may name patients."""
    code: tuple[str, ...] = ()
    """Code outside LGD that the network may run, as python:package.module:name."""

    def __post_init__(self) -> None:
        require(bool(self.model), "name the student: --model DIR (its folder or its run's)")
        require(bool(self.slides or not self.out), "--out holds the results of slides: name their folder by --slides")
        require(0 <= self.port < 65536, f"--port is {self.port}: give one of 1 to 65535, or 0 for any that is free")
        require(self.replicas >= 1, f"--replicas is {self.replicas}: give at least 1")
        require(self.cpus >= 0, f"--cpus is {self.cpus}: give 0 for all, or how many")
        require(self.gpus is None or 0 <= self.gpus <= 1, f"--gpus is {self.gpus}: give a share, of 0 to 1")
        require(self.max_mb >= 1, f"--max-mb is {self.max_mb}: give at least 1")
        require(1 <= self.max_pixels <= 100, f"--max-pixels is {self.max_pixels}: give 1 to 100")

    @classmethod
    def read(cls, arguments: Mapping[str, object]) -> "ServeOptions":
        """The options in the arguments of an application; `ConfigError` for what is none."""
        try:
            return TypeAdapter(cls).validate_python(dict(arguments), extra="forbid")
        except ValidationError as error:
            lines = [f"args.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ConfigError("the arguments of the application lgd are wrong:", *lines) from error

    @property
    def is_private(self) -> bool:
        """Whether only this machine reaches the service."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def student(self) -> Location:
        """The student's folder."""
        return find_in_run(self.model, "student")

    @property
    def slides_folder(self) -> Path | None:
        """The folder of the slides; raises `DataError` where it is none."""
        if not self.slides:
            return None
        folder = require_local(self.slides, f"{self.slides}: slides are read from local folders only: fetch them first")
        if not folder.is_dir():
            raise DataError(f"--slides {self.slides} is no folder: name the one that holds the slides")
        return folder

    @property
    def results(self) -> Location:
        """The folder of the slides' results."""
        return as_output_location(self.out, "--out") if self.out else self.student.parent / "slides"

    def read_token(self, needed: bool) -> str:
        """The token, or nothing where there is none; raises where one is `needed`, and for one that is too short."""
        if not self.token_file:
            require(
                not needed,
                f"without a token everybody who reaches {self.host} could read the slides: make one by {_MAKE_TOKEN}; "
                "and give --token-file FILE",
            )
            return ""
        try:
            token = Path(self.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise DataError(f"{self.token_file} is no token file ({error}): make one by {_MAKE_TOKEN}") from error
        if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
            raise DataError(
                f"{self.token_file} holds no token of {_LEAST_TOKEN} or more letters and digits: make one by "
                f"{_MAKE_TOKEN}"
            )
        if os.name == "posix" and Path(self.token_file).stat().st_mode & 0o077:
            logger.warning("others on this machine can read %s: chmod 600 %s", self.token_file, self.token_file)
        return token
