"""onnxruntime sessions over exported graphs.

Needs onnxruntime and NumPy alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from loracle.files.json_file import parse_json_object
from loracle.reference import FileError

from .mapped_pages import release_mapped
from .names import GRAPH_FILE, GRAPH_SUFFIX, OPTIONS_KEY, SHARDS_KEY, model_folder
from .providers import best_device, providers_of
from .shards import check_shards

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
REFUSALS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in vars(onnxruntime_pybind11_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
"""What onnxruntime raises; these classes have no base of their own."""


def open_session(model: str | Path, threads: int = 0, *, reuse: bool = True) -> onnxruntime.InferenceSession:
    """An onnxruntime session over a graph; CUDA where the installed onnxruntime has it.

    Args:
        model: an exported folder, or one of its graphs.
        threads: onnxruntime's threads; 0 leaves the choice to it.
        reuse: whether values share memory, as the shapes that the graph notes allow; some exporters note
            wrong ones.

    Raises FileError where there is no graph, onnxruntime refuses it, or a checkpoint's shard that it refers
    to is another by now.
    """
    path = Path(model)
    if path.suffix != GRAPH_SUFFIX:
        path = path / GRAPH_FILE
    if not path.is_file():
        raise FileError(f"{path}: expected an exported model, found none; make one with `loracle export`")
    return _open(str(path), path, _options(threads, reuse))


def open_graph(
    graph: bytes, folder: Path, threads: int = 0, *, reuse: bool = True
) -> onnxruntime.InferenceSession:
    """As `open_session`, for a serialized graph whose data files lie in `folder`."""
    options = _options(threads, reuse)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return _open(graph, folder, options)


def _options(threads: int, reuse: bool) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.enable_mem_reuse = reuse
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Every fully used core spins between operators otherwise, which slows whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads != 1 else "0")
    return options


def _open(
    source: str | bytes, path: Path, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers_of(best_device()))
    except REFUSALS as error:
        raise FileError(f"{path}: onnxruntime refuses it: {str(error).splitlines()[0]}") from error
    noted = session.get_modelmeta().custom_metadata_map.get(SHARDS_KEY)
    check_shards(noted, model_folder(path), str(path))
    release_mapped(model_folder(path))
    return session


def grows(session: onnxruntime.InferenceSession) -> bool:
    """Whether a graph returns a cache that has grown, instead of one that it has appended to in place.

    Raises FileError where the graph's metadata cannot be read.
    """
    told = session.get_modelmeta().custom_metadata_map.get(OPTIONS_KEY)
    if told is None:
        return False
    try:
        options = parse_json_object(told.encode(), OPTIONS_KEY)
    except FileError as error:
        raise FileError(f"{OPTIONS_KEY}: expected the options of a graph, got {told[:80]!r}") from error
    return options.get("portable") is True
