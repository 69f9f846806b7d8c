"""What is measured: batches, lengths and budgets, and how often."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loracle.reference import ConfigError

from . import paper
from .methods import METHODS

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)

_SETTING = re.compile(r"(\d{1,6})x(\d{1,7})(?::(\d{1,9}(?:\.\d{1,9})?)([kM]?))?")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6}
_SHARE = paper.SETTINGS[1, 128] / paper.PARAMETERS


@dataclass(frozen=True)
class Setting:
    """A batch of texts of one length.

    Attributes:
        batch, length: of the texts.
        parameters: of an adapter for the whole model.
    """

    batch: int
    length: int
    parameters: float

    @property
    def name(self) -> str:
        """As a user writes it."""
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Effort:
    """How often something is measured.

    Attributes:
        rounds: sessions are opened anew in each, at least 2.
        blocks: of A B B A, for each pair of sessions.
        window: seconds that a single measurement takes at least; a shorter run is repeated.
        threads: onnxruntime's, at least 1.

    Raises ConfigError: a number is too small.
    """

    rounds: int = 8
    blocks: int = 2
    window: float = 0.1
    threads: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rounds", self.rounds, 2),
            ("blocks", self.blocks, 1),
            ("threads", self.threads, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")


def parse_settings(text: str, model_parameters: int) -> tuple[Setting, ...]:
    """The settings that a comma-separated list names.

    Args:
        text: `BATCHxLENGTH`, or `BATCHxLENGTH:PARAMETERS` as in `32x512:0.5M`; or `paper` for the paper's
            three. Without a number an adapter's parameters are the paper's share of the model's, 3.1%.
        model_parameters: of the whole model.

    Raises ConfigError: something else is named, or a setting twice.
    """
    share = max(1.0, _SHARE * model_parameters)
    settings = []
    for part in (own.strip() for own in text.split(",")):
        if part == "paper":
            scale = model_parameters / paper.PARAMETERS
            settings += [
                Setting(batch, length, budget * scale) for (batch, length), budget in paper.SETTINGS.items()
            ]
            continue
        found = _SETTING.fullmatch(part)
        if found is None:
            raise ConfigError(
                f"settings: expected BATCHxLENGTH, BATCHxLENGTH:PARAMETERS or paper, got {part!r}; "
                "as in 1x128,16x256:11M"
            )
        batch, length, number, unit = found.groups()
        settings.append(
            Setting(int(batch), int(length), share if number is None else float(number) * _UNITS[unit])
        )
    for setting in settings:
        if min(setting.batch, setting.length, setting.parameters) < 1:
            raise ConfigError(f"settings: expected at least 1 of everything, got {setting.name}")
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ConfigError(f"settings: expected each once, got {', '.join(names)}")
    return tuple(settings)


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods that a comma-separated list names, in the order of `METHODS`.

    Raises ConfigError: another is named, or none.
    """
    named = [part.strip() for part in text.split(",")]
    for name in named:
        if name not in METHODS:
            raise ConfigError(f"methods: expected some of {', '.join(METHODS)}, got {name!r}")
    return tuple(method for method in METHODS if method in named)


def check_context(settings: Sequence[Setting], context: int | None, before: int) -> None:
    """Raise ConfigError where a text, what may stand before it, and one token more do not fit a model.

    Args:
        context: positions that the model has; None where nothing says it.
        before: most positions that stand before a text.
    """
    for setting in settings:
        needed = setting.length + before + 1
        if context is not None and needed > context:
            raise ConfigError(
                f"settings: {setting.name}: expected a length of at most {context - before - 1}, for the "
                f"model has {context} positions, {before + 1} of them for prefix, prompt and the next token"
            )
