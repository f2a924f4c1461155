"""A real Triton for the tests that ask for one, with the demo's models and the tests' own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.demo.tritonserver import MODELS, REPOSITORY, TritonServer


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that runs. A test that stops it starts it again."""
    subprocess.run([REPOSITORY / "deploy" / "services" / "triton", "install"], check=True)
    log = tmp_path_factory.mktemp("triton") / "log"
    with TritonServer(log, (MODELS, Path(__file__).parent / "models")) as server:
        yield server
