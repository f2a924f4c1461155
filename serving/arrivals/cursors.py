"""How far origins that are asked have been asked: one small file, whole after any crash."""

import asyncio
from pathlib import Path

import msgspec

from cache.errors import ConfigError, QueueDown
from serving import durable


class Cursors:
    """A text for each of a few names. What is set is on disk when ``set`` returns."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError: there is a file that cannot be read, or holds something else."""
        self._path = path
        self._held: dict[str, str] = {}
        try:
            self._held = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"cannot read {path}, which holds how far origins were asked: {error}") from error

    def get(self, name: str) -> str:
        """What was set last; "" if nothing was."""
        return self._held.get(name, "")

    async def set(self, name: str, cursor: str) -> None:
        """Raises: QueueDown: it cannot be written, and is as it was."""
        held = self._held | {name: cursor}
        try:
            await asyncio.to_thread(durable.write, self._path, msgspec.json.encode(held))
        except OSError as error:
            raise QueueDown(f"cannot note how far {name} was asked in {self._path}: {error.strerror}") from error
        self._held = self._held | {name: cursor}
