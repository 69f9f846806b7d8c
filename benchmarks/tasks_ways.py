"""The ways of having many tasks of one base at hand that `benchmarks.tasks` compares: all greedy, none of
them stops early.

A process has one of them: what a way imports is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from .answer import Answer

BAKED = "baked"
CONTROL = "A/A control"
LINKED = "linked"
LINKED_SHARED = "linked, not prepacked"
SWAPPABLE = "swappable"
INPUTS = "adapter inputs"
GENAI = "genai adapters"
PEFT = "PEFT set_adapter"
WAYS = (LINKED, LINKED_SHARED, SWAPPABLE, INPUTS, GENAI, PEFT)
"""What is compared with `BAKED`, in order."""

_SESSION = ("benchmarks.decode_loop", "loracle.export.growing_session", "loracle.export.generation")
PACKAGES: Mapping[str, tuple[str, ...]] = {
    BAKED: _SESSION,
    CONTROL: _SESSION,
    LINKED: _SESSION,
    LINKED_SHARED: _SESSION,
    SWAPPABLE: (*_SESSION, "loracle.export.deployment"),
    INPUTS: (*_SESSION, "loracle.export.deployment"),
    GENAI: ("benchmarks.decode_genai",),
    PEFT: ("benchmarks.decode_transformers", "transformers", "peft", "loracle.torch_impl.loading"),
}
"""What a way imports before it opens a model."""

Run = Callable[[Sequence[int], int], Answer]
"""Called with a prompt and how many tokens to append."""


class Way(Protocol):
    """One base, opened, and the tasks that were loaded."""

    def load(self, task: str) -> None:
        """Bring a task into memory."""

    def ready(self, task: str, capacity: int) -> Run:
        """Make everything ready for an answer of a task, prompt and answer of `capacity` tokens."""


@dataclass(frozen=True)
class Opening:
    """What a process opens.

    Attributes:
        way: of `WAYS`, or `BAKED`, or `CONTROL`.
        folder: of the deployment; `BAKED`: of folders called after their tasks; `PEFT`: the base checkpoint.
        adapters: the folder of adapters, called after their tasks.
        threads: of the runtime.
        unused: a token that is in no answer, for the runtime that insists on one that ends an answer.
    """

    way: str
    folder: str
    adapters: str
    threads: int
    unused: int


class Sessions:
    """A session for each task, on a graph of its own."""

    def __init__(self, threads: int, graph: Callable[[str], Path], prepacked: bool = True) -> None:
        self._threads, self._graph, self._prepacked = threads, graph, prepacked
        self._sessions: dict[str, Any] = {}

    def load(self, task: str) -> None:
        from loracle.export.opening import open_session

        graph = self._graph(task)
        self._sessions[task] = (
            open_session(graph, self._threads) if self._prepacked else _open_unpacked(graph, self._threads)
        )

    def ready(self, task: str, capacity: int) -> Run:
        from loracle.export.growing_session import open_decoder

        from .decode_loop import timed_loop

        return partial(timed_loop, open_decoder(self._sessions[task], capacity))


def _open_unpacked(graph: Path, threads: int) -> Any:
    """A session that leaves weights as they lie in their file, where sessions share them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class Deployed:
    """`loracle.export.Deployment`, which binds merged tensors, or A and B where the graph has them apart."""

    def __init__(self, folder: Path, threads: int) -> None:
        from loracle.export.deployment import Deployment

        self._deployment = Deployment(folder, threads=threads)
        self._decoder: Any = None

    def load(self, task: str) -> None:
        self._deployment.load(task)

    def ready(self, task: str, capacity: int) -> Run:
        from .decode_loop import timed_loop

        self._decoder = self._deployment.decoder(task, capacity, reuse=self._decoder)
        return partial(timed_loop, self._decoder)


class Genai:
    """onnxruntime-genai with its `Adapters`."""

    def __init__(self, folder: Path, threads: int, unused: int) -> None:
        import onnxruntime_genai

        from .decode_genai import open_model

        self._folder = folder
        self._model = open_model(folder, threads, unused)
        self._adapters = onnxruntime_genai.Adapters(self._model)

    def load(self, task: str) -> None:
        self._adapters.load(str(self._folder / f"{task}.onnx_adapter"), task)

    def ready(self, task: str, capacity: int) -> Run:
        from .decode_genai import open_generator, timed_generator

        generator = open_generator(self._model, capacity)
        generator.set_active_adapter(self._adapters, task)
        return partial(timed_generator, generator)


class Peft:
    """PEFT's model in torch, with transformers' `generate`."""

    def __init__(self, base: Path, adapters: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from loracle.torch_impl.loading import quiet_transformers

        torch.set_num_threads(threads)
        with quiet_transformers():
            self._base = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, local_files_only=True
            )
        self._adapters = adapters
        self._model: Any = None

    def load(self, task: str) -> None:
        from peft import PeftModel

        folder = str(self._adapters / task)
        if self._model is None:
            self._model = PeftModel.from_pretrained(self._base, folder, adapter_name=task).eval()
        else:
            self._model.load_adapter(folder, task)

    def ready(self, task: str, capacity: int) -> Run:
        from .decode_transformers import timed_generate

        self._model.set_adapter(task)
        return partial(timed_generate, self._model, options={})


def open_way(opening: Opening) -> Way:
    """Open what there is to open before a task is asked for."""
    folder, threads = Path(opening.folder), opening.threads
    if opening.way in (BAKED, CONTROL):
        return Sessions(threads, lambda task: folder / task / "model.onnx")
    if opening.way in (LINKED, LINKED_SHARED):
        return Sessions(threads, lambda task: folder / f"{task}.onnx", opening.way == LINKED)
    if opening.way in (SWAPPABLE, INPUTS):
        return Deployed(folder, threads)
    if opening.way == GENAI:
        return Genai(folder, threads, opening.unused)
    return Peft(folder, Path(opening.adapters), threads)
