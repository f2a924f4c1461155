"""Routes of what is made ready before it is asked for: the plan and its reasons, warm-ups, the index, their jobs."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Annotated, Final, TypeVar

import msgspec
from aiohttp import web

from cache.catalog import Catalog
from cache.errors import BadRequest, NotFound
from cache.interfaces import Clock
from cache.keys import SeriesRef, TensorRef, check_name, check_uid
from cache.store import Store
from cache.urgency import Priority
from serving.audit.record import INDEX
from serving.filler import Failed, Filler, Job
from serving.plan import Decision, Fill, Passed

from .wire import body_of, json_answer

T = TypeVar("T")

#: Bytes of a list of references in the origin, some 200 000 of them.
_LIST_BYTES: Final = 32 << 20

_References = Annotated[list[str], msgspec.Meta(max_length=10_000)]


# ------------------------------------------------------------------ what is said on the wire


class WarmRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to make ready: at least one of the following; what several of them name is made once.

    ``tensors``: references, ``study/series/recipe``. ``studies``: ``study`` or ``study/series``, by what the plan calls
    for. ``list``: an object of the origin, by its key or as ``s3://bucket/key``, with one of all these a line.
    ``since_s``, ``modality``: series of the catalogue, of studies made in the last so many seconds, of this modality.
    """

    tensors: _References = []
    studies: _References = []
    list: str = ""
    since_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    modality: str = ""
    namespace: str = "serving"


class FillAnswer(msgspec.Struct, frozen=True):
    """One planned entry: how urgent (lower goes first), why, and the tier that holds it already ("" for none)."""

    study: str
    series: str
    recipe: str
    namespace: str
    priority: int
    why: str
    tier: str


class SeriesPlan(msgspec.Struct, frozen=True):
    """What one series is of, the rule that decided on it, those passed over before, and what it calls for."""

    series: str
    modality: str
    body_part: str
    description: str
    station: str
    slices: int
    taken_at: float
    rule: str
    passed: tuple[Passed, ...]
    fills: list[FillAnswer]
    priors: list[FillAnswer]


class PlanAnswer(msgspec.Struct, frozen=True):
    """What a study calls for, series by series."""

    study: str
    series: list[SeriesPlan]


class WantedAnswer(msgspec.Struct, frozen=True):
    """What a warm-up would make ready, the most urgent first."""

    fills: list[FillAnswer]


class IndexRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to look for series: a prefix of the origin's keys, or ``s3://bucket/prefix``; "" for all of it."""

    prefix: str = ""


# ------------------------------------------------------------------ the routes


class Warming:
    """The handlers, over the filler. ``bucket``: the origin's; "" for a directory."""

    def __init__(
        self, *, filler: Filler, store: Store, catalog: Catalog, clock: Clock, bucket: str, max_body: int
    ) -> None:
        self._filler = filler
        self._store = store
        self._catalog = catalog
        self._clock = clock
        self._bucket = bucket
        self._max_body = max_body

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/studies/{study}/plan", self.plan),
            web.post("/v1/plan", self.rehearse),
            web.post("/v1/warm", self.warm),
            web.post("/v1/index", self.index),
            web.get("/v1/warm/{job}", self.job),
            web.get("/v1/warm/{job}/events", self.events),
        ]

    async def plan(self, request: web.Request) -> web.Response:
        """What the study calls for by the rules, why, and which tier holds it."""
        study = check_uid(request.match_info["study"])
        decisions = await self._filler.explain(study)
        return json_answer(PlanAnswer(study, [self._series_plan(decision) for decision in decisions]))

    async def rehearse(self, request: web.Request) -> web.Response:
        """What the same request to /v1/warm would make ready; nothing is made."""

        def failed(_: str, error: Exception) -> None:
            raise error

        fills = await (await self._wanted(await body_of(request, WarmRequest, self._max_body)))(failed)
        return json_answer(WantedAnswer(self._fills(sorted(fills, key=lambda fill: fill.priority))))

    async def warm(self, request: web.Request) -> web.Response:
        """Start to make entries ready: 202 and a job that tells how far it is. What is ready is left alone."""
        find = await self._wanted(await body_of(request, WarmRequest, self._max_body))
        return self._accepted(self._filler.warm(find, self._filler.audit.who.http(request)))

    async def index(self, request: web.Request) -> web.Response:
        """Start to note all series under a prefix in the catalogue, from their headers: 202 and a job."""
        asked = await body_of(request, IndexRequest, self._max_body)
        audit = self._filler.audit
        job = self._filler.index(self._key(asked.prefix))
        audit.note(INDEX, audit.who.http(request), None, details=(("job", job.id),))
        return self._accepted(job)

    async def job(self, request: web.Request) -> web.Response:
        """How far a job is."""
        return json_answer(self._filler.job(request.match_info["job"]))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """How far a job is, as server-sent events: one ``progress`` after each change, ``ended`` as the last."""
        job_id = request.match_info["job"]
        self._filler.job(job_id)
        response = web.StreamResponse(headers={"Cache-Control": "no-store"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        async for job in self._filler.follow(job_id):
            await response.write(b": still there\n\n" if job is None else _event(job))
        await response.write_eof()
        return response

    # ------------------------------------------------------------------ what is asked for

    async def _wanted(self, asked: WarmRequest) -> Callable[[Failed], Awaitable[Sequence[Fill]]]:
        """How to find what is asked for. Raises: BadRequest, NotFound, OriginError."""
        if not (asked.tensors or asked.studies or asked.list or asked.since_s is not None or asked.modality):
            raise BadRequest("nothing is asked for: name tensors, studies, a list, since_s or modality")
        namespace = check_name(asked.namespace, "namespace")
        tensors = [TensorRef.parse(text, namespace=namespace) for text in asked.tensors]
        studies: list[str] = []
        series: list[SeriesRef] = []
        for text in [*asked.studies, *await self._lines(asked.list)]:
            match text.strip("/").split("/"):
                case [study]:
                    studies.append(check_uid(study))
                case [study, one]:
                    series.append(SeriesRef.parse(study, one))
                case _:
                    tensors.append(TensorRef.parse(text, namespace=namespace))
        if asked.since_s is not None or asked.modality:
            since = self._clock.now() - asked.since_s if asked.since_s is not None else 0.0
            series += [known.ref for known in self._catalog.taken_since(since, asked.modality)]

        named = [Fill(want, Priority.WARM, "asked for by name") for want in tensors]

        async def find(failed: Failed) -> Sequence[Fill]:
            return await self._filler.wanted(named, list(dict.fromkeys(studies)), series, failed)

        return find

    async def _lines(self, listed: str) -> list[str]:
        if not listed:
            return []
        data = await self._store.read_object(self._key(listed), _LIST_BYTES + 1)
        if data is None:
            raise NotFound(f"the origin has no object {listed!r}")
        if len(data) > _LIST_BYTES:
            raise BadRequest(f"the list {listed!r} is larger than {_LIST_BYTES} bytes: make several of it")
        try:
            return [line.strip() for line in data.decode().splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise BadRequest(f"the list {listed!r} is no UTF-8 text") from None

    def _key(self, place: str) -> str:
        """The key, or prefix of keys, that ``place`` means within the origin."""
        scheme, separator, rest = place.partition("://")
        if not separator:
            return place
        bucket, _, key = rest.partition("/")
        if scheme != "s3" or not self._bucket or bucket != self._bucket:
            raise BadRequest(f"{place!r} is not in the origin, which is {self._bucket or 'a directory'!r}")
        return key

    # ------------------------------------------------------------------ what is answered

    def _accepted(self, job: Job) -> web.Response:
        return json_answer(job, 202, {"Location": f"/v1/warm/{job.id}"})

    def _series_plan(self, decision: Decision) -> SeriesPlan:
        known = decision.series
        its = known.attributes
        return SeriesPlan(
            series=known.ref.series,
            modality=its.modality if its else "",
            body_part=its.body_part if its else "",
            description=its.description if its else "",
            station=its.station if its else "",
            slices=known.slices,
            taken_at=its.taken_at if its else 0.0,
            rule=decision.rule,
            passed=decision.passed,
            fills=self._fills(decision.fills),
            priors=self._fills(decision.priors),
        )

    def _fills(self, fills: Iterable[Fill]) -> list[FillAnswer]:
        return [
            FillAnswer(
                study=fill.want.ref.study,
                series=fill.want.ref.series,
                recipe=fill.want.recipe,
                namespace=fill.want.namespace,
                priority=fill.priority,
                why=fill.why,
                tier=self._store.held(fill.want),
            )
            for fill in fills
        ]


def _event(job: Job) -> bytes:
    name = b"ended" if job.ended else b"progress"
    return b"event: " + name + b"\ndata: " + msgspec.json.encode(job) + b"\n\n"
