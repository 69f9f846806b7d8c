"""A tensor is found by its very name, the body's prefix, or what transformers renames; never by guess."""

import pytest

from loracle.files.architectures import ARCHITECTURES
from loracle.files.tensor_names import resolve_name

BERT, GPT2, OPT, VIT = (ARCHITECTURES[kind] for kind in ("bert", "gpt2", "opt", "vit"))
QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("name", "held", "found"),
    [
        (QUERY, (QUERY,), QUERY),
        (f"bert.{QUERY}", (QUERY,), QUERY),
        (QUERY, (f"bert.{QUERY}",), f"bert.{QUERY}"),
        # Both are there: the very name counts.
        (QUERY, (f"bert.{QUERY}", QUERY), QUERY),
        (f"bert.{QUERY}", (QUERY, f"bert.{QUERY}"), f"bert.{QUERY}"),
        # Two names at the same distance are a guess.
        (f"bert.{QUERY}", (QUERY, f"bert.bert.{QUERY}"), None),
        (QUERY, ("encoder.layer.1.attention.self.query.weight",), None),
        (QUERY, (f"roberta.{QUERY}",), None),
        (f"roberta.{QUERY}", (QUERY,), None),
        # A prefix is whole components.
        (f"bertic.{QUERY}", (QUERY, f"ic.{QUERY}"), None),
        ("embeddings.LayerNorm.bias", ("bert.embeddings.LayerNorm.beta",), "bert.embeddings.LayerNorm.beta"),
        ("bert.embeddings.LayerNorm.gamma", ("embeddings.LayerNorm.weight",), "embeddings.LayerNorm.weight"),
        ("bert.a.LayerNorm.weight", ("bert.a.LayerNorm.gamma", "a.LayerNorm.weight"), "a.LayerNorm.weight"),
        ("x.LayerNorm.weight", ("x.LayerNorm.gamma", "bert.x.LayerNorm.gamma"), "x.LayerNorm.gamma"),
        ("bert.x.LayerNorm.weight", ("bert.bert.x.LayerNorm.gamma", "x.LayerNorm.gamma"), None),
    ],
)
def test_a_name_is_found_by_the_nearest_rule_or_not_at_all(
    name: str, held: tuple[str, ...], found: str | None
) -> None:
    assert resolve_name(name, held, BERT) == found


def test_the_prefix_is_the_architectures_own() -> None:
    assert resolve_name("transformer.h.0.ln_1.bias", ("h.0.ln_1.bias",), GPT2) == "h.0.ln_1.bias"
    assert resolve_name("model.decoder.x", ("decoder.x",), OPT) == "decoder.x"
    assert resolve_name("bert.x", ("x",), GPT2) is None


def test_layers_that_transformers_renames_are_found_in_either_layout() -> None:
    old = "vit.encoder.layer.3.attention.attention.query.weight"
    new = "layers.3.attention.q_proj.weight"
    assert resolve_name(f"vit.{new}", (old,), VIT) == old
    assert resolve_name(new, (old,), VIT) == old
    assert resolve_name(old, (new,), VIT) == new
    for own, other in (
        ("attention.o_proj.bias", "attention.output.dense.bias"),
        ("mlp.fc1.bias", "intermediate.dense.bias"),
        ("mlp.fc2.bias", "output.dense.bias"),
    ):
        held = f"vit.encoder.layer.0.{other}"
        assert resolve_name(f"vit.layers.0.{own}", (held,), VIT) == held


def test_without_a_known_architecture_only_the_very_name_is_found() -> None:
    assert resolve_name("x", ("x",), None) == "x"
    assert resolve_name("bert.x", ("x",), None) is None
    assert resolve_name("a.LayerNorm.weight", ("a.LayerNorm.gamma",), None) is None
