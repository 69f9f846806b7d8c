"""Packed examples: every one in a row, none seeing another, and the loss that they have apart."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from torch import Tensor
from torch_fixtures import tiny_llama
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from loracle.reference import ConfigError, gamma, unit_roundoff
from loracle.torch_impl.batches import IGNORED, collate
from loracle.torch_impl.encoding import Encoded
from loracle.torch_impl.loss import completion_loss
from loracle.torch_impl.packing import (
    Mode,
    Packed,
    border_mask,
    pack,
    packed_inputs,
    packing_mode,
)

SIZES = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def tiny_gpt2() -> GPT2LMHeadModel:
    """Positions that are learned, and every operation in the weights' dtype, float64."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=264, n_positions=64, n_embd=16, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).double().eval()


def tiny_opt() -> OPTForCausalLM:
    """As `tiny_gpt2`; positions that are learned behind an offset of two."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=264,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.0,
    )
    return OPTForCausalLM(config).double().eval()


def example(length: int, seed: int, prompt: int = 0) -> Encoded:
    """Random tokens, all after ``prompt`` labelled, the first one too where there is no prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(0, 264, (length,), generator=generator).tolist())
    return Encoded(ids, (*[IGNORED] * prompt, *ids[prompt:]))


EXAMPLES = (example(5, 0), example(9, 1, prompt=4), example(2, 2), example(7, 3, prompt=1), example(3, 4))


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The same packing, found by looking at every row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        left = [room - sum(lengths[at] for at in row) for row in rows]
        fitting = [at for at, free in enumerate(left) if free >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda at: (left[at], at))].append(index)
        else:
            rows.append([index])
    return [sorted(row) for row in rows]


@given(lengths=st.lists(st.integers(1, 12), max_size=60), room=st.integers(12, 40))
def test_each_example_goes_to_the_fullest_row_with_room(lengths: list[int], room: int) -> None:
    examples = [Encoded((at,) * length, (at,) * length) for at, length in enumerate(lengths)]
    rows = [[one.input_ids[0] for one in row.examples] for row in pack(examples, room)]
    assert rows == best_fit(lengths, room)
    assert sorted(at for row in rows for at in row) == list(range(len(lengths)))
    assert all(sum(lengths[at] for at in row) <= room for row in rows)


def test_positions_restart_and_first_tokens_are_no_labels() -> None:
    row = Packed((Encoded((7, 8, 9), (7, 8, 9)), Encoded((5,), (5,)), Encoded((3, 4), (IGNORED, 4), True)))
    assert row.input_ids == (7, 8, 9, 5, 3, 4)
    assert row.labels == (IGNORED, 8, 9, IGNORED, IGNORED, 4)
    assert row.position_ids == (0, 1, 2, 0, 0, 1)
    assert row.learned == 3 == sum(one.learned for one in row.examples)
    assert row.shortened
    assert not Packed(row.examples[:2]).shortened


def loss_bound(logits: Tensor, tokens: int) -> float:
    """How far apart two float32 evaluations of the mean loss over equal logits may lie.

    Each token's loss is the logarithm of a sum of V terms less a logit: V + 3 operations on numbers of the
    logits' size; the mean takes as many additions as there are tokens.
    """
    size = float(logits.abs().max()) + math.log(logits.shape[-1])
    return 2 * 2 * size * float(gamma(logits.shape[-1] + 3 + tokens, unit_roundoff("float32")))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("make", "mode"), [(tiny_gpt2, "positions"), (tiny_gpt2, "mask"), (tiny_opt, "mask")]
)
@torch.no_grad()
def test_the_loss_is_that_of_the_examples_apart(make: Any, mode: Mode, attention: str) -> None:
    model = make()
    model.set_attn_implementation(attention)
    rows = pack(EXAMPLES, 14)
    assert [len(row.examples) for row in rows] == [2, 3]
    batch = collate(rows)
    assert [len(row.input_ids) for row in rows] == [14, 12]  # one row has padding
    packed = float(completion_loss(model, packed_inputs(batch, mode, torch.float64), None))
    total = sum(float(completion_loss(model, collate([one]), None)) * one.learned for one in EXAMPLES)
    tokens = sum(one.learned for one in EXAMPLES)
    assert sum(int((batch["labels"][row, 1:] != IGNORED).sum()) for row in range(2)) == tokens
    bound = loss_bound(model(input_ids=batch["input_ids"]).logits, tokens)
    assert abs(packed - total / tokens) <= bound
    # What the bound is able to tell: examples that see each other, and a label across a border.
    seen = {**batch, "position_ids": torch.arange(14).expand(2, 14)}
    assert abs(float(completion_loss(model, seen, None)) - total / tokens) > 10 * bound
    across = {**batch, "labels": batch["labels"].clone()}
    across["labels"][0, len(rows[0].examples[0].input_ids)] = rows[0].examples[1].input_ids[0]
    leaked = float(completion_loss(model, packed_inputs(across, mode, torch.float64), None))
    assert abs(leaked - total / tokens) > 10 * bound


@pytest.mark.parametrize("mode", ["positions", "mask"])
@torch.no_grad()
def test_every_tokens_logits_are_those_of_its_example_alone(mode: Mode) -> None:
    model = tiny_gpt2()
    for row, together in zip(pack(EXAMPLES, 14), collate(pack(EXAMPLES, 14))["input_ids"], strict=True):
        positions = collate([row])["position_ids"]
        inputs = {"input_ids": together[None, : positions.shape[1]], "position_ids": positions}
        logits = model(**packed_inputs(inputs, mode, torch.float64)).logits[0]
        apart = [model(input_ids=torch.tensor([one.input_ids])).logits[0] for one in row.examples]
        # float64 throughout: the two agree to far below one rounding of float32.
        bound = unit_roundoff("float32") * float(logits.abs().max())
        assert float((logits - torch.cat(apart)).abs().max()) <= bound


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_another_neighbour_changes_no_bit(attention: str, window: int | None) -> None:
    if window is None:
        model = tiny_llama()
    else:
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, pad_token_id=0)).eval()
    model.set_attn_implementation(attention)
    assert model.config.use_cache  # a cache would make transformers forget the borders
    mode = packing_mode(model)
    assert mode == "positions"
    one, other, follower = example(6, 5), example(6, 6), example(8, 7)
    losses = []
    for first in (one, other):
        silent = Encoded(first.input_ids, (IGNORED,) * 6)
        batch = collate([Packed((silent, follower))])
        losses.append(completion_loss(model, packed_inputs(batch, mode, torch.float32), None))
    assert torch.equal(*losses)
    apart = float(completion_loss(model, collate([follower]), None))
    assert f"{apart:.4f}" == f"{float(losses[0]):.4f}"


def test_a_model_that_adds_an_offset_itself_is_packed_by_the_mask() -> None:
    """OPT makes a mask of its own where it is given none."""
    assert packing_mode(tiny_opt()) == "mask"
    assert packing_mode(tiny_gpt2().train()) == "positions"  # it has dropout, which must not disturb a trial


class OwnMask(LlamaForCausalLM):
    """A model that makes a mask of its own where it is given none, so that positions do not tell borders."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        return super().forward(input_ids, attention_mask, position_ids, **others)


class Deaf(LlamaForCausalLM):
    """A model that takes positions and masks, and heeds neither."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        return super().forward(input_ids, **others)


def test_the_mask_is_taken_where_positions_do_not_suffice() -> None:
    model = OwnMask(tiny_llama().config).train()
    model.set_attn_implementation("eager")
    assert packing_mode(model) == "mask"
    assert model.training


def test_models_whose_examples_would_see_each_other_are_refused() -> None:
    refused(
        lambda: packing_mode(Deaf(tiny_llama().config)),
        ConfigError,
        "packing: expected a model in which packed examples do not see each other, got Deaf, in which the "
        "second example's logits depend on the first; train without packing",
    )
    silent = Deaf(tiny_llama().config)
    torch.nn.init.zeros_(silent.model.embed_tokens.weight)
    with pytest.raises(ConfigError, match="got Deaf, in which"):
        packing_mode(silent)  # equal logits prove nothing where all tokens look alike
    windowed = OwnMask(tiny_llama(sliding_window=3).config)
    with pytest.raises(ConfigError, match="got OwnMask, in which"):
        packing_mode(windowed)
    counting = RobertaForCausalLM(
        RobertaConfig(
            vocab_size=264, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
        )
    )
    refused(
        lambda: packing_mode(counting),
        ConfigError,
        "packing: expected a model that counts positions from 0, got RobertaForCausalLM, which does not; "
        "train without packing",
    )
    bloom = BloomForCausalLM(BloomConfig(vocab_size=264, hidden_size=16, n_layer=1, n_head=2))
    refused(
        lambda: packing_mode(bloom),
        ConfigError,
        "packing: expected a model that takes position_ids, got BloomForCausalLM, which does not; "
        "train without packing",
    )


def test_a_token_may_see_its_example_up_to_itself() -> None:
    mask = border_mask(torch.tensor([[0, 1, 0, 0, 1, 2]]), torch.float32)
    assert mask.shape == (1, 1, 6, 6)
    seen = [[int(value) for value in row] for row in (mask[0, 0] == 0).tolist()]
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert float(mask.min()) == torch.finfo(torch.float32).min
