"""The server on the loopback: many clients at a time, clients that go away, tasks that go away."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serve_fixtures import (
    ADAPTERS,
    PROMPTS,
    Gated,
    alone,
    events_of,
    make_deployment,
    raw_request,
    serving,
    until,
)

from loracle.export import Deployment, Sampling
from loracle.reference import ConfigError, NonFiniteError
from loracle.serve import Settings
from loracle.serve.server import bind

NAMES: dict[str, str | None] = {**{name: name for name in ADAPTERS}, "base": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory)


@pytest.fixture(scope="module")
def plain(made: Path) -> Deployment:
    return Deployment(made, threads=1)


@pytest.fixture
def gated(made: Path) -> Gated:
    return Gated(made)


def body(model: str = "french", prompt: str = "one", count: int = 8, **fields: Any) -> dict[str, Any]:
    """A request, greedy unless `fields` say otherwise."""
    return {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": count, **fields}


def ask(address: str, **fields: Any) -> httpx2.Response:
    return httpx2.post(f"{address}/v1/completions", json=body(**fields), timeout=60)


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_clients_of_different_tasks_at_a_time_each_get_their_own_answer(
    made: Path, plain: Deployment
) -> None:
    cases = [(name, prompt) for name in NAMES for prompt in PROMPTS] * 3
    expected = {case: alone(plain, NAMES[case[0]], case[1], 30) for case in cases}
    assert len(set(expected.values())) > len(PROMPTS)
    with (
        serving(Deployment(made, threads=1), max_batch=5) as (address, service),
        ThreadPoolExecutor(16) as pool,
    ):
        found = pool.map(lambda case: text_of(ask(address, model=case[0], prompt=case[1], count=30)), cases)
        assert list(found) == [expected[case] for case in cases]
        sizes = service.metrics.batch_rows.collect()
    (sample,) = (s for family in sizes for s in family.samples if s.name.endswith("_count"))
    assert sample.value < len(cases)  # some were answered together


def test_prompts_of_one_task_that_wait_are_answered_together_oldest_first(gated: Gated) -> None:
    with serving(gated, max_batch=3) as (address, service), ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, address, model="base")
        until(lambda: service.scheduler.running == 1)
        found = []
        for waiting, model in enumerate(["french", "german", "french", "french", "german", "french"], 1):
            found.append(pool.submit(ask, address, model=model))
            until(lambda number=waiting: service.scheduler.waiting == number)
        gated.gate.set()
        assert all(one.result().status_code == 200 for one in (first, *found))
    assert gated.batches[1:] == [(None, 1), ("french", 3), ("german", 2), ("french", 1)]


def test_requests_of_one_batch_have_their_own_sampling_length_and_stop(
    gated: Gated, plain: Deployment
) -> None:
    drawn = [{"temperature": 1, "seed": seed, "count": 10 + seed} for seed in range(3)]
    text = alone(plain, "german", "one", 30, Sampling(1.0, seed=7))
    asked: list[dict[str, Any]] = [
        {"temperature": 0, "count": 25},
        *drawn,
        {"temperature": 1, "seed": 7, "count": 30, "stop": text[3:5]},
        {"temperature": 0.5, "top_k": 9, "top_p": 0.8, "seed": 1, "count": 20},
        {"temperature": 1, "seed": 0, "count": 10},
    ]
    expected = []
    for own in asked:
        names = ("temperature", "top_k", "top_p", "seed")
        sampling = Sampling(**{name: own[name] for name in names if name in own})
        stop = (own["stop"],) if "stop" in own else ()
        expected.append(alone(plain, "german", "one", own["count"], sampling, stop))
    with serving(gated) as (address, service), ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, address, model="base")
        until(lambda: service.scheduler.running == 1)
        found = [pool.submit(ask, address, model="german", **own) for own in asked]
        until(lambda: service.scheduler.waiting == len(asked))
        gated.gate.set()
        assert [text_of(one.result()) for one in found] == expected
        assert first.result().status_code == 200
    assert gated.batches[2:] == [("german", len(asked))]


def test_a_stream_comes_token_by_token(gated: Gated, plain: Deployment) -> None:
    expected = alone(plain, "german", PROMPTS[1], 20)
    with (
        serving(gated) as (address, _),
        httpx2.stream(
            "POST",
            f"{address}/v1/completions",
            json=body("german", PROMPTS[1], 20, stream=True),
            timeout=30,
        ) as response,
    ):
        # The first token is there, and the gate is shut.
        assert response.status_code == 200
        assert gated.steps == 0
        gated.gate.set()
        *chunks, end = events_of(response.read().decode())
    assert end is None
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer(gated: Gated, stream: bool) -> None:
    with serving(gated) as (address, service):
        connection = raw_request(address, json.dumps(body("base", count=4000, stream=stream)).encode())
        until(lambda: service.scheduler.running == 1)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        (row,) = service.scheduler._running
        connection.close()
        until(lambda: row.cancelled)
        gated.gate.set()
        until(lambda: service.scheduler.running == 0)
        assert gated.steps < 10
        assert text_of(ask(address)) is not None


def test_a_client_that_goes_away_while_it_waits_is_never_answered(gated: Gated) -> None:
    with serving(gated) as (address, service), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, address, model="base")
        until(lambda: service.scheduler.running == 1)
        connection = raw_request(address, json.dumps(body("german")).encode())
        until(lambda: service.scheduler.waiting == 1)
        connection.close()
        until(lambda: service.scheduler.waiting == 0)
        gated.gate.set()
        assert first.result().status_code == 200
        assert ask(address, model="dutch").status_code == 200
    assert [task for task, _ in gated.batches] == [None, None, "dutch"]


def test_a_client_that_goes_away_does_not_disturb_those_beside_it(gated: Gated, plain: Deployment) -> None:
    expected = alone(plain, "french", PROMPTS[2], 30)
    with serving(gated) as (address, service), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, address, model="base")
        until(lambda: service.scheduler.running == 1)
        connection = raw_request(address, json.dumps(body("french", count=4000)).encode())
        until(lambda: service.scheduler.waiting == 1)
        second = pool.submit(ask, address, prompt=PROMPTS[2], count=30)
        until(lambda: service.scheduler.waiting == 2)
        gated.gate.set()
        assert first.result().status_code == 200
        connection.close()
        assert text_of(second.result()) == expected
        until(lambda: service.scheduler.running == 0)
    assert gated.steps < 4000


def test_a_task_removed_while_in_use_answers_to_the_end_and_is_unknown_then(
    made: Path, plain: Deployment, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "deployment"))
    gated = Gated(folder)
    expected = alone(plain, "french", "one", 20)
    with serving(gated, max_batch=1) as (address, service), ThreadPoolExecutor(3) as pool:
        running = pool.submit(ask, address, count=20)
        until(lambda: service.scheduler.running == 1)
        waiting = pool.submit(ask, address, count=20)
        until(lambda: service.scheduler.waiting == 1)
        (folder / "french.task.safetensors").unlink()
        later = ask(address)
        gated.gate.set()
        assert text_of(running.result()) == expected
        for response in (waiting.result(), later):
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"
        assert ask(address, model="german").status_code == 200
        shutil.copy(made / "french.task.safetensors", folder)
        assert text_of(ask(address, count=20)) == expected


def test_more_than_may_wait_are_told_to_come_again(gated: Gated) -> None:
    with serving(gated, max_waiting=2) as (address, service), ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, address, model="base")]
        until(lambda: service.scheduler.running == 1)
        for number in (1, 2):
            answers.append(pool.submit(ask, address))
            until(lambda number=number: service.scheduler.waiting == number)
        refused = ask(address)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gated.gate.set()
        assert all(answer.result().status_code == 200 for answer in answers)
        assert ask(address).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_so_many_seconds(gated: Gated, stream: bool) -> None:
    with serving(gated, timeout=0.5) as (address, service):
        response = ask(address, stream=stream)
        if stream:  # which has begun
            assert response.status_code == 200
            *_, last = events_of(response.text)
            assert last["error"]["code"] == "timeout"
        else:
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
        gated.gate.set()
        until(lambda: service.scheduler.running == 0)


def test_a_body_that_does_not_come_is_not_waited_for(made: Path) -> None:
    with serving(Deployment(made, threads=1), timeout=0.3) as (address, _):
        connection = raw_request(address, b"")
        connection.close()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 504")


def answered(service: Any, route: str) -> dict[str, float]:
    """How many requests of a route were answered with each status."""
    return {
        sample.labels["status"]: sample.value
        for family in service.metrics.requests.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["route"] == route
    }


def test_a_body_without_end_is_cut_off(made: Path) -> None:
    with serving(Deployment(made, threads=1), max_body_bytes=10_000) as (address, service):
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            while sent < 100_000_000:
                sent += 1000
                yield b"x" * 1000

        try:
            response = httpx2.post(
                f"{address}/v1/completions",
                content=endless(),
                headers={"Content-Type": "application/json"},
                timeout=10,
            )
            assert response.status_code == 413
        except httpx2.TransportError:
            pass  # cut off before it was read
        assert sent < 50_000_000
        assert text_of(ask(address)) is not None
        # An answer is counted when it has been sent, so it may be read before.
        until = time.monotonic() + 10
        while (found := answered(service, "/v1/completions")) != {"413": 1, "200": 1}:
            assert time.monotonic() < until, found
            time.sleep(0.01)


def test_what_is_no_http_is_refused(made: Path) -> None:
    with serving(Deployment(made, threads=1)) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        for text in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 50_000):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(text)
                assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_batch_that_fails_is_answered_and_the_next_is_computed(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = Deployment(made, threads=1)
    with serving(deployment) as (address, service):
        for error in (NonFiniteError("details"), RuntimeError("details"), MemoryError("details")):

            def failing(*_: Any, error: Exception = error) -> Any:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(deployment, "decoder", failing)
                for stream in (False, True):
                    response = ask(address, stream=stream)
                    assert response.status_code == 500
                    assert response.json()["error"]["type"] == "server_error"
                    assert "details" not in response.text
            assert "details" in caplog.text
            assert service.scheduler.alive
            assert text_of(ask(address)) is not None


def test_an_answer_that_fails_in_the_middle_ends_its_stream_with_the_error(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated(made)

    def failing(_: float) -> Any:
        raise NonFiniteError("details")

    gated.gate.wait = failing  # type: ignore[assignment, method-assign]
    with serving(gated) as (address, _):
        *chunks, last = events_of(ask(address, stream=True).text)
        assert last["error"]["code"] == "internal_error"
        assert all("error" not in chunk for chunk in chunks)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_worker_dies_everybody_is_told(gated: Gated) -> None:
    class Fault(BaseException):
        pass

    def failing(_: float) -> Any:
        raise Fault

    with serving(gated) as (address, service), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, address, model="base")
        until(lambda: service.scheduler.running == 1)
        second = pool.submit(ask, address)
        until(lambda: service.scheduler.waiting == 1)
        gated.gate.wait = failing  # type: ignore[assignment, method-assign]
        gated.gate.set()
        until(lambda: not service.scheduler.alive)
        for response in (first.result(), second.result(), ask(address), httpx2.get(f"{address}/health")):
            assert response.status_code == 503


def test_openais_client_gets_answers_and_errors(made: Path, plain: Deployment) -> None:
    with (
        serving(Deployment(made, threads=1), max_body_bytes=10_000) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == [*sorted(ADAPTERS), "base"]
        assert client.models.retrieve("german").id == "german"
        for name, task in NAMES.items():
            done = client.completions.create(model=name, prompt="one", temperature=0, max_tokens=20)
            assert done.choices[0].text == alone(plain, task, "one", 20)
            (expected,) = plain.generate(task, ["one"], max_new_tokens=20)
            turn: Any = {"role": "user", "content": "one"}
            chat = client.chat.completions.create(
                model=name, messages=[turn], temperature=0, max_completion_tokens=20
            )
            assert chat.choices[0].message.content == expected.text
            assert chat.choices[0].finish_reason == expected.finish_reason
            assert chat.usage is not None
            assert chat.usage.completion_tokens == len(expected.tokens)
            stream = client.chat.completions.create(
                model=name,
                messages=[turn],
                temperature=0,
                max_completion_tokens=20,
                stream=True,
                stream_options={"include_usage": True},
            )
            *pieces, last = stream
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            assert text == expected.text
            assert last.usage == chat.usage
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="nobody", prompt="one")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="french", prompt="one", best_of=3)
        assert wrong.value.param == "best_of"
        with pytest.raises(openai.APIStatusError) as large:
            client.completions.create(model="french", prompt="x" * 20_000)
        assert large.value.status_code == 413


def test_an_address_that_cannot_be_had_is_refused() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"expected a free address, got 127.0.0.1, {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="expected a free address"):
        bind("no such host.invalid", 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"max_batch": 0},
        {"max_batch_tokens": 0},
        {"max_waiting": 0},
        {"max_body_bytes": 0},
        {"max_connections": 0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"grace": -1.0},
        {"grace": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: Any) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        Settings(**wrong)


def test_threads_of_a_server_end_with_it(made: Path) -> None:
    before = set(threading.enumerate())
    with serving(Deployment(made, threads=1)) as (address, _):
        assert ask(address).status_code == 200
    until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("loracle")])
