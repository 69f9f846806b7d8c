"""What `benchmarks.train_step` compares: one causal language model, trained in different ways.

Each way adapts modules of its own around the same frozen tensors; full fine-tuning has its own weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import loralib
import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from loracle.torch_impl import LoraConfig, inject
from loracle.torch_impl.attention import AttentionChoice
from loracle.torch_impl.chunked_loss import chunked_loss
from loracle.torch_impl.compiled import compile_body

from .adapters import ALL_LINEAR

TARGETS = {"q+v": ("q_proj", "v_proj"), "all-linear": ALL_LINEAR}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALPHA_OVER_R = 2
LEARNING_RATE = 1e-4

FLOOR, CONTROL, FULL, FLOOR_CHUNKED = "floor", "A/A control", "full fine-tuning", "floor + chunked"
OURS, PEFT, LORALIB, OURS_CHUNKED = "loracle", "PEFT", "loralib", "loracle + chunked"
PEFT_COMPILED, PEFT_LIGER = "PEFT, compiled", "PEFT + Liger"
OURS_COMPILED, OURS_GRAPHS = "loracle, compiled", "loracle, CUDA graphs"
OUR_WAYS = (OURS, OURS_CHUNKED, OURS_COMPILED, OURS_GRAPHS)
ADAPTED = (OURS, PEFT, OURS_CHUNKED, LORALIB)
"""The ways that have targets, a rank and dropout; PEFT stands between the two that are compared with it."""

_FACTOR = re.compile(r"(base_model\.model\.)?(?P<path>.+?)(\.adapters\.\w+)?\.(?P<kind>lora_[AB])\b")


@dataclass(frozen=True)
class Size:
    """A shape of Llama's architecture."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_theta: float
    tied: bool = False


SIZES = {
    "135m": Size(576, 1536, 30, 9, 3, 49152, 100000.0, tied=True),
    "1.1b": Size(2048, 5632, 22, 32, 4, 32000, 10000.0),
    "7b": Size(4096, 11008, 32, 32, 32, 32000, 10000.0),
}
"""SmolLM2-135M, TinyLlama-1.1B and Llama-2-7B."""


@dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
        dtype: of the frozen weights, a key of `DTYPES`.
        model: a folder of transformers; None for one of `SIZES` with seeded weights.
        attention: ``"eager"`` or ``"sdpa"``; None for what our trainer uses (`AttentionChoice`).
        layers, vocabulary: of the seeded model; those of its size where None.
        batch, length: of the token ids.
        size: of the seeded model, a key of `SIZES`.
        device: of model and tokens.
    """

    dtype: str
    model: str | None = None
    attention: str | None = None
    layers: int | None = None
    vocabulary: int | None = None
    batch: int = 4
    length: int = 128
    size: str = "135m"
    device: str = "cpu"

    def tokens(self, vocabulary: int) -> Tensor:
        """Seeded token ids (batch, length), input and labels at once."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary, (self.batch, self.length), generator=generator)
        return tokens.to(self.device)


@dataclass(frozen=True)
class Case:
    """What is adapted, and how: ``targets`` is a key of `TARGETS`."""

    targets: str
    r: int
    dropout: float

    def lora_config(self) -> LoraConfig:
        return LoraConfig(
            r=self.r,
            lora_alpha=ALPHA_OVER_R * self.r,
            lora_dropout=self.dropout,
            target_modules=TARGETS[self.targets],
        )


def cases(
    targets: Sequence[str], ranks: Sequence[int], dropouts: Sequence[float], *, every: bool
) -> tuple[Case, ...]:
    """The combinations; unless `every`, only those in which rank or dropout is the first of its list."""
    return tuple(
        Case(target, r, dropout)
        for target, r, dropout in product(targets, ranks, dropouts)
        if every or r == ranks[0] or dropout == dropouts[0]
    )


def config_of(work: Workload) -> Any:
    """The configuration of the workload's model."""
    if work.model is not None:
        return AutoConfig.from_pretrained(work.model, local_files_only=True)
    size = SIZES[work.size]
    return LlamaConfig(
        vocab_size=size.vocabulary if work.vocabulary is None else work.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers if work.layers is None else work.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        rms_norm_eps=1e-5,
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=size.tied,
    )


def base_model(work: Workload) -> Any:
    """The model in training mode, all of it frozen."""
    dtype, attention = DTYPES[work.dtype], work.attention or "sdpa"
    options = {"dtype": dtype, "attn_implementation": attention}
    if work.model is None:
        torch.manual_seed(0)
        # Drawn where it is used: to draw 7 billion numbers on the host takes minutes.
        with torch.device(work.device):
            model = AutoModelForCausalLM.from_config(config_of(work), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(work.model, local_files_only=True, **options)
    if work.attention is None:
        AttentionChoice(model, bf16=dtype is torch.bfloat16).choose(work.length)
    model.to(work.device).requires_grad_(False)
    return model.train()


def shape_of(work: Workload) -> Any:
    """The model without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(work))


def shared_copy(model: nn.Module) -> Any:
    """New modules around the same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Subject:
    """A model with what is trained in it.

    ``optimizer`` is None where nothing is trained; ``contexts`` are entered as long as the subject lives.
    """

    name: str
    model: Any
    optimizer: torch.optim.Optimizer | None
    contexts: ExitStack

    def differentiate(self, tokens: Tensor) -> Tensor:
        """Compute the loss, (), and its gradients, from none."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, tokens: Tensor) -> Tensor:
        """One step of training; the loss before it, ()."""
        loss = self.differentiate(tokens)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss

    def factors(self) -> dict[tuple[str, str], nn.Parameter]:
        """The trained factors by path of the layer in the base model and ``"lora_A"`` or ``"lora_B"``."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if (match := _FACTOR.match(name)) is not None:
                found[match["path"], match["kind"]] = parameter
        return dict(sorted(found.items()))


def subject(name: str, model: Any, case: Case | None) -> Subject:
    """Change `model`, a `base_model` that nothing else uses, into the named way of training.

    Args:
        name: one of this module's names.
        model: its modules are changed; the tensors are not, but for `FULL`.
        case: None for the ways that have none, which adapt nothing.
    """
    if case is not None:
        build: dict[str, Callable[[Any, Case], Any]] = {
            PEFT: _peft,
            OURS_COMPILED: _loracle_compiled,
            OURS_GRAPHS: _loracle_graphs,
            PEFT_COMPILED: _peft_compiled,
            PEFT_LIGER: _peft_liger,
            LORALIB: _loralib,
        }
        model = build.get(name, _loracle)(model, case)
    elif name == FULL:
        model.requires_grad_(True)
    else:
        # The embedding is frozen, so backward would end at the head; it has to reach the first layer.
        model.get_input_embeddings().register_forward_hook(_require_gradient)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=True) if trained else None
    contexts = ExitStack()
    if name in (OURS_CHUNKED, FLOOR_CHUNKED):
        contexts.enter_context(chunked_loss(model))
    return Subject(name, model, optimizer, contexts)


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _loracle(model: Any, case: Case) -> Any:
    inject(model, case.lora_config(), generator=torch.Generator().manual_seed(0))
    return model


def _loracle_compiled(model: Any, case: Case) -> Any:
    """As `finetune` compiles: the body, not the head and the loss."""
    compile_body(_loracle(model, case))
    return model


def _loracle_graphs(model: Any, case: Case) -> Any:
    """Compiled, and its launches recorded: torch's mode for short steps."""
    compile_body(_loracle(model, case), mode="reduce-overhead")
    return model


def _peft(model: Any, case: Case) -> Any:
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=ALPHA_OVER_R * case.r,
        lora_dropout=case.dropout,
        target_modules=list(TARGETS[case.targets]),
    )
    return peft.get_peft_model(model, config)


def _peft_compiled(model: Any, case: Case) -> Any:
    adapted = _peft(model, case)
    adapted.compile()
    return adapted


def _peft_liger(model: Any, case: Case) -> Any:
    """Liger's kernels in the model. They also take the place of functions that all of transformers' Llamas
    call: no other way is what it was from then on."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return _peft(model, case)


def _loralib(model: Any, case: Case) -> Any:
    """loralib's layers in place of the model's; their factors have the base's dtype, it knows no other."""
    for path, base in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in TARGETS[case.targets]:
            layer = loralib.Linear(
                base.in_features,
                base.out_features,
                r=case.r,
                lora_alpha=ALPHA_OVER_R * case.r,
                lora_dropout=case.dropout,
                merge_weights=False,
                bias=base.bias is not None,
                dtype=base.weight.dtype,
            )
            layer.weight, layer.bias = base.weight, base.bias
            setattr(model.get_submodule(parent), name, layer)
    return model
