"""The unmerged model in float64, and the noise that rounding in another precision puts on its outputs.

Numeric contract, clause 7: noise of the size that `product_noise` gives each matrix product is added at the
products' outputs, several times with different seeds; the largest deviation of the outputs, times a stated
factor, is the tolerance for a model evaluated in that precision.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.files import Adapter
from loracle.files.checkpoint import is_module
from loracle.files.json_file import read_json_object
from loracle.files.sidecar import CONFIG_FILE, config_bytes
from loracle.files.ties import EMBEDDINGS
from loracle.reference import ConfigError, unit_roundoff
from loracle.torch_impl.adapter_io import load_adapter
from loracle.torch_impl.loading import quiet_transformers

from ..tasks import TASKS, Task
from .adapter_noise import as_merged
from .float64_mode import in_float64
from .rounding_noise import RoundingNoise
from .stacked_adapter import with_experts_stacked

#: The tolerance is this many times the largest deviation sampled: the maximum of a few draws lies below the
#: maximum over all draws, and roundings outside the matrix products are not sampled. It can be small, for
#: `product_noise` takes every rounding of a product at its largest size.
FACTOR = 2.0
SAMPLES = 4

_CAUSAL = next(task for task in TASKS if task.name == "text-generation")

Watching = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Truth:
    """A float64 output of the unmerged model, and how far rounding was seen to move it.

    Attributes:
        logits: the output as the model returns it; of `Float64Model.evaluate`, (n, vocabulary).
        deviation: the largest of any entry that counts.
    """

    logits: NDArray[Any]
    deviation: float

    @property
    def tolerance(self) -> float:
        """How far a right model's output may be off."""
        return FACTOR * self.deviation


class Float64Model:
    """The transformers model of `model_dir` with `adapter` beside its weights, unmerged, in float64.

    Args:
        model_dir: transformers folder; its weights are widened, exactly.
        adapter: None for the base model alone.
        task: which of the architecture's models, and with which outputs.
        config: the content of the merged model's `config.json`, where the adapter changes it: a head or a
            vocabulary that the checkpoint has not comes from the adapter then. None for the folder's own.
        trusted: whether the folder's own modelling code may run.
    """

    def __init__(
        self,
        model_dir: str | Path,
        adapter: Adapter | None,
        task: Task = _CAUSAL,
        config: Mapping[str, Any] | None = None,
        *,
        trusted: bool = False,
    ) -> None:
        with quiet_transformers(), _changed(model_dir, config, trusted) as changes:
            model = getattr(transformers, task.auto).from_pretrained(
                model_dir,
                dtype=torch.float64,
                # The implementations whose products are plain ones.
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                trust_remote_code=trusted,
                **changes,
            )
        if adapter is not None:
            _put_embeddings(model, adapter)
            load_adapter(model, with_experts_stacked(adapter, model))
        model.double().eval()
        model.config.use_cache = False
        self._model: Any = model
        self._task = task

    @property
    def module(self) -> nn.Module:
        """The transformers model, with the adapter beside its weights."""
        model: nn.Module = self._model
        return model

    def evaluate(
        self,
        sequences: Sequence[Sequence[int]],
        dtype: np.dtype[Any],
        *,
        samples: int = SAMPLES,
        seed: int = 0,
    ) -> list[Truth]:
        """The logits of each sequence by a causal language model, and the largest deviation that `samples`
        draws of rounding cause anywhere in them; see `evaluate_feeds`.

        Raises ConfigError for another kind of model, or fewer than one sample.
        """
        if self._task.name != _CAUSAL.name:
            raise ConfigError(
                f"task: expected {_CAUSAL.name} for sequences of tokens, got {self._task.name}; "
                "evaluate its feeds"
            )
        lengths = [len(sequence) for sequence in sequences]
        # Padding on the right changes nothing before it: attention is causal.
        tokens = np.zeros((len(sequences), max(lengths)), np.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
        ((exact, spread),) = self._sampled({"input_ids": tokens}, dtype, samples, seed)
        return [
            Truth(exact[row, :length].numpy(), float(spread[row, :length].max()))
            for row, length in enumerate(lengths)
        ]

    def evaluate_feeds(
        self,
        feeds: Mapping[str, NDArray[Any]],
        dtype: np.dtype[Any],
        *,
        samples: int = SAMPLES,
        seed: int = 0,
    ) -> dict[str, Truth]:
        """The task's outputs for inputs given by the names that the model's forward has for them.

        Their deviations are the largest that `samples` draws of rounding cause, for a model stored in
        `dtype`, where `attention_mask`, or `decoder_attention_mask` where the outputs are a decoder's, is 1;
        anywhere without one. Terms are summed in float32, as kernels for float16 do too, or in a wider
        `dtype`.

        Raises ConfigError for fewer than one sample.
        """
        mask = feeds.get("decoder_attention_mask" if "decoder_input_ids" in feeds else "attention_mask")
        truths = {}
        sampled = self._sampled(feeds, dtype, samples, seed)
        for name, (exact, spread) in zip(self._task.outputs, sampled, strict=True):
            if mask is not None and not self._task.pooled and spread.shape[:2] == mask.shape:
                spread = spread[torch.from_numpy(mask) == 1]
            truths[name] = Truth(exact.numpy(), float(spread.max()))
        return truths

    def _sampled(
        self, feeds: Mapping[str, NDArray[Any]], dtype: np.dtype[Any], samples: int, seed: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each output of the task, and the largest deviation of each of its entries."""
        if samples < 1:
            raise ConfigError(f"samples: expected at least 1, got {samples}")
        draws = self.draws(feeds, dtype, samples=samples, seed=seed)
        exact = next(draws)
        spreads = [torch.zeros_like(output) for output in exact]
        for draw in draws:
            for spread, output, noisy in zip(spreads, exact, draw, strict=True):
                torch.maximum(spread, (noisy - output).abs_(), out=spread)
        return list(zip(exact, spreads, strict=True))

    def draws(
        self,
        feeds: Mapping[str, NDArray[Any]],
        dtype: np.dtype[Any],
        *,
        samples: int = SAMPLES,
        seed: int = 0,
        watching: Watching | None = None,
    ) -> Iterator[list[Tensor]]:
        """Yield the task's outputs: exact, and then with each of `samples` draws of rounding; see
        `evaluate_feeds`.

        Args:
            watching: makes what each of these evaluations stands in, for hooks on the modules of `module`.
        """
        stored = unit_roundoff(dtype)
        accumulated = min(stored, unit_roundoff(np.float32))
        inputs = {name: _tensor(array) for name, array in feeds.items()}
        for sample in range(-1, samples):
            noise = None if sample < 0 else RoundingNoise(stored, accumulated, seed + sample)
            yield self._outputs(inputs, noise, watching or nullcontext)

    def _outputs(
        self, inputs: Mapping[str, Tensor], noise: RoundingNoise | None, watching: Watching
    ) -> list[Tensor]:
        with in_float64(self._model, noise) as mode, as_merged(self._model, mode), watching():
            answer = self._model(**inputs)
        return [answer[name] for name in self._task.outputs]


@contextmanager
def _changed(
    model_dir: str | Path, config: Mapping[str, Any] | None, trusted: bool
) -> Iterator[dict[str, Any]]:
    """What transformers is told where `config` is not the folder's: it, and to take what the adapter has."""
    if config is None or config == read_json_object(Path(model_dir) / CONFIG_FILE):
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_bytes(config_bytes({**config}))
        for path in Path(model_dir).glob("*.py"):
            shutil.copyfile(path, Path(folder) / path.name)
        own = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trusted, local_files_only=True
        )
        yield {"config": own, "ignore_mismatched_sizes": True}


def _put_embeddings(model: Any, adapter: Adapter) -> None:
    """Give the model the embeddings that the adapter's file holds, as a merge does, in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, array in adapter.tensors.items():
        held = parameters.get(name)
        if is_module(name, EMBEDDINGS) and held is not None and tuple(held.shape) == array.shape:
            with torch.no_grad():
                held.copy_(torch.from_numpy(array.astype(np.float64)))


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return the array's numbers as the wide model takes them."""
    wide = np.float64 if np.issubdtype(array.dtype, np.floating) else np.int64
    return torch.from_numpy(array.astype(wide))
