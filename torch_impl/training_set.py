"""What a training loop draws from: rows, their order, their batches and their loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Sampler

from loracle.reference import ConfigError

from .batches import Row, collate
from .encoded import EncodedData
from .encoding import Encoded
from .masking import MaskableRow, MaskedRows, Masking
from .packing import pack, packed_inputs, packing_mode
from .sampling import EpochSampler, LengthGroupedSampler
from .tasks import Loss, Task


@dataclass(frozen=True)
class TrainingSet:
    """Encoded examples made ready for a training loop.

    Attributes:
        rows: to draw from, by what `sampler` yields.
        lengths: of the rows, in tokens.
        collate: rows to a batch.
        loss: of a batch.
    """

    rows: Sequence[Row] | MaskedRows
    lengths: tuple[int, ...]
    collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    loss: Loss

    def sampler(self, batch_size: int, seed: int) -> Sampler[Any]:
        """Return the order of the rows, shuffled anew in each epoch; see `LengthGroupedSampler`."""
        order = LengthGroupedSampler(self.lengths, batch_size, seed)
        return EpochSampler(order) if isinstance(self.rows, MaskedRows) else order


def training_set(
    task: Task,
    data: EncodedData,
    model: nn.Module,
    tokenizer: Any,
    *,
    seed: int,
    packing: bool = False,
    max_length: int = 0,
    mask_probability: float = 0.15,
) -> TrainingSet:
    """Return what ``task`` trains on.

    Args:
        task: of the model.
        data: encoded by ``task.encode``.
        model: tried on a row of two examples where packing is wanted.
        tokenizer: for its padding and its mask.
        seed: of the masks.
        packing: join examples to rows of ``max_length`` tokens; `loracle.torch_impl.packing`.
        max_length: of a packed row.
        mask_probability: of a token to be hidden, where the task hides tokens.

    Raises:
        ConfigError: the task cannot be packed, or the model's packed examples would see each other.
    """
    rows: Sequence[Row] | MaskedRows = data.examples
    lengths = tuple(len(row.input_ids) for row in data.examples)
    loss = task.loss
    if packing:
        if task.name != "causal-lm":
            raise ConfigError(f"packing: expected task causal-lm, got {task.name}; train without packing")
        rows = pack([row for row in data.examples if isinstance(row, Encoded)], max_length)
        lengths = tuple(len(row.input_ids) for row in rows)
        loss = packed_loss(task.loss, model)
    elif task.name == "masked-lm":
        rows = MaskedRows(_maskable(data), Masking.of(tokenizer, mask_probability, seed))
    return TrainingSet(rows, lengths, partial(collate, pad_id=pad_id(tokenizer)), loss)


def held_out_batches(
    task: Task,
    data: EncodedData,
    tokenizer: Any,
    batch_size: int,
    *,
    seed: int,
    mask_probability: float = 0.15,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of similar lengths, the shortest first; tokens are hidden the same way always."""
    rows: list[Row] = list(data.examples)
    if task.name == "masked-lm":
        masking = Masking.of(tokenizer, mask_probability, seed)
        rows = list(MaskedRows(_maskable(data), masking).held_out())
    rows.sort(key=lambda row: len(row.input_ids))
    for at in range(0, len(rows), batch_size):
        yield collate(rows[at : at + batch_size], pad_id(tokenizer))


def packed_loss(loss: Loss, model: nn.Module) -> Loss:
    """Return ``loss`` for batches of `Packed` rows; see `packing_mode`.

    Raises:
        ConfigError: the model's packed examples would see each other.
    """
    mode = packing_mode(model)
    dtype = next(model.parameters()).dtype

    def packed(model: nn.Module, inputs: Mapping[str, Tensor], items: Tensor | int | None) -> Tensor:
        return loss(model, packed_inputs(inputs, mode, dtype), items)

    return packed


def pad_id(tokenizer: Any) -> int:
    """Return the token that fills a batch; 0 where the tokenizer has none, for models that never read it."""
    found = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)


def _maskable(data: EncodedData) -> list[MaskableRow]:
    return [row for row in data.examples if isinstance(row, MaskableRow)]
