"""What goes to the log, in which form, and how UIDs appear in it."""

import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from cache.errors import UnknownStudy
from serving.log import LogSettings, configure, log_failure, logger, show_uids
from serving.uids import Uids

STUDY = "1.2.276.0.7230010.3.1.2.1784940379"
UUID = "2.25.329800735698586629295641978511506172918"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Logging is one a process: each test leaves it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    show_uids(Uids("off"))


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    """Event, level, time and what belongs to it; what is below the level is left out."""
    configure(LogSettings(level="info"))
    show_uids(Uids("full"))
    logger().debug("unheard")
    log_failure("warm-up failed", UnknownStudy(f"nothing of study {STUDY}"), study=STUDY)
    [line] = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "warm-up failed",
        "level": "warning",
        "code": "unknown-study",
        "detail": f"nothing of study {STUDY}",
        "study": STUDY,
    }


@pytest.mark.parametrize("how", ["hashed", "off"])
def test_uids_appear_as_they_are_set_to(how: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In fields, in texts, in lists and in tracebacks alike; one UID always by the same hash."""
    configure(LogSettings(level="debug", uids=how))
    show_uids(Uids(how, b"k" * 32))
    logger().info(
        "told", study=STUDY, series="1.2", told=[f"in {STUDY}/{UUID}", {STUDY: 1}], syntax="1.2.840.10008.1.2"
    )
    try:
        raise RuntimeError(f"of {UUID}")
    except RuntimeError as error:
        log_failure("a bug", error)
    text = capsys.readouterr().err
    assert STUDY not in text and UUID not in text
    assert "1.2.840.10008.1.2" in text  # a transfer syntax is nobody's
    told, bug = map(json.loads, text.splitlines())
    shown = Uids(how, b"k" * 32).shown(STUDY)
    assert told["study"] == shown
    assert told["told"][0].startswith(f"in {shown or '(uid)'}/")
    assert "RuntimeError: of" in bug["exception"]


def test_before_the_key_is_known_no_uid_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A hash with another key would be another name; what is said so early shows none."""
    configure(LogSettings())
    logger().info("early", study=STUDY)
    assert STUDY not in capsys.readouterr().err


def test_libraries_are_heard_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings and errors, with tracebacks; what libraries say below that may quote what they carry, so it is not."""
    configure(LogSettings(level="debug"))
    show_uids(Uids("hashed", b"k" * 32))
    logging.getLogger("botocore.parsers").debug("Response body: %s", b"<Key>Doe^John</Key>")
    logging.getLogger("aiohttp.server").error("Error handling request from %s", f"/v1/studies/{STUDY}")
    logging.getLogger("grpc").warning("wrong %d", "format")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    try:
        raise RuntimeError("broke")
    except RuntimeError:
        logging.getLogger("asyncio").exception("never retrieved")
    told = lines(capsys)
    assert [line.get("library") for line in told] == ["aiohttp.server", "grpc", "py.warnings", "asyncio"]
    assert [line["level"] for line in told] == ["error", "warning", "warning", "error"]
    assert STUDY not in told[0]["event"]
    assert "RuntimeError: broke" in told[3]["exception"]


def test_the_console_shows_no_values_of_variables(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for people names lines, and not what was in them."""
    configure(LogSettings(format="console"))
    secret = "Doe^John"
    try:
        raise RuntimeError("broke")
    except RuntimeError as error:
        log_failure("a bug", error)
    text = capsys.readouterr().err
    assert "RuntimeError: broke" in text
    assert secret not in text.replace('secret = "Doe^John"', "")


def test_keys_and_uids_make_the_hash() -> None:
    """Another installation has other hashes, so that lists of theirs cannot be laid side by side."""
    one, other = Uids("hashed", b"a" * 32), Uids("hashed", b"b" * 32)
    assert one.shown(STUDY) == Uids("hashed", b"a" * 32).shown(STUDY) != other.shown(STUDY)
    assert one.shown(STUDY) != one.shown(UUID)
    assert one.shown("") == ""
    assert one.in_text("127.0.0.1:8600, version 2.25.1, 0.5 s") == "127.0.0.1:8600, version 2.25.1, 0.5 s"
