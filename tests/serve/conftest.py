"""The service of a small network, for a module."""

import pytest

from tests.support.serving import SCRIPT, start_service
from tests.support.shades import write_ramp


@pytest.fixture(scope="module")
def service(tissue_run, tmp_path_factory):
    """The service in a process of its own, of two slides, and of a file that is none."""
    folder = tmp_path_factory.mktemp("served")
    slides = folder / "slides"
    slides.mkdir()
    write_ramp(slides / "ramp.tif", mpp=0.46)
    write_ramp(slides / f"{SCRIPT}.tif", mpp=0.46, height=500, width=600)
    (slides / "broken.svs").write_bytes(b"II*\0" + bytes(100))
    with start_service(folder, model=tissue_run.student.dir, store=tissue_run.latents.dir, slides=slides) as service:
        yield service


@pytest.fixture(scope="module")
def ramp(service):
    """The id of a slide that is scored."""
    return service.score("ramp")
