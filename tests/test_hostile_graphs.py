"""ONNX graphs and data files that are made to deceive, beyond those of test_export_verification.py."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fuzz import seeds
from google.protobuf.message import Message
from limited import run_limited
from onnx import TensorProto, helper, numpy_helper
from refusal import read_or_refused

from loracle.export.external import load_graph
from loracle.export.names import OPTIONS_KEY, SHARDS_KEY
from loracle.export.options import noted_options
from loracle.export.verification.candidate import open_candidate
from loracle.export.verification.graph_tensors import held_tensors
from loracle.reference import FileError

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its data, inside another with what nobody may read."""
    (tmp_path / "secret").write_bytes(bytes(4096))
    own = tmp_path / "m"
    own.mkdir()
    for name, content in seeds.model()[0].items():
        (own / name).write_bytes(content)
    return own


def change(folder: Path, alter: Change) -> Path:
    path = folder / "model.onnx"
    model = onnx.ModelProto.FromString(path.read_bytes())
    alter(model)
    path.write_bytes(model.SerializeToString())
    return path


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def external(name: str, location: str, dims: list[int], **entries: Any) -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def everywhere(model: onnx.ModelProto, tensor: TensorProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model with the tensor in each place where one may stand."""

    def copy() -> onnx.ModelProto:
        other = onnx.ModelProto()
        other.CopyFrom(model)
        return other

    other = copy()
    other.graph.initializer.append(tensor)
    yield "initializer", other
    other = copy()
    other.graph.node[0].attribute[0].t.CopyFrom(tensor)
    yield "constant", other
    other = copy()
    other.graph.node[3].attribute.append(helper.make_attribute("list", [tensor]))
    yield "list of tensors", other
    for number in (0, 1):
        other = copy()
        other.graph.node[2].attribute[number].g.initializer.append(tensor)
        yield f"initializer of branch {number}", other
    other = copy()
    other.functions[0].node[0].attribute[0].t.CopyFrom(tensor)
    yield "constant of a function", other
    other = copy()
    other.functions[0].attribute_proto.append(helper.make_attribute("default", tensor))
    yield "default of a function", other


def test_a_model_with_tensors_everywhere_is_read(folder: Path) -> None:
    model = load_graph(folder / "model.onnx")
    assert set(model.graph.initializers) == {"far", "listed", "packed", "half", "words"}
    assert len(held_tensors(model.graph)) == 8
    for _, other in everywhere(
        onnx.load(folder / "model.onnx", load_external_data=False),
        numpy_helper.from_array(np.ones(2, np.float32), "new"),
    ):
        (folder / "model.onnx").write_bytes(other.SerializeToString())
        load_graph(folder / "model.onnx")


@pytest.mark.parametrize(
    ("location", "entries"),
    [
        ("../secret", {}),
        ("{folder}/../secret", {}),
        ("/dev/zero", {}),
        ("/proc/self/environ", {}),
        ("sub/data", {}),
        ("./model.onnx_data", {}),
        ("", {}),
        (".", {}),
        ("..", {}),
        ("x" * 300, {}),
        ("link", {}),
        ("pipe", {}),
        ("sub", {}),
        ("hard", {}),
        ("absent", {}),
        ("model.onnx_data", {"offset": 112}),
        ("model.onnx_data", {"offset": 2**63}),
        ("model.onnx_data", {"offset": -1}),
        ("model.onnx_data", {"offset": "x"}),
        ("model.onnx_data", {"offset": "1" * 5000}),
        ("model.onnx_data", {"length": 4}),
        ("model.onnx_data", {"length": 2**63}),
        ("model.onnx_data", {"length": -16}),
        ("model.onnx_data", {"length": "1e3"}),
    ],
)
def test_data_are_read_from_the_folders_own_files_alone(
    folder: Path, location: str, entries: dict[str, Any]
) -> None:
    """Wherever the tensor stands; also where the graph lies in the current folder and its path names none."""
    (folder / "link").symlink_to("../secret")
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_bytes(bytes(64))
    os.link(folder.parent / "secret", folder / "hard")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = external("new", location.format(folder=folder), [4], **entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for place, other in everywhere(model, tensor):
            (folder / "model.onnx").write_bytes(other.SerializeToString())
            for path in (folder / "model.onnx", Path("model.onnx")):
                with pytest.raises(FileError) as caught:
                    load_graph(path)
                assert "\n" not in str(caught.value), place


def test_tensors_may_lie_on_one_another_and_end_with_the_file(folder: Path) -> None:
    def alter(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(external("one", "model.onnx_data", [4], offset=0))
        model.graph.initializer.append(external("two", "model.onnx_data", [4], offset=8))
        model.graph.initializer.append(external("end", "model.onnx_data", [0, 4], offset=112, length=0))

    model = load_graph(change(folder, alter))
    tensors = {
        name: held_tensors(model.graph)[name].read(lambda own: own.copy()) for name in ("one", "two", "end")
    }
    assert tensors["one"].tobytes()[8:] == tensors["two"].tobytes()[:8]
    assert tensors["end"].shape == (0, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(data_type=TensorProto.FLOAT, dims=[2**40]),
        TensorProto(data_type=TensorProto.FLOAT, dims=[2**32, 2**32]),
        TensorProto(data_type=TensorProto.FLOAT, dims=[1]),
        TensorProto(data_type=TensorProto.FLOAT, dims=[-1], raw_data=bytes(4)),
        TensorProto(data_type=TensorProto.FLOAT, dims=[-2, -2], raw_data=bytes(16)),
        TensorProto(data_type=TensorProto.FLOAT, dims=[2], raw_data=bytes(4)),
        TensorProto(data_type=TensorProto.FLOAT, dims=[2], raw_data=bytes(7)),
        TensorProto(data_type=TensorProto.FLOAT, dims=[2], raw_data=bytes(12)),
        TensorProto(data_type=TensorProto.FLOAT, dims=[2], float_data=[1.0]),
        TensorProto(data_type=TensorProto.FLOAT, dims=[1], int64_data=[1]),
        TensorProto(data_type=TensorProto.INT64, dims=[1], float_data=[1.0]),
        TensorProto(data_type=TensorProto.FLOAT, dims=[1] * 70, float_data=[1.0]),
        TensorProto(data_type=TensorProto.INT4, dims=[5], raw_data=bytes(2)),
        TensorProto(data_type=TensorProto.STRING, dims=[2], string_data=[b"x"]),
        TensorProto(data_type=TensorProto.STRING, dims=[2**40]),
        TensorProto(data_type=TensorProto.UNDEFINED, dims=[1], raw_data=bytes(4)),
        TensorProto(data_type=99, dims=[1], raw_data=bytes(4)),
        TensorProto(dims=[1]),
        external("x", "model.onnx_data", [-4]),
        external("x", "model.onnx_data", [-2, -2]),
        external("x", "model.onnx_data", [2**62, 4]),
        external("x", "model.onnx_data", [2**40]),
    ],
)
def test_a_tensor_without_the_data_that_its_shape_asks_for_is_refused(
    folder: Path, tensor: TensorProto
) -> None:
    tensor.name = "new"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for place, other in everywhere(model, tensor):
        (folder / "model.onnx").write_bytes(other.SerializeToString())
        with pytest.raises(FileError, match=r"new|value|list|default|expected an ONNX model") as caught:
            load_graph(folder / "model.onnx")
        assert len(str(caught.value)) < 600, place


def test_packed_data_that_lie_outside_are_as_long_as_the_numbers_are(folder: Path) -> None:
    tensor = external("new", "model.onnx_data", [5], length=3)
    tensor.data_type = TensorProto.INT4
    model = load_graph(change(folder, lambda model: model.graph.initializer.append(tensor)))
    assert held_tensors(model.graph)["new"].read(lambda own: own.copy()).shape == (5,)
    tensor.external_data[1].value = "0"
    with pytest.raises(FileError, match="expected 3 bytes"):
        load_graph(change(folder, lambda model: model.graph.initializer.append(tensor)))


def test_a_tensor_of_another_dtype_than_its_value_is_refused(folder: Path) -> None:
    def alter(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("listed", TensorProto.INT64, [4]))

    with pytest.raises(FileError, match="listed: expected INT64, got a tensor of FLOAT"):
        load_graph(change(folder, alter))


def _odd_attribute(kind: int, **fields: Any) -> Change:
    def alter(model: onnx.ModelProto) -> None:
        attribute = model.graph.node[3].attribute.add(name="odd", type=kind)
        for name, value in fields.items():
            own = getattr(attribute, name)
            own.CopyFrom(value) if isinstance(value, Message) else own.extend(value)

    return alter


def _double(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "s"


def _deep(model: onnx.ModelProto) -> None:
    graph = model.graph.node[2].attribute[0].g
    for _ in range(25):
        graph = (
            graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        )


ODD: dict[str, Change] = {
    "a sparse tensor": _odd_attribute(onnx.AttributeProto.SPARSE_TENSOR),
    "a sparse initializer": lambda model: model.graph.sparse_initializer.add(),  # type: ignore[func-returns-value]
    "an attribute of no type": _odd_attribute(onnx.AttributeProto.UNDEFINED),
    "a type that is a map": _odd_attribute(
        onnx.AttributeProto.TYPE_PROTO, tp=helper.make_map_type_proto(1, helper.make_tensor_type_proto(1, []))
    ),
    "texts in no code": _odd_attribute(onnx.AttributeProto.STRINGS, strings=[b"\xff"]),
    "a value made twice": _double,
    "a cycle": lambda model: model.graph.node[1].input.__setitem__(0, "out"),
    "a value of nobody": lambda model: model.graph.node[1].input.__setitem__(0, "nobody"),
    "an output of nobody": lambda model: model.graph.output[0].__setattr__("name", "nobody"),
    "no graph": lambda model: model.ClearField("graph"),
    "no name": lambda model: initializer(model, "listed").ClearField("name"),
    "two of a name": lambda model: model.graph.initializer.append(initializer(model, "listed")),
    "a constant without output": lambda model: model.graph.node[0].ClearField("output"),
    "a constant that refers": lambda model: (
        model.graph.node[0].attribute[0].__setattr__("ref_attr_name", "x")
    ),
    "a constant of another kind": lambda model: model.graph.node[0].attribute[0].__setattr__("type", 1),
    "a function of a missing value": lambda model: model.functions[0].output.__setitem__(0, "nobody"),
    "graphs in graphs": _deep,
    "an unknown key of data": lambda model: initializer(model, "far").external_data.add(
        key="basepath", value="/"
    ),  # type: ignore[func-returns-value]
    "data without a place": lambda model: initializer(model, "far").ClearField("external_data"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_graph_is_read_or_refused_in_one_line(folder: Path, name: str) -> None:
    path = change(folder, ODD[name])

    def use() -> None:
        for held in held_tensors(load_graph(path).graph).values():
            held.read(lambda own: own.copy())
        candidate = open_candidate(folder, ["model.onnx"])
        for value in candidate.models["model.onnx"].graph.initializers:
            candidate.tensor(value)

    read_or_refused(use)


def test_a_refusal_says_what_was_wrong_and_not_around_what(folder: Path) -> None:
    with pytest.raises(FileError, match=r"expected an ONNX model: Output 's' is redeclared") as caught:
        load_graph(change(folder, ODD["a value made twice"]))
    assert "Error calling" not in str(caught.value)


def test_a_message_in_messages_is_refused_by_depth(folder: Path) -> None:
    """A graph in an attribute of a node in a graph in an attribute, as the wire format has them."""
    content = b""
    for key in (*(b"\x32", b"\x2a", b"\x0a") * 2000, b"\x3a"):
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        content = key + length + bytes([size]) + content
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(FileError, match="expected an ONNX model"):
        load_graph(folder / "model.onnx")


def test_a_text_that_is_not_in_utf_8_is_refused(folder: Path) -> None:
    path = folder / "model.onnx"
    whole = path.read_bytes()
    for text in (b"listed", b"product", b"loracle.shards", b"model.onnx_data", b"Scaled", b"batch", b"inner"):
        assert text in whole
        path.write_bytes(whole.replace(text, b"\xff" + text[1:]))
        with pytest.raises(FileError, match=r"\\xff.* is no text in UTF-8|expected an ONNX model"):
            load_graph(path)


@pytest.mark.parametrize("step", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_graph_cut_anywhere_and_every_flipped_bit_is_read_or_refused(folder: Path, step: int) -> None:
    """Cut between two fields a message is whole again: then what is left is read."""
    path = folder / "model.onnx"
    whole = path.read_bytes()
    changed = [whole[:end] for end in range(0, len(whole), 11 if step else 1)]
    for bit in range(0, 8 * len(whole), 61 if step else 1):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        changed.append(bytes(flipped))
    refusals = 0
    for content in changed:
        path.write_bytes(content)
        try:
            model = load_graph(path)
            for held in held_tensors(model.graph).values():
                held.read(lambda own: own.copy())
        except FileError:
            refusals += 1
    assert len(changed) / 8 < refusals < len(changed)


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "{",
        "[" * 100_000,
        "{}",
        '{"dtype": []}',
        '{"dtype": "fp32", "packed": 1, "quantization": {}, "portable": 0}',
        "é\0",
    ],
)
def test_options_that_are_none_are_refused(folder: Path, told: str) -> None:
    def alter(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == OPTIONS_KEY:
                entry.value = told

    model = load_graph(change(folder, alter))
    with pytest.raises(FileError, match="expected the options of a graph"):
        noted_options(model, "x")


@pytest.mark.parametrize(
    "name",
    ["../s.safetensors", "/etc/passwd", "a\0b", "x" * 300, "..", "", ".", "a/b", "s.safetensors/", "link"],
)
def test_a_graph_notes_no_shard_outside_its_folder(folder: Path, name: str) -> None:
    (folder / "link").symlink_to("s.safetensors")
    noted = json.loads(
        {p.key: p.value for p in onnx.load(folder / "model.onnx", load_external_data=False).metadata_props}[
            SHARDS_KEY
        ]
    )

    def alter(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == SHARDS_KEY:
                entry.value = json.dumps({name: noted["s.safetensors"]})

    with pytest.raises(FileError):
        load_graph(change(folder, alter))


def test_a_graph_that_claims_to_be_huge_takes_no_memory(folder: Path) -> None:
    """A file with a hole of 64 GiB in place of a graph; and shapes of 2^40 numbers that are not there."""
    hole = folder / "hole.onnx"
    hole.touch()
    os.truncate(hole, 2**36)
    claims = change(
        folder,
        lambda model: model.graph.initializer.append(TensorProto(name="new", data_type=1, dims=[2**33])),
    )
    code = """
import sys
from pathlib import Path
from loracle.export.external import load_graph
from loracle.reference import FileError
limit()
for path in sys.argv[1:]:
    try:
        load_graph(Path(path))
    except FileError as error:
        print(error)
"""
    said = run_limited(code, hole, claims)
    assert "expected at most 2147483647 bytes" in said
    assert "shape (8589934592,)" in said


def test_what_is_no_file_is_no_graph(folder: Path) -> None:
    os.mkfifo(folder / "pipe.onnx")
    (folder / "folder.onnx").mkdir()
    (folder / "zero.onnx").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero", "absent"):
        with pytest.raises(FileError, match="found none"):
            load_graph(folder / f"{name}.onnx")


def test_nothing_is_written_beside_a_graph(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    model = load_graph(folder / "model.onnx")
    assert isinstance(model, ir.Model)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
