"""A decoder's graph without its weights, and its place in the cache.

The graph depends on the architecture, the dtype and the versions of what traced it, never on a weight:
one trace serves the base model and every fine-tuned task.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import cache_folder, write_atomic

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
class GraphTemplate:
    """A graph whose weights have a name, a shape and a dtype, and no values yet.

    Attributes:
        model: all initializers but those named in `aliases` are constants.
        aliases: each weight's checkpoint names, itself first (more where weights are tied).
        dtype: of the weights.
        unused: names of the weights that no output depends on.
        ignored: patterns of the names of what a checkpoint may hold beside the model's weights.
        renames: patterns, with what to put for them, that turn names of older checkpoints into the model's.
        prefix: of the weights of the model without its head.
        decoder: its sizes, where it has a cache.
    """

    model: ir.Model
    aliases: dict[str, tuple[str, ...]]
    dtype: np.dtype[Any]
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    decoder: DecoderShape | None = None

    @property
    def weights(self) -> list[ir.Value]:
        """The unbound initializers, in the order of the model's parameters."""
        return [self.model.graph.initializers[name] for name in self.aliases]


def cache_key(config: Mapping[str, Any], dtype: np.dtype[Any]) -> str:
    """SHA-256 over architecture, dtype, the tracing packages' versions and this room's source."""
    digest = hashlib.sha256()
    architecture = {k: v for k, v in config.items() if k not in _NOT_ARCHITECTURE}
    versions = {p: version(p) for p in ("torch", "transformers", "onnx-ir", "onnxscript")}
    digest.update(json.dumps([architecture, dtype.name, versions], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def to_bytes(template: GraphTemplate) -> bytes:
    """The template as an ONNX model whose unbound weights are graph inputs."""
    model = template.model.clone()
    graph = model.graph
    for name in template.aliases:
        graph.inputs.append(graph.initializers.pop(name))
    model.metadata_props[_NAMES] = json.dumps(
        {
            "aliases": [list(group) for group in template.aliases.values()],
            "unused": list(template.unused),
            "ignored": list(template.ignored),
            "renames": [list(pair) for pair in template.renames],
            "prefix": template.prefix,
            "decoder": None if template.decoder is None else asdict(template.decoder),
        }
    )
    return bytes(ir.to_proto(model).SerializeToString())


def from_bytes(data: bytes, dtype: np.dtype[Any]) -> GraphTemplate:
    """The inverse of `to_bytes`."""
    import onnx

    model = ir.from_proto(onnx.ModelProto.FromString(data))
    names = json.loads(model.metadata_props.pop(_NAMES))
    groups = names["aliases"]
    graph = model.graph
    unbound = {str(value.name): value for value in graph.inputs}
    for group in groups:
        value = unbound[group[0]]
        graph.inputs.remove(value)
        graph.initializers[group[0]] = value
    aliases = {group[0]: tuple(group) for group in groups}
    shape = None if names["decoder"] is None else DecoderShape(**names["decoder"])
    return GraphTemplate(
        model,
        aliases,
        dtype,
        tuple(names["unused"]),
        tuple(names["ignored"]),
        tuple((pattern, target) for pattern, target in names["renames"]),
        names["prefix"],
        shape,
    )


def cached(
    config: Mapping[str, Any],
    dtype: np.dtype[Any],
    make: Callable[[], GraphTemplate],
    folder: Path | None = None,
) -> GraphTemplate:
    """The template for `config`, read from the cache or made and put there.

    A cache file that is not whole is made anew: the file's name ends in the hash of its contents.
    """
    folder = (folder or cache_folder()) / "graphs"
    stem = cache_key(config, dtype)[:32]
    for path in folder.glob(f"{stem}-*.onnx"):
        data = path.read_bytes()
        if re.fullmatch(r"[0-9a-f]{16}", path.stem.removeprefix(stem + "-")) and path.stem.endswith(
            hashlib.sha256(data).hexdigest()[:16]
        ):
            return from_bytes(data, dtype)
    data = to_bytes(make())
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}.onnx", data)
    return from_bytes(data, dtype)
