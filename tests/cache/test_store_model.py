"""The store against a dict: whatever is asked, leased, changed, broken or killed, its bytes are those of the series."""

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from cache.errors import (
    AllPinned,
    CorruptEntry,
    DiskFailing,
    LeaseExpired,
    ModelChanged,
    NotFound,
    OriginError,
    TooLarge,
    VoxcacheError,
)
from cache.keys import SeriesRef, TensorRef
from cache.lease import Lease, Leases, LeaseSettings
from cache.nvme import State
from cache.nvme.disk import allocated_below
from cache.nvme.faults import DiskFaultPlan
from cache.origin.faults import FaultPlan
from cache.store import Bypassed, Outcome, StoreSettings
from tests.cache.walk import EMBEDDINGS, KIB, MIB, Walk, content, made, said, until, walking
from tests.conformance.tier import FakeClock

T = TypeVar("T")

RAM = 512 * KIB
NVME = 5 * MIB
GRACE_S = 5.0
#: Longer than any deadline, shorter than any lease.
LATE_S = 0.05
REFS = [SeriesRef(f"1.2.{number % 2}", f"1.2.{number}.1") for number in range(4)]
Objects = tuple[bytes, ...]

refs = st.sampled_from(REFS)
recipes = st.sampled_from(["plain", "turned", "word_of_plain", "word_of_turned"])
#: Some fit RAM many times, some once, some never.
sources = st.builds(
    lambda seed, count, nbytes: tuple(bytes([seed, number]) * nbytes for number in range(count)),
    st.integers(0, 255),
    st.integers(1, 4),
    st.sampled_from([1, 3 * KIB, 20 * KIB, 60 * KIB]),
)
plans = st.builds(
    FaultPlan,
    down=st.sampled_from([0, 0.2, 1]),
    changed=st.sampled_from([0, 0.2]),
    truncated=st.sampled_from([0, 0.3]),
    methods=st.sampled_from([("list", "fetch"), ("fetch",)]),
)
disk_plans = st.one_of(
    st.builds(
        DiskFaultPlan,
        error=st.sampled_from([0, 0.1, 1]),
        full=st.sampled_from([0, 0.3]),
        short=st.sampled_from([0, 0.1]),
        flipped=st.sampled_from([0, 0.2]),
        methods=st.sampled_from([("read",), ("write", "allocate", "sync"), ("read", "write", "allocate", "sync")]),
    ),
    st.builds(DiskFaultPlan, hang=st.sampled_from([0.1, 0.5, 1]), methods=st.just(("read",))),
)


class StoreMachine(RuleBasedStateMachine):
    """``source`` is what the origin has of each series; ``known`` what the store may have heard since it was told.

    What threads do first differs from run to run, so no rule's choices depend on what another one came to.
    """

    revalidate: ClassVar[Literal["request", "events"]]
    held = Bundle("held")
    leased = Bundle("leased")
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.source: dict[SeriesRef, Objects] = {}
        self.known: dict[SeriesRef, set[Objects]] = {}
        self.holding: dict[int, tuple[Outcome, bytes]] = {}
        self.leases = Leases(LeaseSettings(grace_s=GRACE_S), self.clock)
        self.leasing: dict[int, tuple[Lease, bytes, float]] = {}  # with its deadline on the monotonic clock
        self.tokens = itertools.count()
        self.sound = True  # nothing makes the origin fail
        self.late = False  # some reads may hang, be it by a plan that was replaced since
        self.robbed = False  # files vanished that were being written, which counts against the disk
        self.getting = 0  # requests whose answer is still to come
        self.last = b""
        self.walk: Walk
        self.parts: AsyncExitStack

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(self.patiently(work))

    async def patiently(self, work: Coroutine[Any, Any, T]) -> T:
        """``work``'s result, time going on while the disk may hang. A request never waits for a disk that does; what
        has to, as reading what is only there, gets it back after a while."""
        task = asyncio.create_task(work)
        for turn in itertools.count():
            await asyncio.wait([task], timeout=0.001 if self.late else None)
            if task.done():
                return task.result()
            self.clock.advance(LATE_S)
            if turn % 10 == 9 and not self.getting:
                self.walk.disk.resume()
        raise AssertionError

    @initialize()
    def start(self) -> None:
        self.parts = AsyncExitStack()
        opened = walking(
            Path(self.folder.name),
            ram=RAM,
            nvme=NVME,
            settings=StoreSettings(revalidate=self.revalidate),
            clock=self.clock,
        )
        self.walk = self.loop.run_until_complete(self.parts.enter_async_context(opened))
        self.sound, self.late, self.robbed = True, False, False

    # ------------------------------------------------------------------ the world

    @rule(ref=refs, objects=sources, announced=st.booleans())
    def change(self, ref: SeriesRef, objects: Objects, announced: bool) -> None:
        self.walk.archive.write(ref, objects)
        self.source[ref] = objects
        if announced:
            self.walk.store.changed(ref)
            self.known.pop(ref, None)

    @rule(ref=refs)
    def delete(self, ref: SeriesRef) -> None:
        self.walk.archive.write(ref, ())
        self.source.pop(ref, None)

    @rule(plan=plans)
    def fail(self, plan: FaultPlan) -> None:
        self.walk.origin.plan = plan
        self.sound = False

    @rule(plan=disk_plans)
    def fail_disk(self, plan: DiskFaultPlan) -> None:
        self.walk.disk.plan = plan
        self.sound = False
        self.late = self.late or plan.hang > 0

    @rule()
    def heal(self) -> None:
        async def healthy() -> None:
            await self.walk.settled()
            await until(lambda: all(state <= State.SLOW for state in self.walk.nvme.health.values()))

        self.walk.heal()
        self.sound, self.late = True, False  # time stands still again: no probe is late, however slow the machine
        self.run(healthy())
        self.robbed = False

    @rule(number=st.integers(0, 100), at=st.floats(0, 1))
    def corrupt(self, number: int, at: float) -> None:
        self.run(self.walk.settled())
        files = self.walk.files()
        if files:
            path = files[number % len(files)]
            with path.open("r+b") as file:
                size = path.stat().st_size
                file.seek(int(at * (size - 1)))
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 0x41]))

    @rule()
    def replace_model(self) -> None:
        """Another model answers from now on; who it was is known until it is asked again."""
        before = self.walk.oracle.model
        self.walk.oracle.model = msgspec.structs.replace(before, version=str(int(before.version) + 1))

    @rule()
    def delete_temporaries(self) -> None:
        for path in self.walk.in_the_making():
            path.unlink(missing_ok=True)
            self.robbed = True

    @rule()
    def restart(self) -> None:
        self.end()
        self.start()

    @rule(asked=st.lists(st.tuples(refs, recipes), max_size=4), steps=st.integers(0, 40))
    def crash(self, asked: list[tuple[SeriesRef, str]], steps: int) -> None:
        """The process dies in the midst of these requests; another starts on what it left on the disk."""
        nvme = Path(self.folder.name) / "nvme"
        left = nvme.with_name("left")

        async def dies() -> None:
            asking = [asyncio.create_task(self.walk.store.get(TensorRef(*what))) for what in asked]
            for _ in range(steps):
                await asyncio.sleep(0)
            _copy(nvme, left)
            for task in asking:
                task.cancel()
            for outcome in await asyncio.gather(*asking, return_exceptions=True):
                if not isinstance(outcome, BaseException):
                    outcome.release()

        self.run(dies())
        for ref, _ in asked:
            self.heard(ref)
        self.end()
        shutil.rmtree(nvme)
        left.rename(nvme)
        self.start()
        self.fsck()

    @rule()
    def fsck(self) -> None:
        """Nothing but what has decayed is wrong, and that is put right."""
        if self.sound:
            self.run(self.walk.settled())
            assert self.run(self.walk.nvme.check(repair=True)).well
            report = self.run(self.walk.nvme.check())
            assert report.problems == ()
            assert report.on_disk <= report.ledger <= NVME

    # ------------------------------------------------------------------ asking

    @rule(ref=refs, recipe=recipes, settle=st.booleans())
    def get(self, ref: SeriesRef, recipe: str, settle: bool) -> None:
        if settle:
            self.run(self.walk.settled())
        outcome = self.run(self.ask(ref, recipe, must=settle and self.sound and not self.holding and not self.leasing))
        if outcome is not None:
            outcome.release()

    @rule(asked=st.lists(st.tuples(refs, recipes), min_size=2, max_size=6))
    def get_together(self, asked: list[tuple[SeriesRef, str]]) -> None:
        async def all_of_them() -> None:
            for outcome in await asyncio.gather(*(self.ask(ref, recipe) for ref, recipe in asked)):
                if outcome is not None:
                    outcome.release()

        self.run(all_of_them())

    @rule(target=held, ref=refs, recipe=recipes)
    def hold(self, ref: SeriesRef, recipe: str) -> int:
        token = next(self.tokens)
        outcome = self.run(self.ask(ref, recipe))
        if outcome is not None:
            self.holding[token] = (outcome, self.last)
        return token

    @rule(token=consumes(held))
    def release(self, token: int) -> None:
        if token in self.holding:
            outcome, _ = self.holding.pop(token)
            outcome.release()

    @rule(target=leased, ref=refs, recipe=recipes, ttl_s=st.sampled_from([1, 60, 3600]))
    def lease(self, ref: SeriesRef, recipe: str, ttl_s: float) -> int:
        token = next(self.tokens)
        outcome = self.run(self.ask(ref, recipe))
        if isinstance(outcome, Bypassed):
            outcome.release()
        elif outcome is not None:
            granted = self.leases.grant(outcome.pin, ttl_s)
            self.leasing[token] = (granted, self.last, self.clock.monotonic() + ttl_s)
        return token

    @rule(token=leased, ttl_s=st.sampled_from([1, 60]))
    def renew(self, token: int, ttl_s: float) -> None:
        if token not in self.leasing:
            return
        lease, expected, deadline = self.leasing[token]
        try:
            lease = self.leases.renew(lease.id, ttl_s)
        except LeaseExpired:
            assert deadline <= self.clock.monotonic()
        else:
            assert deadline > self.clock.monotonic()
            self.leasing[token] = (lease, expected, self.clock.monotonic() + ttl_s)

    @rule(token=consumes(leased))
    def give_back(self, token: int) -> None:
        if token in self.leasing:
            lease, _, _ = self.leasing.pop(token)
            self.leases.release(lease.id)

    @rule(seconds=st.sampled_from([0.5, 30, 3700]))
    def time_goes_by(self, seconds: float) -> None:
        self.run(self.walk.settled())  # or what is being written would be late
        self.clock.advance(seconds)

    @rule(ref=refs, steps=st.integers(0, 5))
    def leave(self, ref: SeriesRef, steps: int) -> None:
        """A caller asks and is soon gone."""

        async def asks_and_goes() -> None:
            asking = asyncio.create_task(self.walk.get(ref))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        self.run(asks_and_goes())
        self.run(self.walk.settled())
        self.heard(ref)

    @rule(ref=refs)
    def evict(self, ref: SeriesRef) -> None:
        self.walk.store.evict(ref.study, ref.series)

    async def ask(self, ref: SeriesRef, recipe: str, *, must: bool = False) -> Outcome | None:
        """Get a tensor, check it against the model; None for an error that may be. ``must``: none may be."""
        present = self.source.get(ref)
        possible = {present} | (self.known.get(ref, set()) if self.revalidate == "events" else set())
        self.getting += 1
        try:
            outcome = await self.walk.store.get(TensorRef(ref, recipe))
        except NotFound:
            assert None in possible or not self.sound
            self.known.pop(ref, None)
            return None
        except VoxcacheError as error:
            own = isinstance(error, TooLarge | ModelChanged) and recipe in EMBEDDINGS
            assert own or not must, error
            outside = isinstance(error, OriginError | DiskFailing) and not self.sound
            left_alone = isinstance(error, DiskFailing) and self.robbed
            assert own or outside or left_alone or isinstance(error, AllPinned)
            self.heard(ref)
            return None
        finally:
            self.getting -= 1
        try:
            data = await content(outcome)
        except CorruptEntry:  # what is too large for RAM is verified while it is read
            outcome.release()
            self.heard(ref)
            return None
        matching = {o for o in possible if o is not None and self.answer(recipe, o, outcome) == data}
        assert matching
        self.known[ref] = matching
        self.last = data
        return outcome

    def answer(self, recipe: str, objects: Objects, outcome: Outcome) -> bytes:
        """What the outcome should be, by the model that it is named after."""
        model = outcome.entry.lineage.model
        tensor = made(recipe.removeprefix("word_of_"), objects)
        return tensor if model is None else said(model, tensor)

    def heard(self, ref: SeriesRef) -> None:
        """The store may have listed the series as it is now, or not."""
        if ref in self.source:
            self.known.setdefault(ref, set()).add(self.source[ref])

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def held_bytes_do_not_change(self) -> None:
        for outcome, expected in self.holding.values():
            try:
                assert self.run(content(outcome)) == expected
            except CorruptEntry:
                assert outcome.tier == "bypass"

    @invariant()
    def leased_bytes_do_not_change(self) -> None:
        """A lease that crashed clients never gave back ends by itself, not before its time and grace are over."""
        self.leases.expire()
        over = self.clock.monotonic() - GRACE_S
        self.leasing = {token: lease for token, lease in self.leasing.items() if lease[2] > over}
        assert len(self.leases) == len(self.leasing)
        for lease, expected, _ in self.leasing.values():
            assert lease.pin.view == expected

    @invariant()
    def ledgers_are_exact(self) -> None:
        """With nothing under way, what is taken belongs to entries, and what is pinned to those who hold it."""
        type(self).steps += 1
        store, nvme = self.walk.store, self.walk.nvme
        if store.under_way == (0, 0) and not (store._behind.busy or nvme._tasks or nvme._reads._reading):
            if self.walk.leaks():  # what was just given back is being unlinked
                self.run(nvme._folder.settled())
            leaks = self.walk.leaks()
            assert not leaks, leaks
            # what was found broken while it was held is no entry any more
            gone = [
                outcome
                for outcome, _ in self.holding.values()
                if isinstance(outcome, Bypassed) and not nvme._ledger.holds(outcome.payload._resident)
            ]
            assert self.walk.pins() == len(self.holding) + len(self.leasing) - len(gone)

    @invariant()
    def budgets_hold(self) -> None:
        assert self.walk.ram.usage().used <= RAM
        assert self.walk.ram._extents.check() == []
        assert allocated_below(Path(self.folder.name) / "nvme") <= NVME
        assert self.walk.nvme.usage().used <= NVME

    def end(self) -> None:
        for outcome, _ in self.holding.values():
            outcome.release()
        self.holding.clear()
        self.leases.close()
        self.leasing.clear()
        self.walk.disk.plan = DiskFaultPlan()
        self.walk.disk.resume()
        self.run(self.parts.aclose())

    def teardown(self) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, AssertionError | VoxcacheError | OSError):
            traceback.print_exc()  # threads differ from run to run: it may not fail again
        self.end()
        self.loop.close()
        self.folder.cleanup()


class AskedBeforeEveryAnswer(StoreMachine):
    """No answer is older than its request."""

    revalidate = "request"


class ToldByEvents(StoreMachine):
    """No answer is older than the last announcement."""

    revalidate = "events"


def _copy(folder: Path, target: Path) -> None:
    """What a dead process leaves in ``folder``: its files, those that it would have gone on to change as they are."""
    target.mkdir()
    for path in [*folder.iterdir(), *folder.glob("*/*")]:
        with contextlib.suppress(FileNotFoundError):  # a thread that has not heard of its death moves or removes it
            if path.is_dir():
                (target / path.name).mkdir(mode=0o700)
            elif path.parent == folder:
                shutil.copy2(path, target)
            else:
                os.link(path, target / path.relative_to(folder))


def run(machine: type[StoreMachine], steps: int) -> None:
    """Take at least so many steps with ``machine``, in runs of at most a hundred."""
    machine.steps = 0
    while machine.steps < steps:
        examples = min(-(-(steps - machine.steps) // 60), 100)
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=100,
                deadline=None,
                suppress_health_check=checks,
                database=None,
                phases=[Phase.generate],
            ),
        )


MACHINES = [AskedBeforeEveryAnswer, ToldByEvents]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("machine", MACHINES)
def test_against_a_dict(machine: type[StoreMachine], part: int) -> None:
    """Ten thousand steps in all."""
    run(machine, 2500)
