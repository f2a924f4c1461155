"""Whether a post comes from who it should: a shared secret for each source that has one."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

import msgspec

from cache.errors import Unauthorized

from .post import Post

#: Unix seconds, and ``sha256=`` with the HMAC over them, a dot and the body, in hex.
TIMESTAMP: Final = "voxcache-timestamp"
SIGNATURE: Final = "voxcache-signature"


class SecretSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a source proves itself with; with neither, everybody who reaches the port may post.

    bearer: a token: as Authorization: Bearer, as the password of Basic, or as ?token= from senders that can set no
        header.
    hmac: a key: Voxcache-Signature is "sha256=" and the hex HMAC-SHA256 of Voxcache-Timestamp, a dot and the body.
    window_s: seconds that Voxcache-Timestamp may be off.
    """

    bearer: str = ""
    hmac: str = ""
    window_s: float = 300.0

    def __repr__(self) -> str:
        # secrets must not reach a log through somebody's repr
        return f"SecretSettings(bearer={bool(self.bearer)}, hmac={bool(self.hmac)}, window_s={self.window_s})"


def check(settings: SecretSettings, post: Post, query: Mapping[str, str], now: float) -> None:
    """Let a post through that one of the source's secrets vouches for; ``now`` in Unix seconds.

    A signature that is repeated within its window is let through: what it vouches for is a repeat, which is no work.

    Raises:
        Unauthorized: none does.
    """
    if not (settings.bearer or settings.hmac):
        return
    if settings.bearer and _same(_token(post, query), settings.bearer):
        return
    if settings.hmac and post.header(SIGNATURE):
        _check_signature(settings, post, now)
        return
    raise Unauthorized("this source has a secret, and the request does not show that it knows it")


def signature(key: str, timestamp: str, body: bytes) -> str:
    """The value of Voxcache-Signature."""
    return "sha256=" + hmac.new(key.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _check_signature(settings: SecretSettings, post: Post, now: float) -> None:
    timestamp = post.header(TIMESTAMP)
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        raise Unauthorized("a signature needs Voxcache-Timestamp, in Unix seconds")
    if not _same(post.header(SIGNATURE), signature(settings.hmac, timestamp, post.body)):
        raise Unauthorized("Voxcache-Signature is not this body's")
    if abs(now - int(timestamp)) > settings.window_s:
        raise Unauthorized(f"the request was signed more than {settings.window_s:g} s from now; are both clocks right?")


def _token(post: Post, query: Mapping[str, str]) -> str:
    scheme, _, value = post.header("authorization").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":  # all that SNS can do
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return query.get("token", "")


def _same(given: str, wanted: str) -> bool:
    """In a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())
