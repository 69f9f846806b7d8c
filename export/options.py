"""How a graph is spelled: what its nodes depend on beside the architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files.json_file import parse_json_object
from loracle.reference import ConfigError, FileError

from .block_codes import code_bits
from .names import OPTIONS_KEY

DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


@dataclass(frozen=True)
class GraphOptions:
    """Which graph of a model is meant.

    Attributes:
        dtype: "fp32" or "fp16", of weights, cache and outputs.
        packed: whether products of the same input are one, their weights' rows one after the other.
        quantization: None; or "int8" or "int4", the codes of the weights that products alone use.
        portable: whether all operators are of the ONNX standard, and the cache grows by concatenation.

    Raises:
        ConfigError: another dtype or quantization, or a quantization where the graph is portable.
    """

    dtype: str = "fp32"
    packed: bool = True
    quantization: str | None = None
    portable: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.quantization is not None:
            code_bits(self.quantization)
            if self.portable:
                raise ConfigError(
                    f"quantization: expected none in a portable graph, got {self.quantization!r}, whose "
                    "operators are onnxruntime's own; leave one of them out"
                )

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the weights."""
        return DTYPES[self.dtype]

    def to_json(self) -> Mapping[str, Any]:
        """All of them, by their names."""
        return asdict(self)


def note_options(model: ir.Model, options: GraphOptions) -> None:
    """Write the options into a graph's metadata, in place."""
    model.metadata_props[OPTIONS_KEY] = json.dumps(options.to_json())


def noted_options(model: ir.Model, source: str) -> GraphOptions:
    """The options that somebody's graph says it was made with.

    Raises FileError, naming `source`, where it says none, or none that there are.
    """
    told = model.metadata_props.get(OPTIONS_KEY)
    if told is None:
        raise FileError(
            f"{source}: expected {OPTIONS_KEY} in its metadata, found none; make it with `loracle export`"
        )
    try:
        values = parse_json_object(told.encode(), OPTIONS_KEY)
        if values.keys() != {field.name for field in fields(GraphOptions)}:
            raise ValueError("other options")
        options = GraphOptions(**values)
    except (ValueError, TypeError, ConfigError, FileError) as error:
        raise FileError(
            f"{source}: {OPTIONS_KEY}: expected the options of a graph, got {told[:80]!r}"
        ) from error
    return options
