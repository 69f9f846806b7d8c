"""Text to tokens and back beside an exported model: tokenizer.json, the chat template, the end tokens.

Needs the tokenizers and jinja2 packages; neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding

from loracle.files.config_checks import short
from loracle.files.json_file import MAX_BYTES, read_json_object, read_regular_file
from loracle.reference import ConfigError, FileError

from .names import GENAI_FILE, model_folder
from .streaming import AnswerText, StopFilter
from .tokenizer_file import read_tokenizer, tokenizer_errors

# Files that name the end tokens, and the section where they do.
_END_TOKENS = (("generation_config.json", None), (GENAI_FILE, "model"), ("config.json", None))

# What a template raises that is no template for these messages; it is a program, in a sandbox.
_REFUSALS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class TextModel:
    """The tokenizer files of a model folder, or of the folder of a graph.

    Attributes:
        stop: tokens that end an answer, as the first of `generation_config.json`, `genai_config.json` and
            `config.json` says that names any.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = model_folder(folder)
        self._path = folder / "tokenizer.json"
        self.tokenizer = read_tokenizer(self._path)
        # Some files ask for a fixed length, which transformers does not heed either.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config_path = folder / "tokenizer_config.json"
        self._config = read_json_object(config_path) if config_path.is_file() else {}
        template_path = folder / "chat_template.jinja"
        template = _read_text(template_path) if template_path.is_file() else self._config.get("chat_template")
        self._template: str | None = template if isinstance(template, str) else None
        self.stop = _stop_tokens(folder)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's next turn, as `apply_chat_template` renders it.

        Raises ConfigError where the folder has no chat template or the template refuses the messages.
        """
        if self._template is None:
            raise ConfigError(
                "chat template: expected chat_template.jinja or one in tokenizer_config.json, found none"
            )

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        special = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in self._config.items()
            if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value is not None
        }
        try:
            return environment.from_string(self._template).render(
                messages=list(messages), add_generation_prompt=True, **special
            )
        except _REFUSALS as error:
            raise ConfigError(f"chat template: it refuses the messages: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with tokenizer_errors(self._path):
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encoding(self, text: str, pair: str | None = None) -> Encoding:
        """The tokens of a text, or of a pair, with their segments. Raises FileError: the tokenizer fails."""
        with tokenizer_errors(self._path):
            return self.tokenizer.encode(text, pair)

    def encode_prompt(self, prompt: str, *, system: str | None = None, raw: bool = False) -> list[int]:
        """Tokens of `prompt` as a user's turn, or as it stands where `raw` or there is no template."""
        if raw or not self.has_chat_template:
            return self.encode(prompt if system is None else f"{system}\n{prompt}")
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.encode(
            self.chat([*messages, {"role": "user", "content": prompt}]), add_special_tokens=False
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens."""
        with tokenizer_errors(self._path):
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def answer(self, stops: Sequence[str] = ()) -> AnswerText:
        """An empty answer that `stops` end; see `stop_rules`."""
        return AnswerText(self.tokenizer, stops)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The pieces of text as tokens arrive; a character split over tokens waits until it is whole."""
        answer = self.answer()
        for token in ids:
            piece = answer.push(token)
            if piece:
                yield piece

    def stop_rules(self, stops: Sequence[str] = ()) -> tuple[frozenset[int], tuple[str, ...]]:
        """The tokens and the strings that end an answer: the model's end tokens and `stops`.

        A string of `stops` that is a special token is counted among the tokens: it never shows in text.

        Raises ConfigError for an empty string.
        """
        added = self.tokenizer.get_added_tokens_decoder()
        special = {entry.content: token for token, entry in added.items() if entry.special}
        strings = tuple(stop for stop in stops if stop not in special)
        StopFilter(strings)
        return self.stop | {special[stop] for stop in stops if stop in special}, strings


def _read_text(path: Path) -> str:
    try:
        return read_regular_file(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: expected text in UTF-8, got other bytes ({error.reason})") from None


def _stop_tokens(folder: Path) -> frozenset[int]:
    """The end tokens, from the first file that names any.

    Raises FileError where they are no tokens.
    """
    for name, section in _END_TOKENS:
        path = folder / name
        entries = read_json_object(path) if path.is_file() else {}
        if section is not None:
            entries = entries.get(section) or {}
        found = entries.get("eos_token_id") if isinstance(entries, dict) else None
        if found is None:
            continue
        tokens = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise FileError(f"{path}: eos_token_id: expected a token or a list of tokens, got {short(found)}")
        return frozenset(tokens)
    return frozenset()
