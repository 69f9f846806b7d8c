"""The fields of a request: which are read, which may be there, and which are refused by name."""

from typing import Any

import pytest

from loracle.export import Sampling
from loracle.serve.asked import Asked, chat_asked, completion_asked
from loracle.serve.errors import RequestError

COMPLETION = {"model": "french", "prompt": "one"}
CHAT = {"model": "french", "messages": [{"role": "user", "content": "one"}]}


def completion(**fields: Any) -> Asked:
    return completion_asked({**COMPLETION, **fields}, 3)


def chat(**fields: Any) -> Asked:
    return chat_asked({**CHAT, **fields})


@pytest.mark.parametrize("ask", [completion, chat])
def test_what_is_left_out_is_openais(ask: Any) -> None:
    asked = ask(seed=7)
    assert asked.model == "french"
    assert asked.sampling == Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=7)
    assert (asked.max_tokens, asked.stop, asked.stream, asked.include_usage) == (None, (), False, False)
    assert ask().sampling.seed != ask().sampling.seed


@pytest.mark.parametrize("ask", [completion, chat])
def test_what_is_there_is_taken(ask: Any) -> None:
    asked = ask(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=-1,
        max_tokens=5,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    assert asked.sampling == Sampling(0.5, 3, 0.25, 2**64 - 1)
    assert (asked.max_tokens, asked.stop, asked.stream, asked.include_usage) == (5, ("a", "b"), True, True)
    assert ask(stop="x").stop == ("x",)
    assert ask(temperature=0).sampling.greedy
    assert ask(temperature=2).sampling.temperature == 2


def test_prompts_are_one_or_several() -> None:
    assert completion().prompts == ("one",)
    assert completion(prompt=["a", ""]).prompts == ("a", "")
    assert completion().messages == ()


def test_a_chats_turns_are_role_and_text() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    )
    assert chat().prompts == ()


def test_a_chats_limit_has_two_names() -> None:
    assert chat(max_completion_tokens=4, max_tokens=5).max_tokens == 4
    assert chat(max_completion_tokens=4).limit_field == "max_completion_tokens"
    assert chat(max_completion_tokens=None, max_tokens=5).max_tokens == 5


@pytest.mark.parametrize("ask", [completion, chat])
@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"n": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"n": None, "logprobs": None, "stop": None, "seed": None, "temperature": None, "stream": None},
        {"stream": False, "stream_options": None, "top_p": None, "max_tokens": None},
    ],
)
def test_fields_that_change_nothing_may_be_there(ask: Any, fields: dict[str, Any]) -> None:
    assert ask(**fields).sampling.temperature == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False},
        {"store": False, "modalities": ["text"], "tools": None},
    ],
)
def test_a_chats_fields_that_change_nothing_may_be_there(fields: dict[str, Any]) -> None:
    assert chat(**fields) is not None


WRONG = [
    ("model", None),
    ("model", 3),
    ("model", ["french"]),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 1e-50),
    ("top_p", 1.1),
    ("top_p", -1),
    ("top_p", []),
    ("top_k", -1),
    ("top_k", 1.0),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 0.5),
    ("seed", False),
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", 10**400),
    ("max_tokens", "5"),
    ("max_tokens", 5.0),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", 1]),
    ("stop", list("abcde")),
    ("stop", {}),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
]


@pytest.mark.parametrize("ask", [completion, chat])
@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_values_are_refused_by_name(ask: Any, field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**{field: value})
    assert (caught.value.status, caught.value.param) == (400, field)
    assert str(caught.value).startswith(f"{field}: expected ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("options", [[], {"include_usage": 1}, {"other": 1}])
def test_stream_options_are_checked(options: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(stream=True, stream_options=options)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("ask", "field", "value"),
    [
        *((ask, "n", value) for ask in (completion, chat) for value in (2, 0, True, "1")),
        *((ask, "logit_bias", {"5": 1}) for ask in (completion, chat)),
        *((ask, "presence_penalty", value) for ask in (completion, chat) for value in (0.1, False)),
        *((ask, "frequency_penalty", -1) for ask in (completion, chat)),
        (completion, "best_of", 2),
        (completion, "echo", True),
        (completion, "echo", 0),
        (completion, "logprobs", 0),
        (completion, "suffix", "x"),
        (chat, "logprobs", True),
        (chat, "top_logprobs", 3),
        (chat, "tools", [{"type": "function"}]),
        (chat, "response_format", {"type": "json_object"}),
        (chat, "modalities", ["text", "audio"]),
        (chat, "audio", {"voice": "x"}),
        (chat, "store", True),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(ask: Any, field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**{field: value})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field, "unsupported_field")


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (completion, "messages"),
        (completion, "max_completion_tokens"),
        (completion, "min_p"),
        (completion, "x" * 500),
        (chat, "prompt"),
        (chat, "best_of"),
        (chat, ""),
    ],
)
def test_fields_that_nobody_knows_are_refused_by_name(ask: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**{field: "x"})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field[:80], "unknown_field")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("prompt", [None, [], 1, {}, [1, 2], ["a", [1]], [None], ["a"] * 4])
def test_wrong_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": ["a"]}], "messages[1].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a", "name": "me"}], "messages[0].name"),
    ],
)
def test_wrong_messages_are_refused_at_their_place(messages: Any, where: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(messages=messages)
    assert (caught.value.status, caught.value.param) == (400, where)
