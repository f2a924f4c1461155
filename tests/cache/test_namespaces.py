"""Namespaces: what is reserved is nobody else's, what is lent comes back, and both can be changed while it is held."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.arena import ALIGN, Arena
from cache.entry import Entry
from cache.errors import AllPinned, ConfigError, TooLarge
from cache.keys import SeriesRef, TensorRef
from cache.nvme import NvmeSettings, NvmeTier
from cache.policy.shares import Share, Shares
from cache.ram import Pin, RamSettings, RamTier
from tests.cache.walk import KIB, MIB, walking
from tests.conformance.tier import FakeClock, payload_of, tensor

SHARES: Shares = {"serving": Share(0.5), "staging": Share(0.1, 0.4), "trial": 0.1}
AnyTier = RamTier | NvmeTier


@pytest.fixture(params=["ram", "nvme"])
async def tier(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyTier]:
    """A tier of some MiB, of which 30 % are lent."""
    if request.param == "ram":
        arena = Arena.create(1024 * ALIGN)
        yield RamTier(arena, RamSettings(1024 * ALIGN, SHARES), FakeClock())
        arena.close()
    else:
        settings = NvmeSettings(str(tmp_path / "cache"), 16 * MIB, SHARES, quarantine=0.0)
        nvme = await NvmeTier.open(settings, FakeClock())
        yield nvme
        await nvme.close()


def step(tier: AnyTier) -> int:
    """A size of which the whole has about forty, whatever an entry costs beside its bytes."""
    return (tier.usage("serving").reserved * 2) // 40 - (0 if isinstance(tier, RamTier) else 48 * KIB)


async def fill(tier: AnyTier, namespace: str, entries: int, first: int = 0) -> list[Entry]:
    """Write so many entries of a fortieth each; all of them are taken in."""
    made = [tensor(first + number, step(tier), namespace) for number in range(entries)]
    for entry in made:
        assert await tier.write(entry, payload_of(entry))
        assert all(tier.usage(each).used <= tier.usage(each).budget for each in tier.namespaces)
        assert tier.usage().used <= tier.usage().budget
    return made


def held(tier: AnyTier, entries: list[Entry]) -> int:
    return sum(tier.lookup(entry.key) is not None for entry in entries)


async def test_what_nobody_reserved_is_lent(tier: AnyTier) -> None:
    """A namespace fills its reservation and all that is lent, up to its ceiling; what others reserved stays free."""
    await fill(tier, "serving", 60)
    usage = tier.usage("serving")
    assert usage.reserved < usage.budget - 4 * step(tier) < usage.used
    await fill(tier, "staging", 3)
    await fill(tier, "trial", 3)
    assert held(tier, await fill(tier, "serving", 1, 100)) == 1


@pytest.mark.slow
async def test_a_scan_takes_nothing_that_is_reserved(tier: AnyTier) -> None:
    """However much another namespace writes, not one byte of a reservation goes."""
    mine = await fill(tier, "serving", 18)
    assert tier.usage("serving").used <= tier.usage("serving").reserved
    await fill(tier, "staging", 400)
    assert held(tier, mine) == 18
    assert tier.usage("staging").used > tier.usage("staging").reserved


@pytest.mark.slow
async def test_what_is_lent_comes_back(tier: AnyTier) -> None:
    """Who borrowed most gives first: what is lent comes to be divided, and no reservation is given with it."""
    borrowed = await fill(tier, "serving", 60)
    await fill(tier, "staging", 60, 100)
    serving, staging = (tier.usage(name) for name in ("serving", "staging"))
    assert serving.reserved <= serving.used
    over = [usage.used - usage.reserved for usage in (serving, staging)]
    assert min(over) > 2 * step(tier)
    assert abs(over[0] - over[1]) <= 3 * step(tier)
    assert held(tier, borrowed) >= 18


async def test_a_namespace_without_a_reservation_can_borrow(tmp_path: Path) -> None:
    """What has reserved nothing has what the others leave, and no more than its ceiling."""
    arena = Arena.create(100 * ALIGN)
    shares: Shares = {"serving": Share(0.6), "staging": Share(0.0, 0.3)}
    tier = RamTier(arena, RamSettings(100 * ALIGN, shares), FakeClock())
    await fill(tier, "staging", 60)
    assert tier.usage("staging").budget == 30 * ALIGN
    assert 25 * ALIGN < tier.usage("staging").used <= 30 * ALIGN
    arena.close()


@pytest.mark.slow
async def test_dividing_anew(tier: AnyTier) -> None:
    """New shares hold at once: what is above them goes, what is within them stays, and others may have the rest."""
    serving = await fill(tier, "serving", 60)
    tier.divide({"serving": 0.2, "staging": Share(0.1, 0.8), "trial": 0.1, "new": 0.1})
    assert tier.usage("serving").used <= tier.usage("serving").budget
    assert held(tier, serving) >= 4
    await fill(tier, "staging", 40, 100)
    assert tier.usage("staging").used > 20 * step(tier)
    await fill(tier, "new", 2)
    with pytest.raises(ConfigError, match="restart"):
        tier.divide({"serving": 0.2, "staging": 0.8})
    with pytest.raises(ConfigError):
        tier.divide({**SHARES, "serving": 0.9, "new": 0.1})
    assert tier.usage("new").reserved > 0


async def test_what_is_pinned_outlasts_a_division() -> None:
    """A pinned entry in what became another's range stays until it is let go; then its place is the other's."""
    arena = Arena.create(100 * ALIGN)
    tier = RamTier(arena, RamSettings(100 * ALIGN, {"serving": 0.8, "staging": 0.2}), FakeClock())
    pins = []
    for number in range(4):
        entry = tensor(number, 20 * ALIGN)
        space = tier.reserve("serving", entry.nbytes)
        space.view[:] = payload_of(entry)
        pins.append(tier.admit(entry, space))
    tier.divide({"serving": 0.2, "staging": 0.8})
    for pin in pins:
        assert pin.view == payload_of(pin.entry)
    with pytest.raises(AllPinned):
        tier.reserve("staging", 60 * ALIGN)
    with pytest.raises(TooLarge):
        tier.reserve("serving", 30 * ALIGN)
    for pin in pins:
        pin.release()
    tier.reserve("staging", 80 * ALIGN)
    assert held(tier, [pin.entry for pin in pins]) == 1
    arena.close()


async def test_what_is_being_made_outlasts_a_division() -> None:
    """Space that was reserved before can still be filled and admitted; the entry goes when its place is needed."""
    arena = Arena.create(100 * ALIGN)
    tier = RamTier(arena, RamSettings(100 * ALIGN, {"serving": 0.8, "staging": 0.2}), FakeClock())
    entry = tensor(1, 70 * ALIGN)
    space = tier.reserve("serving", entry.nbytes)
    tier.divide({"serving": 0.2, "staging": 0.8})
    space.view[:] = payload_of(entry)
    pin: Pin = tier.admit(entry, space)
    assert pin.view == payload_of(entry)
    pin.release()
    tier.reserve("staging", 80 * ALIGN)
    assert tier.lookup(entry.key) is None
    assert tier.usage("serving").used == 0
    arena.close()


async def test_entries_span_what_is_theirs_and_what_is_lent() -> None:
    """The first two namespaces can have an entry as large as their reservation and all that is lent together."""
    arena = Arena.create(100 * ALIGN)
    shares: Shares = {"serving": Share(0.5), "staging": Share(0.2)}
    tier = RamTier(arena, RamSettings(100 * ALIGN, shares), FakeClock())
    for namespace, pages in (("serving", 80), ("staging", 50)):
        tier.reserve(namespace, pages * ALIGN).release()
        with pytest.raises(TooLarge):
            tier.reserve(namespace, (pages + 1) * ALIGN)
    arena.close()


@pytest.mark.slow
async def test_a_staging_scan_spares_what_serves(tmp_path: Path) -> None:
    """Staging asks for ten times what both tiers hold; of what serving has within its reservations nothing goes."""
    shares: Shares = {"serving": Share(0.6), "staging": Share(0.1, 0.3)}
    async with walking(tmp_path, ram=512 * KIB, nvme=2560 * KIB, shares=shares) as walk:

        async def ask(number: int, namespace: str) -> None:
            ref = SeriesRef("1.2.9", f"1.2.9.{number}")
            walk.archive.write(ref, [bytes([number % 251]) * 40 * KIB])
            await walk.get(ref, namespace=namespace)
            await walk.settled()

        serving = 6
        for number in range(serving):
            await ask(number, "serving")
        before = {(each.tier, each.key) for each in walk.store.residents() if each.key.namespace == "serving"}
        for tier in (walk.ram, walk.nvme):
            usage = tier.usage("serving")
            assert usage.reserved * 0.7 < usage.used <= usage.reserved
        scanned = 0
        number = serving
        while scanned < 10 * (512 * KIB + 2560 * KIB):
            await ask(number, "staging")
            number += 1
            scanned += 40 * KIB
        after = {(each.tier, each.key) for each in walk.store.residents()}
        assert before <= after
        outcome = await walk.store.get(TensorRef(SeriesRef("1.2.9", "1.2.9.0"), "plain", "serving"))
        assert outcome.tier == "ram"
        outcome.release()
