"""Clients' own shared memory: kept apart client by client, whatever they call it, and never a piece of ours.

A client is the process at the other end of a connection, if it runs where we can see it, or else its address. To
Triton each of its regions has a name that nobody could guess, so one client neither sees, uses nor takes away what is
another's, and a client that unregisters everything unregisters its own. A client that has ended leaves nothing.
"""

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec

from cache.errors import BadRequest, NotFound, Overloaded, TritonDown, TritonRefused

from .peers import Address, End, Process, far_end
from .triton import Server, Triton

Kind = Literal["system", "cuda"]

#: Regions that clients may have registered at a time, all together.
MAX_REGIONS: Final = 4096

_REMEMBERED: Final = 4096
_ARENAS = re.compile(r"voxcache-[0-9a-f]{32}")
_BACKENDS: Final = "triton_python_backend_shm"


class Client(msgspec.Struct, frozen=True):
    """Whoever is at the other end: ``name`` tells clients apart, ``process`` is it, if it was seen."""

    name: str
    process: Process | None = None


class Clients:
    """Which client a connection belongs to."""

    def __init__(self) -> None:
        self._ends: OrderedDict[Address, End] = OrderedDict()

    async def of(self, theirs: Address, our_port: int) -> Client:
        """The client whose connection comes from ``theirs``. Two connections of one process are one client."""
        end = self._ends.get(theirs)
        if end is None or not end.holds:  # the port may be another's by now
            found = await asyncio.to_thread(far_end, theirs, our_port)
            if found is None:
                return Client(theirs[0])
            end = self._ends[theirs] = found
            while len(self._ends) > _REMEMBERED:
                self._ends.popitem(last=False)
        if end.process is None:
            return Client(f"{theirs[0]} user {end.user}")
        return Client(f"process {end.process.pid}.{end.process.started}", end.process)


class _Region(msgspec.Struct, frozen=True):
    kind: Kind
    real: str
    key: str


class Regions:
    """The regions that clients have registered, with every Triton server."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton
        self._of: dict[Client, dict[str, _Region]] = {}

    def __len__(self) -> int:
        return sum(len(regions) for regions in self._of.values())

    def real(self, client: Client, name: object) -> str:
        """What Triton calls a client's region. Raises: NotFound for one that it has not registered."""
        region = self._of.get(client, {}).get(name) if isinstance(name, str) else None
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        return region.real

    def told(self, client: Client, text: str) -> str:
        """A message of Triton's in the client's own words."""
        for name, region in self._of.get(client, {}).items():
            text = text.replace(region.real, name)
        return text

    async def register(self, client: Client, kind: Kind, name: str, body: Mapping[str, Any]) -> None:
        """Register a region as Triton's API asks for it: ``body`` is the JSON of its request.

        Raises:
            BadRequest: the memory is the cache's, or Triton's own.
            Overloaded: too many regions.
            TritonDown, TritonRefused.
        """
        key = str(body.get("key", ""))
        if kind == "system":
            await self._check(key)
        await self._forget_the_dead()
        if len(self) >= MAX_REGIONS:
            raise Overloaded(f"clients have {MAX_REGIONS} shared-memory regions registered already: unregister some")
        mine = self._of.setdefault(client, {})
        # under a name that is taken it is for Triton to refuse it, or, after a restart, to take it again
        region = mine.get(name) or _Region(kind, f"client-{secrets.token_hex(16)}", key)
        try:
            await self._tell(client, _path(kind, region.real, "register"), msgspec.json.encode(body), name, region.real)
        except BaseException:
            if not mine:
                self._of.pop(client, None)
            raise
        self._of.setdefault(client, {})[name] = region

    async def unregister(self, client: Client, kind: Kind, name: str = "") -> None:
        """Take away one of the client's regions, or all of a kind. A name that it has not is no error, as with Triton.

        Raises: TritonDown, TritonRefused.
        """
        mine = self._of.get(client, {})
        for each in [each for each, region in mine.items() if region.kind == kind and name in ("", each)]:
            real = mine[each].real
            await self._tell(client, _path(kind, real, "unregister"), b"", each, real)
            mine.pop(each, None)
        if not mine:
            self._of.pop(client, None)

    async def status(self, client: Client, kind: Kind, name: str = "") -> list[dict[str, Any]]:
        """The client's regions as Triton has them. Raises: NotFound, TritonDown, TritonRefused."""
        names = {region.real: each for each, region in self._of.get(client, {}).items() if region.kind == kind}
        found: list[dict[str, Any]] = []
        if names:
            found = msgspec.json.decode(await self._triton.first().get(f"/v2/{kind}sharedmemory/status"))
        mine = [each | {"name": names[each["name"]]} for each in found if each["name"] in names]
        if not name:
            return mine
        mine = [each for each in mine if each["name"] == name]
        if not mine:
            raise NotFound(f"Unable to find {kind} shared memory region: '{name}'")
        return mine

    async def _tell(self, client: Client, path: str, body: bytes, name: str, real: str) -> None:
        """Have every server do it; those that are down know no region in any case."""
        self._triton.first()
        answers = await asyncio.gather(*(_told(server, path, body) for server in self._triton.servers))
        refusals = [answer for answer in answers if isinstance(answer, TritonRefused)]
        if refusals:
            raise TritonRefused(str(refusals[0]).replace(real, name), refusals[0].status)
        down = [answer for answer in answers if answer is not None]
        if len(down) == len(answers):
            raise down[0]

    async def _check(self, key: str) -> None:
        """Refuse memory that is not a client's to offer: with its name it could be read, or written as an output."""
        plain = key.lstrip("/")
        if self._triton.is_arena(key=key) or _ARENAS.fullmatch(plain):
            raise BadRequest("the cache's memory belongs to the cache: name a reference instead")
        theirs = {region.key.lstrip("/") for regions in self._of.values() for region in regions.values()}
        inside = plain.startswith(_BACKENDS)
        if not inside and plain not in theirs:
            path = f"/dev/shm/{plain}"
            seen = await asyncio.gather(*(asyncio.to_thread(server.maps, path) for server in self._triton.servers))
            inside = any(seen)
        if inside:
            raise BadRequest("this memory is Triton's own: no client may have it read or written")

    async def _forget_the_dead(self) -> None:
        for client in [each for each in self._of if each.process is not None and not each.process.lives]:
            for kind in ("system", "cuda"):
                try:
                    await self.unregister(client, kind)
                except TritonRefused:  # in use by a call that goes on: at another time
                    continue
                except TritonDown:  # then it knows nothing of them either
                    self._of.pop(client, None)


async def _told(server: Server, path: str, body: bytes) -> TritonDown | TritonRefused | None:
    try:
        answer = await server.request("POST", path, body=body)
        if answer.status != 200:
            return TritonRefused(await answer.message(), answer.status)
        answer.close()
    except TritonDown as down:
        return down
    return None


def _path(kind: Kind, real: str, verb: str) -> str:
    return f"/v2/{kind}sharedmemory/region/{quote(real, safe='')}/{verb}"
