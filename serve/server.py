"""The server's process: its socket, its log and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from loracle.export.deployment import Deployment
from loracle.reference import ConfigError

from .app import application
from .service import Service
from .settings import Settings

LOG = logging.getLogger("loracle.serve")

_HEADER_BYTES = 16 * 1024
_KEEP_ALIVE = 15
# Seconds beyond the grace in which the errors for unfinished answers are sent.
_LAST_WORDS = 5


class Server(uvicorn.Server):
    """uvicorn's, which on SIGTERM and SIGINT takes no more requests, lets the answers under way finish for
    some seconds, and ends in the ordinary way.

    Args:
        service: what it serves.
        listening: called with its address once it listens.
    """

    def __init__(self, service: Service, listening: Callable[[str], None] = lambda address: None) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                application(service),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.max_connections,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=math.ceil(settings.grace) + _LAST_WORDS,
                h11_max_incomplete_event_size=_HEADER_BYTES,
            )
        )
        self._service = service
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            self._listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers finish for as long as the settings say, then end them."""
        self._service.draining = True
        loop = asyncio.get_running_loop()
        end = loop.call_later(self._service.settings.grace, self._service.scheduler.stop)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that has been obeyed is not raised again: the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True  # told twice
        self.should_exit = True
        self._service.draining = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises ConfigError: there is no such address, or it is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"host, port: expected a free address, got {host}, {port}: {reason}") from error


def serve(
    deployment: Deployment, settings: Settings, listening: Callable[[str], None] = lambda address: None
) -> None:
    """Serve a deployment until SIGTERM or SIGINT.

    Args:
        listening: called with the server's address once it listens.

    Raises:
        ConfigError: the address cannot be had.
        FileError: the deployment's model is no decoder, or has no tokenizer.
    """
    service = Service(deployment, settings)
    listener = bind(settings.host, settings.port)
    Server(service, listening).run([listener])


def log_to_stderr() -> None:
    """Show the server's log, a line for each request and each fault, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
