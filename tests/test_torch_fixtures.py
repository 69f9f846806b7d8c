"""The helpers of the torch tests themselves."""

import torch
from torch import nn
from torch_fixtures import EOS, Chain, byte_tokenizer, fill_integers, same_bits, tiny_llama


def test_same_bits_tells_signed_zeros_dtypes_and_shapes_apart() -> None:
    zero = torch.zeros(2)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, torch.zeros(2, 1))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_fill_integers_fills_every_parameter_with_integers_in_the_bound() -> None:
    layer = nn.Linear(20, 20)
    fill_integers(layer, seed=3)
    assert set(layer.weight.unique().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert torch.equal(layer.bias, layer.bias.round())


def test_chain_has_the_names_and_is_linear() -> None:
    chain = Chain()
    x = torch.tensor([1.0, -2.0, 3.0])
    zero = chain(torch.zeros(3))
    assert torch.equal(chain(2 * x) - zero, 2 * (chain(x) - zero))
    assert {name for name, _ in chain.named_children()} == {"q_proj", "k_proj", "v_proj"}


def test_byte_tokenizer_round_trips_and_closes_turns() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("né <eos>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == f"né {EOS}"
    turns = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<user>x<eos>\n"


def test_tiny_llama_is_a_function_of_its_seed() -> None:
    one, same, other = tiny_llama(1), tiny_llama(1), tiny_llama(2)
    assert same_bits(one.lm_head.weight, same.lm_head.weight)
    assert not same_bits(one.lm_head.weight, other.lm_head.weight)
