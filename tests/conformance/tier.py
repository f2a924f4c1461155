"""What every tier does: the class that each implementation's tests subclass, and entries to try it with."""

import asyncio
from abc import ABC, abstractmethod

import msgspec
import numpy as np
import pytest

from cache.entry import CHUNK, DType, Entry, Lineage, ModelIdentity, TensorSpec
from cache.errors import UnknownNamespace
from cache.interfaces import Tier
from cache.keys import Key

EYE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time - 1_600_000_000.0

    def advance(self, seconds: float) -> None:
        self.time += seconds


def tensor(number: int, nbytes: int, namespace: str = "serving", dtype: DType = "uint8") -> Entry:
    """A tensor entry of ``nbytes``, another one for each ``number``."""
    series = f"1.2.826.{number}"
    shape = (nbytes // np.dtype(dtype).itemsize, 1, 1)
    spec = TensorSpec(dtype, shape, "zyx", (1.0, 1.0, 1.0), EYE, "HU")
    lineage = Lineage("v" * 32, 3, nbytes, "ct", "assemble@1|cast@1(dtype=uint8)", {"1.2.840.10008.1.2.1": "none"}, "x")
    return Entry(Key(namespace, "tensor", "1.2.826", series, "v" * 32, "r" * 32), nbytes, spec, lineage, 1.5)


def pack(number: int, nbytes: int, namespace: str = "serving") -> Entry:
    """A pack entry of ``nbytes``."""
    key = Key(namespace, "pack", "1.2.826", f"1.2.826.{number}", "v" * 32, "")
    return Entry(key, nbytes, None, Lineage("v" * 32, 3, nbytes), 0.5)


def embedding(number: int, nbytes: int) -> Entry:
    """What a model made of ``tensor(number, …)``."""
    source = tensor(number, nbytes)
    spec = TensorSpec("uint8", (1, nbytes), "", None, None)
    lineage = msgspec.structs.replace(source.lineage, modality="CT", model=ModelIdentity("m", "3", "c" * 32))
    key = msgspec.structs.replace(source.key, kind="embedding")
    return msgspec.structs.replace(source, key=key, spec=spec, lineage=lineage)


def payload_of(entry: Entry) -> memoryview:
    """The bytes of an entry: the same for the same series, others for others."""
    seed = int(entry.key.series.rpartition(".")[2])
    return memoryview(np.random.default_rng(seed).bytes(entry.nbytes))


async def held(tier: Tier, entry: Entry) -> bool:
    """Whether the tier holds the entry, after a look at its bytes."""
    if tier.lookup(entry.key) is None:
        return False
    out = memoryview(bytearray(entry.nbytes))
    assert await tier.read_into(entry.key, out) == entry
    assert out == payload_of(entry)
    return True


class TierConformance(ABC):
    """Subclass it and provide ``tier``: at least 2 MiB for ``serving``, some less for ``staging``, below 64 MiB."""

    @pytest.fixture
    @abstractmethod
    def tier(self) -> Tier: ...

    @pytest.mark.parametrize("nbytes", [0, 1, 511, 4096, 4097, 300_000, 1 << 20])
    async def test_gives_back_what_was_written(self, tier: Tier, nbytes: int) -> None:
        """Bytes and description come back as they were, whatever the size."""
        for entry in (tensor(1, nbytes), pack(1, nbytes), embedding(1, nbytes)):
            assert await tier.write(entry, payload_of(entry))
            assert tier.lookup(entry.key) == entry
            assert await held(tier, entry)

    async def test_absent(self, tier: Tier) -> None:
        """What was never written is not found, read or evicted."""
        key = tensor(1, 10).key
        assert tier.lookup(key) is None
        assert not tier.evict(key)
        with pytest.raises(KeyError):
            await tier.read_into(key, memoryview(bytearray(10)))

    async def test_evicts_when_asked(self, tier: Tier) -> None:
        """An evicted entry is gone, its room is free again, and it can be written anew."""
        entry = tensor(1, 100_000)
        empty = tier.usage()
        assert await tier.write(entry, payload_of(entry))
        assert tier.evict(entry.key)
        assert tier.lookup(entry.key) is None
        assert tier.usage("serving").used == 0
        assert tier.usage() == empty
        assert await tier.write(entry, payload_of(entry))
        assert await held(tier, entry)

    async def test_writing_again_changes_nothing(self, tier: Tier) -> None:
        """A key determines its value: a second write is a success without effect."""
        entry = tensor(1, 100_000)
        assert await tier.write(entry, payload_of(entry))
        before = tier.usage()
        assert await tier.write(entry, memoryview(bytes(entry.nbytes)))
        assert tier.usage() == before
        assert await held(tier, entry)

    async def test_concurrent_writes_of_one_key(self, tier: Tier) -> None:
        """Writes of one key at a time leave one entry, charged once."""
        entry = tensor(1, 100_000)
        assert all(await asyncio.gather(*(tier.write(entry, payload_of(entry)) for _ in range(5))))
        assert tier.usage().entries == 1
        once = tier.usage("serving").used
        assert tier.evict(entry.key)
        assert await tier.write(entry, payload_of(entry))
        assert tier.usage("serving").used == once

    async def test_makes_room_for_what_comes(self, tier: Tier) -> None:
        """More than fits pushes out the longest unused; what is held stays within the budget and stays right."""
        size = tier.usage("serving").budget // 5
        entries = [tensor(number, size) for number in range(12)]
        for entry in entries:
            assert await tier.write(entry, payload_of(entry))
            assert tier.usage().used <= tier.usage().budget
        kept = [entry for entry in entries if await held(tier, entry)]
        assert kept == entries[-len(kept) :]
        assert len(kept) >= 3

    async def test_use_keeps_an_entry(self, tier: Tier) -> None:
        """What is read goes later than what is not."""
        size = tier.usage("serving").budget // 4
        old = tensor(0, size)
        assert await tier.write(old, payload_of(old))
        for number in range(1, 8):
            entry = tensor(number, size)
            assert await tier.write(entry, payload_of(entry))
            assert await held(tier, old)

    async def test_shares_are_hard(self, tier: Tier) -> None:
        """A namespace that overflows evicts its own entries only."""
        mine = tensor(0, 10_000)
        assert await tier.write(mine, payload_of(mine))
        size = tier.usage("staging").budget // 3
        for number in range(1, 9):
            entry = tensor(number, size, "staging")
            assert await tier.write(entry, payload_of(entry))
            assert tier.usage("staging").used <= tier.usage("staging").budget
        assert await held(tier, mine)

    async def test_what_can_never_fit_is_refused(self, tier: Tier) -> None:
        """An entry larger than its share is not held, and nothing is evicted for it."""
        small = tensor(0, 10_000)
        assert await tier.write(small, payload_of(small))
        large = tensor(1, tier.usage("serving").budget + 1)
        assert not await tier.write(large, payload_of(large))
        assert tier.lookup(large.key) is None
        assert await held(tier, small)

    async def test_an_entry_being_read_stays(self, tier: Tier) -> None:
        """While it is read, an entry is neither evicted nor changed, however much else is written."""
        entry = tensor(0, tier.usage("serving").budget // 3)
        assert await tier.write(entry, payload_of(entry))
        out = memoryview(bytearray(entry.nbytes))
        reading = asyncio.create_task(tier.read_into(entry.key, out))
        await asyncio.sleep(0)
        assert not tier.evict(entry.key)
        for number in range(1, 5):
            other = tensor(number, entry.nbytes)
            assert await tier.write(other, payload_of(other))
        assert await reading == entry
        assert out == payload_of(entry)

    async def test_a_cancelled_write_leaves_a_whole_entry_or_none(self, tier: Tier) -> None:
        """Cancellation never leaves bytes charged to nobody, or an entry that is not whole."""
        entry = tensor(1, 1 << 20)
        empty = tier.usage("serving").used
        writing = asyncio.create_task(tier.write(entry, payload_of(entry)))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        if await held(tier, entry):
            assert tier.evict(entry.key)
        assert tier.usage("serving").used == empty

    async def test_unknown_namespace(self, tier: Tier) -> None:
        """A namespace that nobody configured has no share."""
        entry = tensor(1, 10, "elsewhere")
        with pytest.raises(UnknownNamespace):
            await tier.write(entry, payload_of(entry))
        with pytest.raises(UnknownNamespace):
            tier.usage("elsewhere")

    async def test_wrong_lengths(self, tier: Tier) -> None:
        """Payloads and targets that are not of the entry's size are refused before anything happens."""
        entry = tensor(1, 1000)
        with pytest.raises(ValueError, match="1000"):
            await tier.write(entry, memoryview(bytes(999)))
        assert await tier.write(entry, payload_of(entry))
        with pytest.raises(ValueError, match="1000"):
            await tier.read_into(entry.key, memoryview(bytearray(1001)))
        assert await held(tier, entry)

    async def test_residents_are_listed(self, tier: Tier) -> None:
        """Each entry is listed with its size and uses."""
        entry = tensor(1, CHUNK // 8)
        assert await tier.write(entry, payload_of(entry))
        await held(tier, entry)
        (resident,) = tier.residents()
        assert (resident.key, resident.tier, resident.nbytes) == (entry.key, tier.name, entry.nbytes)
        assert (resident.uses, resident.pins) == (1, 0)
