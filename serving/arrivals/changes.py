"""Orthanc's own list of changes, for an Orthanc that runs no script of ours.

https://orthanc.uclouvain.be/book/users/rest.html#tracking-changes
"""

import base64
from typing import Annotated, Any, Final

import aiohttp
import msgspec

from cache.errors import OriginDenied, OriginDown

from . import orthanc
from .event import Event
from .pull import Found

#: A series says all that its study would; deletions are in no list: they take the changes of what they delete away.
_TOLD: Final = {("StableSeries", "Series"), ("UpdatedMetadata", "Series"), ("UpdatedMetadata", "Study")}
_TIMEOUT_S: Final = 30.0


class OrthancSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An Orthanc that is asked for its changes.

    url: of its REST API; "" for none.
    user, password: of it, where it asks for them.
    interval_s: seconds between looks while nothing is new.
    limit: changes that are asked for at once.
    """

    url: str = ""
    user: str = ""
    password: str = ""
    interval_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    limit: Annotated[int, msgspec.Meta(ge=1)] = 1000

    def __repr__(self) -> str:
        # the password must not reach a log through somebody's repr
        return f"OrthancSettings(url={self.url!r}, interval_s={self.interval_s}, limit={self.limit})"


class _Change(msgspec.Struct):
    ChangeType: str
    ID: str
    ResourceType: str


class _Changes(msgspec.Struct):
    Changes: list[_Change]
    Done: bool
    Last: int


class _Resource(msgspec.Struct):
    MainDicomTags: dict[str, str]
    Instances: list[str] = []
    ParentStudy: str = ""
    LastUpdate: str = ""


class OrthancChanges:
    """A Pull over the changes; its cursor is the number of the last one."""

    name = "orthanc"

    def __init__(self, settings: OrthancSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def look(self, cursor: str) -> Found:
        """The events of the changes since, in their order. Raises: OriginDenied, OriginDown."""
        since = int(cursor or 0)
        path = f"/changes?since={since}&limit={self._settings.limit}"
        changes = await self._get(path, _Changes)
        if changes is None:
            raise OriginDown(f"Orthanc at {self._settings.url} has no changes to tell: is this its REST API?")
        if changes.Last < since:  # it was set up anew, and counts from the start
            return Found([], "0", 0.0)
        events = [
            event
            for change in changes.Changes
            if (change.ChangeType, change.ResourceType) in _TOLD and (event := await self._event(change)) is not None
        ]
        return Found(events, str(changes.Last), self._settings.interval_s if changes.Done else 0.0)

    def taken(self) -> None:
        return

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _event(self, change: _Change) -> Event | None:
        """The event, as its script would have posted it; None if the resource has been deleted since."""
        level = "series" if change.ResourceType == "Series" else "studies"
        resource = await self._get(f"/{level}/{change.ID}", _Resource)
        if resource is None:
            return None
        study: _Resource | None = resource
        if level == "series" and (study := await self._get(f"/studies/{resource.ParentStudy}", _Resource)) is None:
            return None
        assert study is not None
        told = orthanc.Change(
            ChangeType=change.ChangeType,
            ID=change.ID,
            StudyInstanceUID=study.MainDicomTags.get("StudyInstanceUID", ""),
            SeriesInstanceUID=resource.MainDicomTags.get("SeriesInstanceUID", ""),
            Modality=resource.MainDicomTags.get("Modality", ""),
            Instances=len(resource.Instances) if level == "series" else None,
            LastUpdate=resource.LastUpdate,
        )
        return orthanc.event_of(told)

    async def _get(self, path: str, kind: type[Any]) -> Any:
        """What it answers, or None for 404. Raises: OriginDenied, OriginDown."""
        where = f"Orthanc at {self._settings.url}"
        if self._session is None:
            headers = {}
            if self._settings.user:
                credentials = f"{self._settings.user}:{self._settings.password}".encode()
                headers["Authorization"] = f"Basic {base64.b64encode(credentials).decode()}"
            self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))
        try:
            async with self._session.get(self._settings.url.rstrip("/") + path, allow_redirects=False) as answer:
                if answer.status == 404:
                    return None
                if answer.status in (401, 403):
                    raise OriginDenied(f"{where} answered {answer.status}: are pull.orthanc.user and password right?")
                if answer.status != 200:
                    raise OriginDown(f"{where} answered {answer.status}")
                return msgspec.json.decode(await answer.read(), type=kind)
        except (aiohttp.ClientError, OSError, ValueError) as error:  # a TimeoutError is an OSError
            raise OriginDown(f"{where} cannot be asked: {type(error).__name__}") from None
