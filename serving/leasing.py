"""Leases as callers are told of them, whether they ask by HTTP or by the hand-off socket."""

import functools
import time
from typing import Annotated

import msgspec

from cache.entry import Affine, Spacing
from cache.errors import TooLarge, VoxcacheError
from cache.keys import SeriesRef, TensorRef, check_name
from cache.lease import Lease, Leases
from cache.stopwatch import current
from cache.store import Bypassed, Filled, Hit, Store

from .audit import SILENT, Agent, Auditor, failing
from .audit.record import LEASE


class LeaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/leases``. ``ttl_s``: seconds the lease is wanted for."""

    study: str
    series: str
    recipe: str
    ttl_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    namespace: str = "serving"

    @property
    def want(self) -> TensorRef:
        """What is to be leased. Raises: MalformedUid, MalformedReference."""
        return _want(self.study, self.series, self.recipe, self.namespace)


@functools.lru_cache(
    maxsize=4096
)  # what is asked for is asked for again: to check it takes longer than to find it here
def _want(study: str, series: str, recipe: str, namespace: str) -> TensorRef:
    return TensorRef(SeriesRef.parse(study, series), check_name(recipe, "recipe"), namespace)


class RenewRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/leases/{lease}/renew``."""

    ttl_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class LeaseAnswer(msgspec.Struct, frozen=True):
    """Where the tensor lies: ``nbytes`` from ``offset`` of ``/dev/shm/{shm}``, until ``expires`` (Unix seconds).

    ``socket``: path of the hand-off socket, where further leases cost less; "" for none. What differs from lease to
    lease comes first: a client may keep what it made of the rest.
    """

    lease: str
    expires: float
    tier: str
    shm: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    axes: str
    spacing: Spacing | None
    affine: Affine | None
    units: str
    socket: str


class Lessor:
    """Grants, renews and ends leases on what the store has. ``among``: see ``Leases.grant``; ``who`` asks."""

    def __init__(self, store: Store, leases: Leases, *, shm: str, socket: str, audit: Auditor = SILENT) -> None:
        self.audit = audit
        self._store = store
        self._leases = leases
        self._shm = shm
        self._socket = socket

    def grant_at_once(self, asked: LeaseRequest, among: set[str], who: Agent, times: list[float]) -> LeaseAnswer | None:
        """The lease if that takes no waiting; ``times`` gets when it was found, and leased.

        Raises: BadRequest, Overloaded.
        """
        want = asked.want
        try:  # as `failing` does, in less time: nothing is asked more often
            hit = self._store.hit(want)
            if hit is None:
                return None
            times.append(time.perf_counter())
            granted = self._granted(hit, asked.ttl_s, among, who)
        except VoxcacheError as error:
            self.audit.note(LEASE, who, want, error.code)
            raise
        times.append(time.perf_counter())
        return granted

    async def grant(self, asked: LeaseRequest, who: Agent, among: set[str] | None = None) -> LeaseAnswer:
        """The lease. Raises: TooLarge for what bypasses RAM, and all the walk does."""
        want = asked.want
        with failing(self.audit, LEASE, who, want):
            outcome = await self._store.get(want)
            if isinstance(outcome, Bypassed):
                outcome.release()
                raise TooLarge(f"it cannot be leased: {outcome.reason}; GET its bytes instead")
            granted = self._granted(outcome, asked.ttl_s, among, who)
        current().hand("lease")
        return granted

    def renew(self, lease: str, ttl_s: float | None) -> LeaseAnswer:
        """Put its end off. Raises: LeaseExpired, UnknownLease."""
        return self._answer(self._leases.renew(lease, ttl_s), "ram")

    def release(self, lease: str) -> None:
        """End it. Raises: LeaseExpired, UnknownLease."""
        self._leases.release(lease)

    def _granted(self, outcome: Hit | Filled, ttl_s: float | None, among: set[str] | None, who: Agent) -> LeaseAnswer:
        try:
            lease = self._leases.grant(outcome.pin, ttl_s, among)
        except BaseException:
            outcome.release()
            raise
        self.audit.note(LEASE, who, outcome.entry)
        return self._answer(lease, outcome.tier)

    def _answer(self, lease: Lease, tier: str) -> LeaseAnswer:
        entry = lease.pin.entry
        spec = entry.spec
        assert spec is not None  # only packs have none, and nobody is handed a pack
        return LeaseAnswer(
            lease=lease.id,
            expires=lease.expires,
            tier=tier,
            shm=self._shm,
            offset=lease.pin.extent.offset,
            nbytes=entry.nbytes,
            dtype=spec.dtype,
            shape=spec.shape,
            axes=spec.axes,
            spacing=spec.spacing,
            affine=spec.affine,
            units=spec.units,
            socket=self._socket,
        )
