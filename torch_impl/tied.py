"""The output layer, and other embeddings, tied to an adapted embedding: one update counts in all."""

from typing import cast

from torch import Tensor, nn

from loracle.reference import ConfigError, TargetError

from .embedding import LoraEmbedding
from .linear import LoraLinear
from .shared_weight import WeightFollower
from .update import LoraUpdate, UpdateOptions


class TransposedUpdate(LoraUpdate):
    """An embedding's update as that of a linear layer with the same weight, (V, d).

    ``lora_A`` is the embedding's lora_B^T, (r, d), and ``lora_B`` its lora_A^T, (V, r): views of the same
    parameters, so that the gradients of both uses add up in these.
    """

    def __init__(self, update: LoraUpdate) -> None:
        nn.Module.__init__(self)
        self.update = update
        self.options = update.options
        self.lora_bias = None
        self.lora_magnitude_vector = None

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """(r, d)."""
        return self.update.lora_B.t()

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """(V, r)."""
        return self.update.lora_A.t()

    @property
    def start(self) -> None:
        """None: an embedding does not start as a part of W0."""
        return


class LoraTiedLinear(WeightFollower, LoraLinear):
    """``y = x W0^T + bias + sum of scaling * (dropout(x) lora_B) lora_A``, of an embedding's lora_A, lora_B.

    A linear layer, such as the output layer, whose weight is the embedding's: what trains there counts here.
    In a file it has a pair of its own, as PEFT writes it: the embedding's, transposed.
    """

    def shared(self, update: nn.Module) -> nn.Module:
        """See `TransposedUpdate`."""
        return TransposedUpdate(cast(LoraUpdate, update))


class LoraTiedEmbedding(WeightFollower, LoraEmbedding):
    """An embedding whose weight is another one's: what trains there counts here, scaled as this one scales.

    In a file it has a pair of its own, equal to the other.
    """


def tied_layer(module: nn.Module, path: str) -> WeightFollower:
    """Return a layer around a module that holds an adapted embedding's weight, without adapters yet.

    Raises:
        TargetError: it is neither a plain linear layer nor an embedding.
    """
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LoraTiedLinear(module)
    if isinstance(module, nn.Embedding):
        return LoraTiedEmbedding(module, path)
    raise TargetError(
        f"{path}: expected nn.Linear or an embedding to be tied to an adapted embedding, got "
        f"{type(module).__name__}; leave the embedding out of the targets"
    )


def check_tied(options: UpdateOptions, other: UpdateOptions, path: str, owner: str) -> None:
    """Check that a configuration says the same of a layer and of the embedding that it is tied to.

    Raises:
        ConfigError: another rank or scaling, which would be a second update; or magnitudes.
    """
    if options.use_dora:
        raise ConfigError(
            f"use_dora: expected False for {owner}, which {path} is tied to, got True; rows and columns "
            "of one weight can't both have magnitudes"
        )
    for name, own, expected in (("r", options.r, other.r), ("scaling", options.scaling, other.scaling)):
        if own != expected:
            raise ConfigError(
                f"{name}: expected {expected} for {path}, as for {owner}, which it is tied to, got {own}; "
                "let rank_pattern and alpha_pattern say the same of both"
            )
