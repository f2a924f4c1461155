"""Who is at the other end of a connection on this machine: which process, and when it has ended (Linux, proc(5))."""

import asyncio
import contextlib
import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

Address = tuple[str, int]

_TABLES: Final = {4: Path("/proc/net/tcp"), 6: Path("/proc/net/tcp6")}
_LISTENS: Final = "0A"


class Process(msgspec.Struct, frozen=True):
    """One run of a program: process ids are used again, one with its start (clock ticks after boot) is not."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process with this id; None if it has ended."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # the second field is the program's name in parentheses, which may hold anything
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def lives(self) -> bool:
        return Process.of(self.pid) == self

    async def ended(self) -> None:
        """Return when it has ended: nothing that it had mapped is read or written by it any more."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        try:
            if self.lives:  # whoever has the id now, it is held by ``fd``
                loop.add_reader(fd, over.set)
                await over.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def maps(self, path: str) -> bool | None:
        """Whether it has the file mapped; None if we may not know."""
        try:
            lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        except OSError:
            return None
        return any(line.endswith(f" {path}") for line in lines)


class End(msgspec.Struct, frozen=True):
    """The other end of a connection: its socket (inode), that socket's user, and the process that holds it, if seen."""

    inode: int
    user: int
    process: Process | None = None
    descriptor: int = -1

    @property
    def holds(self) -> bool:
        """Whether that process still holds that socket."""
        if self.process is None:
            return False
        try:
            held = Path(f"/proc/{self.process.pid}/fd/{self.descriptor}").readlink()
            return str(held) == f"socket:[{self.inode}]"
        except OSError:
            return False


def listener(address: Address) -> Process | None:
    """The process that listens at an address of this machine; None if there is none, or none that we may see."""
    port = f"{address[1]:04X}"
    for rows in map(_rows, _TABLES.values()):
        for fields in rows:
            if fields[3] == _LISTENS and fields[1].endswith(f":{port}") and _covers(fields[1], address[0]):
                return _holder(int(fields[9]), int(fields[7])).process
    return None


def far_end(theirs: Address, our_port: int) -> End | None:
    """The other end of a connection from ``theirs`` to a port of ours; None if it comes from another machine."""
    port = f":{our_port:04X}"
    for version, table in _TABLES.items():
        try:
            wanted = _written(theirs, version)
        except ValueError:
            continue
        for fields in _rows(table):
            if fields[1] == wanted and fields[2].endswith(port):
                return _holder(int(fields[9]), int(fields[7]))
    return None


def _rows(table: Path) -> Iterator[list[str]]:
    with contextlib.suppress(OSError), table.open() as file:
        next(file, None)
        for line in file:
            yield line.split()


def _covers(local: str, host: str) -> bool:
    address = local.partition(":")[0]
    if set(address) == {"0"}:
        return True
    try:
        version = 4 if len(address) == 8 else 6
        return _written((host, 0), version).partition(":")[0] == address
    except ValueError:
        return False


def _written(address: Address, version: int) -> str:
    """An address as the kernel's tables have it: each 32 bits in the machine's order."""
    ip = ipaddress.ip_address(address[0])
    if ip.version == 4 and version == 6:
        ip = ipaddress.ip_address(b"\0" * 10 + b"\xff\xff" + ip.packed)
    if ip.version != version:
        raise ValueError
    words = struct.unpack(f"={len(ip.packed) // 4}I", ip.packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def _holder(inode: int, user: int) -> End:
    wanted = f"socket:[{inode}]"
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            for descriptor in os.scandir(folder / "fd"):
                if os.readlink(descriptor.path) == wanted:  # noqa: PTH115 - a Path for each takes twice as long
                    return End(inode, user, Process.of(int(folder.name)), int(descriptor.name))
        except OSError:  # another user's, or gone already
            continue
    return End(inode, user)
