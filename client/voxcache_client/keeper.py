"""One background thread that renews a client's leases in time and gives them back when they are no longer needed.

Arrays may be collected at any moment, in any thread. What happens there is one send that does not wait; where that
cannot be, the thread is told through a queue, whose put is safe anywhere.
"""

import atexit
import math
import os
import threading
import time
from queue import Empty, SimpleQueue
from typing import Final, Literal

from .arena import Arena
from .errors import NotFound, VoxcacheError
from .handoff import Handoff, Link

#: Seconds without a lease after which the arena is unmapped: a mapping keeps the memory of a dead daemon in use.
_IDLE_S: Final = 20.0
#: Seconds that giving back leases may hold up the interpreter's exit. What is left expires by itself.
_EXIT_S: Final = 2.0


class Lease:
    """A granted lease: the bytes do not change until ``deadline`` (monotonic seconds), as long as ``link`` lasts."""

    def __init__(self, name: str, ttl_s: float, asked: float, link: Link | None) -> None:
        self.name = name
        self.ttl_s = ttl_s
        self.link = link
        self.extend(asked)

    @property
    def lost(self) -> bool:
        """Whether the connection is over that it was granted on."""
        return self.link is not None and not self.link.alive

    @property
    def valid(self) -> bool:
        return time.monotonic() < self.deadline and not self.lost

    def extend(self, asked: float) -> None:
        """Granted anew to a request sent at ``asked``; the daemon's own count starts later, so this one is safe."""
        self.deadline = asked + self.ttl_s
        self.due = asked + self.ttl_s / 2

    def postpone(self, now: float) -> None:
        """Try again when half of what is left has passed."""
        self.due = now + (self.deadline - now) / 2

    def end(self) -> None:
        self.deadline = 0.0


_Message = tuple[Literal["release"], Lease] | tuple[Literal["look", "drain"], None]


class Keeper:
    """Holds leases until they are dropped. It belongs to the process that made it: a fork's child leaves it alone."""

    def __init__(self, handoff: Handoff) -> None:
        self._handoff = handoff
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._held: dict[str, Lease] = {}
        self._retired = False
        self._lock = threading.Lock()  # of what follows; never taken where an array may be collected
        self._arena: Arena | None = None
        self._used_at = 0.0
        self._looks_at = 0.0  # when the thread, if it sleeps, will look without being told to
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def hold(self, lease: Lease, arena: Arena) -> None:
        """Renew ``lease`` from now on, and keep its arena mapped for the leases to come."""
        with self._lock:
            self._held[lease.name] = lease
            self._arena = arena
            self._used_at = time.monotonic()
            late = lease.due < self._looks_at
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="voxcache-leases", daemon=True)
                self._thread.start()
                atexit.register(self._drain)
        if late:  # not every time: to wake a thread takes as long as to grant a lease
            self._inbox.put(("look", None))

    def drop(self, lease: Lease) -> None:
        """Give ``lease`` back. Returns at once; harmless when repeated, and in a fork's child."""
        # an array may be collected at any moment, in any thread: nothing here waits or takes a lock
        if self._pid != os.getpid() or lease.name not in self._held:
            return
        if not self._handoff.release_at_once(lease.name):
            self._inbox.put(("release", lease))
        self._held.pop(lease.name, None)
        if self._retired and not self._held:
            self._inbox.put(("look", None))

    def retire(self) -> None:
        """The client is gone: end with the last lease."""
        if self._pid == os.getpid():
            self._retired = True
            self._inbox.put(("look", None))

    def _drain(self) -> None:
        thread = self._thread
        if self._pid == os.getpid() and thread is not None:
            self._inbox.put(("drain", None))
            thread.join(_EXIT_S)

    def _run(self) -> None:
        while not (self._retired and not self._held and self._inbox.empty()):
            try:
                word, lease = self._inbox.get(timeout=self._patience())
            except Empty:
                self._unmap_idle()
            else:
                if word == "drain":
                    self._give_back_all()
                    return
                if lease is not None:
                    self._give_back(lease, self._handoff.timeout_s)
                del lease  # it may be the last to hold on to its connection
            self._renew_due()
        atexit.unregister(self._drain)

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked; None: never."""
        with self._lock:
            idle_at = math.inf if self._arena is None else self._used_at + _IDLE_S
            self._looks_at = min((lease.due for lease in list(self._held.values())), default=idle_at)
            return None if self._looks_at == math.inf else max(0.0, self._looks_at - time.monotonic())

    def _unmap_idle(self) -> None:
        with self._lock:
            if not self._held and time.monotonic() >= self._used_at + _IDLE_S:
                self._arena = None

    def _renew_due(self) -> None:
        now = time.monotonic()
        for lease in list(self._held.values()):
            if lease.due <= now:
                self._renew(lease)

    def _renew(self, lease: Lease) -> None:
        asked = time.monotonic()
        timeout = max(0.1, min(self._handoff.timeout_s, lease.ttl_s / 4))
        try:
            if lease.lost:
                self._end(lease)
            else:
                self._handoff.renew(lease.name, lease.ttl_s, timeout)
                lease.extend(asked)
        except NotFound:
            self._end(lease)
        except VoxcacheError:
            lease.postpone(time.monotonic())
            if lease.deadline - time.monotonic() < 0.1:
                self._end(lease)

    def _end(self, lease: Lease) -> None:
        """It is over: the daemon says so, or its time has passed without a word from the daemon."""
        lease.end()
        self._held.pop(lease.name, None)

    def _give_back(self, lease: Lease, timeout_s: float) -> bool:
        """Whether the daemon could be told. If not, the lease ends by itself at its time."""
        try:
            self._handoff.release(lease.name, timeout_s)
        except NotFound:
            return True
        except VoxcacheError:
            return False
        return True

    def _give_back_all(self) -> None:
        end = time.monotonic() + _EXIT_S
        for lease in list(self._held.values()):
            left = end - time.monotonic()
            if left <= 0 or not self._give_back(lease, left):
                return
