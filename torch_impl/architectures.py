"""Which layers an architecture's attention consists of, by the names that transformers gives them."""

from collections.abc import Iterable

from loracle.files.matching import matches

ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "qkv_proj",
    "query",
    "key",
    "value",
    "attention.output.dense",
    "SelfAttention.q",
    "SelfAttention.k",
    "SelfAttention.v",
    "SelfAttention.o",
    "EncDecAttention.q",
    "EncDecAttention.k",
    "EncDecAttention.v",
    "EncDecAttention.o",
    "attn.c_attn",
    "attn.c_proj",
    "query_key_value",
    "attention.dense",
    "self_attention.dense",
    "q_lin",
    "k_lin",
    "v_lin",
    "out_lin",
    "Wqkv",
)
"""What the shorthand ``"attention"`` stands for, as far as a model has it: the query, key, value and output
projections of the LoRA paper, section 4.2, whatever they are called."""

_DEFAULTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
)

_EXCEPTIONS = {
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def attention_targets(paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of `ATTENTION` that name at least one of the paths of a model's linear layers."""
    return _present(ATTENTION, tuple(paths))


def default_targets(model_type: str | None, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the names of query and value, or of the projection that they are fused in; empty if unknown.

    The paper's choice (section 7.1), and PEFT 0.21's default for every architecture that it has one for
    and that transformers has the code of.

    Args:
        model_type: of the model's configuration, where it has one.
        paths: of the model's linear layers.
    """
    paths = tuple(paths)
    for names in (_EXCEPTIONS.get(model_type or "", ()), *_DEFAULTS):
        if names and _present(names, paths) == names:
            return names
    return ()


def _present(names: Iterable[str], paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if any(matches(path, (name,)) for path in paths))
