"""A graph for each method, over one copy of the weights.

All graphs are the base's, edited, and refer to the base's data file; the merged model alone has weights, and
a file, of its own. An adapter's tensors are random and lie in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import Checkpoint, MergedWeights
from loracle.reference import TargetError

from ..adapter_inputs import put_inputs
from ..graphs import graph_template
from ..names import DATA_FILE, GRAPH_FILE, GRAPH_SUFFIX
from ..options import GraphOptions, noted_options
from ..recipes import RECIPES
from ..template import GraphTemplate
from ..unmerged import adapted_weights, add_adapter
from ..write import Progress, graph_bytes, refer, write_models
from .bottlenecks import add_adapter_h, add_adapter_l
from .lora import adapter_tensors, lora_layers, lora_parameters, random_adapter
from .methods import ADAPTER_H, ADAPTER_L, FULL, INPUTS, MERGED, PREFIX, PROMPT, UNMERGED
from .models import BenchModel
from .sizes import (
    adapter_h_parameters,
    adapter_l_parameters,
    nearest_rank,
    prefix_parameters,
    prompt_parameters,
)
from .virtual_tokens import add_virtual_tokens

Array = np.ndarray[Any, Any]

_BASE = "base"
_SPREAD = 0.02
_SEED = 1


@dataclass(frozen=True)
class MethodGraph:
    """One method's graph, and what it has to be given.

    Attributes:
        method: of `methods.METHODS`, or `methods.FULL`.
        graph: its file.
        size: the rank, or the number of positions; 0 for full fine-tuning.
        parameters: that are trained.
        model_bytes: of the graph and the weights that it refers to.
        past: positions that stand in the cache before a text.
        row_by_row: whether a batch's rows are prefilled one after the other.
        prompt: virtual tokens that stand before a text.
        inputs: tensors beside text and cache.
        is_base: whether the graph is the base's own, byte for byte.
    """

    method: str
    graph: Path
    size: int
    parameters: int
    model_bytes: int
    past: int = 0
    row_by_row: bool = False
    prompt: int = 0
    inputs: Mapping[str, Array] = field(default_factory=dict)
    is_base: bool = False


@dataclass(frozen=True)
class Positions:
    """Of prefix tuning and of prompt tuning, before each text."""

    prefix: int = 10
    prompt: int = 20


class Graphs:
    """Makes the graphs of a model's methods in a folder, each once.

    Args:
        model: whose checkpoint is read.
        folder: an empty one.
        positions: of prefix and prompt.
        dtype: of weights and cache, as `GraphOptions` has it.
        progress: called with (bytes written, bytes in all) of the base's weights.

    Attributes:
        base: of full fine-tuning: the model's own graph and weights.
        vocabulary: tokens that the model knows.
        context: positions that it has; None where nothing says it.
    """

    def __init__(
        self,
        model: BenchModel,
        folder: Path,
        positions: Positions,
        dtype: str = "fp32",
        progress: Progress | None = None,
    ) -> None:
        self._model, self._folder, self._positions = model, folder, positions
        self._options = GraphOptions(dtype)
        self._random = np.random.default_rng(_SEED)
        self._made: dict[tuple[str, float], MethodGraph] = {}
        self._merged: dict[int, Path] = {}
        with Checkpoint(model.folder) as checkpoint:
            config = dict(checkpoint.config)
            template = self._template(checkpoint, packed=True)
            self._hidden = _hidden_size(template, config)
            self.vocabulary = _number(config, "vocab_size")
            self._shape = template.decoder
            self._portable = noted_options(template.model, GRAPH_FILE).portable
            self.context = _context(template, config)
            (folder / _BASE).mkdir()
            size = write_models(
                {GRAPH_FILE: template}, MergedWeights(checkpoint, None), folder / _BASE, progress
            )
            self._offsets = _offsets(template)
        self.base = MethodGraph(
            FULL, folder / _BASE / GRAPH_FILE, 0, _parameters(template), size, is_base=True
        )
        self._model_type = str(config.get("model_type"))

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(self._options.numpy_dtype.itemsize)

    @property
    def decoder(self) -> bool:
        """Whether the model has a cache."""
        return self._shape is not None

    def token_bytes(self, length: int) -> int:
        """About what a token of a text of `length` takes: logits, a place in two caches, and the widest
        values of two sessions."""
        numbers = 24 * self._hidden
        if self._shape is not None:
            cache = 2 * self._shape.layers * self._shape.kv_heads * self._shape.head_size
            numbers += self._shape.vocabulary + 2 * cache + self._shape.heads * length
        return self.itemsize * numbers

    def graph(self, method: str, parameters: float) -> MethodGraph:
        """The graph of a method with about as many trained parameters as given, for as many layers as the
        model has; prefix and prompt have their own numbers.

        Raises TargetError where the method has no place in the model.
        """
        key = (method, 0.0 if method in (PREFIX, PROMPT) else parameters)
        if key not in self._made:
            self._made[key] = self._make(method, parameters)
        return self._made[key]

    def _make(self, method: str, parameters: float) -> MethodGraph:
        if method == PREFIX:
            return self._prefix()
        with Checkpoint(self._model.folder) as checkpoint:
            if method in (MERGED, UNMERGED, INPUTS):
                return self._lora(method, parameters, checkpoint)
            template = self._template(checkpoint, packed=True)
        if method == PROMPT:
            return self._prompt(template)
        return self._bottleneck(method, parameters, template)

    def _prefix(self) -> MethodGraph:
        """The base's graph, whose cache is not empty when a text begins."""
        shape = self._shape
        if shape is None:
            raise TargetError(
                "prefix: expected a model with a cache, whose first positions it is, got one without; leave "
                "it out of --methods"
            )
        count = self._positions.prefix
        trained = prefix_parameters(shape.layers, shape.kv_heads * shape.head_size, count)
        base = self.base
        return MethodGraph(
            PREFIX,
            base.graph,
            count,
            trained,
            base.model_bytes + self.itemsize * trained,
            past=count,
            row_by_row=not self._portable,
            is_base=True,
        )

    def _prompt(self, template: GraphTemplate) -> MethodGraph:
        count = self._positions.prompt
        add_virtual_tokens(template.model.graph, self.vocabulary, self._hidden, count, self._draw)
        trained = prompt_parameters(self._hidden, count)
        path = self._write(template, PROMPT)
        return MethodGraph(PROMPT, path, count, trained, self._bytes(path), prompt=count)

    def _bottleneck(self, method: str, parameters: float, template: GraphTemplate) -> MethodGraph:
        insert, count = {
            ADAPTER_H: (add_adapter_h, adapter_h_parameters),
            ADAPTER_L: (add_adapter_l, adapter_l_parameters),
        }[method]
        layers, hidden = self._model.layers, self._hidden
        rank = nearest_rank(lambda r: count(layers, hidden, r), parameters)
        trained = insert(template.model.graph, hidden, rank, self._draw)
        path = self._write(template, f"{method}-{rank}")
        return MethodGraph(method, path, rank, trained, self._bytes(path))

    def _lora(self, method: str, parameters: float, checkpoint: Checkpoint) -> MethodGraph:
        template = self._template(checkpoint, packed=False)
        layers = lora_layers(template, self._model_type)
        rank = nearest_rank(lambda r: lora_parameters(layers, r), parameters)
        adapter = random_adapter(layers, rank, self._draw)
        trained = lora_parameters(layers, rank)
        if method == MERGED:
            packed = self._template(checkpoint, packed=True)
            folder = self._folder / f"{MERGED}-{rank}"
            folder.mkdir()
            size = write_models({GRAPH_FILE: packed}, MergedWeights(checkpoint, adapter), folder)
            path = folder / GRAPH_FILE
            same = path.read_bytes() == self.base.graph.read_bytes()
            return MethodGraph(method, path, rank, trained, size, is_base=same)
        weights = adapted_weights(template, adapter)
        if method == UNMERGED:
            add_adapter(template, adapter)
            path = self._write(template, f"{method}-{rank}")
            return MethodGraph(method, path, rank, trained, self._bytes(path))
        for weight in weights.values():
            put_inputs(template.model.graph, weight)
        path = self._write(template, method)
        return MethodGraph(
            method,
            path,
            rank,
            trained,
            self._bytes(path) + self.itemsize * trained,
            inputs=adapter_tensors(adapter, weights),
        )

    def _template(self, checkpoint: Checkpoint, *, packed: bool) -> GraphTemplate:
        options = replace(self._options, packed=packed)
        return graph_template(checkpoint, checkpoint.config, self._model.task, options)

    def _write(self, template: GraphTemplate, name: str) -> Path:
        """Write a graph that refers to the base's weights."""
        folder = self._folder / _BASE
        for weight in template.unbound:
            refer(template.model.graph.initializers[weight], DATA_FILE, self._offsets[weight], folder)
        template.model.opset_imports.setdefault(
            "com.microsoft", 1
        )  # a portable graph has none of its operators
        path = folder / f"{name}{GRAPH_SUFFIX}"
        path.write_bytes(graph_bytes(template))
        return path

    def _bytes(self, path: Path) -> int:
        return path.stat().st_size + (path.parent / DATA_FILE).stat().st_size

    def _draw(self, _: str, shape: tuple[int, ...]) -> Array:
        drawn = self._random.standard_normal(shape, dtype=np.float32) * np.float32(_SPREAD)
        return drawn.astype(self._options.numpy_dtype)


def _offsets(template: GraphTemplate) -> dict[str, int]:
    """Where each weight, and each initializer made of weights, lies in the file that was written."""
    offsets = {}
    for name in template.unbound:
        held = template.model.graph.initializers[name].const_value
        assert isinstance(held, ir.ExternalTensor)
        offsets[name] = start = int(held.offset or 0)
        made = template.made.get(name)
        if made is not None and RECIPES[made.recipe].in_order:
            for weight in made.sources:
                offsets[weight] = start
                start += int(np.prod(template.shape(weight))) * template.dtype.itemsize
    return offsets


def _parameters(template: GraphTemplate) -> int:
    return sum(int(np.prod(template.shape(weight))) for weight in template.aliases)


def _hidden_size(template: GraphTemplate, config: Mapping[str, Any]) -> int:
    if template.decoder is not None:
        return template.decoder.hidden_size
    return _number(config, "hidden_size" if "hidden_size" in config else "dim")


def _context(template: GraphTemplate, config: Mapping[str, Any]) -> int | None:
    if template.decoder is not None:
        return template.decoder.context
    positions = config.get("max_position_embeddings")
    # RoBERTa counts positions from the padding token's on.
    return positions - 2 if isinstance(positions, int) else None


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise TargetError(f"{key}: expected a number in config.json, got {value!r}; it cannot be measured")
    return value
