"""An S3 server on loopback, for the tests that go over the wire."""

import os
import urllib.request

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="module")
def s3_server():
    """A client of an S3 server of the module's own, which the environment names to everybody."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # s3fs keeps the address and the keys of its first use.
        s3fs.S3FileSystem.clear_instance_cache()
        yield boto3.client("s3")
    s3fs.S3FileSystem.clear_instance_cache()
    # All servers of a process share what they hold.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", b"").close()
    server.stop()
