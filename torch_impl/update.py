"""One adapter in one layer: its matrices, and what is said of them."""

import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from loracle.reference import ConfigError, lora_scaling

TAKEN_FROM_W0 = ("pissa", "olora")
"""The values of ``init_lora_weights`` with which an adapter starts as a part of W0."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class UpdateOptions:
    """What a configuration says of one adapter in one layer; every value is checked when it is made.

    Attributes:
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        dropout: probability in [0, 1) of dropping an entry of the adapter's input while training.
        use_rslora: scaling is ``lora_alpha / sqrt(r)`` instead of ``lora_alpha / r``.
        lora_bias: whether lora_B has a bias.
        use_dora: whether there is a magnitude, `loracle.reference.dora_forward`.
        init: PEFT's ``init_lora_weights``, see `loracle.torch_impl.starts`.

    Raises:
        ConfigError: a wrong rank, alpha or dropout.
    """

    r: int
    lora_alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init: bool | str = True

    def __post_init__(self) -> None:
        lora_scaling(self.r, self.lora_alpha, self.use_rslora)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora_dropout: expected a probability in [0, 1), got {self.dropout!r}")

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, or ``lora_alpha / sqrt(r)``; float64."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)


class LoraUpdate(nn.Module):
    """The trained tensors of one adapter in one layer; a `LoraLayer` computes with them.

    Attributes:
        lora_A, lora_B: in the shapes of PEFT's files for the kind of layer.
        lora_bias: (out,), the bias of lora_B, or None.
        lora_magnitude_vector: DoRA's magnitude in the shape of PEFT's files, or None.
        start: (A, B) to take away from the update, where it starts as a part of W0 (PiSSA, OLoRA): then the
            update is ``scaling * (lora_B lora_A - B A)``, zero at the start, and W0 stays what it is. None
            for no such part.
        options: see `UpdateOptions`.
    """

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        options: UpdateOptions,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_bias: Tensor | None = None,
        lora_magnitude_vector: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.lora_bias = None if lora_bias is None else nn.Parameter(lora_bias)
        self.lora_magnitude_vector = (
            None if lora_magnitude_vector is None else nn.Parameter(lora_magnitude_vector)
        )
        # B is kept with its sign changed: what is taken away is one more addition.
        self.register_buffer("start_A", None if start is None else start[0], persistent=False)
        self.register_buffer("minus_start_B", None if start is None else -start[1], persistent=False)

    @property
    def is_product(self) -> bool:
        """Whether it is ``scaling * lora_B lora_A`` and nothing beside: no magnitude, no bias of lora_B."""
        return self.lora_magnitude_vector is None and self.lora_bias is None

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """(A, -B) of the part of W0 that the update starts as, or None."""
        A, B = cast(tuple[Tensor | None, Tensor | None], (self.start_A, self.minus_start_B))
        return None if A is None or B is None else (A, B)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A and B with ``scaling * B A`` the whole update: of twice the rank where it starts as a part
        of W0.
        """
        if self.start is None:
            return self.lora_A, self.lora_B
        A, B = self.start
        return torch.cat([self.lora_A, A]), torch.cat([self.lora_B, B], dim=1)

    @property
    def scaling(self) -> float:
        """See `UpdateOptions.scaling`."""
        return self.options.scaling

    def extra_repr(self) -> str:
        """Describe the adapter in ``print(model)``."""
        options = self.options
        return f"r={options.r}, scaling={options.scaling:g}, dropout={options.dropout:g}"


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of an adapter beside a weight: float32, or float64 beside float64."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


def check_adapter_name(name: str) -> str:
    """Return the name, which has to serve as a part of parameter names.

    Raises:
        ConfigError: it has a dot, a space or the like, or is empty.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"adapter_name: expected letters, digits, '_' and '-', got {name!r}; choose a plain name"
        )
    return name
