"""An S3 with archive classes for tests: moto's server, a process of its own on loopback.

Its own clock for restores starts when an object is stored, and takes a restore that is not even begun for one that has
ended; so here a restore takes until the test says that it is over.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.conftest import ROOT
from tests.services import S3Service, free_port

_THAWED = "thawed"


class Glacier(S3Service, frozen=True, kw_only=True):
    """Objects stored with a class such as GLACIER cannot be read until they were restored. Signatures go unchecked."""

    folder: Path

    async def archive(self, bucket: str, files: dict[str, bytes], storage_class: str = "GLACIER") -> None:
        """Store ``files`` in an archive."""
        async with self.client() as client:
            for key, data in files.items():
                await client.put_object(Bucket=bucket, Key=key, Body=data, StorageClass=storage_class)

    def thaw(self) -> None:
        """End all restores, those under way and those to come."""
        (self.folder / _THAWED).touch()

    @property
    def asked_for(self) -> int:
        """How many restores the server was asked for."""
        return (self.folder / "moto.log").read_text().count("?restore")


@contextlib.asynccontextmanager
async def glacier(folder: Path) -> AsyncIterator[Glacier]:
    """A server with nothing in it, until the block ends; ``folder`` is for what it notes."""
    port = free_port()
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.glacier", str(folder), str(port)], cwd=ROOT, stdout=log, stderr=log
        )
        try:
            running = Glacier(
                endpoint=f"http://127.0.0.1:{port}",
                access_key="test",
                secret_key="test",
                region="us-east-1",
                folder=folder,
            )
            async with aiohttp.ClientSession() as session:
                while True:
                    assert process.poll() is None, (folder / "moto.log").read_text()
                    with contextlib.suppress(aiohttp.ClientError):
                        async with session.get(f"{running.endpoint}/moto-api/data.json"):
                            break
                    await asyncio.sleep(0.05)  # another process, which tells this only when asked
            yield running
        finally:
            process.terminate()
            process.wait(60)


def origin(service: S3Service, bucket: str) -> dict[str, Any]:
    """A daemon's settings for one of its buckets."""
    return {
        "s3": {
            "bucket": bucket,
            "endpoint_url": service.endpoint,
            "access_key": service.access_key,
            "secret_key": service.secret_key,
        }
    }


def main(folder: Path, port: str) -> None:
    """moto's server; a restore ends once there is a file that says so."""
    from moto import server
    from moto.s3.models import FakeKey

    FakeKey.status = property(lambda key: "RESTORED" if (folder / _THAWED).exists() else "IN_PROGRESS")  # type: ignore[assignment,method-assign]  # what its state machine decides otherwise
    server.main(["-H", "127.0.0.1", "-p", port])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
