"""The server's answers and refusals, in OpenAI's objects; without a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_fixtures import ADAPTERS, CONTEXT, PROMPTS, alone, events_of, make_deployment
from starlette.testclient import TestClient

from loracle.export import Deployment, Sampling
from loracle.serve import Service, Settings, application

TASKS = [*sorted(ADAPTERS), "base"]
BODY = {"model": "french", "prompt": "one", "temperature": 0, "max_tokens": 3}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return Deployment(make_deployment(tmp_path_factory), threads=1)


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[TestClient]:
    settings = Settings(max_body_bytes=20_000, max_waiting=8, max_batch=4)
    with TestClient(application(Service(deployment, settings)), raise_server_exceptions=False) as client:
        yield client


def complete(client: TestClient, **fields: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={**BODY, **fields})


def chat(client: TestClient, content: str = "one", **fields: Any) -> httpx2.Response:
    body = {"model": "french", "temperature": 0, "max_tokens": 3, **fields}
    return client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **body}
    )


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of a response, which has this status and OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def task_of(name: str) -> str | None:
    return None if name == "base" else name


def test_each_task_gives_its_own_answers(client: TestClient, deployment: Deployment) -> None:
    answers = {}
    for name in TASKS:
        body = complete(client, model=name, prompt=PROMPTS, max_tokens=20).json()
        answers[name] = [choice["text"] for choice in body["choices"]]
        assert answers[name] == [alone(deployment, task_of(name), prompt, 20) for prompt in PROMPTS]
    assert len({str(own) for own in answers.values()}) == len(TASKS)


def test_a_completion_has_openais_form(client: TestClient, deployment: Deployment) -> None:
    response = complete(client, prompt=["one", "three"], max_tokens=4)
    body = response.json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert re.fullmatch("cmpl-[0-9a-f]{24}", body["id"])
    assert body["id"].endswith(response.headers["x-request-id"])
    assert (body["object"], body["model"]) == ("text_completion", "french")
    assert isinstance(body["created"], int)
    for index, (choice, prompt) in enumerate(zip(body["choices"], ["one", "three"], strict=True)):
        text = alone(deployment, "french", prompt, 4)
        assert choice == {"text": text, "index": index, "logprobs": None, "finish_reason": "length"}
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}


def test_a_chat_has_openais_form(client: TestClient, deployment: Deployment) -> None:
    body = chat(client, max_tokens=12).json()
    (expected,) = deployment.generate("french", ["one"], max_new_tokens=12)
    assert body["object"] == "chat.completion"
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", body["id"])
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.text, "refusal": None},
            "logprobs": None,
            "finish_reason": expected.finish_reason,
        }
    ]
    assert body["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert body["usage"]["completion_tokens"] == len(expected.tokens)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("stop", [None, "e", ["3", "t"]])
def test_a_stream_says_what_the_whole_answer_says(client: TestClient, temperature: float, stop: Any) -> None:
    fields = {"temperature": temperature, "seed": 5, "stop": stop, "max_tokens": 30}
    fields["stream_options"] = {"include_usage": True}
    for ask, prompts in ((complete, {"prompt": PROMPTS}), (chat, {})):
        whole = ask(client, **{**fields, **prompts, "stream_options": None}).json()
        response = ask(client, **fields, **prompts, stream=True)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, end = events_of(response.text)
        assert end is None
        assert len({chunk["id"] for chunk in chunks}) == 1
        *pieces, usage = chunks
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        assert all(piece["usage"] is None for piece in pieces)
        for choice in whole["choices"]:
            own = [c for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
            assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
            if ask is chat:
                assert own[0]["delta"]["role"] == "assistant"
                text = "".join(c["delta"].get("content", "") for c in own)
                assert text == choice["message"]["content"]
                assert {p["object"] for p in pieces} == {"chat.completion.chunk"}
            else:
                assert "".join(c["text"] for c in own) == choice["text"]
                assert {p["object"] for p in pieces} == {"text_completion"}


def test_a_stream_has_no_usage_unless_it_is_asked_for(client: TestClient) -> None:
    *chunks, end = events_of(complete(client, stream=True).text)
    assert end is None
    assert chunks
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_drawn_answers_depend_on_the_seed_and_not_on_what_is_beside_them(
    client: TestClient, deployment: Deployment
) -> None:
    drawn = {"temperature": 1, "top_p": 0.9, "top_k": 50, "max_tokens": 20}
    sampling = Sampling(1.0, 50, 0.9, 7)
    expected = [alone(deployment, "german", prompt, 20, sampling) for prompt in PROMPTS]
    body = complete(client, model="german", prompt=PROMPTS, seed=7, **drawn).json()
    assert [choice["text"] for choice in body["choices"]] == expected
    other = complete(client, model="german", prompt=PROMPTS, seed=8, **drawn).json()
    assert all(c["text"] != text for c, text in zip(other["choices"], expected, strict=True))
    free = [complete(client, prompt="one", **drawn).json()["choices"][0]["text"] for _ in range(2)]
    assert free[0] != free[1]
    # Equal prompts of one request get different answers, the first of them the one it gets alone.
    twice = complete(client, model="german", prompt=[PROMPTS[0]] * 2, seed=7, **drawn).json()
    assert twice["choices"][0]["text"] == expected[0] != twice["choices"][1]["text"]


def test_an_answer_ends_at_a_stop_string_or_an_end_token(client: TestClient, deployment: Deployment) -> None:
    drawn = {"model": "base", "temperature": 1, "seed": 3, "max_tokens": 40}
    whole = complete(client, **drawn).json()["choices"][0]["text"]
    stop = whole[4:6]
    choice = complete(client, **drawn, stop=["never", stop]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    found = []
    for seed in range(40):
        body = complete(client, **{**drawn, "seed": seed, "max_tokens": 60}).json()
        count = body["usage"]["completion_tokens"]
        found.append(body["choices"][0]["finish_reason"])
        assert count == 60 if found[-1] == "length" else count <= 60
    assert set(found) == {"stop", "length"}
    special = complete(client, **drawn, stop="<s>")
    assert special.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_beginning_of_a_stop_string_at_the_end_of_an_answer_is_text(
    client: TestClient, stream: bool
) -> None:
    drawn = {"model": "base", "temperature": 1, "seed": 3, "max_tokens": 20}
    whole = complete(client, **drawn).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    response = complete(client, **drawn, stop=f"{whole['text'][-2:]} and more", stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events_of(response.text)[:-1]]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        assert choices[-1]["finish_reason"] == "length"
    else:
        assert response.json()["choices"][0] == whole


def test_an_answer_has_128_tokens_or_what_the_context_has_room_for(client: TestClient) -> None:
    fields = {"model": "base", "temperature": 1, "seed": 1, "max_tokens": None}
    longest = max(
        complete(client, **{**fields, "seed": seed}).json()["usage"]["completion_tokens"] for seed in range(8)
    )
    assert longest == 128
    prompt = "x" * (CONTEXT - 3)
    body = complete(client, **fields, prompt=prompt).json()
    assert body["usage"]["prompt_tokens"] == CONTEXT - 3
    assert body["usage"]["completion_tokens"] <= 3
    error = error_of(complete(client, **fields, prompt=f"{prompt}xxx"), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(("prompt", "tokens"), [("one", CONTEXT - 2), ("x" * 2000, CONTEXT - 1999)])
def test_more_tokens_than_the_context_are_refused(client: TestClient, prompt: str, tokens: int) -> None:
    error = error_of(complete(client, prompt=prompt, max_tokens=tokens), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    error = error_of(chat(client, prompt, max_tokens=None, max_completion_tokens=tokens), 400)
    assert error["param"] == "max_completion_tokens"


def test_an_unknown_task_is_refused_with_the_names_that_there_are(client: TestClient) -> None:
    for name in (
        "nobody",
        "French",
        "../french",
        "french.task",
        "model",
        "swappable",
        "",
        "a\0",
        "/etc/passwd",
    ):
        for ask in (complete, chat):
            error = error_of(ask(client, model=name), 404)
            assert error["message"] == f"model: expected one of dutch, french, german, base, got {name!r}"
            assert (error["param"], error["code"]) == ("model", "model_not_found")
    error = error_of(complete(client, model="x" * 10_000), 404)
    assert len(error["message"]) < 200


def test_the_base_is_called_base_or_by_its_folder(client: TestClient, deployment: Deployment) -> None:
    assert deployment.folder.name == "deployment"
    texts = [
        complete(client, model=name, max_tokens=9).json()["choices"][0] for name in ("base", "deployment")
    ]
    assert texts[0] == texts[1]


def test_a_task_that_is_called_base_is_a_task(deployment: Deployment, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deployment.folder, tmp_path / "other"))
    (folder / "french.task.safetensors").rename(folder / "base.task.safetensors")
    with TestClient(application(Service(Deployment(folder), Settings()))) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["base", "dutch", "german"]
        found = complete(client, model="base", max_tokens=9).json()["choices"][0]["text"]
        assert found == alone(deployment, "french", "one", 9)
        other = complete(client, model="other", max_tokens=9).json()["choices"][0]["text"]
        assert other == alone(deployment, None, "one", 9)


def test_models_are_listed_and_found(client: TestClient) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == TASKS
    for model in body["data"]:
        assert model.keys() == {"id", "object", "created", "owned_by"}
        assert client.get(f"/v1/models/{model['id']}").json() == model
    error_of(client.get("/v1/models/nobody"), 404)
    error_of(client.get("/v1/models/%2e%2e%2ffrench"), 404)


def test_unknown_paths_and_methods_have_the_same_form(client: TestClient) -> None:
    for path in ("/", "/v1", "/v1/completions/", "/v1/embeddings", "/../model.onnx", "/%2e%2e/model.onnx"):
        error = error_of(client.get(path, follow_redirects=False), 404)
        assert error["type"] == "invalid_request_error"
    for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("POST", "/health")):
        response = client.request(method, path)
        error_of(response, 405)
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 15_000, "application/json", 400),
        (b'{"model": "french", "prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"model": "french", "model": "german", "prompt": "a"}', "application/json", 400),
        (b'{"model": "french", "prompt": "\\ud800"}', "application/json", 400),
        (b"{}", "application/json; charset=utf-8", 400),
        (b"", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 415),
    ],
)
def test_bodies_that_are_no_json_are_refused(
    client: TestClient, content: bytes, kind: str, status: int
) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        error_of(client.post(path, content=content, headers={"Content-Type": kind}), status)


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    error_of(client.post("/v1/completions", content=b"{}", headers=headers), 415)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(20_000, 400), (20_001, 413), (500_000, 413)])
def test_a_body_may_have_as_many_bytes_as_the_settings_say(
    client: TestClient, chunked: bool, size: int, status: int
) -> None:
    body = b'{"model": "french", "prompt": 0, "user": "' + b"x" * size
    body = body[: size - 2] + b'"}'
    content = (body[at : at + 999] for at in range(0, size, 999)) if chunked else body
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error = error_of(response, status)
    assert error["code"] == ("request_too_large" if status == 413 else "invalid_value")


def test_more_prompts_than_may_wait_are_refused(client: TestClient) -> None:
    assert complete(client, prompt=["a"] * 8).status_code == 200
    assert error_of(complete(client, prompt=["a"] * 9), 400)["param"] == "prompt"


def test_a_prompt_without_tokens_is_refused(client: TestClient) -> None:
    assert error_of(complete(client, prompt=["a", ""]), 400)["param"] == "prompt"


def test_messages_that_the_template_refuses_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deployment.folder, tmp_path / "other"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('turns must alternate') }}")
    with TestClient(application(Service(Deployment(folder), Settings()))) as client:
        error = error_of(chat(client), 400)
        assert error["param"] == "messages"
        assert "turns must alternate" in error["message"]
        assert str(folder) not in error["message"]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with TestClient(application(Service(Deployment(folder), Settings()))) as client:
        assert "chat template" in error_of(chat(client), 400)["message"]
        assert complete(client).status_code == 200


def test_it_tells_that_it_is_alive_and_ready(deployment: Deployment) -> None:
    service = Service(deployment, Settings())
    with TestClient(application(service)) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        service.draining = True
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        response = complete(client)
        assert error_of(response, 503)["code"] == "shutting_down"
        assert response.headers["retry-after"]
        service.draining = False
        service.scheduler.stop()
        service.scheduler.join(10)
        assert client.get("/health").status_code == 503
        error_of(complete(client), 503)


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """All metrics, by name and labels' values."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_requests_tokens_and_tasks_are_counted(deployment: Deployment) -> None:
    for task in ADAPTERS:
        deployment.evict(task)
    with TestClient(application(Service(deployment, Settings()))) as client:
        complete(client, prompt=["one", "two"])
        complete(client, prompt="one", stream=True)
        chat(client, model="base")
        for number in range(20):
            complete(client, model=f"nobody{number}")
            client.get(f"/somewhere/{number}")
            client.get(f"/v1/models/{number}")
        found = samples(client)
        requests = {key[1:]: value for key, value in found.items() if key[0] == "loracle_requests_total"}
        assert requests == {
            ("/v1/completions", "200", "french"): 2,
            ("/v1/chat/completions", "200", "base"): 1,
            ("/v1/completions", "404", ""): 20,
            ("other", "404", ""): 20,
            ("/v1/models/{model}", "404", ""): 20,
        }
        assert found["loracle_prompt_tokens_total", "french"] == 9
        assert found["loracle_answer_tokens_total", "french"] == 9
        assert found["loracle_answer_tokens_total", "base"] == 3
        assert found["loracle_time_to_first_token_seconds_count", "french"] == 2
        assert 0 < found["loracle_time_to_first_token_seconds_sum", "french"] < 60
        assert found[("loracle_waiting_prompts",)] == found[("loracle_running_prompts",)] == 0
        assert found[("loracle_loaded_tasks",)] == 1
        assert found[("loracle_loaded_bytes",)] == deployment.loaded_bytes > 0
        assert found[("loracle_batch_rows_count",)] == 3
        assert found[("loracle_batch_rows_sum",)] == 4


def test_a_line_of_the_log_has_counts_and_no_word_of_a_prompt(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "loracle.serve"):
        response = complete(client, prompt="secret words", user="secret")
        complete(client, model="secret\nname")
    first, second = (record.getMessage() for record in caplog.records if record.name == "loracle.serve")
    number = response.headers["x-request-id"]
    assert re.fullmatch(rf"{number} /v1/completions french 200 12\+3 tokens \d+ ms", first)
    assert re.fullmatch(r"[0-9a-f]{24} /v1/completions - 404 0\+0 tokens \d+ ms", second)


def test_a_fault_of_ours_is_an_error_object_without_details(
    client: TestClient, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> Any:
        raise ZeroDivisionError("details")

    monkeypatch.setattr(type(deployment), "tasks", property(fault))
    error = error_of(client.get("/v1/models"), 500)
    assert error["type"] == "server_error"
    assert "details" not in json.dumps(error)
