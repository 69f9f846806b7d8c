"""A deployment in the model's own folder: the base's graph refers to the checkpoint's shards as they lie.

    DIR/config.json, DIR/model.safetensors, ...   the checkpoint, which is not touched
    DIR/model.onnx                                the base's graph
    DIR/model.<hash>.onnx_data                    what the shards do not hold as the graph has it: weights
                                                  of another dtype or layout, and constants

ONNX's external data are bytes at an offset of a file, and a safetensors file is a header with tensors as
plain bytes behind it; so a weight that a shard holds in the graph's dtype and layout is named by its
offset, and not copied. The graph notes which shards it refers to (`shards.py`).

The folder is the model's own because runtimes open data in a graph's own folder or below alone. Everything
in it stays as it is; what is written appears in one step each, the graph last. What a killed process leaves
is removed by the next task.

Tensors of a safetensors file start at multiples of 8 bytes as a rule, not of pages as those of
`model.onnx_data` do. onnxruntime maps them all the same, from the page that a tensor begins in. Two
processes on SmolLM2-135M in float32 (538 MB) with `session.disable_prepacking` have a proportional set of
278 MB each, of either file; with weights that onnxruntime has laid out anew, each process has its own, 606
MB, of either file.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from loracle.files import Checkpoint, MergedWeights, require_space
from loracle.files.atomic import flush_folder, flush_tree, reported
from loracle.files.lock import locked
from loracle.files.partial import partial_folder, remove_abandoned
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import ConfigError, FileError

from .deployed_base import NO_DIGEST, UNDER_WAY, Hashing, entry_of
from .external import load_graph, parse_graph
from .genai_config import genai_bytes
from .linked import base_data, remove_unmentioned
from .names import GENAI_FILE, GRAPH_FILE, SHARDS_KEY, SWAPPABLE_FILE
from .options import noted_options
from .shards import shards_text
from .template import GraphTemplate
from .write import BoundTensors, Progress, graph_bytes, lay_out, refer, stored, write_data

FORMS = ("linked", "swappable")
"""Of tasks that can lie beside such a base."""


def check_in_place(checkpoint: Checkpoint, out_dir: Path, form: str) -> None:
    """Raise unless a deployment can be made, or is, in a checkpoint's own folder.

    Raises:
        ConfigError: another form, or another folder.
        FileError: a shard is a link, or the folder has a graph of another maker.
    """
    if form not in FORMS:
        raise ConfigError(
            f"in_place: expected the form {' or '.join(FORMS)}, got {form}; leave --in-place out"
        )
    folder = checkpoint.dir
    if os.path.realpath(out_dir) != os.path.realpath(folder):
        raise ConfigError(
            f"in_place: expected --out {folder}, the model's own folder, got {out_dir}: runtimes open "
            "data in a graph's own folder or below alone; choose this --out or leave --in-place out"
        )
    for shard in checkpoint.shards:
        if (folder / shard).is_symlink():
            raise FileError(
                f"{folder / shard}: expected a file, got a link, which runtimes do not follow; copy the "
                "model or leave --in-place out"
            )
    for path in (folder / GRAPH_FILE, folder / SWAPPABLE_FILE):
        if os.path.lexists(path) and SHARDS_KEY not in parse_graph(path).metadata_props:
            raise FileError(
                f"{path}: expected none, or one that `loracle export --in-place` has made, got another; "
                "move it away or leave --in-place out"
            )


def write_base(template: GraphTemplate, checkpoint: Checkpoint, progress: Progress | None = None) -> int:
    """Make a checkpoint's folder a deployment without tasks; return the bytes of its graph and data file.

    Args:
        template: the base's graph; it is used up.
        checkpoint: for which `check_in_place` has passed.
        progress: called with (bytes written, bytes in all) of what the shards do not hold.

    Raises:
        ConfigError: no weight of the graph is in the shards in its dtype and layout.
        TargetError, ShapeError: the checkpoint is not of the template's model.
        FileError: the disk has no room, or the folder cannot be written.
        The folder is as before then.
    """
    folder = checkpoint.dir
    tensors = BoundTensors([template], MergedWeights(checkpoint, None))
    own: list[ir.Value] = []
    shards: set[str] = set()
    for value in stored(template):
        place = _place(value, tensors, checkpoint)
        if place is None:
            own.append(value)
        else:
            shards.add(place[0])
            refer(value, *place, folder)
    _require_shards(shards, template, checkpoint)
    template.model.metadata_props[SHARDS_KEY] = shards_text(folder, shards)
    layout = lay_out(own)

    def content(digest: str) -> bytes:
        for value in own:
            refer(value, base_data(digest), layout.offsets[str(value.name)], folder)
        return graph_bytes(template)

    remove_abandoned(folder / UNDER_WAY)
    require_space(folder, layout.nbytes + len(content(NO_DIGEST)))
    with reported(folder / GRAPH_FILE), partial_folder(folder / UNDER_WAY) as partial:
        with open(partial / "data", "xb") as file:
            hashing = Hashing(file)
            write_data(hashing, layout, tensors, progress)
        graph = content(hashing.hexdigest())
        (partial / "graph").write_bytes(graph)
        described = _described(template, checkpoint)
        if described is not None:
            (partial / "genai").write_bytes(described)
        flush_tree(partial)
        with locked(folder / CONFIG_FILE):
            if (folder / GRAPH_FILE).is_file():  # another process was faster
                load_graph(folder / GRAPH_FILE)
                return 0
            if own:
                os.replace(partial / "data", folder / base_data(hashing.hexdigest()))
            if described is not None:
                os.replace(partial / "genai", folder / GENAI_FILE)
            flush_folder(folder)
            os.replace(partial / "graph", folder / GRAPH_FILE)
            flush_folder(folder)
            remove_unmentioned(folder)
    return layout.nbytes + len(graph)


def _place(value: ir.Value, tensors: BoundTensors, checkpoint: Checkpoint) -> tuple[str, int] | None:
    """The shard that holds an initializer as the graph has it, and the offset; None where none does."""
    name, dtype, shape = entry_of(value)
    held = tensors.found.get(name)
    if held is None or (checkpoint.dtype(held), checkpoint.shape(held)) != (dtype, shape):
        return None
    shard, offset = checkpoint.place(held)
    # Runtimes read entries where they lie: one that starts between two may not be read everywhere.
    return (shard, offset) if offset % dtype.itemsize == 0 else None


def _require_shards(shards: Collection[str], template: GraphTemplate, checkpoint: Checkpoint) -> None:
    if shards:
        return
    others = [name for name in checkpoint.names if checkpoint.dtype(name) != template.dtype]
    got = f"{checkpoint.dtype(others[0])} in {others[0]}" if others else "another place or layout"
    raise ConfigError(
        f"in_place: expected {template.dtype} tensors in {checkpoint.dir} that the graph can refer to, got "
        f"{got}; leave --in-place out or convert the checkpoint"
    )


def _described(template: GraphTemplate, checkpoint: Checkpoint) -> bytes | None:
    """The `genai_config.json` to write; None for no decoder, or where somebody else's is there."""
    if template.decoder is None:
        return None
    ways = [genai_bytes(checkpoint, template.decoder, grows=grows) for grows in (False, True)]
    path = checkpoint.dir / GENAI_FILE
    # A killed process may have left one, of a graph that was to have the other kind of cache.
    if os.path.lexists(path) and path.read_bytes() not in ways:
        return None
    return ways[noted_options(template.model, GRAPH_FILE).portable]
