"""What a reader goes by in what a writer leaves: without what nobody refers to.

Each function takes a tree, and the old and the new one.
"""

from __future__ import annotations

import json
import re

from .disk import Tree

SUFFIXES = {"linked": ".onnx", "swappable": ".task.safetensors", "adapter-inputs": ".onnx_adapter"}
_DATA = re.compile(r"\.[0-9a-f]{16}\.onnx_data$")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)/")
_SECONDS = re.compile(rb'"seconds": [0-9.e-]+')


def itself(tree: Tree, old: Tree, new: Tree) -> Tree:
    """All of it."""
    return tree


def files(tree: Tree, old: Tree, new: Tree) -> Tree:
    """Files, whether or not there are empty folders."""
    return {name: data for name, data in tree.items() if not name.endswith("/")}


def linked(tree: Tree, old: Tree, new: Tree) -> Tree:
    """A deployment whose tasks have graphs of their own."""
    return _with_records(_with_data(tree))


def with_graph(tree: Tree, old: Tree, new: Tree, graph: str, task: str, *, goes: bool) -> Tree:
    """A deployment whose tasks share a graph. One with more inputs than it needs makes no difference: it
    counts as the one that belongs to the task's file. It is the new one, or, where a task goes, the old."""
    tree = _with_records(tree)
    graphs = [state.get(graph, b"") for state in (old, new)]
    if tree.get(graph, b"") == graphs[not goes]:
        belongs = graphs[tree.get(task) == new.get(task)]
        tree = {name: data for name, data in tree.items() if name != graph}
        return {**tree, graph: belongs} if belongs else tree
    return tree


def in_place(tree: Tree, old: Tree, new: Tree, form: str) -> Tree:
    """A model's own folder, without what belongs to graphs that are not there."""
    tree = _with_data(tree)
    if "model/model.onnx" not in tree:
        tree = {name: data for name, data in tree.items() if name != "model/genai_config.json"}
    if form == "swappable" and "model/french.task.safetensors" not in tree:
        tree = {name: data for name, data in tree.items() if name != "model/swappable.onnx"}
    return tree


def latest(tree: Tree, old: Tree, new: Tree) -> Tree:
    """The latest checkpoint of a run, and its options, which alone are nothing."""
    numbers = [int(found) for name in tree for found in _CHECKPOINT.findall(name)]
    if not numbers:
        return {}
    wanted = str(max(numbers))
    return {
        name: data
        for name, data in tree.items()
        if not (match := _CHECKPOINT.search(name)) or match[1] == wanted
    }


def trained(tree: Tree, old: Tree, new: Tree) -> Tree:
    """A fine-tuned adapter, but for the time that it took."""
    return {
        name: _SECONDS.sub(b"", data)
        for name, data in tree.items()
        if not name.startswith("out.checkpoints/")
    }


def _with_records(tree: Tree) -> Tree:
    """Without the records of verifications that speak of other bytes than the task's, or of no task."""

    def of_its_task(name: str) -> bool:
        task = name.removesuffix(".verified.json")
        digest = json.loads(tree[name])["sha256"].encode()
        return any(digest in tree.get(f"{task}{suffix}", b"") for suffix in SUFFIXES.values())

    return {
        name: data
        for name, data in tree.items()
        if not name.endswith(".verified.json") or not data or of_its_task(name)
    }


def _with_data(tree: Tree) -> Tree:
    """Without the data files that no graph refers to."""
    graphs = [data for name, data in tree.items() if name.endswith(".onnx")]
    return {
        name: data
        for name, data in tree.items()
        if not _DATA.search(name) or any(name.rpartition("/")[2].encode() in graph for graph in graphs)
    }
