"""The walk itself: RAM, else the one flight of the key, which finds the entry on NVMe or has it made."""

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from cache.attributes import Attributes, Described
from cache.catalog import Catalog
from cache.entry import Entry, ModelIdentity
from cache.errors import CorruptEntry, DiskFailing, ModelChanged, OriginChanged, Refused, UnknownVersion
from cache.flight import Flights, FlightSettings
from cache.interfaces import Clock, Deriver, Encoder, Observer, Origin, Residency, Space, Tier
from cache.keys import Key, Manifest, SeriesRef, SourceObject, TensorRef
from cache.nvme import NvmeTier, Payload
from cache.origin.find import Finder, Survey
from cache.ram import Pin, RamTier
from cache.recipe.chain import Infer, Recipe
from cache.restore import Restores
from cache.stopwatch import Stopwatch
from cache.stopwatch import current as timed
from cache.urgency import Priority, current

from .behind import WriteBehind
from .describe import Descriptions
from .embeddings import Embeddings
from .fill import Filling
from .instances import Instances
from .listings import Listings
from .outcome import Bypassed, Filled, Hit, Instance, Landed, Outcome
from .outdated import Outdated
from .packs import Packs
from .places import Places
from .settings import StoreSettings
from .verify import Verified, Verifier
from .wanted import Recipes, Wanted
from .warmups import WARMED_ON_NVME, WarmUps


class Shared(NamedTuple):
    """Who waits for fills now; how many fills were begun, and how often one that another had begun was waited for."""

    waiters: int
    begun: int
    joined: int


class Store:
    """Read-through over RAM, NVMe and the origin."""

    def __init__(
        self,
        *,
        settings: StoreSettings,
        flights: FlightSettings,
        ram: RamTier,
        nvme: NvmeTier,
        catalog: Catalog,
        origin: Origin,
        finder: Finder,
        workers: Deriver,
        encoder: Encoder,
        recipes: Mapping[str, Recipe],
        clock: Clock,
        observer: Observer,
        patient_key: bytes,
        restores: Restores,
        host: str = "",
    ) -> None:
        """``host`` is told with what is made here. ``patient_key`` hashes what identifies patients.

        It is 16 to 64 bytes that nobody else knows.
        """
        self._ram = ram
        self._nvme = nvme
        self._tiers: tuple[Tier, ...] = (ram, nvme)
        self._catalog = catalog
        self._origin = origin
        self._finder = finder
        self._encoder = encoder
        self._observer = observer
        self._restores = restores
        self._recipes = Recipes(recipes, workers.decoders)
        self._fills: Flights[Key, Landed] = Flights(flights, lambda landed: landed.held.release())
        # apart from the fills, each of them waits for one
        self._encodings: Flights[Key, Landed] = Flights(flights, lambda landed: landed.held.release())
        self._behind = WriteBehind(settings, nvme, observer)
        self._warm_ups = WarmUps(settings, ram, clock)
        self._instances = Instances(finder)
        self._outdated = Outdated(self._tiers, catalog, self._in_the_making)
        self._listings = Listings(
            settings=settings,
            flights=flights,
            catalog=catalog,
            finder=finder,
            clock=clock,
            observer=observer,
            superseded=self._outdated.drop_versions,
        )
        self._descriptions = Descriptions(
            catalog=catalog,
            listings=self._listings,
            origin=origin,
            workers=workers,
            restores=restores,
            patient_key=patient_key,
        )
        self._places = Places(ram, nvme, self._behind, self._warm_ups, observer)
        self._filling = Filling(
            ram=ram,
            nvme=nvme,
            places=self._places,
            behind=self._behind,
            packs=Packs(
                nvme=nvme,
                places=self._places,
                behind=self._behind,
                origin=origin,
                restores=restores,
                clock=clock,
                host=host,
            ),
            descriptions=self._descriptions,
            workers=workers,
            clock=clock,
            host=host,
        )
        self._verifier = Verifier(
            recipes=self._recipes, ram=ram, nvme=nvme, catalog=catalog, filling=self._filling, observer=observer
        )
        self._embeddings = Embeddings(
            recipes=self._recipes, encoder=encoder, ram=ram, nvme=nvme, filling=self._filling, clock=clock
        )
        self._kept: Callable[[Key], bool] = lambda key: False
        self.demands = 0  # requests on demand that were answered, since the start
        ram.spares = self._warm_ups.outranked
        nvme.spares = self._spared_on_nvme

    # ------------------------------------------------------------------ asking

    async def get(self, want: TensorRef, priority: int = Priority.DEMAND) -> Outcome:
        """The tensor, or embedding, that ``want`` names. The caller releases the outcome.

        Raises:
            UnknownRecipe, UnknownNamespace, UnknownStudy, EmptySeries, UnknownVersion, BadSource, OriginError, Refused,
            WorkerFailed; for embeddings also TritonError.
        """
        demand = priority == Priority.DEMAND
        watch = timed(self._observer) if demand else Stopwatch(self._observer)
        watch.study = want.ref.study
        outcome: Outcome | None = self._hit(want, watch)
        watch.lap("lookup")
        if outcome is None:
            outcome = await self._walked(want, watch, priority)
        watch.at_hand()
        if demand:
            self.demands += 1
            self._observer.answered(outcome.tier, outcome.entry)
        return outcome

    async def _walked(self, want: TensorRef, watch: Stopwatch, priority: int) -> Outcome:
        try:
            return await self._get(await self._wanted(want, watch, priority), watch, priority)
        except OriginChanged:
            # the series grew or was replaced since it was listed: the listing is at fault, not the request
            self.changed(want.ref)
            if want.version:
                raise UnknownVersion(_gone(want)) from None
        except ModelChanged:
            pass  # the encoder knows by now who answers in its place
        return await self._get(await self._wanted(want, watch, priority), watch, priority)

    def hit(self, want: TensorRef) -> Hit | None:
        """The entry if that takes no waiting: it is in RAM, and nobody need be asked about series or model first.

        The caller releases it. Raises: UnknownRecipe.
        """
        hit = self._hit(want, None)
        if hit is not None:
            self.demands += 1
            self._observer.answered("ram", hit.entry)
        return hit

    def _hit(self, want: TensorRef, watch: Stopwatch | None) -> Hit | None:
        known = self._recipes[want.recipe]
        model = None
        if known.recipe.infer is not None and (model := self._encoder.known(known.recipe.infer)) is None:
            return None
        manifest = (
            self._catalog.manifest_of(want.ref, want.version) if want.version else self._listings.trusted(want.ref)
        )
        if manifest is None:
            return None
        pin = self._ram.pin(known.key(want.namespace, manifest, model))
        if pin is None:
            return None
        self._warm_ups.used(pin.entry.key)
        return Hit(pin, watch, "ram")

    async def instance(self, ref: SeriesRef, name: str, namespace: str = "serving") -> Instance:
        """One object of a series, read from the series' pack, which is fetched if it has to be.

        ``name``: its number among the series' objects by key, from 0, or what stands for {instance} in its key. The
        caller releases it.

        Raises:
            NotFound: the series has no such object.
            UnknownStudy, EmptySeries, UnknownNamespace, OriginError, Refused.
        """
        watch = timed(self._observer)
        watch.study = ref.study
        # nobody is told that it was ``answered``: each object would count as having saved the whole pack
        try:
            found = await self._instance(ref, name, namespace, watch)
        except OriginChanged:
            self.changed(ref)
            found = await self._instance(ref, name, namespace, watch)
        watch.at_hand()
        return found

    async def objects_of(self, ref: SeriesRef) -> Manifest:
        """The objects of a series, in the order of their numbers. Raises: UnknownStudy, EmptySeries, OriginError."""
        return await self._listings.current(ref, Stopwatch(self._observer), Priority.DEMAND)

    async def scratch(self, namespace: str, nbytes: int) -> Space:
        """RAM for bytes that are put together for one use: an intermediate until it is released, and bounded as those.

        Raises: AllPinned, TooLarge, UnknownNamespace.
        """
        return await self._places.scratch(namespace, nbytes)

    async def series_of(self, object_key: str) -> SeriesRef | None:
        """Which series an announced object belongs to, or None if it is none of a series. Raises: OriginError."""
        return await self._finder.series_of(object_key)

    async def describe(self, ref: SeriesRef, priority: int = Priority.WARM) -> Described:
        """The series with its attributes; they are read from the first bytes of an object if they are not known yet.

        Raises: UnknownStudy, EmptySeries, BadManifest, OriginError, WorkerFailed.
        """
        return await self._descriptions.describe(ref, priority)

    async def attributes(self, ref: SeriesRef, object_key: str) -> Attributes | None:
        """What the series is of: as the catalogue knows, else as the object says; None if it says nothing.

        Raises: OriginError, WorkerFailed.
        """
        return await self._descriptions.attributes(ref, object_key)

    async def source_bytes(self, ref: SeriesRef, priority: int = Priority.WARM) -> int:
        """How many bytes the objects of a series have. Raises: UnknownStudy, EmptySeries, BadManifest, OriginError."""
        manifest = await self._listings.recorded(ref, priority)
        return sum(source.size for source in manifest.objects)

    async def read_object(self, key: str, limit: int) -> bytes | None:
        """The first ``limit`` bytes of an object of the origin; None if there is none. Raises: OriginError."""
        return await self._origin.read(key, limit)

    def held(self, want: TensorRef) -> str:
        """Which tier holds the entry of the series as it is recorded; "" for none, or if it is said to have changed.

        Raises: UnknownRecipe.
        """
        known = self._recipes[want.recipe]
        model = self._encoder.known(known.recipe.infer) if known.recipe.infer is not None else None
        recorded = self._catalog.recorded(want.ref)
        if recorded is None or recorded.validated_at <= 0 or (known.recipe.infer is not None and model is None):
            return ""
        key = known.key(want.namespace, recorded.manifest, model)
        return next((tier.name for tier in self._tiers if tier.lookup(key) is not None), "")

    async def series_in(self, study: str) -> list[SeriesRef]:
        """The series of a study that the origin has, or that are remembered, sorted. Raises: OriginError."""
        return sorted({*await self._finder.series_in(study), *(known.ref for known in self._catalog.study(study))})

    async def series_under(self, prefix: str) -> list[SeriesRef]:
        """The series that objects under a prefix belong to, sorted. Raises: OriginError, WorkerFailed."""
        return await self._finder.series_under(prefix)

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        """The origin's objects under a prefix, with when they were written. Raises: OriginDenied, OriginDown."""
        return await self._origin.dated(prefix)

    async def survey(self) -> Survey:
        """All that the origin has. Raises: OriginDenied, OriginDown."""
        return await self._finder.survey()

    async def expected(self, object_key: str) -> int | None:
        """How many objects its series will have, if this is a series' manifest object. Raises: OriginError."""
        return await self._finder.expected(object_key)

    async def objects(self, ref: SeriesRef) -> int:
        """How many of the series' objects the origin has now. Raises: NotFound, BadManifest, OriginError."""
        return await self._finder.present(ref)

    async def written(self, ref: SeriesRef) -> None:
        """Return once what was made of the series is on NVMe, where it outlives a crash, or will not get there."""
        await self._behind.written(ref)

    def changed(self, ref: SeriesRef) -> None:
        """The origin has said that this series changed: what asks for it from now on gets a listing made after this."""
        self._listings.changed(ref)
        self._restores.look(ref)

    def residents(self, study: str | None = None) -> list[Residency]:
        """What both tiers hold of a study, or of all."""
        return [r for tier in self._tiers for r in tier.residents() if study in (None, r.key.study)]

    def entry(self, key: Key) -> Entry | None:
        """The entry as the first tier that has it describes it."""
        return self._ram.lookup(key) or self._nvme.lookup(key)

    def manifest(self, key: Key) -> Manifest | None:
        """The objects an entry was made from, as long as the catalogue remembers that version of the series."""
        return self._catalog.manifest_of(key.ref, key.source_version)

    async def model(self, name: str, version: str = "") -> ModelIdentity:
        """The model of that name that recipes end in.

        Raises:
            UnknownModel: none does, or not in that version.
            BadRequest: they end in several versions of it, and none is named.
            TritonError: it is not known who it is, and nobody says.
        """
        return await self._embeddings.model(name, version)

    def embeddings(self, model: ModelIdentity, namespace: str) -> AsyncIterator[list[tuple[Entry, bytes]]]:
        """A copy of every embedding by ``model`` in either tier, some at a time, with turns for others in between.

        To be looked at is no use of an entry. What lies on NVMe alone is put into RAM where that has room to spare.

        Raises: UnknownNamespace.
        """
        return self._embeddings.held(model, namespace)

    def last_models(self) -> dict[Infer, ModelIdentity]:
        """Who the models of the recipes were when the newest of their embeddings that are held were made."""
        return self._embeddings.last_models()

    async def key(self, want: TensorRef, priority: int = Priority.DEMAND) -> Key:
        """Which entry ``want`` means now; it need not be there.

        Raises: UnknownRecipe, UnknownStudy, EmptySeries, OriginError; for embeddings also TritonError.
        """
        return (await self._wanted(want, timed(self._observer), priority)).key

    async def find(self, key: Key) -> Hit | None:
        """The entry of this name, if either tier has it and RAM has room for it: nothing is made."""
        watch = timed(self._observer)
        found = await self._find(key, watch)
        if found is not None:
            watch.at_hand()
            self._observer.answered(found.tier, found.entry)
        return found

    async def _find(self, key: Key, watch: Stopwatch) -> Hit | None:
        pin = self._ram.pin(key)
        watch.lap("lookup")
        if pin is not None:
            return Hit(pin, watch, "ram")
        if self._nvme.lookup(key) is None:
            return None

        async def load() -> Landed:
            watch.lap("queue")
            return await self._filling.load(key, watch)

        def take(landed: Landed) -> Hit | None:
            return Hit(landed.held.share(), watch, "nvme") if isinstance(landed.held, Pin) else None

        with contextlib.suppress(CorruptEntry, KeyError, Refused):
            with watch.stage("join") if key in self._fills else contextlib.nullcontext():
                found, leads = await self._fills.join(key, load, Priority.DEMAND, take)
            if leads:
                watch.lap("admit")
            return found
        return None

    async def keep(self, entry: Entry, payload: bytes) -> bool:
        """Hold what was made elsewhere, unless RAM has no room for it now."""
        try:
            pin = await self._filling.keep(entry, payload)
        except Refused:
            return False
        pin.release()
        return True

    async def verify(self, key: Key) -> Verified:
        """Make an entry again and compare; what differs is given to nobody any more. Raises: NotFound: not held."""
        return await self._verifier.verify(key)

    async def drop_made_by(self, models: Collection[ModelIdentity]) -> None:
        """Drop what nobody holds of what these models made: they are not served any more."""
        await self._embeddings.drop_made_by(models)

    async def drop_outdated(self) -> None:
        """Drop what a series has had another version since, and an end of the daemon has kept from going."""
        await self._outdated.drop_all()

    def keep_what(self, kept: Callable[[Key], bool]) -> None:
        """Have entries stay on NVMe that are ``kept``: they make no room, and are not evicted with their study."""
        self._kept = kept

    def drop(self, key: Key) -> bool:
        """Drop an entry from every tier where nobody holds it; whether it went from any."""
        return any([tier.evict(key) for tier in self._tiers])

    def evict(self, study: str, series: str | None = None) -> int:
        """Drop what nobody holds, and what is not kept, of a study or series from both tiers; how many entries went."""
        return sum(
            tier.evict(resident.key)
            for tier in self._tiers
            for resident in list(tier.residents())
            if resident.key.study == study and series in (None, resident.key.series) and not self._kept(resident.key)
        )

    @property
    def under_way(self) -> tuple[int, int]:
        """Fills that run, and fills that wait for a slot."""
        both = (self._fills, self._encodings)
        queued = sum(flights.queued for flights in both)
        return sum(map(len, both)) - queued, queued

    @property
    def shared(self) -> Shared:
        """How fills are shared, now and since the start."""
        both = (self._fills, self._encodings)
        return Shared(
            waiters=sum(flights.waiters for flights in both),
            begun=sum(flights.begun for flights in both),
            joined=sum(flights.joined for flights in both),
        )

    async def close(self, grace_s: float = 10.0) -> None:
        """Cancel fills, then give what waits to be written to NVMe ``grace_s`` seconds."""
        await self._encodings.close()
        await self._fills.close()
        await self._listings.close()
        await self._outdated.close()
        await self._behind.close(grace_s)

    # ------------------------------------------------------------------ walking

    async def _wanted(self, want: TensorRef, watch: Stopwatch, priority: int) -> Wanted:
        known = self._recipes[want.recipe]
        manifest = self._catalog.manifest_of(want.ref, want.version) if want.version else None
        if manifest is None:
            manifest = await self._listings.current(want.ref, watch, priority)
            if want.version not in ("", manifest.source_version):
                raise UnknownVersion(_gone(want))
        model = None
        if (infer := known.recipe.infer) is not None and (model := self._encoder.known(infer)) is None:
            with watch.stage("identify"):
                model = await self._encoder.identify(infer)
        return Wanted(known.key(want.namespace, manifest, model), manifest, known, model)

    async def _get(self, wanted: Wanted, watch: Stopwatch, priority: int) -> Outcome:
        key = wanted.key
        pin = self._ram.pin(key)
        if pin is not None:
            self._warm_ups.used(key)
            return Hit(pin, watch, "ram")

        flights = self._fills
        if wanted.model is not None:
            flights = self._encodings
            self._fills.urge(wanted.tensor.key, priority)
        outcome = await self._share(flights, key, lambda: self._fill(wanted, watch), watch, priority)
        if priority > Priority.DEMAND:
            self._warm_ups.made(key)
        elif isinstance(outcome, Bypassed) and outcome.reason == WARMED_ON_NVME:
            outcome.release()  # RAM was not for a warm-up; for a request it may be
            return await self._get(wanted, watch, priority)
        return outcome

    async def _instance(self, ref: SeriesRef, name: str, namespace: str, watch: Stopwatch) -> Instance:
        manifest = await self._listings.current(ref, watch, Priority.DEMAND)
        number = self._instances.number(manifest, name)
        pack = await self._pack(Key.pack(namespace, manifest), manifest, watch)
        return Instance(pack, manifest.objects[number], self._instances.layout(manifest).members[number])

    async def _pack(self, key: Key, manifest: Manifest, watch: Stopwatch) -> Outcome:
        pin = self._ram.pin(key)
        watch.lap("lookup")
        if pin is not None:
            return Hit(pin, watch, "ram")

        async def fill() -> Landed:
            await self._behind.landed(key, self._instances.layout(manifest).nbytes)  # sooner there than fetched again
            return await self._loaded(key, watch) or await self._filling.gather(key, manifest, watch)

        return await self._share(self._fills, key, fill, watch, Priority.DEMAND)

    async def _share(
        self,
        flights: Flights[Key, Landed],
        key: Key,
        fill: Callable[[], Awaitable[Landed]],
        watch: Stopwatch,
        priority: int,
    ) -> Outcome:
        """A share in what the key's flight brings. ``fill``: how, if none is under way."""

        async def run() -> Landed:
            watch.lap("queue")
            with self._behind.let_first():
                return await fill()

        def take(landed: Landed) -> Outcome:
            return _taken(landed, watch)

        with watch.stage("join") if key in flights else contextlib.nullcontext():
            outcome, leads = await flights.join(key, run, priority, take)
        if leads:
            watch.lap("admit")
        return outcome

    async def _fill(self, wanted: Wanted, watch: Stopwatch) -> Landed:
        key = wanted.key
        if (loaded := await self._loaded(key, watch)) is not None:
            return loaded
        if wanted.model is not None:
            return await self._encode(wanted, wanted.model, watch)
        return await self._filling.make(key, wanted.manifest, wanted.known.tensor, watch)

    async def _loaded(self, key: Key, watch: Stopwatch) -> Landed | None:
        """From NVMe; None if it is not there, was quarantined, or lies on a disk that is late: it is made then."""
        if self._nvme.lookup(key) is None:
            return None
        with contextlib.suppress(CorruptEntry, KeyError, DiskFailing):
            return await self._filling.load(key, watch)
        return None

    async def _encode(self, wanted: Wanted, model: ModelIdentity, watch: Stopwatch) -> Landed:
        """What the model makes of its recipe's tensor, which is got as if it were asked for."""
        tensor = await self._get(wanted.tensor, watch, current().value)
        return await self._embeddings.encode(wanted, model, tensor, watch)

    def _in_the_making(self) -> Iterator[Key]:
        return itertools.chain(self._fills.keys(), self._encodings.keys(), self._behind.keys())

    def _spared_on_nvme(self, key: Key, last_use: float) -> bool:
        return self._kept(key) or self._warm_ups.outranked(key, max(last_use, self._ram.last_use(key) or 0.0))


def _taken(landed: Landed, watch: Stopwatch) -> Outcome:
    """A waiter's share of what a flight brought."""
    if isinstance(landed.held, Payload):
        return Bypassed(landed.held.share(), watch, landed.reason)
    mine = landed.held.share()
    return Filled(mine, watch) if landed.made else Hit(mine, watch, "nvme")


def _gone(want: TensorRef) -> str:
    return f"series {want.ref.series} has no version {want.version}: neither held here nor what the origin has now"
