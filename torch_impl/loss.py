"""The language model's loss, computed without the logits that it does not need."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import IGNORED


def completion_loss(model: nn.Module, inputs: Mapping[str, Tensor], items: Tensor | int | None) -> Tensor:
    """Return the mean cross-entropy, in nats, over the labelled tokens.

    It equals the model's own loss. Where the model allows (`takes_a_mask`) logits are computed at labelled
    positions alone: with a vocabulary of 49152 and prompts four times as long as completions that is most
    of the head's work, and most of the memory.

    Args:
        model: a causal language model of transformers.
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, (batch, length); labels unshifted,
            `IGNORED` where nothing is learned.
        items: what to divide the sum by, when it is more than this batch's labelled tokens (gradient
            accumulation).
    """
    rest = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    labels = inputs["labels"]
    # An argument of the loss, and only where it is used: not every model takes it.
    divisor: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    if not takes_a_mask(model):
        loss: Tensor = model(**rest, labels=labels, **divisor).loss
        return loss
    # The logits at position t predict the token at t + 1.
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = targets != IGNORED
    logits = model(**rest, logits_to_keep=kept).logits  # (labelled, vocabulary)
    loss_function: Any = model.loss_function
    result: Tensor = loss_function(
        logits=logits,
        labels=None,
        shift_labels=targets[kept],
        vocab_size=logits.shape[-1],
        **divisor,
    )
    return result


def takes_a_mask(model: nn.Module) -> bool:
    """Whether the model computes logits at the positions that a boolean ``logits_to_keep`` marks.

    True for those of transformers' own models whose code slices with its helper for that, and whose loss is
    nothing but the cross-entropy of next tokens.
    """
    from transformers import modeling_utils
    from transformers.loss.loss_utils import ForCausalLMLoss

    helper = getattr(modeling_utils, "slice_logits_to_keep", None)
    # Sharding puts a class of torch's in front of the model's own.
    modules = [sys.modules[own.__module__] for own in type(model).__mro__]
    config = getattr(model, "config", None)
    return (
        helper is not None
        and any(getattr(module, "slice_logits_to_keep", None) is helper for module in modules)
        and getattr(model, "loss_function", None) is ForCausalLMLoss
        # A mixture of experts adds a term to its loss.
        and not getattr(config, "output_router_logits", False)
    )


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Any, device: torch.device) -> float:
    """Return the loss per labelled token over all batches, with the model in evaluation mode meanwhile."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
            total += float(completion_loss(model, inputs, None)) * tokens
            count += tokens
    finally:
        model.train(training)
    return total / count
