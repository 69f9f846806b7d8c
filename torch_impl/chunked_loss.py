"""A causal language model of transformers whose own forward never holds all its logits."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loracle.reference import ConfigError, TargetError

from .chunked_cross_entropy import OFF, checked_chunk_bytes, chunked_cross_entropy
from .encoding import IGNORED

_PROBE_TOKENS = 4


@contextmanager
def chunked_loss(
    model: nn.Module, *, chunk_bytes: int | None = None, evaluation: bool = False
) -> Iterator[None]:
    """Make a model's own ``forward(..., labels=...)`` compute its loss with `chunked_cross_entropy`.

    While the context lasts and the model trains, a call with labels has the loss that it had before, and
    ``logits`` None. Calls without labels, and in evaluation mode, are the model's own. Everything happens
    inside ``model.forward``, so DDP, FSDP2, gradient checkpointing and torch.compile go on as before; give
    the model itself, not a wrapper. Whatever happens, the model is as it was afterwards.

    On entering, the model is run on a few tokens, in evaluation mode, to see that its logits are its head's
    output and its loss is their cross-entropy, and nothing else. Of a sharded model, all processes enter.

    Args:
        model: a causal language model of transformers, with a frozen ``nn.Linear`` for a head.
        chunk_bytes: see `chunked_cross_entropy`.
        evaluation: also in evaluation mode: for a caller that reads the loss alone.

    Raises:
        TargetError: the model is a wrapper, or its head is trained, adapted, quantised, or has hooks.
        ConfigError: the model transforms its logits, or has a loss of its own.
    """
    checked_chunk_bytes(chunk_bytes, torch.device("cpu"))
    head = _plain_head(model)
    _check_loss(model)
    _probe(model, head)
    patch = _Patch(model, head, chunk_bytes, evaluation)

    # Callers read the signature: of what to pass, and whether num_items_in_batch is taken.
    @wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return patch.forward(*args, **kwargs)

    with (
        _attribute(head, "forward", patch.head),
        _attribute(model, "_loss_function", patch.loss),
        _attribute(model, "forward", forward),
    ):
        try:
            yield
        finally:
            patch.end()


class _Patch:
    """What takes the place of the forward of the model and of its head, and of the model's loss."""

    def __init__(self, model: Any, head: nn.Linear, chunk_bytes: int | None, evaluation: bool) -> None:
        self._model, self._layer = model, head
        self._own_forward, self._own_head = model.forward, head.forward
        self._own_loss: Callable[..., Tensor] = model.loss_function
        self._chunk_bytes, self._evaluation = chunk_bytes, evaluation
        # Without self.
        self._labels_at = list(inspect.signature(type(model).forward).parameters).index("labels") - 1
        self._ended = self._active = False

    def end(self) -> None:
        """Stand in for nothing any more, even where another wrapper of the forward still holds this one."""
        self._ended = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = args[self._labels_at] if len(args) > self._labels_at else kwargs.get("labels")
        if self._ended or labels is None or not (self._model.training or self._evaluation):
            return self._own_forward(*args, **kwargs)
        self._active = True
        try:
            output = self._own_forward(*args, **kwargs)
        finally:
            self._active = False
        if not isinstance(output, dict):
            raise ConfigError(f"return_dict: expected True, got False; ask for an output by name, or {OFF}")
        # Of hidden states: not what anyone expects there.
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def head(self, x: Tensor) -> Tensor:
        return x if self._active else self._own_head(x)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **others: Any,  # models pass on whatever their caller gave them
    ) -> Tensor:
        """`ForCausalLMLoss`, with hidden states in the place of logits."""
        if not self._active:
            result: Tensor = self._own_loss(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **others,
            )
            return result
        weight = self._layer.weight
        if isinstance(weight, DTensor):
            raise TargetError(
                "output head's weight: expected to be whole while the model runs, got a DTensor; "
                f"shard the head with the model around it, not by itself, or {OFF}"
            )
        if shift_labels is None:
            assert labels is not None
            # The logits at position t predict the token at t + 1.
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        if ignore_index != IGNORED:
            targets = targets.masked_fill(targets == ignore_index, IGNORED)
        return chunked_cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            weight,
            targets,
            bias=self._layer.bias,
            divisor=num_items_in_batch,
            chunk_bytes=self._chunk_bytes,
        )


def _plain_head(model: nn.Module) -> nn.Linear:
    """Return the model's output layer, if calling it computes ``x W^T + b`` with frozen plain tensors."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"model: expected a transformers model, got {type(model).__name__}; "
            "enter chunked_loss with the model itself, before it is wrapped"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TargetError(
            f"output head: expected a torch.nn.Linear, got {type(head).__name__}; leave it out of the "
            f"adapter's targets, or {OFF}"
        )
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if "forward" in vars(head) or any(hooks):
        raise TargetError(f"output head: expected no hooks, got some; remove them, or {OFF}")
    for name in ("weight", "bias"):
        tensor = getattr(head, name)
        if tensor is None:
            continue
        if name not in head._parameters or type(tensor) not in (nn.Parameter, DTensor):
            raise TargetError(
                f"output head's {name}: expected a plain parameter, got {type(tensor).__name__}; "
                f"leave the head unquantised, or {OFF}"
            )
        if tensor.requires_grad:
            raise TargetError(
                f"output head's {name}: expected a frozen parameter, got requires_grad=True; "
                f"freeze it (a tied embedding too), or {OFF}"
            )
    return head


def _check_loss(model: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(f"{type(model).__name__}: expected a forward that takes labels, got none; {OFF}")
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        raise ConfigError(f"loss_function: expected transformers' ForCausalLMLoss, got {name}; {OFF}")
    if getattr(model.config, "output_router_logits", False):
        raise ConfigError(
            "output_router_logits: expected False, got True, which adds a term to the loss; "
            f"set it to False, or {OFF}"
        )


def _probe(model: Any, head: nn.Linear) -> None:
    """Run a few tokens through the model and compare its logits and loss with its head's, bit for bit."""
    outputs: list[Tensor] = []
    losses: list[tuple[Tensor, Tensor, Tensor]] = []
    own_loss: Callable[..., Tensor] = model.loss_function

    def spied_head(x: Tensor) -> Tensor:
        result = nn.Linear.forward(head, x)
        # A copy: the model may change it in place.
        outputs.append(result.clone())
        return result

    def spied_loss(logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
        losses.append((logits, labels, own_loss(logits, labels, vocab_size, **others)))
        return losses[-1][-1]

    tokens = torch.arange(_PROBE_TOKENS, device=model.device)[None] % head.out_features
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices),
        _evaluating(model),
        _attribute(head, "forward", spied_head),
        _attribute(model, "_loss_function", spied_loss),
    ):
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    if (
        len(outputs) != 1
        or output.logits.shape != outputs[0].shape
        or not torch.equal(output.logits, outputs[0].to(output.logits.dtype))
    ):
        raise ConfigError(
            f"{type(model).__name__}: expected logits that are its head's output, got others: this model "
            f"transforms its logits; {OFF}"
        )
    if len(losses) != 1 or not (
        torch.equal(losses[0][0], output.logits)
        and torch.equal(losses[0][1], tokens)
        and torch.equal(losses[0][2], output.loss)
    ):
        raise ConfigError(
            f"{type(model).__name__}: expected a loss that is the cross-entropy of its logits, got another; "
            f"{OFF}"
        )


@contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an object itself, and put back what it had there, or nothing."""
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in the mode that each had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
