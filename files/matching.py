"""Which modules a LoRA configuration speaks of: PEFT's rules on dotted paths, as functions of strings.

Source: PEFT 0.21, ``tuners_utils.check_target_module_exists`` and ``BaseTuner._inject_parameters``,
``utils.other.get_pattern_key`` and ``_set_trainable``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from loracle.reference import ConfigError

from .expression_cost import takes_too_long

T = TypeVar("T")

_MOST_DIGITS = 18  # of the number of a layer; Python converts no more than some thousands


def matches(path: str, modules: Sequence[str] | str | None) -> bool:
    """Tell whether the module at ``path`` is named by ``modules``.

    A list names a module exactly or by its last components (``q_proj`` names
    ``model.layers.0.self_attn.q_proj``); a string is a regular expression that must match the whole path;
    None and the empty list name nothing.

    Raises:
        ConfigError: the regular expression is malformed.
    """
    if not modules:
        return False
    if isinstance(modules, str):
        return _compile(modules, path).fullmatch(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules)


def names_parameter(path: str, names: Sequence[str] | None) -> bool:
    """Tell whether the parameter at ``path`` is named: exactly, or by its last components."""
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def saved(path: str, names: Sequence[str] | None) -> bool:
    """Tell whether ``path`` ends in one of ``names``, as text: ``head`` is an end of ``lm_head``."""
    return any(path.endswith(name) for name in names or ())


def inside_saved(path: str, names: Sequence[str] | None) -> bool:
    """Tell whether a component of ``path`` is one of ``names`` (which may have several, and are expressions).

    This rule is narrower than `saved` where a name is a part of a component, and wider where it is not: it
    counts what lies in a module that is named.

    Raises:
        ConfigError: a name is not a regular expression.
    """
    return any(_compile(rf"(^|.*\.){name}($|\..*)", path).match(path) is not None for name in names or ())


def layer_selected(
    path: str, layers: Sequence[int] | int | None, layers_pattern: Sequence[str] | str | None = None
) -> bool:
    """Tell whether ``path`` lies in one of the numbered ``layers``; None or an empty list select every layer.

    The number is the first one after a component named in ``layers_pattern`` (regular expressions), or
    without a pattern the first component that is a number with two components before it.

    Raises:
        ConfigError: a pattern is malformed.
    """
    if layers is None or (not isinstance(layers, int) and len(layers) == 0):
        return True
    if not layers_pattern:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        hits = (_compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path).match(path) for pattern in patterns)
        found = next((hit for hit in hits if hit is not None), None)
    if found is None or found["idx"] is None:  # an alternation in a pattern may match without a number
        return False
    if len(found["idx"]) > _MOST_DIGITS:
        return False
    index = int(found["idx"])
    return index == layers if isinstance(layers, int) else index in layers


def pattern_value(path: str, pattern: Mapping[str, T], default: T) -> T:
    """Return the value of the first key of ``pattern`` that matches the end of ``path``, else ``default``.

    A key is a regular expression for one or more whole trailing components: ``(.*\\.)?(key)$``. The order of
    the mapping counts. A key equal to the path counts too, after all others, even where it is no expression
    for it.

    Raises:
        ConfigError: a key is not a regular expression.
    """
    for key, value in pattern.items():
        if _compile(rf"(.*\.)?({key})$", path).match(path):
            return value
    return pattern.get(path, default)


def check_pattern(pattern: str) -> None:
    """Check a regular expression. Raises: ConfigError."""
    _compile(pattern)


def _compile(pattern: str, path: str = "") -> re.Pattern[str]:
    """Return an expression that can be matched with `path` in a bearable time."""
    try:
        compiled = re.compile(pattern)
        endless = takes_too_long(pattern, len(path))
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"module pattern {pattern!r}: not a regular expression ({error}); correct the adapter's config"
        ) from None
    if endless:
        raise ConfigError(
            f"module pattern {pattern[:80]!r}: may take for ever on a path of {len(path)} characters; write "
            "it without repeats inside repeats"
        )
    return compiled
