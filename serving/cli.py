"""The ``voxcache`` command."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from cache import __version__
from cache.errors import ConfigError, VoxcacheError

from . import app, remote
from .audit.spool import Head
from .audit.verify import verify_all
from .config import Settings, load
from .log import configure


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status (2: the settings or the arguments are at fault)."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"voxcache: {error}", file=sys.stderr)
        return 2
    except VoxcacheError as error:
        print(f"voxcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("voxcache", description="A low-latency read cache for medical-imaging inference.")
    parser.add_argument("--version", action="version", version=f"voxcache {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE")
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check-config", help="say whether a settings file is right")
    check.add_argument("--config", type=Path, required=True, metavar="FILE")
    check.set_defaults(run=_check_config)

    demo = commands.add_parser("demo", help="show a study's way to an answer, with and without voxcache")
    demo.add_argument("--json", action="store_true", help="end with one line of JSON")
    demo.add_argument("--keep", action="store_true", help="leave the daemon and Triton running")
    demo.add_argument("--slices", type=int, default=300, help="slices of the synthetic CT (default: 300)")
    demo.add_argument("--transfer-syntax", default="1.2.840.10008.1.2.1", metavar="UID", help="how it is encoded")
    demo.set_defaults(run=_demo)

    phantom = commands.add_parser("phantom", help="write a synthetic CT series")
    phantom.add_argument("folder", type=Path)
    phantom.add_argument("--slices", type=int, default=300)
    phantom.add_argument("--rows", type=int, default=512)
    phantom.add_argument("--columns", type=int, default=512)
    phantom.add_argument("--transfer-syntax", default="1.2.840.10008.1.2.1", metavar="UID")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.set_defaults(run=_phantom)

    fsck = commands.add_parser("fsck", help="check the NVMe tier of a daemon that does not run")
    fsck.add_argument("--config", type=Path, required=True, metavar="FILE")
    fsck.add_argument("--repair", action="store_true", help="put right what can be")
    fsck.set_defaults(run=_fsck)

    audit = commands.add_parser("audit", help="look at the audit records")
    actions = audit.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify", help="say whether they are all there, as they were written; if not, which are"
    )
    verify.add_argument("path", nargs="*", type=Path, help="files, or folders of them, that were taken away")
    verify.add_argument("--config", type=Path, required=True, metavar="FILE")
    verify.add_argument("--head", action="append", default=[], type=_head, metavar="RECORD:DIGEST", help="from the log")
    verify.set_defaults(run=_audit_verify)

    remote.add_commands(commands)
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    return load(arguments.config, os.environ)


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    configure(settings.log)
    # a thread that computes keeps the loop waiting for so long at most; its own wait for the disk it does without us
    sys.setswitchinterval(0.0005)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            app.serve(
                settings,
                ready=lambda url: print(f"voxcache: ready at {url}", flush=True),
                reread=lambda: _settings(arguments),
            )
        )
    return 0


def _check_config(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    origin = "a bucket" if settings.origin.s3 is not None else "a directory"
    recipes = ", ".join(sorted(settings.recipes)) or "none"
    print(f"{arguments.config}: right. Origin: {origin}; recipes: {recipes}; RAM {settings.ram.budget} bytes,")
    print(f"NVMe {settings.nvme.budget} bytes under {settings.nvme.path}; Triton: {settings.triton.url or 'none'}.")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run  # it needs the test servers, which a daemon does not

    return run.main(arguments)


def _phantom(arguments: argparse.Namespace) -> int:
    from cache.dicom.phantom import write_series

    study, series, files = write_series(
        arguments.folder,
        slices=arguments.slices,
        rows=arguments.rows,
        columns=arguments.columns,
        transfer_syntax=arguments.transfer_syntax,
        seed=arguments.seed,
        progress=_progress("slices"),
    )
    print(json.dumps({"study": study, "series": series, "files": len(files)}))
    return 0


def _progress(what: str) -> Any:
    def tell(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} {what}", end=end, file=sys.stderr, flush=True)

    return tell if sys.stderr.isatty() else None


def _fsck(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    return asyncio.run(app.fsck(settings, repair=arguments.repair))


def _head(text: str) -> Head:
    record, _, digest = text.partition(":")
    if not record.isdecimal() or not digest:
        raise argparse.ArgumentTypeError(f"{text!r} is no head: write RECORD:DIGEST")
    return Head(int(record), digest)


def _audit_verify(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    verdict = verify_all(settings.audit, Path(settings.state.path), arguments.path, arguments.head)
    for finding in verdict.findings:
        print(f"{'WRONG' if finding.wrong else 'note '}  {finding}")
    state = "as they were written" if verdict.whole else "NOT as they were written"
    print(f"{verdict.records} records, {verdict.first} to {verdict.last}: {state}")
    return 0 if verdict.whole else 1


if __name__ == "__main__":
    sys.exit(main())
