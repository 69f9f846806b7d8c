"""The lean loss is the model's own, and falls back to it where it must."""

import math

import pytest
import torch
from torch import Tensor
from torch_fixtures import tiny_llama

from loracle.reference import gamma, unit_roundoff
from loracle.torch_impl.encoding import IGNORED
from loracle.torch_impl.loss import completion_loss, mean_loss, takes_a_mask


def batch(seed: int, rows: int = 3, length: int = 8) -> dict[str, Tensor]:
    """Random tokens; the rows are learned in their last parts, of different lengths, and padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 264, (rows, length), generator=generator)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    for row in range(rows):
        labels[row, : row + 2] = IGNORED
        labels[row, length - row :] = IGNORED
        mask[row, length - row :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tolerance(logits: Tensor, tokens: int) -> float:
    """How far two evaluations of the loss may lie apart: float32 logits of one float64 model, any summation.

    Each token's loss is the logarithm of a sum of V terms less a logit: V + 3 operations on numbers of the
    logits' size; the mean takes as many additions as there are tokens.
    """
    size = float(logits.abs().max()) + math.log(logits.shape[-1])
    return 2 * 2 * size * float(gamma(logits.shape[-1] + 3 + tokens, unit_roundoff("float32")))


@pytest.mark.parametrize("items", [None, 37])
def test_it_is_the_models_own_loss(items: int | None) -> None:
    model = tiny_llama().double()
    assert takes_a_mask(model)
    inputs = batch(0)
    divisor = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
    assert 0 < tokens < inputs["labels"].numel()
    with torch.no_grad():
        own = model(**inputs, **divisor)
        lean = completion_loss(model, inputs, divisor.get("num_items_in_batch"))
    assert abs(float(lean) - float(own.loss)) <= tolerance(own.logits, tokens)
    assert float(own.loss) > 10 * tolerance(own.logits, tokens)


def test_only_labelled_positions_reach_the_head() -> None:
    model = tiny_llama()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1]))
    inputs = batch(1)
    completion_loss(model, inputs, None)
    assert rows == [int((inputs["labels"][:, 1:] != IGNORED).sum())]


def test_another_loss_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.loss_function = lambda *args, **kwargs: None
    assert not takes_a_mask(model)
    mixture = tiny_llama()
    mixture.config.output_router_logits = True
    assert not takes_a_mask(mixture)
    from transformers import modeling_utils

    monkeypatch.delattr(modeling_utils, "slice_logits_to_keep")
    older = tiny_llama()
    assert not takes_a_mask(older)
    inputs = batch(2)
    assert torch.equal(completion_loss(older, inputs, None), older(**inputs).loss)


def test_the_mean_is_over_tokens_not_batches() -> None:
    model = tiny_llama().train()
    batches = [batch(3, rows=1), batch(4, rows=3)]
    sums = counts = 0.0
    model.eval()
    with torch.no_grad():
        for inputs in batches:
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            sums += float(completion_loss(model, inputs, None)) * count
            counts += count
    model.train()
    assert mean_loss(model, batches, torch.device("cpu")) == sums / counts
    assert model.training
