"""A decoder's graph without its weights, and its place in the cache.

The graph depends on the architecture, the dtype and the versions of what traced it, never on a weight:
one trace serves the base model and every fine-tuned task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import cache_folder, write_atomic
from loracle.files.atomic import reported

from .options import GraphOptions

_NAMES = "loracle.names"
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder with a cache: numbers of layers, heads of queries and of keys, and entries."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Made:
    """An initializer that holds several weights: `recipes.RECIPES` has the recipe."""

    recipe: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class GraphTemplate:
    """A graph whose weights have a name, a shape and a dtype, and no values yet.

    Attributes:
        model: all initializers but those named in `aliases` and `made` are constants.
        aliases: each weight's checkpoint names, itself first (more where weights are tied).
        dtype: of the weights.
        unused: names of the weights that no output depends on.
        ignored: patterns of the names of what a checkpoint may hold beside the model's weights.
        renames: patterns, with what to put for them, that turn names of older checkpoints into the model's.
        prefix: of the weights of the model without its head.
        decoder: its sizes, where it has a cache.
        made: the initializers that hold several weights, which are no initializers themselves.
        shapes: of these weights.
    """

    model: ir.Model
    aliases: dict[str, tuple[str, ...]]
    dtype: np.dtype[Any]
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    decoder: DecoderShape | None = None
    made: Mapping[str, Made] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def unbound(self) -> frozenset[str]:
        """Names of the initializers that have no values yet."""
        return frozenset(self.aliases).difference(self.shapes).union(self.made)

    def shape(self, weight: str) -> tuple[int, ...]:
        """The shape of a weight, or of an initializer made of several."""
        if weight in self.shapes:
            return self.shapes[weight]
        shape = self.model.graph.initializers[weight].shape
        assert shape is not None
        return tuple(int(size) for size in shape.numpy())


def cache_key(config: Mapping[str, Any], options: GraphOptions, file: str) -> str:
    """SHA-256 over architecture, options, the tracing packages' versions and this room's source."""
    digest = hashlib.sha256()
    architecture = {k: v for k, v in config.items() if k not in _NOT_ARCHITECTURE}
    versions = {p: version(p) for p in ("torch", "transformers", "onnx-ir", "onnxscript")}
    what = [architecture, options.to_json(), file, versions]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def to_bytes(template: GraphTemplate) -> bytes:
    """The template as an ONNX model whose unbound initializers are graph inputs."""
    model = template.model.clone()
    graph = model.graph
    unbound = [name for name in graph.initializers if name in template.unbound]
    for name in unbound:
        graph.inputs.append(graph.initializers.pop(name))
    model.metadata_props[_NAMES] = json.dumps(
        {
            "aliases": [list(group) for group in template.aliases.values()],
            "unused": list(template.unused),
            "ignored": list(template.ignored),
            "renames": [list(pair) for pair in template.renames],
            "prefix": template.prefix,
            "decoder": None if template.decoder is None else asdict(template.decoder),
            "unbound": unbound,
            "made": {name: [made.recipe, list(made.sources)] for name, made in template.made.items()},
            "shapes": {name: list(shape) for name, shape in template.shapes.items()},
        }
    )
    return bytes(ir.to_proto(model).SerializeToString())


def from_bytes(data: bytes, dtype: np.dtype[Any]) -> GraphTemplate:
    """The inverse of `to_bytes`."""
    import onnx

    model = ir.from_proto(onnx.ModelProto.FromString(data))
    names = json.loads(model.metadata_props.pop(_NAMES))
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    for name in names["unbound"]:
        graph.inputs.remove(inputs[name])
        graph.initializers[name] = inputs[name]
    shape = None if names["decoder"] is None else DecoderShape(**names["decoder"])
    return GraphTemplate(
        model,
        {group[0]: tuple(group) for group in names["aliases"]},
        dtype,
        tuple(names["unused"]),
        tuple(names["ignored"]),
        tuple((pattern, target) for pattern, target in names["renames"]),
        names["prefix"],
        shape,
        {name: Made(recipe, tuple(sources)) for name, (recipe, sources) in names["made"].items()},
        {name: tuple(own) for name, own in names["shapes"].items()},
    )


def cached(
    config: Mapping[str, Any],
    options: GraphOptions,
    files: Sequence[str],
    make: Callable[[], Mapping[str, GraphTemplate]],
    folder: Path | None = None,
) -> dict[str, GraphTemplate]:
    """The templates for `config` by the names of their `files`, read from the cache or made and put there.

    A cache file that is not whole is made anew: the file's name ends in the hash of its contents.

    Raises FileError: the cache cannot be written.
    """
    folder = (folder or cache_folder()) / "graphs"
    dtype = options.numpy_dtype
    stems = {file: cache_key(config, options, file)[:32] for file in files}
    held = {file: data for file, stem in stems.items() if (data := _held(folder, stem)) is not None}
    if held.keys() != stems.keys():
        held = {file: to_bytes(template) for file, template in make().items()}
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for file, data in held.items():
            write_atomic(folder / f"{stems[file]}-{_hash(data)}.onnx", data)
    return {file: from_bytes(held[file], dtype) for file in files}


def _held(folder: Path, stem: str) -> bytes | None:
    """Return what the cache holds, if it is whole."""
    for path in folder.glob(f"{stem}-*.onnx"):
        data = path.read_bytes()
        if path.stem == f"{stem}-{_hash(data)}":
            return data
    return None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
