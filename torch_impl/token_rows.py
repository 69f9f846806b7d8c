"""`TokenRows`: an embedding or an output layer, the rows of some of whose tokens are trained."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import ConfigError, NonFiniteError, TargetError, round_to

from .arrays import array_of, assign
from .embedding import check_embedding, embed_scale_of
from .row_function import embedding_with_rows, linear_with_rows
from .shared_weight import WeightFollower, WeightOwner
from .update import LoraUpdate, UpdateOptions, adapter_dtype, check_adapter_name


class TrainedRows(nn.Module):
    """What one adapter has in a `TokenRows` layer.

    Attributes:
        rows: (n, d), the tokens' rows themselves, not what is added to the base's.
        tokens: whose rows they are, in their order.
    """

    def __init__(self, tokens: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.rows = nn.Parameter(rows)

    def extra_repr(self) -> str:
        """Describe the rows in ``print(model)``."""
        return f"tokens={len(self.tokens)}"


class TokenRows(WeightOwner):
    """The base layer as if the rows of the active adapters' tokens stood in its weight in W0's rows' place.

    The rows start as W0's; they are float32, or float64 beside a float64 base, and rounded to W0's dtype
    wherever they are used. Only they train, and no weight is formed but by a merge. See
    `loracle.torch_impl.row_function`.

    Several adapters of different tokens count at once.

    Args:
        base_layer: an ``nn.Embedding`` that `LoraEmbedding` could adapt, or an ``nn.Linear``, a row of whose
            weight is a token's; its parameters are frozen.
        path: the layer's, for error messages.

    Raises:
        TargetError: another kind of layer.

    Source: PEFT's ``trainable_token_indices``.
    """

    kind = "tokens"

    tokens: Tensor
    """(n,), those of the active adapters."""

    places: Tensor
    """(V,), for an embedding: see `embedding_with_rows`."""

    def __init__(self, base_layer: nn.Module, path: str = "base_layer") -> None:
        if isinstance(base_layer, nn.Embedding):
            check_embedding(base_layer, path)
        elif not isinstance(base_layer, nn.Linear) or type(base_layer).forward is not nn.Linear.forward:
            raise TargetError(
                f"{path}: expected nn.Embedding or nn.Linear for trainable_token_indices, got "
                f"{type(base_layer).__name__}; name an embedding"
            )
        super().__init__(base_layer)
        empty = torch.empty(0, dtype=torch.int64, device=self.weight.device)
        self.register_buffer("tokens", empty, persistent=False)
        self.register_buffer("places", empty, persistent=False)

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Raise TargetError: what rows are added to would depend on the order of adapters."""
        raise TargetError(
            "base_layer: expected a layer without trained rows, got one of trainable_token_indices; eject "
            "that adapter first"
        )

    def add_rows(self, name: str, tokens: Sequence[int]) -> None:
        """Give the layer a new adapter, which is not active yet; its rows are W0's.

        Raises:
            ConfigError: the name is taken or no name, or a token is not in the vocabulary, or there is none.
            TargetError: the layer is merged.
        """
        if check_adapter_name(name) in self.adapters:
            raise ConfigError(f"adapter_name: expected a new one, got {name!r}; choose another")
        if self.merged:
            raise TargetError("TokenRows: expected an unmerged layer, got a merged one; unmerge it first")
        vocabulary = self.weight.shape[0]
        if not tokens or not all(0 <= token < vocabulary for token in tokens):
            wrong = next((token for token in tokens if not 0 <= token < vocabulary), "none")
            raise ConfigError(
                f"trainable_token_indices: expected tokens from 0 to {vocabulary - 1}, got {wrong}; resize "
                "the embedding first, or correct them"
            )
        at = torch.tensor(tokens, device=self.weight.device)
        rows = self.weight.detach()[at].to(adapter_dtype(self.weight))
        self.adapters[name] = TrainedRows(tokens, rows)

    def trained(self, name: str) -> TrainedRows:
        """Return what the named adapter has here."""
        return cast(TrainedRows, self.adapters[name])

    def rows(self, name: str) -> NDArray[Any]:
        """Return the named adapter's rows, (n, d), as an array of their own."""
        return array_of(self.trained(name).rows).copy()

    def fill_rows(self, name: str, rows: NDArray[Any]) -> None:
        """Give the named adapter's rows the values of an array, (n, d)."""
        assign(self.trained(name).rows, rows)

    def check_active(self, names: Sequence[str], label: str) -> None:
        """Check that the named adapters, those that this layer has, can count at once.

        Raises:
            ConfigError: two have a row for the same token.
        """
        owners: dict[int, str] = {}
        for name in names:
            for token in self.trained(name).tokens if name in self.adapters else ():
                other = owners.setdefault(token, name)
                if other != name:
                    raise ConfigError(
                        f"trainable_token_indices: expected one active adapter for token {token} of {label}, "
                        f"got {other} and {name}; activate one of them"
                    )

    def activate(self, names: Sequence[str]) -> None:
        """Let the named adapters count, those that this layer has; the others' rows do not train.

        Raises:
            ConfigError: see `check_active`.
        """
        super().activate(names)
        device = self.weight.device
        tokens = [token for name in self.active for token in self.trained(name).tokens]
        self.tokens = torch.tensor(tokens, dtype=torch.int64, device=device)
        if isinstance(self.base_layer, nn.Embedding):
            self.places = torch.full((self.base_layer.num_embeddings,), len(tokens), device=device)
            self.places[self.tokens] = torch.arange(len(tokens), device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map ids (...) of an embedding to (..., d), or x (..., d) of an output layer to (..., V)."""
        if self.merged or not self.active:
            y: Tensor = self.base_layer(x)
            return y
        parts: list[Tensor] = [self.trained(name).rows for name in self.active]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        base = self.base_layer
        if isinstance(base, nn.Embedding):
            scale, padding_idx = embed_scale_of(base), base.padding_idx
            return embedding_with_rows(x, base.weight, rows, self.places, scale, padding_idx)
        return linear_with_rows(x, self.weight, self.bias, rows, self.tokens)

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """Return W0 with the named adapters' rows, each entry rounded once to W0's dtype.

        Raises:
            NonFiniteError: a row holds NaN or infinity, or is too large for W0's dtype.
        """
        merged = array_of(self.base_weight).copy()
        for name in names:
            own = self.trained(name)
            rows = round_to(array_of(own.rows), merged.dtype)
            wrong = np.argwhere(~np.isfinite(rows))
            if len(wrong):
                raise NonFiniteError(
                    f"{label}: expected finite rows, in {merged.dtype} too, got token "
                    f"{own.tokens[wrong[0][0]]}'s of adapter {name} with NaN, infinity or an overflow; train "
                    "them again, or merge into a wider dtype"
                )
            merged[list(own.tokens)] = rows
        return {"weight": merged}

    def extra_repr(self) -> str:
        """Describe the state in ``print(model)``."""
        return f"{super().extra_repr()}, tokens={len(self.tokens)}"


class TiedTokenRows(WeightFollower, TokenRows):
    """A layer whose weight is that of a `TokenRows` layer: the rows that train there count here."""
