"""What a request asks for, read from its object: completions and chat, in OpenAI's fields."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loracle.export.sampling import Sampling
from loracle.reference import ConfigError

from .errors import RequestError, shortened, wrong
from .fields import Fields

Message = Mapping[str, str]

MOST_STOPS = 4
_MOST_TOKENS = 2**31 - 1

_KNOWN = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
)
_IGNORED = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
_COMPLETION_NEUTRAL = {
    **_NEUTRAL,
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}
_CHAT_NEUTRAL = {
    **_NEUTRAL,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "reasoning_effort": ("none",),
    "prediction": (),
    "audio": (),
    "verbosity": (),
    "web_search_options": (),
}
# "developer" is what OpenAI calls the system's role for later models; templates know "system".
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        model: the name of a task, or of the base.
        prompts: texts to continue; none where `messages` are to be answered.
        messages: a chat's turns, each with a role and a content.
        max_tokens: of an answer; None leaves it to the server.
        sampling: how tokens are chosen.
        stop: strings that end an answer.
        stream: whether text is sent as it comes.
        include_usage: whether a stream ends with the counts of tokens.
        limit_field: what the client calls `max_tokens`.
    """

    model: str
    prompts: tuple[str, ...]
    messages: tuple[Message, ...]
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    limit_field: str = "max_tokens"


def completion_asked(body: Mapping[str, Any], most_prompts: int) -> Asked:
    """What a request for completions asks for. Raises RequestError: a field is not as it must be."""
    fields = Fields(body, known=_KNOWN | {"prompt"}, ignored=_IGNORED, neutral=_COMPLETION_NEUTRAL)
    return _asked(fields, _prompts(fields.value("prompt"), most_prompts), (), "max_tokens")


def chat_asked(body: Mapping[str, Any]) -> Asked:
    """What a request for a chat's next turn asks for. Raises RequestError: a field is not as it must be."""
    fields = Fields(
        body,
        known=_KNOWN | {"messages", "max_completion_tokens"},
        ignored=_IGNORED,
        neutral=_CHAT_NEUTRAL,
    )
    limit = "max_completion_tokens" if fields.value("max_completion_tokens") is not None else "max_tokens"
    return _asked(fields, (), _messages(fields.value("messages")), limit)


def _asked(fields: Fields, prompts: tuple[str, ...], messages: tuple[Message, ...], limit: str) -> Asked:
    model = fields.text("model")
    max_tokens = fields.integer(limit, 1, _MOST_TOKENS)
    stream = fields.flag("stream")
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    try:
        sampling = Sampling(
            temperature=fields.number("temperature", 0, 2, 1.0),
            top_k=fields.integer("top_k", 0, _MOST_TOKENS) or 0,
            top_p=fields.number("top_p", 0, 1, 1.0),
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
        )
    except ConfigError as error:  # a temperature so small that nothing can be divided by it
        raise wrong("temperature", "expected 0, or a number that is not as small") from error
    return Asked(
        model=model,
        prompts=prompts,
        messages=messages,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=fields.strings("stop", MOST_STOPS),
        stream=stream,
        include_usage=_include_usage(fields.value("stream_options"), stream),
        limit_field=limit,
    )


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", f"expected an object, got {shortened(options)}")
    if not stream:
        raise wrong("stream_options", "expected none where stream is not true")
    fields = Fields(
        options, known=frozenset({"include_usage"}), ignored=frozenset({"include_obfuscation"}), neutral={}
    )
    return fields.flag("include_usage")


def _prompts(value: Any, most: int) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise wrong("prompt", f"expected a string or a list of strings, got {shortened(value)}")
    if len(found) > most:
        raise wrong("prompt", f"expected at most {most} at a time, got {len(found)}")
    return tuple(found)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", f"expected a list of messages, got {shortened(value)}")
    return tuple(_message(f"messages[{at}]", one) for at, one in enumerate(value))


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise wrong(where, f"expected an object, got {shortened(value)}")
    for name, part in value.items():
        if name not in ("role", "content") and part not in (None, []):
            raise RequestError(
                400,
                f"{where}.{name[:80]}: expected none, for it is not supported",
                param=f"{where}.{name[:80]}",
                code="unsupported_field",
            )
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"expected one of {', '.join(_ROLES)}, got {shortened(role)}")
    return {"role": _ROLES[role], "content": _content(f"{where}.content", value.get("content"))}


def _content(where: str, value: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(where, f"expected a string or a list of parts, got {shortened(value)}")
    for at, part in enumerate(value):
        if (
            not isinstance(part, dict)
            or part.keys() != {"type", "text"}
            or part["type"] != "text"
            or not isinstance(part["text"], str)
        ):
            raise wrong(f"{where}[{at}]", f"expected a part of type text, got {shortened(part)}")
    return "".join(part["text"] for part in value)
