"""A proxy in front of an S3 server that makes chosen or random requests fail, the same ones for the same seed.

The request goes on as it came, so signatures stay valid. Faults:

slow_down     503 SlowDown, the server is not asked
too_many      429 TooManyRequests, the server is not asked
server_error  500 InternalError, the server is not asked
reset         the connection is reset before the server is asked
drop_answer   the server does what was asked, the connection is reset instead of its answer
reset_body    the connection is reset in the middle of the answer's body
truncate      the connection is closed in the middle of the answer's body
corrupt       one byte of an object's content is another
latency       the answer comes a little later
hang          nothing comes for `hang_seconds`
"""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

FAULTS = (
    "slow_down",
    "too_many",
    "server_error",
    "reset",
    "drop_answer",
    "reset_body",
    "truncate",
    "corrupt",
    "latency",
    "hang",
)
_IN_BODY = ("reset_body", "truncate", "corrupt")
_STATUS = {
    "slow_down": (503, "SlowDown"),
    "too_many": (429, "TooManyRequests"),
    "server_error": (500, "InternalError"),
}


@dataclass
class _Planned:
    fault: str
    method: str
    path: str
    times: int


@dataclass
class FaultProxy:
    """`rates` gives each fault a share of all requests; `plan` makes the next matching requests fail.

    With `certificate`, a file with key and certificate for 127.0.0.1, it speaks TLS to the client.
    """

    upstream_port: int
    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    hang_seconds: float = 5.0
    certificate: Path | None = None

    def __post_init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._random = random.Random(self.seed)
        self._planned: list[_Planned] = []
        self._lock = threading.Lock()

    @property
    def endpoint_url(self) -> str:
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    def plan(self, fault: str, *, method: str = "", path: str = "", times: int = 1) -> None:
        """The next `times` requests with this method and `path` in their target fail (all with times=-1)."""
        assert fault in FAULTS
        with self._lock:
            self._planned.append(_Planned(fault, method, path, times))

    def __enter__(self) -> FaultProxy:
        proxy = self

        class Handler(_Handler):
            faults = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            # The handshake is made by the connection's own thread, not by the one that accepts connections.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def choose(self, method: str, path: str) -> str | None:
        """The fault of this request, before the server is asked; faults of the body come true where there is one."""
        with self._lock:
            self.requests[method] += 1
            for planned in self._planned:
                if planned.times != 0 and planned.method in method and planned.path in path:
                    planned.times -= 1
                    return planned.fault
            dice = self._random.random()
            for fault, rate in self.rates.items():
                dice -= rate
                if dice < 0:
                    return fault
        return None


def _is_object(response: http.client.HTTPResponse) -> bool:
    """Whether an answer's body is an object's content, as opposed to a listing or an error."""
    return response.headers.get("ETag") is not None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.choose(self.command, self.path)
        if fault in _STATUS:
            self._answer_error(fault)
        elif fault == "reset":
            self._reset(fault)
        elif fault == "hang":
            self.faults.injected[fault] += 1
            time.sleep(self.faults.hang_seconds)
            self._reset(None)
        else:
            if fault == "latency":
                self.faults.injected[fault] += 1
                time.sleep(0.2)
            response, content = self._ask(body)
            if fault == "drop_answer":
                self._reset(fault)
            else:
                self._answer(response, content, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.faults.upstream_port, timeout=120)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.putheader("Connection", "close")
        upstream.endheaders(body)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        return response, content

    def _answer(self, response: http.client.HTTPResponse, content: bytes, fault: str | None) -> None:
        self.send_response_only(response.status, response.reason)
        length = response.headers.get("Content-Length") if self.command == "HEAD" else str(len(content))
        for name, value in response.headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in _IN_BODY and content and (fault != "corrupt" or _is_object(response)):
            self.faults.injected[fault] += 1
            middle = len(content) // 2
            if fault == "corrupt":
                content = content[:middle] + bytes([content[middle] ^ 0x20]) + content[middle + 1 :]
            else:
                self.wfile.write(content[:middle])
                self.wfile.flush()
                if fault == "reset_body":
                    time.sleep(0.01)
                    self._reset(None)
                self.close_connection = True
                return
        self.wfile.write(content)

    def _answer_error(self, fault: str) -> None:
        self.faults.injected[fault] += 1
        status, code = _STATUS[fault]
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status, "Injected")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self, fault: str | None) -> None:
        if fault:
            self.faults.injected[fault] += 1
        # Linger of zero seconds: closing sends a reset instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            # The client has gone away, or the connection was reset on purpose.
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        pass
