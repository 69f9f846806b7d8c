"""Logits beside the classes they should point to, for every task but causal language modelling."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batches import IGNORED

Scores = tuple[Tensor, Tensor]
"""Logits (n, classes) of the n labelled places of a batch, and their labels (n,), int64."""


def cross_entropy(scores: Scores, items: Tensor | int | None) -> Tensor:
    """Return the mean cross-entropy in nats, ``-sum_i log softmax(logits_i)[label_i] / items``.

    Computed in float32, or in float64 where the logits are.

    Args:
        scores: logits and labels.
        items: what to divide by, where it is more than these labels (gradient accumulation, several
            devices); their number when None.
    """
    logits, labels = scores
    wide = logits if logits.dtype is torch.float64 else logits.float()
    total = nn.functional.cross_entropy(wide, labels, reduction="sum")
    return total / (labels.numel() if items is None else items)


def sequence_scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Scores:
    """Return a sequence classifier's logits, (batch, classes), and the batch's labels."""
    rest, labels = _apart(inputs)
    return model(**rest).logits, labels


def token_scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Scores:
    """Return a token classifier's logits at labelled tokens."""
    rest, labels = _apart(inputs)
    kept = labels != IGNORED
    return model(**rest).logits[kept], labels[kept]


def masked_scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Scores:
    """Return a masked language model's logits at labelled tokens, the others' not computed where possible.

    The head works on each token apart, so it is given the labelled tokens' hidden states alone: of 512 tokens
    77, and with a vocabulary of 30522 the head of BERT-base is a fifth of its products.
    """
    rest, labels = _apart(inputs)
    kept = labels != IGNORED
    with _hidden_states_at(model, kept):
        logits = model(**rest).logits
    if logits.shape[:2] == kept.shape:  # the model's head took them all
        logits = logits[kept]
    return logits.reshape(-1, logits.shape[-1]), labels[kept]


def target_scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Scores:
    """Return the logits of an encoder and decoder at the target's tokens.

    The decoder sees the target shifted by one, as the model itself shifts it.
    """
    rest, labels = _apart(inputs)
    shift: Any = getattr(_unwrapped(model), "prepare_decoder_input_ids_from_labels", None)
    # A model without that method shifts the labels that it is given.
    decoder = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
    kept = labels != IGNORED
    return model(**rest, **decoder, use_cache=False).logits[kept], labels[kept]


def _apart(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}, inputs["labels"]


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch's wrapper for several devices."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def _hidden_states_at(model: nn.Module, kept: Tensor) -> Iterator[None]:
    """Let the model's body hand on, as one row, the last hidden states that ``kept``, (batch, length),
    marks."""
    whole = _unwrapped(model)
    body = getattr(whole, "base_model", whole)

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.shape[:2] == kept.shape:
            output.last_hidden_state = hidden[kept][None]
        return output

    if body is whole:
        yield
        return
    handle = body.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
