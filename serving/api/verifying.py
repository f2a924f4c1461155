"""The route that has entries made again, and says whether they are what they were."""

import msgspec
from aiohttp import web

from cache.errors import NotFound, NotReproduced
from cache.keys import check_uid
from cache.store import Store, Verified
from serving.audit import SILENT, Auditor
from serving.audit.record import QUARANTINE, VERIFY
from serving.log import logger

from .wire import json_answer


class VerifiedAnswer(msgspec.Struct, frozen=True):
    """An entry that was made again: "same", or "untold" and why it could not be."""

    etag: str
    series: str
    kind: str
    recipe: str
    outcome: str
    why: str
    seconds: float


class VerifyAnswer(msgspec.Struct, frozen=True):
    """What came of a study's entries."""

    study: str
    entries: list[VerifiedAnswer]


class Verifying:
    """The handler."""

    def __init__(self, store: Store, audit: Auditor = SILENT) -> None:
        self._store = store
        self._audit = audit

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/studies/{study}/verify", self.verify)]

    async def verify(self, request: web.Request) -> web.Response:
        """Make the study's entries (or the one with ``?etag=``) again, in spare room, and compare them byte by byte."""
        study = check_uid(request.match_info["study"])
        etag = request.query.get("etag", "").strip('"')
        keys = sorted(
            {r.key for r in self._store.residents(study) if etag in ("", r.key.digest)}, key=lambda k: k.digest
        )
        if not keys:
            raise NotFound(f"nothing is held of study {study}" + (f" with ETag {etag}" if etag else ""))
        who = self._audit.who.http(request)
        answers, different = [], []
        for key in keys:
            entry = self._store.entry(key)
            if entry is None:  # it had to go meanwhile
                continue
            verified = await self._store.verify(key)
            self._audit.note(VERIFY, who, entry, "" if verified.outcome == "same" else verified.outcome)
            if verified.outcome == "different":
                different.append(verified)
                self._audit.note(QUARANTINE, who, entry, details=(("tiers", " ".join(verified.different)),))
                logger().error(
                    "an entry is not what its objects make",
                    study=study,
                    series=key.series,
                    etag=key.digest,
                    tiers=verified.different,
                )
            answers.append(_answer(verified, entry.lineage.recipe_name))
        if different:
            told = ", ".join(
                f"{one.key.digest} of series {one.key.series} in {' and '.join(one.different)}" for one in different
            )
            raise NotReproduced(f"made again, study {study} has other bytes than entry {told}: set aside, made anew")
        return json_answer(VerifyAnswer(study, answers))


def _answer(verified: Verified, recipe: str) -> VerifiedAnswer:
    key = verified.key
    return VerifiedAnswer(
        key.digest, key.series, key.kind, recipe, verified.outcome, verified.why, round(verified.seconds, 3)
    )
