"""A deployment of small tasks with a long context, and servers over it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from export_fixtures import make_adapter, make_model

from loracle.export import DecoderSession, Deployment, Sampling, export
from loracle.serve import Service, Settings
from loracle.serve.server import Server, bind

ADAPTERS = {"french": ("q_proj", "v_proj"), "german": ("v_proj", "gate_proj"), "dutch": ("o_proj",)}
CONTEXT = 4096
PROMPTS = ["one", "and two", "three of them", "the fourth"]


def make_deployment(factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and the tasks of `ADAPTERS`, made once in a session; not to be changed."""
    root = factory.getbasetemp() / "serve"
    if root.exists():
        return root / "deployment"
    base = make_model(root / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    for seed, (name, targets) in enumerate(ADAPTERS.items(), 1):
        make_adapter(root / name, base, targets, seed=seed)
        export(base, root / "deployment", root / name, form="swappable", name=name)
    return root / "deployment"


def alone(
    deployment: Deployment,
    task: str | None,
    prompt: str,
    count: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    stop: tuple[str, ...] = (),
) -> str:
    """A task's answer to one prompt, which is continued as it is."""
    (answer,) = deployment.generate(
        task, [prompt], max_new_tokens=count, sampling=sampling, stop=stop, raw=True
    )
    return answer.text


class Gated(Deployment):
    """A deployment whose answers are held up after the first token until `gate` is set.

    Attributes:
        steps: how often all rows of a batch went a token on.
        batches: rows of each batch, in order.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, threads=1)
        self.gate = threading.Event()
        self.steps = 0
        self.batches: list[tuple[str | None, int]] = []

    def decoder(self, task: str | None, capacity: int, batch: int = 1) -> DecoderSession:
        session = super().decoder(task, capacity, batch)
        self.batches.append((task, batch))
        decode = session.decode

        def held(tokens: Any) -> np.ndarray[Any, Any]:
            assert self.gate.wait(30)
            self.steps += 1
            return decode(tokens)

        session.decode = held  # type: ignore[method-assign]
        return session


@contextmanager
def serving(deployment: Deployment, **settings: Any) -> Iterator[tuple[str, Service]]:
    """A real server on a free port of the loopback, in a thread: its address, and what is behind it."""
    service = Service(deployment, Settings(port=0, **settings))
    listener = bind("127.0.0.1", 0)
    server = Server(service)
    thread = threading.Thread(target=server.run, args=([listener],))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    try:
        with httpx2.Client(base_url=address, timeout=30) as client:
            for _ in range(300):
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx2.TransportError:
                    threading.Event().wait(0.01)
        yield address, service
    finally:
        if isinstance(deployment, Gated):
            deployment.gate.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for a condition; fail where it does not come."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not come")


def raw_request(address: str, body: bytes, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request has been sent, and nothing read."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def events_of(text: str) -> list[Any]:
    """The objects of a stream; None is its end mark."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    datas = [line.removeprefix("data: ") for line in lines]
    return [None if data == "[DONE]" else json.loads(data) for data in datas]
