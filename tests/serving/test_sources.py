"""Webhooks: what publishers really send is understood, what cannot be is refused with the reason, secrets are asked.

The cases stand in ``tests/serving/arrivals``, a file for each source. ``source`` is the page of the publisher that the
body was taken from; ``events`` are the fields that matter of what it means, ``refused`` a part of the reason.
"""

import asyncio
import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import BadRequest, NotConfirmed, Overloaded, Unauthorized
from cache.interfaces import SystemClock
from serving.api.arrivals import Webhooks, WebhookSettings, visit
from serving.api.problem import headers_of, problem
from serving.arrivals import aws
from serving.arrivals.auth import SecretSettings, check, signature
from serving.arrivals.event import Event
from serving.arrivals.post import Handshake, Post
from serving.arrivals.sources import SOURCES
from tests.conftest import ROOT

NOW = 1_700_000_000.0
CASES = [
    pytest.param(source, case, id=f"{source}: {case['name']}")
    for source in SOURCES
    for case in json.loads((Path(__file__).parent / "arrivals" / f"{source}.json").read_text())
]


def posted(case: dict[str, Any], bucket: str = "") -> Post:
    text = case["text"] if "text" in case else json.dumps(case["body"])
    return Post(text.encode(errors="surrogateescape"), case.get("headers", {}), bucket)


def told(name: str, source: str) -> Post:
    """The body of one of the cases."""
    (case,) = (p.values[1] for p in CASES if p.values[0] == source and p.values[1]["name"] == name)  # type: ignore[index]  # a dict, which pytest does not know
    assert isinstance(case, dict)
    return posted(case)


def events(found: list[Event] | Handshake) -> list[Event]:
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(("source", "case"), CASES)
def test_what_publishers_send(source: str, case: dict[str, Any]) -> None:
    """Good bodies mean what their publisher says they mean; malformed ones are refused, and the reason is told."""
    parse = SOURCES[source].parse
    if "refused" in case:
        with pytest.raises(BadRequest) as refused:
            parse(posted(case))
        assert case["refused"] in str(refused.value)
    elif "visit" in case or "answer" in case:
        assert parse(posted(case)) == Handshake(case.get("answer", {}), case.get("visit", ""))
    else:
        found = events(parse(posted(case)))
        fields = [
            {name: getattr(event, name) for name in wanted} for event, wanted in zip(found, case["events"], strict=True)
        ]
        assert fields == case["events"]
        assert parse(posted(case)) == found  # ids included: a repeat is known as one


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_examples_are_right(source: Any) -> None:
    """What the documentation and the OpenAPI description show of a source is taken."""
    assert events(source.parse(Post(source.example.encode(), {"Content-Type": source.content_type})))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@given(
    body=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
@settings(max_examples=25)
def test_no_body_breaks_a_parser(source: Any, body: bytes) -> None:
    """Whatever is posted is understood or refused."""
    try:
        source.parse(Post(body, {"ce-specversion": "1.0"}))
    except BadRequest:
        return


# ------------------------------------------------------------------ one announcement, by several ways


def test_other_buckets_are_none_of_ours() -> None:
    """With an S3 origin only its bucket counts; the rest of a body is left out, not refused."""
    put = json.loads(told("Ceph, a key as it is", "s3").body)["Records"][0]
    other = json.loads(told("AWS, an object with a key that needs encoding", "s3").body)["Records"][0]
    body = json.dumps({"Records": [put, other]}).encode()
    assert [event.etag[:4] for event in events(aws.parse(Post(body, bucket="notif-1795174471")))] == ["3985"]
    assert len(events(aws.parse(Post(body)))) == 2
    for source, name in (
        ("s3", "EventBridge, deleted"),
        ("healthimaging", "an import that is complete"),
        ("monai", "a payload of two series"),
        ("pubsub", "a bucket, written"),
        ("cloudevents", "an object of Cloud Storage"),
    ):
        theirs = told(name, source)
        assert events(SOURCES[source].parse(theirs))
        assert SOURCES[source].parse(Post(theirs.body, theirs.headers, "ours")) == []


def test_an_announcement_is_told_from_its_repeat() -> None:
    """Another write of the same bytes, another key and another action are news; another way here is not."""
    body = told("Ceph, a key as it is", "s3").body.decode()
    (event,) = events(aws.parse(Post(body.encode())))
    for old, new in (("4830006BA886A703", "4830006BA886A704"), ("a+b", "a+c"), ("Created:Put", "Removed:Delete")):
        (other,) = events(aws.parse(Post(body.replace(old, new).encode())))
        assert other.id != event.id


def test_a_version_is_announced_once() -> None:
    """An object's version that S3, SNS and EventBridge all tell of is one piece of news, whenever they tell it."""
    bridged = json.loads(told("EventBridge, created: the key is not encoded", "s3").body)
    named = {"key": "a%2Bb+%2541/example-key", "versionId": bridged["detail"]["object"]["version-id"]}
    record = {
        "eventName": "ObjectCreated:CompleteMultipartUpload",
        "eventTime": "2021-11-12T00:00:07Z",
        "s3": {"bucket": {"name": "amzn-s3-demo-bucket1"}, "object": named},
    }
    direct = json.dumps({"Records": [record]})
    wrapped = json.dumps({"Type": "Notification", "TopicArn": "arn", "Message": direct})
    found = [events(aws.parse(Post(body.encode())))[0] for body in (json.dumps(bridged), direct, wrapped)]
    assert len({event.id for event in found}) == 1


def test_without_an_id_everything_is_news() -> None:
    """A plain announcement repeats another one only if it says so: by id, by ETag or version, or by time."""
    base: dict[str, Any] = {"key": "a.dcm"}

    def name(**more: Any) -> str:
        return events(SOURCES["plain"].parse(Post(json.dumps(base | more).encode())))[0].id

    assert name() == ""
    assert name(id="1") == name(id="1", etag="e") != name(id="2")
    assert name(etag="e") == name(etag='"e"') != name(etag="f")
    assert name(time="2026") != name(time="2027") != ""


# ------------------------------------------------------------------ secrets


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"Authorization": "Bearer s3cret"}, {}),
        ({"authorization": basic("s3cret")}, {}),
        ({}, {"token": "s3cret"}),
    ],
)
def test_a_token_that_is_right(headers: dict[str, str], query: dict[str, str]) -> None:
    """A bearer token is taken from where a publisher can put it."""
    check(SecretSettings(bearer="s3cret"), Post(b"{}", headers), query, NOW)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer s3cre"},
        {"Authorization": "Bearer s3cretx"},
        {"Authorization": "Bearer é"},
        {"Authorization": basic("other")},
        {"Authorization": "Basic ?"},
        {"Authorization": "Digest s3cret"},
        {"Voxcache-Signature": signature("s3cret", str(int(NOW)), b"{}"), "Voxcache-Timestamp": str(int(NOW))},
    ],
)
def test_a_token_that_is_wrong(headers: dict[str, str]) -> None:
    """Without the token nothing is taken, and what is missing is not hinted at."""
    with pytest.raises(Unauthorized) as refused:
        check(SecretSettings(bearer="s3cret"), Post(b"{}", headers), {}, NOW)
    assert "s3cret" not in str(refused.value)
    assert "Bearer" in headers_of(refused.value)["WWW-Authenticate"]


def signed(body: bytes = b"{}", at: float = NOW, key: str = "k") -> dict[str, str]:
    return {"Voxcache-Timestamp": str(int(at)), "Voxcache-Signature": signature(key, str(int(at)), body)}


def test_a_signature() -> None:
    """It covers time and body; it is right within the window, on both sides."""
    secret = SecretSettings(hmac="k", window_s=300)
    for at in (NOW - 300, NOW, NOW + 300):
        check(secret, Post(b"{}", signed(at=at)), {}, NOW)
    right = signed()
    wrong = [
        signed(at=NOW - 301),
        signed(at=NOW + 301),
        signed(key="other"),
        signed(body=b"{} "),
        right | {"Voxcache-Timestamp": str(int(NOW) + 1)},
        right | {"Voxcache-Timestamp": "now"},
        right | {"Voxcache-Timestamp": "9" * 400},
        {"Voxcache-Signature": right["Voxcache-Signature"]},
        {"Voxcache-Signature": "sha256="} | {"Voxcache-Timestamp": right["Voxcache-Timestamp"]},
        {"Authorization": "Bearer k"},
    ]
    for headers in wrong:
        with pytest.raises(Unauthorized):
            check(secret, Post(b"{}", headers), {}, NOW)


def test_either_secret_will_do() -> None:
    """A source that has both takes both; one that has none takes everybody."""
    both = SecretSettings(bearer="t", hmac="k")
    check(both, Post(b"{}", {"Authorization": "Bearer t"}), {}, NOW)
    check(both, Post(b"{}", signed()), {}, NOW)
    check(SecretSettings(), Post(b"{}"), {}, NOW)


# ------------------------------------------------------------------ the route


class Taker:
    """Takes events over, once it is let."""

    def __init__(self) -> None:
        self.taken: list[Event] = []
        self.go = asyncio.Event()
        self.go.set()
        self.waiting = asyncio.Event()
        self.full = False

    async def accept(self, events: Sequence[Event]) -> int:
        self.waiting.set()
        await self.go.wait()
        if self.full:
            raise Overloaded("1000000 events wait already; retry later")
        self.taken += events
        return len(events)


@web.middleware
async def problems(request: web.Request, handler: Any) -> Any:
    try:
        return await handler(request)
    except (BadRequest, NotConfirmed, Overloaded) as error:
        return problem(error)


def serving(taker: Taker, **changes: Any) -> TestClient[Any, Any]:
    webhooks = Webhooks(WebhookSettings(**changes), taker, SystemClock(), bucket="", max_body=1 << 20)
    app = web.Application(middlewares=[problems])
    app.add_routes(webhooks.routes())
    return TestClient(TestServer(app))


SERIES = b'{"study":"1.2.3","series":"1.2.3.4"}'


async def test_more_than_can_be_taken_is_shed() -> None:
    """Past so many bytes at a time posts are answered with 429 and when to come again; the first ones are not lost."""
    taker = Taker()
    taker.go.clear()
    async with serving(taker, max_bytes=len(SERIES) + 10) as client:
        first = asyncio.create_task(client.post("/v1/arrivals/plain", data=SERIES))
        await taker.waiting.wait()
        shed = await client.post("/v1/arrivals/plain", data=SERIES)
        assert (shed.status, shed.headers["Retry-After"]) == (429, "2")
        assert (await shed.json())["type"] == "urn:voxcache:error:shed"
        taker.go.set()
        assert (await first).status == 202
        assert (await client.post("/v1/arrivals/plain", data=SERIES)).status == 202
    assert len({event.id for event in taker.taken}) == 2


async def test_a_full_queue_is_told_in_the_same_way() -> None:
    """Publishers know 429 and come again."""
    taker = Taker()
    taker.full = True
    async with serving(taker) as client:
        assert (await client.post("/v1/arrivals/plain", data=SERIES)).status == 429


async def test_a_large_body_is_taken_when_nothing_else_is() -> None:
    """A bound below a single body does not shut that body out for ever."""
    many = json.dumps([{"study": "1.2.3", "series": f"1.2.3.{n}"} for n in range(5000)]).encode()
    taker = Taker()
    async with serving(taker, max_bytes=1) as client:
        answer = await client.post("/v1/arrivals/plain", data=many)
        assert await answer.json() == {"accepted": 5000, "new": 5000}


async def test_secrets_are_asked_for_by_source() -> None:
    """A source with a secret refuses who does not know it, before the body is looked at; others go on."""
    taker = Taker()
    async with serving(taker, secrets={"plain": SecretSettings(bearer="t")}) as client:
        refused = await client.post("/v1/arrivals/plain", data=b"not even JSON")
        assert refused.status == 401
        taken = await client.post("/v1/arrivals/plain", data=SERIES, headers={"Authorization": "Bearer t"})
        assert taken.status == 202
        assert (await client.post("/v1/arrivals/azure", data=SOURCES["azure"].example)).status == 202


async def test_handshakes() -> None:
    """Event Grid and senders of CloudEvents ask first, and are told what they want to hear."""
    async with serving(Taker()) as client:
        asked = told("the validation of a subscription", "azure")
        answer = await client.post("/v1/arrivals/azure", data=asked.body)
        assert (answer.status, await answer.json()) == (
            200,
            {"validationResponse": "512d38b6-c7b8-40c8-89fe-f46f9e9622b6"},
        )
        origin = {"WebHook-Request-Origin": "eventemitter.example.com", "WebHook-Request-Rate": "120"}
        welcome = await client.options("/v1/arrivals/cloudevents", headers=origin)
        assert welcome.status == 200
        assert welcome.headers["WebHook-Allowed-Origin"] == "eventemitter.example.com"
        assert (await client.options("/v1/arrivals/cloudevents")).status == 400


async def test_a_subscription_is_confirmed() -> None:
    """SNS's URL is visited once, where that is allowed; nothing else is, and no redirect is followed."""
    visits: list[str] = []

    async def sns(request: web.Request) -> web.Response:
        visits.append(request.path_qs)
        if "elsewhere" in request.path_qs:
            raise web.HTTPFound("/followed")
        return web.Response(text="<ConfirmSubscriptionResponse/>")

    app = web.Application()
    app.router.add_get("/{path:.*}", sns)
    async with TestServer(app) as server, serving(Taker(), confirm=(f"http://127.0.0.1:{server.port}",)) as client:
        question = json.loads(told("SNS asks to be confirmed", "s3").body)
        for path, status in (("?Action=ConfirmSubscription&Token=2%2B3", 200), ("?elsewhere", 502)):
            question["SubscribeURL"] = f"http://127.0.0.1:{server.port}/{path}"
            assert (await client.post("/v1/arrivals/s3", json=question)).status == status
        question["SubscribeURL"] = f"http://localhost:{server.port}/"
        assert (await client.post("/v1/arrivals/s3", json=question)).status == 400
    assert visits == ["/?Action=ConfirmSubscription&Token=2%2B3", "/?elsewhere"]


@pytest.mark.parametrize(
    "url",
    [
        "http://sns.us-east-1.amazonaws.com/",
        "https://sns.us-east-1.amazonaws.com:8443/",
        "https://sns.a.b.amazonaws.com/",
        "https://sns..amazonaws.com/",
        "https://sns.us-east-1.amazonaws.com.evil.example/",
        "https://sns.us-east-1.amazonaws.com@evil.example/",
        "https://user@sns.us-east-1.amazonaws.com/",
        "https://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "//sns.us-east-1.amazonaws.com/",
        "https://[::1/",
        "",
    ],
)
async def test_other_urls_are_not_visited(url: str) -> None:
    """Whoever can post cannot have the daemon call what they like."""
    with pytest.raises(BadRequest):
        await visit(url, WebhookSettings().confirm)


async def test_a_subscription_that_cannot_be_confirmed() -> None:
    """Nobody answers there: the publisher is told to ask again."""
    with pytest.raises(NotConfirmed):
        await visit("http://127.0.0.1:9/", ("http://127.0.0.1:9",))


def test_settings_hide_their_secrets() -> None:
    """What is printed of the settings holds none of the secrets."""
    hidden = WebhookSettings(secrets={"s3": SecretSettings(bearer="t0ken", hmac="k3y")})
    assert "t0ken" not in repr(hidden)
    assert "k3y" not in repr(hidden)
    assert msgspec.json.decode(msgspec.json.encode(hidden), type=WebhookSettings) == hidden


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_documentation_shows_every_source(source: Any) -> None:
    """docs/arrivals.md has a part for each source, with a call that works."""
    page = (ROOT / "docs" / "arrivals.md").read_text()
    assert f"\n## {source.name}\n" in page
    assert f"$D/v1/arrivals/{source.name}" in page
    assert f"-d '{source.example}'" in page
