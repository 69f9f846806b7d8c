"""Many tasks in one session on one base: a task is run by giving the session its tensors.

Needs onnxruntime, tokenizers and NumPy alone; onnx-ir where adapters are merged on load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime

from loracle.reference import ConfigError, DataError, FileError

from .answers import Answer, answer_prompts
from .context import check_capacity, context_length
from .growing_session import open_decoder
from .loaded_task import LoadedTask, check_inputs, load_task, map_task, signature_of
from .names import GRAPH_FILE, SWAPPABLE_FILE
from .opening import REFUSALS, open_session
from .providers import device_of
from .sampling import Sampling
from .session import DecoderSession
from .task_names import bound_file, bound_names, is_name
from .text import TextModel

Array = np.ndarray[Any, Any]

_GREEDY = Sampling()
_NEW_TOKENS = 128


class Deployment:
    """A deployment's swappable tasks, or its adapters, and its base, in one session.

    The base is in memory once, laid out for the processor; a task's tensors are mapped from its file, so that
    processes share them. What a task is run with is bound for each call: tasks may be run by many threads at
    a time. A call goes on with what it began with, whatever becomes of the task's file.

    Args:
        folder: with a base and tasks in the form swappable, or adapter-inputs: these run unmerged.
        threads: onnxruntime's threads; 0 leaves the choice to it.
        max_bytes: of tasks in memory: those that were used least recently go first. One task is always kept;
            None keeps all. Tensors that a running call uses stay until it ends.
        adapters: folders of adapters, by the names of tasks that are merged into memory when they are first
            used, each entry rounded once.

    Raises:
        FileError: the folder has no base, or onnxruntime refuses it. ConfigError: an adapter has the name of
            a task in the folder, or none that a task can have.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int = 0,
        max_bytes: int | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError(f"max_bytes: expected at least 0, got {max_bytes}")
        self.folder = Path(folder)
        self._threads = threads
        self._max_bytes = max_bytes
        self._adapters = {name: Path(path) for name, path in (adapters or {}).items()}
        taken = set(bound_names(self.folder))
        for name in self._adapters:
            if not is_name(name) or name in taken:
                raise ConfigError(
                    f"adapters: expected names that a task can have and no task of {self.folder} has, "
                    f"got {name!r}"
                )
        self._lock = Lock()
        self._loaded: OrderedDict[str, LoadedTask] = OrderedDict()
        self._text: TextModel | None = None
        self._session = self._open()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, sorted."""
        return tuple(sorted({*bound_names(self.folder), *self._adapters}))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The tasks in memory, the least recently used first."""
        with self._lock:
            return tuple(self._loaded)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the tasks in memory."""
        with self._lock:
            return sum(task.nbytes for task in self._loaded.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs, but those of tasks."""
        return tuple(entry.name for entry in self._session.get_inputs())

    @property
    def text(self) -> TextModel:
        """The tokenizer and the end tokens. Raises FileError where the folder has no tokenizer."""
        if self._text is None:
            self._text = TextModel(self.folder)
        return self._text

    def load(self, task: str) -> None:
        """Bring a task into memory, where it is not.

        Raises FileError: there is no such task, or it is another model's.
        """
        self._take(task)

    def evict(self, task: str) -> None:
        """Let go of a task's tensors; the next call loads them again."""
        with self._lock:
            self._loaded.pop(task, None)

    def decoder(
        self, task: str | None, capacity: int, batch: int = 1, *, reuse: DecoderSession | None = None
    ) -> DecoderSession:
        """A decoder of one task; of the base for None.

        Args:
            capacity: most tokens of a row, prompt and answer together.
            batch: number of rows.
            reuse: a decoder of this deployment that is done with. Where it has as many rows and places, and
                its task changes the same tensors, it is given the other task's and returned.

        Raises:
            FileError: there is no such task, it is another model's, or the model is no decoder.
            ConfigError: the model has not so many positions.
        """
        session, weights = self._take(task)
        if (
            reuse is not None
            and reuse.session is session
            and (reuse.capacity, reuse.batch) == (capacity, batch)
            and reuse.switch(weights)
        ):
            return reuse
        check_capacity(self.folder, capacity)
        return open_decoder(session, capacity, batch=batch, weights=weights)

    def generate(
        self,
        task: str | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
        system: str | None = None,
        raw: bool = False,
    ) -> list[Answer]:
        """A task's answers to a batch of prompts; the base's for None.

        Args:
            prompts: at least one.
            max_new_tokens: most tokens of an answer; None for 128, or what the context has room for.
            stop: strings that end an answer, and are left out of it.
            system: the chat's system message.
            raw: whether a prompt is continued as it is, without the chat template.

        Raises:
            FileError, ConfigError: as `decoder`. DataError: no prompt, or one without a token.
        """
        tokens = [self.text.encode_prompt(prompt, system=system, raw=raw) for prompt in prompts]
        if not tokens or not all(tokens):
            raise DataError("prompts: expected at least one, each of some text")
        longest = max(map(len, tokens))
        if max_new_tokens is None:
            context = context_length(self.folder) or longest + _NEW_TOKENS
            max_new_tokens = max(1, min(_NEW_TOKENS, context - longest))
        session = self.decoder(task, longest + max_new_tokens, len(tokens))
        return answer_prompts(session, self.text, tokens, max_new_tokens, sampling=sampling, stop=stop)

    def run(self, task: str | None, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One pass of a task through the graph, of any head; of the base for None.

        Args:
            inputs: by the names of the graph's inputs.

        Returns:
            the graph's outputs by their names.

        Raises:
            FileError: there is no such task, or it is another model's. DataError: onnxruntime refuses the
                inputs.
        """
        session, weights = self._take(task)
        names = {entry.name for entry in session.get_inputs()}
        for name in inputs:
            if name not in names:
                raise DataError(f"{name}: expected one of the inputs {', '.join(sorted(names))}, got another")
        feeds = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in inputs.items()
        }
        outputs = [entry.name for entry in session.get_outputs()]
        try:
            found = session.run_with_ort_values(outputs, {**feeds, **weights})
        except REFUSALS as error:
            raise DataError(f"inputs: onnxruntime refuses them: {str(error).splitlines()[0]}") from error
        return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}

    def _open(self) -> onnxruntime.InferenceSession:
        """A session on the graph that has the tasks' tensors among its inputs."""
        if self._adapters:
            from .merged_task import open_with_inputs

            return open_with_inputs(self.folder, self._adapters.values(), self._threads)
        path = self.folder / SWAPPABLE_FILE
        return open_session(path if path.is_file() else self.folder / GRAPH_FILE, self._threads)

    def _take(
        self, task: str | None
    ) -> tuple[onnxruntime.InferenceSession, Mapping[str, onnxruntime.OrtValue]]:
        """The session, and what it is given for a task."""
        if task is None:
            return self._session, {}
        with self._lock:
            found = self._current(task)
            if found is None:
                found = self._read(task)
                self._loaded[task] = found
            self._loaded.move_to_end(task)
            if self._max_bytes is not None:
                held = sum(own.nbytes for own in self._loaded.values())
                while held > self._max_bytes and len(self._loaded) > 1:
                    held -= self._loaded.popitem(last=False)[1].nbytes
            return self._session, found.weights

    def _current(self, task: str) -> LoadedTask | None:
        """The task in memory, unless its file is gone or another."""
        found = self._loaded.get(task)
        if found is None or task in self._adapters:
            return found
        if signature_of(bound_file(self.folder, task)) == found.signature:
            return found
        del self._loaded[task]
        return None

    def _read(self, task: str) -> LoadedTask:
        """Load a task, and open the session anew where the task has inputs that it has not yet."""
        if task in self._adapters:
            from .merged_task import merge_task

            found = load_task(merge_task(self.folder, self._adapters[task]), device_of(self._session))
            check_inputs(str(self._adapters[task]), found, self._session)
            return found
        path = bound_file(self.folder, task)
        signature = signature_of(path)
        if signature is None:
            there = ", ".join(self.tasks) or "none"
            raise FileError(f"{path}: expected one of the deployment's tasks ({there}), found none")
        found = map_task(path, signature, device_of(self._session))
        inputs = {entry.name for entry in self._session.get_overridable_initializers()}
        if not inputs.issuperset(found.weights):
            self._session = self._open()
        check_inputs(str(path), found, self._session)
        return found
