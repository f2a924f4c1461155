"""The walk of one request: a lease if the daemon's memory can be seen from here, the bytes over HTTP if not."""

import asyncio
import contextlib
import json
import os
import time
import weakref
from functools import partial
from urllib.parse import quote

from .arena import open_arena
from .errors import VoxcacheError
from .handoff import Handoff, Wanted
from .keeper import Keeper, Lease
from .spec import Spec
from .tensor import Tensor
from .transport import Transport

DEFAULT_URL = "http://127.0.0.1:8600"


class Client:
    """A voxcache daemon. One client serves all threads, and the children of a fork.

    ``timeout_s`` bounds each wait for the daemon, also the one for a tensor that has to be made first. ``socket``:
    whether to lease over the daemon's Unix socket where there is one, past whatever stands in front of ``url``.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, token: str | None = None, timeout_s: float = 30.0, socket: bool = True
    ) -> None:
        self._socket = socket
        self._transport = Transport(url, token, timeout_s)
        self._handoff = Handoff(self._transport)
        self._keepers: dict[int, Keeper] = {}
        self._same_node = True
        self._retire = weakref.finalize(self, _retire, self._keepers)
        self._retire.atexit = False

    def tensor(
        self, study: str, series: str, recipe: str, *, namespace: str = "serving", ttl_s: float = 60.0
    ) -> Tensor:
        """The series, prepared by the recipe.

        ``ttl_s``: seconds the lease outlives this process, should it die; while it lives, the lease is renewed.

        Raises:
            VoxcacheError: the daemon refused, failed, or did not answer.
            ValueError: the client is closed.
        """
        if not self._retire.alive:
            raise ValueError("the client is closed")
        if self._same_node:
            leased = self._leased(study, series, recipe, namespace, ttl_s)
            if leased is not None:
                return leased
        return self._copied(study, series, recipe, namespace)

    def close(self) -> None:
        """Close the connections. Arrays that are still in use keep their leases until their last view is gone."""
        self._retire()
        self._handoff.close()
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leased(self, study: str, series: str, recipe: str, namespace: str, ttl_s: float) -> Tensor | None:
        wanted = Wanted(study, series, recipe, namespace, ttl_s)
        asked = time.monotonic()
        try:
            grant = self._handoff.grant(wanted)
        except VoxcacheError as error:
            if error.status in (409, 507):  # it does not go through the arena: no room for it there
                return None
            raise
        place = grant.place
        spec = place.spec
        arena = open_arena(place.shm)
        if arena is None or place.offset + spec.nbytes > arena.nbytes:
            self._same_node = False  # and it will stay so: from now on, ask for the bytes at once
            with contextlib.suppress(VoxcacheError):  # then it ends by itself, at its time
                self._handoff.release(grant.lease, self._handoff.timeout_s)
            return None
        if grant.link is None and self._socket:
            self._handoff.use(place.socket)
        # the daemon may grant less time than asked for; on one node there is one clock
        lease = Lease(grant.lease, min(ttl_s, max(0.0, grant.expires - time.time())), asked, grant.link)
        keeper = self._keeper()
        keeper.hold(lease, arena)
        drop = partial(keeper.drop, lease)
        array = arena.array(place.offset, spec.dtype, spec.shape, drop)
        return Tensor(array, spec, grant.tier, lease, drop)

    def _copied(self, study: str, series: str, recipe: str, namespace: str) -> Tensor:
        study, series, recipe, namespace = (quote(part, safe="") for part in (study, series, recipe, namespace))
        path = f"/v1/studies/{study}/series/{series}/tensors/{recipe}?namespace={namespace}"
        headers, body = self._transport.fetch(path, lambda headers: _spec(headers).nbytes)
        spec = _spec(headers)
        body.flags.writeable = False
        array = body.view(spec.dtype).reshape(spec.shape)
        return Tensor(array, spec, headers.get("voxcache-tier", ""), None, _nothing)

    def _keeper(self) -> Keeper:
        pid = os.getpid()
        return self._keepers.get(pid) or self._keepers.setdefault(pid, Keeper(self._handoff))


def _spec(headers: dict[str, str]) -> Spec:
    return Spec(json.loads(headers["voxcache-spec"]))


def _retire(keepers: dict[int, Keeper]) -> None:
    for keeper in keepers.values():
        keeper.retire()


def _nothing() -> None:
    """A copy of one's own has nothing to give back."""


class AsyncClient:
    """The same for asyncio: requests run in threads, so the event loop never waits for one."""

    def __init__(
        self, url: str = DEFAULT_URL, *, token: str | None = None, timeout_s: float = 30.0, socket: bool = True
    ) -> None:
        self._client = Client(url, token=token, timeout_s=timeout_s, socket=socket)

    async def tensor(
        self, study: str, series: str, recipe: str, *, namespace: str = "serving", ttl_s: float = 60.0
    ) -> Tensor:
        """As :meth:`Client.tensor`. If the caller is cancelled meanwhile, the lease is given back."""
        ask = partial(self._client.tensor, study, series, recipe, namespace=namespace, ttl_s=ttl_s)
        return await asyncio.to_thread(ask)

    async def close(self) -> None:
        """As :meth:`Client.close`."""
        self._client.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
