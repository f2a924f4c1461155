"""HTTP caches before the bucket."""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from loadtest import servers
from loadtest.generator import Request
from loadtest.stand import Series, program

from .base import Peer, Tensor, get_all, over_http, volume_of


class _Proxy(Peer):
    port: int

    def start(self, stack: contextlib.ExitStack) -> None:
        self.port = servers.free_port()
        self._store = over_http(f"http://127.0.0.1:{self.port}/{self.bucket.name}")

    def tensor(self, series: Series) -> Tensor:
        return volume_of(get_all(self._store, sorted(series.files), self.at_once))

    def requests(self, series: Series) -> list[Request]:
        base = f"http://127.0.0.1:{self.port}/{self.bucket.name}"
        return [
            Request("instances", f"{base}/{key}", nbytes=series.files[key].stat().st_size)
            for key in sorted(series.files)
        ]


class NginxCache(_Proxy):
    """https://nginx.org/en/docs/http/ngx_http_proxy_module.html"""

    name = "nginx proxy_cache"
    settings = (
        "proxy_cache_path with max_size, inactive 7 d, use_temp_path off; proxy_cache_valid 200 7d, "
        "proxy_cache_lock on, one worker a core, sendfile, 64 connections to the gateway kept"
    )

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        cache = self.place / "cache"
        cache.mkdir(exist_ok=True)
        config = self.place / "nginx.conf"
        temporaries = "\n".join(
            f"{kind}_temp_path {self.place};" for kind in ("client_body", "fastcgi", "uwsgi", "scgi")
        )
        config.write_text(
            f"""
            daemon off; {"user root;" if os.geteuid() == 0 else ""} worker_processes auto;
            pid {self.place / "nginx.pid"}; error_log stderr;
            events {{ worker_connections 1024; }}
            http {{
                access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000;
                {temporaries} proxy_temp_path {self.place};
                proxy_cache_path {cache} levels=1:2 keys_zone=images:16m max_size={self.limit} inactive=7d
                    use_temp_path=off;
                upstream bucket {{ server {urlsplit(self.bucket.endpoint).netloc}; keepalive 64; }}
                server {{
                    listen 127.0.0.1:{self.port};
                    location / {{
                        proxy_pass http://bucket; proxy_http_version 1.1; proxy_set_header Connection "";
                        proxy_cache images; proxy_cache_valid 200 7d; proxy_cache_lock on;
                        proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 128k;
                    }}
                }}
            }}
            """
        )
        command = [program("nginx", "bench"), "-c", str(config), "-p", str(self.place), "-e", "stderr"]
        running = servers.process(command, self.place / "nginx.log", servers.listens(self.port))
        self.pid = stack.enter_context(running).pid

    def disk(self) -> Path | None:
        return self.place / "cache"


class Varnish(_Proxy):
    """https://varnish-cache.org/docs/7.1/users-guide/"""

    name = "Varnish"
    settings = "storage malloc of the limit, ttl 7 d, default VCL otherwise (misses of one object wait for one fetch)"

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        place = urlsplit(self.bucket.endpoint)
        command = [program("varnishd", "peers"), "-F", "-a", f"127.0.0.1:{self.port}", "-b", place.netloc, "-t", "7d"]
        command += ["-n", str(self.place / "run"), "-s", f"malloc,{self.limit}"]
        running = servers.process(command, self.place / "varnish.log", servers.listens(self.port))
        self.pid = stack.enter_context(running).pid
