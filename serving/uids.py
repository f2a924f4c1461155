"""How a UID is shown outside of answers and audit records: in full, as a keyed hash, or not at all."""

import hashlib
import re
from typing import Final, Literal

Shown = Literal["full", "hashed", "off"]

#: UIDs as archives make them: an ISO or joint root with four parts or more, or a UUID (PS3.5 §9.1, §B.2). An address
#: that begins so is taken for one, which harms nobody.
_IN_TEXT: Final = re.compile(r"(?<![\d.])(?:2\.25\.\d{10,39}|[0-2](?:\.\d{1,60}){3,})(?![\d.]*\d)")
#: What DICOM registers (PS3.6 §A): transfer syntaxes and classes, which are of nobody.
_REGISTERED: Final = "1.2.840.10008."


class Uids:
    """Shows UIDs as the settings say. ``key``: 16 to 64 bytes that nobody else knows; only hashes need it.

    The same UID has the same hash as long as the key stays, so what is told of one study can be put together.
    """

    def __init__(self, how: Shown = "full", key: bytes = b"") -> None:
        self.how: Final = how
        self._key = key

    def shown(self, uid: str) -> str:
        """The UID, ``uid-`` and 16 hex digits of its hash, or "" for nothing."""
        if self.how == "full" or not uid or uid.startswith(_REGISTERED):
            return uid
        if self.how == "off":
            return ""
        digest = hashlib.blake2b(uid.encode(), key=self._key, person=b"voxcache uid", digest_size=8)
        return f"uid-{digest.hexdigest()}"

    def in_text(self, text: str) -> str:
        """``text`` with every UID in it as it is shown, ``(uid)`` for nothing."""
        if self.how == "full":
            return text
        return _IN_TEXT.sub(lambda found: self.shown(found[0]) or "(uid)", text)
