"""Structured logs: one event a line, JSON or for the console. UIDs as the settings say, never patient data."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
import structlog

from cache.errors import VoxcacheError

from .uids import Shown, Uids

#: Fields that hold a UID and nothing else; in all others UIDs are looked for.
_UID_FIELDS: Final = frozenset({"study", "series", "instance"})


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is logged, and how.

    level: the least level that is written; of libraries never less than warnings, which may quote what they carry.
    format: "json" for machines, "console" for people.
    slow_ms: a request that takes at least this many milliseconds is logged, with its stages.
    uids: how UIDs are shown in logs and in the list of slow requests: "full", "hashed" with a key of this installation
        (patient.key in state.path), or "off".
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"
    slow_ms: float = 1000.0
    uids: Shown = "full"


class _Showing:
    """The processor that has UIDs shown as they should be: not at all until it is told how."""

    def __init__(self) -> None:
        self.uids = Uids("off")

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if self.uids.how == "full":
            return event
        return {name: self._part(name, value) for name, value in event.items()}

    def _part(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.uids.shown(value) if name in _UID_FIELDS else self.uids.in_text(value)
        if isinstance(value, Mapping):
            return {self.uids.in_text(str(key)): self._part(str(key), part) for key, part in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._part(name, part) for part in value]
        return value


_showing: Final = _Showing()  # logging is one a process, and so is how it shows what


def show_uids(uids: Uids) -> None:
    """Have UIDs shown like this from now on."""
    _showing.uids = uids


def configure(settings: LogSettings) -> None:
    """Set logging up for this process, on standard error: ours, and that of all libraries."""
    renderer = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        # its own way to show a traceback would show the values of variables
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    level = logging.getLevelName(settings.level.upper())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _showing,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_Passed(max(level, logging.WARNING))]
    root.setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)
    # gRPC's C code writes to standard error by itself; all that matters of it comes with its calls
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


class _Passed(logging.Handler):
    """Takes what libraries log, so that it comes out as ours does."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told = record.getMessage()
        except Exception:  # a library's mistake in a format must not end what it was about
            told = str(record.msg)
        level = min(record.levelno, logging.CRITICAL) // 10 * 10
        logger().log(level, told, library=record.name, **({"exc_info": record.exc_info} if record.exc_info else {}))


def logger() -> structlog.typing.FilteringBoundLogger:
    """The daemon's logger."""
    return structlog.get_logger("voxcache")  # type: ignore[no-any-return]  # structlog's own signature says Any


def code_of(error: Exception) -> str:
    """The stable code of an error; that of the root for one that nothing foresaw."""
    return error.code if isinstance(error, VoxcacheError) else VoxcacheError.code


def log_failure(event: str, error: Exception, **more: object) -> None:
    """A failure that was reckoned with in a line; one that was not, a bug of ours, with its traceback."""
    if isinstance(error, VoxcacheError):
        logger().warning(event, code=error.code, detail=str(error), **more)
    else:
        logger().error(event, exc_info=error, **more)
