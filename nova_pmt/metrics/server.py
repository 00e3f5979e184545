#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""``/metrics`` and ``/healthz`` on a port of their own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from oslo_log import log
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from nova_pmt import exception

LOG = log.getLogger(__name__)

Health = Callable[[], "list[str]"]
_REQUEST_S = 10


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S  # nobody holds a thread by sending nothing

    def log_message(self, format: str, *args: Any) -> None:
        """Not for each scrape."""


@dataclass(frozen=True)
class _Application:
    metrics: Callable[..., Iterable[bytes]]
    health: Health

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _answer(start, "405 Method Not Allowed", {"error": "GET only"})
        if path == "/metrics":
            return self.metrics(environ, start)
        if path == "/healthz":
            problems = self.health()
            status = "503 Service Unavailable" if problems else "200 OK"
            return _answer(start, status, {"healthy": not problems, "problems": problems})
        return _answer(start, "404 Not Found", {"error": "there are /metrics and /healthz"})


def _answer(start: Callable[..., Any], status: str, content: dict[str, Any]) -> list[bytes]:
    body = json.dumps(content).encode() + b"\n"
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start(status, headers)
    return [body]


class MetricsServer:
    """Serves until it is closed.

    :param port: 0: nothing is opened.
    :param collectors: what brings the figures.
    :param health: what is wrong with the service; nothing: it is well.
    :raises nova_pmt.exception.ConfigError: the port cannot be opened.
    """

    def __init__(
        self, address: str, port: int, collectors: Iterable[Collector], health: Health
    ) -> None:
        self._server: WSGIServer | None = None
        if not port:
            return
        registry = CollectorRegistry(auto_describe=False)
        for collector in collectors:
            registry.register(collector)
        application = _Application(make_wsgi_app(registry), health)
        try:
            self._server = make_server(address, port, application, _Server, _Handler)
        except OSError as error:
            raise exception.ConfigError(
                f"[metrics] {address} port {port} cannot be opened: {error.strerror}",
                cure="Choose a port that is free, or 0 for none; restart the service.",
            ) from error
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        LOG.info("figures are served on http://%s:%d/metrics", address, port)

    def close(self) -> None:
        """Close the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
