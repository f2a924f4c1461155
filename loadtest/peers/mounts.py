"""The bucket as a file system."""

import contextlib
import subprocess
from pathlib import Path

from loadtest import servers
from loadtest.stand import Series, program

from .base import Peer, Tensor, read_all, volume_of


class Rclone(Peer):
    """https://rclone.org/commands/rclone_mount/#vfs-file-caching"""

    name = "rclone mount"
    settings = "--vfs-cache-mode full with --vfs-cache-max-size, listings kept for an hour, read-only; 32 threads read"

    def start(self, stack: contextlib.ExitStack) -> None:
        # a bundle for another client's requests is nothing that rclone could use
        command = ["env", "-u", "AWS_CA_BUNDLE", program("rclone", "peers"), "mount", f":s3:{self.bucket.name}"]
        command.append(str(self.place / "mount"))
        program("fusermount3", "peers")
        if not Path("/dev/fuse").exists():
            raise RuntimeError("there is no /dev/fuse here")
        (self.place / "mount").mkdir(exist_ok=True)
        command += ["--s3-provider", "Ceph", "--s3-endpoint", self.bucket.endpoint, "--s3-env-auth=false"]
        command += ["--read-only", "--vfs-cache-mode", "full", "--vfs-cache-max-size", f"{self.limit}B"]
        command += ["--cache-dir", str(self.place / "cache"), "--dir-cache-time", "1h", "--config", "/dev/null"]
        mounted = (self.place / "mount").is_mount
        stack.callback(self._unmount)
        self.pid = stack.enter_context(servers.process(command, self.place / "rclone.log", mounted)).pid

    def tensor(self, series: Series) -> Tensor:
        return volume_of(read_all([self.place / "mount" / key for key in sorted(series.files)], self.at_once))

    def disk(self) -> Path | None:
        return self.place / "cache"

    def _unmount(self) -> None:
        # one whose rclone was killed answers nothing, not even whether it is a mount
        subprocess.run(["fusermount3", "-uz", str(self.place / "mount")], check=False, capture_output=True)
