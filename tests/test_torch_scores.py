"""Losses are the models' own, over all labels that are counted, and heads see labelled tokens alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from task_fixtures import tiny_bart, tiny_bert, tiny_t5
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from loracle.reference import gamma, unit_roundoff
from loracle.torch_impl.batches import IGNORED
from loracle.torch_impl.scores import (
    Scores,
    cross_entropy,
    masked_scores,
    sequence_scores,
    target_scores,
    token_scores,
)


def inputs(label: str, rows: int = 3, length: int = 8) -> dict[str, Tensor]:
    """Random tokens, the later rows padded, and labels of one kind."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 77, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row :] = 0
    ids[mask == 0] = 0
    labels = torch.randint(0, 2, (rows, length), generator=generator)
    if label == "sequence":
        labels = labels[:, 0]
    elif label == "target":
        labels = torch.randint(5, 77, (rows, 6), generator=generator)
        labels[1, 4:] = IGNORED
    else:
        if label == "masked":
            labels = ids.clone()
        labels[:, ::2] = IGNORED
        labels[mask == 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tiny_gpt2_classifier() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=80, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2)
    config.pad_token_id = 0
    return GPT2ForSequenceClassification(config).eval()


CASES: dict[str, tuple[Callable[[], Any], str, Callable[[nn.Module, Mapping[str, Tensor]], Scores]]] = {
    "bert, sequences": (lambda: tiny_bert("BertForSequenceClassification"), "sequence", sequence_scores),
    "gpt2, sequences": (tiny_gpt2_classifier, "sequence", sequence_scores),
    "bert, tokens": (lambda: tiny_bert("BertForTokenClassification"), "tokens", token_scores),
    "bert, masks": (tiny_bert, "masked", masked_scores),
    "t5": (tiny_t5, "target", target_scores),
    "bart": (tiny_bart, "target", target_scores),
}


def loss_bound(logits: Tensor, labels: int) -> float:
    """How far two evaluations of a mean loss may lie apart.

    Each label's loss is the logarithm of a sum of V terms less a logit: V + 3 operations on numbers of the
    logits' size; the mean adds as many as there are.
    """
    size = float(logits.abs().max()) + math.log(logits.shape[-1])
    return 2 * 2 * size * float(gamma(logits.shape[-1] + 3 + labels, unit_roundoff("float32")))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_loss_is_the_models_own(case: str) -> None:
    make, label, scores = CASES[case]
    model = make().double()
    batch = inputs(label)
    count = int((batch["labels"] != IGNORED).sum())
    own = model(**batch)
    logits, labels = scores(model, batch)
    assert logits.shape == (count, own.logits.shape[-1])
    assert labels.shape == (count,)
    bound = loss_bound(own.logits, count)
    loss = float(cross_entropy((logits, labels), None))
    assert abs(loss - float(own.loss)) <= bound
    assert abs(float(cross_entropy((logits, labels), torch.tensor(2 * count))) * 2 - loss) <= bound
    assert float(own.loss) > 100 * bound


def test_the_loss_of_half_precision_logits_is_float32() -> None:
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    exact = cross_entropy((logits.float(), torch.tensor([0])), None)
    assert torch.equal(cross_entropy((logits, torch.tensor([0])), None), exact)
    assert exact.dtype is torch.float32
    assert cross_entropy((logits.double(), torch.tensor([0])), 1).dtype is torch.float64


def test_only_labelled_tokens_reach_the_head() -> None:
    model = tiny_bert()
    rows: list[int] = []
    model.cls.predictions.decoder.register_forward_hook(
        lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1])
    )
    batch = inputs("masked")
    masked_scores(model, batch)
    assert rows == [int((batch["labels"] != IGNORED).sum())]
    model(**batch)
    assert rows[1] == batch["labels"].numel()  # the hook is gone


class Whole(nn.Module):
    """A model that is its own body: nothing can be selected before its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = (model,)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, **arguments: Tensor) -> Any:
        return self.inner[0](**arguments)


@torch.no_grad()
def test_a_head_that_takes_all_tokens_gives_the_same_scores() -> None:
    model = tiny_bert().double()
    batch = inputs("masked")
    lean, labels = masked_scores(model, batch)
    full, same = masked_scores(Whole(model), batch)
    assert torch.equal(labels, same)
    assert lean.shape == full.shape
    assert float((lean - full).abs().max()) <= unit_roundoff("float32") * float(full.abs().max())


class Wrapped(nn.Module):
    """As torch wraps a model for several devices."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: Any) -> Any:
        return self.module(**arguments)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_wrapper_changes_nothing(case: str) -> None:
    make, label, scores = CASES[case]
    model, batch = make(), inputs(label)
    assert torch.equal(scores(model, batch)[0], scores(Wrapped(model), batch)[0])
