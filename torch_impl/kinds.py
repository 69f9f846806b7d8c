"""Which class adapts which kind of module."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from loracle.reference import TargetError

from .convolution import CONVOLUTIONS, LoraConvolution, convolution_shapes
from .embedding import LoraEmbedding
from .encoder_layer import LoraReadLinear, is_read
from .layer import LoraLayer
from .linear import LoraLinear
from .multihead import LoraMultiheadAttention
from .parameters import parameter_shapes
from .quantization import is_quantized
from .quantized import LoraQuantizedLinear
from .read_weights import LoraModule


def adapted_layer(module: nn.Module, path: str, outer: nn.Module | None = None) -> LoraLayer | LoraModule:
    """Return what takes the module's place in the module ``outer``, without adapters yet.

    Raises:
        TargetError: there is no such layer for this class of module.
    """
    if is_quantized(module):
        return LoraQuantizedLinear(module)
    if isinstance(module, nn.Linear | Conv1D):
        return LoraReadLinear(module) if is_read(outer) else LoraLinear(module)
    if isinstance(module, nn.Embedding):
        return LoraEmbedding(module, path)
    if isinstance(module, CONVOLUTIONS):
        return LoraConvolution(module, path)
    if isinstance(module, nn.MultiheadAttention):
        return LoraMultiheadAttention(module, path)
    raise TargetError(
        f"{path}: expected a linear, embedding, convolution or nn.MultiheadAttention layer, "
        f"got {type(module).__name__}; leave it out of the targets"
    )


def factor_shapes(module: nn.Module, r: int, parameter: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of lora_A and lora_B for a module, or for a named stacked parameter of it."""
    if parameter:
        return parameter_shapes(module, parameter, r)
    if isinstance(module, CONVOLUTIONS):
        return convolution_shapes(module.weight, r)
    if isinstance(module, nn.Embedding):
        return (r, module.num_embeddings), (module.embedding_dim, r)
    if isinstance(module, nn.MultiheadAttention):
        return (r, module.embed_dim), (3 * module.embed_dim, r)
    if is_quantized(module):
        return (r, int(module.in_features)), (int(module.out_features), r)  # type: ignore[arg-type]
    assert isinstance(module, nn.Linear | Conv1D)
    shape = tuple(module.weight.shape)
    out_features, in_features = shape if isinstance(module, nn.Linear) else shape[::-1]
    return (r, in_features), (out_features, r)
