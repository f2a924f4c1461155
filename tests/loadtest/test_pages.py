"""The floor of objects over HTTP sends what the peers send."""

from pathlib import Path

import aiohttp
from aiohttp.test_utils import TestServer

from loadtest.pages import application


async def test_files_come_as_they_are(tmp_path: Path) -> None:
    contents = {"small": b"few", "empty": b"", "large": bytes(range(256)) * 4000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    async with TestServer(application(tmp_path)) as server, aiohttp.ClientSession() as session:
        for name, content in contents.items():
            async with session.get(server.make_url(f"/{name}")) as answer:
                assert await answer.read() == content
