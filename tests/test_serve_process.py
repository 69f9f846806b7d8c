"""`loracle serve` as a process: how it starts, what it imports, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serve_fixtures import events_of, make_deployment
from typer.testing import CliRunner

from loracle.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory)


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    command = [sys.executable, "-m", "loracle.cli", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "tasks: dutch, french, german" in line
            yield process, line.split()[0]
        finally:
            process.kill()


def long_answer(address: str, count: int, **fields: Any) -> dict[str, Any]:
    """A request whose answer has so many tokens: it goes on to its limit."""
    for seed in range(60):
        body = {"model": "base", "prompt": f"{seed}", "seed": seed, "max_tokens": count, **fields}
        answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=60).json()
        if answer["choices"][0]["finish_reason"] == "length":
            return {**body, "stream": True}
    raise AssertionError("all answers end early")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_answer_finish_and_the_exit_code_is_0(
    folder: Path, number: signal.Signals
) -> None:
    with served(folder, "--threads", "1") as (process, address):
        body = long_answer(address, 600)
        whole = httpx2.post(f"{address}/v1/completions", json={**body, "stream": False}, timeout=60).json()
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            process.send_signal(number)
            *chunks, end = events_of(response.read().decode())
        assert end is None
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert process.wait(15) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log
        assert re.search(r"/v1/completions base 200 \d\+600 tokens", log)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{address}/health")


def test_an_answer_that_takes_longer_than_the_grace_gets_an_error_and_the_exit_code_is_0(
    folder: Path,
) -> None:
    with served(folder, "--threads", "1", "--grace", "0") as (process, address):
        body = long_answer(address, 3500, temperature=0)
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            process.send_signal(signal.SIGTERM)
            *_, last = events_of(response.read().decode())
        assert last["error"]["code"] == "shutting_down"
        assert process.wait(15) == 0


def test_serving_imports_neither_torch_nor_onnx(folder: Path) -> None:
    program = (
        "import sys, threading\n"
        "import loracle.cli.commands.serve\n"
        "from starlette.applications import Starlette\n"
        "from loracle.export.deployment import Deployment\n"
        "from loracle.serve import Service, Settings, application\n"
        "from loracle.serve.server import Server, bind\n"
        f"service = Service(Deployment({str(folder)!r}, threads=1), Settings())\n"
        "socket = bind('127.0.0.1', 0)\n"
        "server = Server(service)\n"
        "thread = threading.Thread(target=server.run, args=([socket],))\n"
        "thread.start()\n"
        "import http.client, json\n"
        "connection = http.client.HTTPConnection(*socket.getsockname())\n"
        "body = json.dumps({'model': 'french', 'prompt': 'one', 'max_tokens': 3})\n"
        "connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})\n"
        "print(connection.getresponse().status)\n"
        "connection.close()\n"
        "server.should_exit = True\n"
        "thread.join()\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'onnx', 'onnx_ir', 'onnxscript', 'pydantic'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
        "print('loracle.torch_impl' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["200", "[]", "False"]


def wrong(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def test_wrong_input_is_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    assert wrong(tmp_path).startswith(f"error: {tmp_path / 'model.onnx'}: expected")
    assert wrong(folder, "--port", 65536) == "error: port: expected 0 (any) to 65535, got 65536\n"
    assert wrong(folder, "--max-batch", 0) == "error: max_batch: expected at least 1, got 0\n"
    assert wrong(folder, "--cache-bytes", -1).startswith("error: max_bytes: expected")
    assert "expected a free address" in wrong(folder, "--host", "no such host.invalid")


def test_a_model_that_is_no_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [other])
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "model.onnx",
    )
    (tmp_path / "config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert "is this a decoder" in wrong(tmp_path)


def test_options_reach_the_server(folder: Path) -> None:
    options = ("--max-body-bytes", "300", "--max-waiting", "2", "--timeout", "20", "--threads", "1")
    with served(folder, *options) as (_, address):
        body: dict[str, Any] = {"model": "french", "prompt": "one", "max_tokens": 2}
        url = f"{address}/v1/completions"
        assert httpx2.post(url, json=body).status_code == 200
        assert httpx2.post(url, json={**body, "user": "x" * 300}).status_code == 413
        assert httpx2.post(url, json={**body, "prompt": ["a"] * 3}).status_code == 400
        assert json.loads(httpx2.get(f"{address}/ready").text) == {"status": "ready"}
