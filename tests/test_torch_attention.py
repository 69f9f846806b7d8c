"""The attention is switched by length, in bfloat16 on the CPU alone."""

import pytest
from torch_fixtures import tiny_llama

from loracle.torch_impl.attention import SHORT, AttentionChoice


@pytest.mark.parametrize(
    ("bf16", "start", "chosen"),
    [
        (True, "sdpa", ("eager", "sdpa", "eager")),
        (False, "sdpa", ("sdpa",) * 3),
        (True, "eager", ("eager",) * 3),
    ],
)
def test_short_batches_in_bfloat16_get_plain_products(
    bf16: bool, start: str, chosen: tuple[str, ...]
) -> None:
    model = tiny_llama()
    model.set_attn_implementation(start)
    choice = AttentionChoice(model, bf16=bf16)
    seen = []
    for length in (SHORT, SHORT + 1, 1):
        choice.choose(length)
        seen.append(model.config._attn_implementation)
    assert tuple(seen) == chosen
