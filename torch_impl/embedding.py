"""`LoraEmbedding`: a frozen embedding with trainable low-rank updates beside it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import ConfigError, LowRank, TargetError, merge_embedding

from .arrays import array_of
from .embedding_function import EmbeddingTerm, lora_embedding
from .shared_weight import WeightOwner
from .update import TAKEN_FROM_W0, LoraUpdate, UpdateOptions, adapter_dtype


class LoraEmbedding(WeightOwner):
    """``y = embed_scale * (W0[ids] + sum over adapters of scaling * (lora_A^T)[ids] lora_B^T)``.

    ``lora_A`` is (r, V) and ``lora_B`` (d, r), the tensors ``lora_embedding_A`` and ``lora_embedding_B`` of
    PEFT's files; both float32, or float64 beside a float64 base. ``lora_A`` starts at zero unless
    ``init_lora_weights`` says otherwise. ``embed_scale`` is the base's, where it multiplies its rows as
    Gemma's and BART's embeddings do. See `loracle.torch_impl.embedding_function.lora_embedding`.

    ``lora_dropout`` has no effect, as in PEFT: ids have no entries to drop. The column of lora_A at the
    base's ``padding_idx`` gets no gradient. ``sparse`` has no effect: the gradient of lora_A is dense.

    Args:
        base_layer: an ``nn.Embedding`` that looks up rows and, perhaps, multiplies them with its
            ``embed_scale``; its parameters are frozen.
        path: the layer's, for error messages.

    Raises:
        TargetError: another kind of layer, or an embedding that does more or changes its weight when it is
            called (``max_norm``), or weighs gradients by frequency (``scale_grad_by_freq``).

    Source: LoRA, arXiv 2106.09685, equation 3; `loracle.reference.embedding_forward`.
    """

    kind = "embedding"

    def __init__(self, base_layer: nn.Module, path: str = "base_layer") -> None:
        super().__init__(check_embedding(base_layer, path))

    @property
    def embedding(self) -> nn.Embedding:
        """The base layer."""
        return cast(nn.Embedding, self.base_layer)

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows."""
        return self.embedding.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """d, the length of a row."""
        return self.embedding.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """The id whose column of lora_A gets no gradient, or None."""
        return self.embedding.padding_idx

    @property
    def embed_scale(self) -> Tensor | float | None:
        """What the base multiplies its rows with, or None."""
        return embed_scale_of(self.embedding)

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter, drawn from torch's generator as PEFT draws it.

        ``init_lora_weights`` False: both matrices are normal, lora_A first. Every other start leaves lora_A
        at zero and lora_B normal; "gaussian" and "orthogonal" speak of linear layers alone, as in PEFT.

        Raises:
            ConfigError: "pissa" or "olora", which take the start from W0; a magnitude or a bias of lora_B.
        """
        if options.use_dora:
            raise ConfigError("use_dora: expected False for this layer, got True; it has no magnitude")
        if options.lora_bias:
            raise ConfigError(
                "lora_bias: expected False for an embedding, got True; leave it out of the targets"
            )
        if options.init in TAKEN_FROM_W0:
            raise ConfigError(
                f"init_lora_weights: expected True, False, 'gaussian' or 'orthogonal' for an embedding, got "
                f"{options.init!r}; choose one of them, or leave the embedding out of the targets"
            )
        vocabulary, d = self.weight.shape
        dtype = adapter_dtype(self.weight)
        # On the CPU, so that a seed means the same on every device. PEFT draws A and B for every start, and
        # then lora_B again: what is thrown away is drawn too, so that a seed means the same there.
        A = torch.randn(options.r, vocabulary, dtype=dtype, generator=generator)
        B = torch.randn(d, options.r, dtype=dtype, generator=generator)
        if options.init is not False:
            A.zero_()
            B.normal_(generator=generator)
        return LoraUpdate(options, A.to(self.weight.device), B.to(self.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...), integers, to (..., d)."""
        updates = self.updates
        if self.merged or not updates:
            y: Tensor = self.base_layer(ids)
            return y
        terms = [EmbeddingTerm(own.lora_A, own.lora_B, own.scaling) for own in updates]
        return lora_embedding(ids, self.weight, terms, self.embed_scale, self.padding_idx)

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """See `LoraLayer.merged_arrays`."""
        adapters = [self.low_rank(name) for name in names]
        return {"weight": merge_embedding(array_of(self.base_weight), adapters, name=f"{label}.weight")}

    def low_rank(self, name: str) -> LowRank:
        """Return the named adapter's update."""
        update = self.update(name)
        return LowRank(array_of(update.lora_A), array_of(update.lora_B), update.scaling)


def check_embedding(module: nn.Module, path: str) -> nn.Embedding:
    """Return the module, if calling it looks up rows of its weight and at most scales them.

    Raises:
        TargetError: see `LoraEmbedding`.
    """
    if not isinstance(module, nn.Embedding):
        raise TargetError(f"{path}: expected nn.Embedding, got {type(module).__name__}; target embeddings")
    if type(module).forward is not nn.Embedding.forward and _scale(module) is None:
        raise TargetError(
            f"{path}: expected an nn.Embedding that looks up rows and multiplies them with its embed_scale, "
            f"got {type(module).__name__} with a forward of its own; leave it out of the targets"
        )
    if module.max_norm is not None:
        raise TargetError(
            f"{path}: expected an embedding without max_norm, got {module.max_norm}, which changes the "
            "frozen weight when it is called; set it to None, or leave it out of the targets"
        )
    if module.scale_grad_by_freq:
        raise TargetError(
            f"{path}: expected an embedding with scale_grad_by_freq False, got True, by which gradients "
            "would not be those of the loss; set it to False, or leave it out of the targets"
        )
    return module


def embed_scale_of(module: nn.Embedding) -> Tensor | float | None:
    """Return what an embedding multiplies its rows with, a tensor in its weight's dtype; or None."""
    if type(module).forward is nn.Embedding.forward:
        return None
    scale = _scale(module)
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


def _scale(module: nn.Embedding) -> Tensor | float | None:
    """Return the attribute ``embed_scale``, where it is one number."""
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor):
        return scale if scale.numel() == 1 else None
    return scale if isinstance(scale, int | float) and not isinstance(scale, bool) else None
