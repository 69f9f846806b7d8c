"""The weights of real models are found in what real exporters make of them, each bit for bit the merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architecture_runs import make_adapter as adapter_of_all
from architectures import make
from candidates.graphs import by_genai, by_optimum, by_torch
from export_fixtures import make_adapter, make_model
from matching_fixtures import seen

from loracle.export import export
from loracle.export.external import load_graph
from loracle.export.names import GRAPH_FILE
from loracle.export.verification.graph_content import describe_graph
from loracle.export.verification.weight_matching import Matches, match_weights
from loracle.files import Checkpoint, MergedWeights, read_adapter, write_merged_checkpoint
from loracle.files.safetensors_writer import write_safetensors

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def matched(graph: Path, base: Path, adapter: Path | None, dtype: Any = np.float32) -> Matches:
    """Match a graph; every weight must be there, and be the merge rounded to `dtype`, and the graph the
    model's products alone."""
    model = load_graph(graph)
    with Checkpoint(base) as checkpoint:
        weights = MergedWeights(checkpoint, None if adapter is None else read_adapter(adapter))
        matches = match_weights(model.graph, weights)
        assert not matches.missing
        for name, places in matches.found.items():
            for match in places:
                assert np.array_equal(seen(model.graph, match), weights.tensor(name, dtype)), str(match)
        check = describe_graph(model, matches, weights.adapter).check()
        assert check.passed, check
    return matches


def merged(base: Path, adapter: Path, out: Path) -> Path:
    """The merged checkpoint, in float32."""
    write_merged_checkpoint(base, adapter, out, dtype=np.float32)
    return out


@pytest.mark.parametrize(
    ("tied", "dtype"),
    [
        (False, "fp32"),
        pytest.param(True, "fp32", marks=pytest.mark.slow),
        pytest.param(True, "fp16", marks=pytest.mark.slow),
    ],
)
def test_our_own_export(tmp_path: Path, tied: bool, dtype: str) -> None:
    base = make_model(tmp_path / "base", tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, ALL_LINEAR)
    export(base, tmp_path / "out", adapter, dtype=dtype)
    held = np.float16 if dtype == "fp16" else np.float32
    matches = matched(tmp_path / "out" / GRAPH_FILE, base, adapter, held)
    q = matches.found["model.layers.1.self_attn.q_proj.weight"][0]
    assert str(q) == "rows 0:64 of model.layers.1.self_attn.q_proj+k_proj+v_proj.weight"
    assert "lm_head.weight" in matches.found or tied


@pytest.mark.slow
def test_tasks_of_a_deployment(tmp_path: Path) -> None:
    """A linked one is the merge; the base of a swappable one has its weights among the inputs."""
    base = make_model(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "out", adapter, form="linked", name="french")
    export(base, tmp_path / "out", adapter, form="swappable", name="german")
    matched(tmp_path / "out" / "french.onnx", base, adapter)
    matched(tmp_path / "out" / GRAPH_FILE, base, None)
    matched(tmp_path / "out" / "swappable.onnx", base, None)


@pytest.mark.slow
def test_adapter_inputs_are_an_adapter_that_is_left(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "out", adapter, form="adapter-inputs", name="french")
    model = load_graph(tmp_path / "out" / GRAPH_FILE)
    with Checkpoint(base) as checkpoint:
        matches = match_weights(model.graph, MergedWeights(checkpoint, read_adapter(adapter)))
    content = describe_graph(model, matches, read_adapter(adapter))
    assert content.adapter is not None
    assert content.adapter.pairs == 4
    assert content.adapter.operators == {"FusedMatMul": 8, "Add": 4}
    assert not content.strangers


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_export(tmp_path: Path, quantization: str) -> None:
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "out", quantization=quantization)
    with Checkpoint(base) as checkpoint:
        matches = match_weights(load_graph(tmp_path / "out" / GRAPH_FILE).graph, MergedWeights(checkpoint))
    assert not matches.missing
    assert {name for name in matches.found if "norm" not in name} <= {"model.embed_tokens.weight"}
    assert "model.layers.0.mlp.gate_proj.weight" in matches.quantized


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_genai_builder(tmp_path: Path, kind: str, tied: bool) -> None:
    """It packs query, key and value, and their biases."""
    base = make_model(tmp_path / "base", kind, tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, ALL_LINEAR)
    out = by_genai(merged(base, adapter, tmp_path / "merged"), tmp_path / "out")
    matches = matched(out / GRAPH_FILE, base, adapter)
    v = matches.found["model.layers.1.self_attn.v_proj.weight"][0]
    assert str(v) == "rows 96:128 of the transpose of model.layers.1.attn.qkv_proj.MatMul.weight"
    if kind == "qwen2":
        assert matches.found["model.layers.1.self_attn.v_proj.bias"][0].rows == (96, 128)


@pytest.mark.slow
def test_an_adapter_that_the_genai_builder_leaves_in_the_graph(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    model = load_graph(by_genai(base, tmp_path / "out", adapter=adapter) / GRAPH_FILE)
    with Checkpoint(base) as checkpoint:
        matches = match_weights(model.graph, MergedWeights(checkpoint, read_adapter(adapter)))
    assert not matches.missing
    content = describe_graph(model, matches, read_adapter(adapter))
    assert content.adapter is not None
    assert content.adapter.pairs == 4
    assert content.adapter.operators == {"MatMul": 8, "Add": 4}
    assert not content.strangers
    plain = load_graph(by_genai(base, tmp_path / "plain") / GRAPH_FILE)
    compared = describe_graph(model, matches, read_adapter(adapter), plain).base
    assert compared is not None
    assert compared.added["MatMul"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("exporter", [by_torch, by_optimum])
@pytest.mark.parametrize("tied", [True, False])
def test_decoders_by_other_exporters(tmp_path: Path, exporter: Callable[..., Path], tied: bool) -> None:
    base = make_model(tmp_path / "base", tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, ALL_LINEAR)
    out = exporter(merged(base, adapter, tmp_path / "merged"), tmp_path / "out")
    matched(out / GRAPH_FILE, base, adapter)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", [by_torch, by_optimum])
@pytest.mark.parametrize("case", ["gpt2", "bert_sequence"])
def test_other_architectures_by_other_exporters(
    tmp_path: Path, exporter: Callable[..., Path], case: str
) -> None:
    """GPT-2 stores its weights (in, out)."""
    base = make(tmp_path / "base", case)
    adapter = adapter_of_all(base, case, tmp_path / "adapter")
    out = exporter(merged(base, adapter, tmp_path / "merged"), tmp_path / "out")
    matched(out / GRAPH_FILE, base, adapter)


@pytest.mark.slow
def test_the_same_exporter_makes_the_same_graph_of_base_and_merge(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    own = by_torch(merged(base, adapter, tmp_path / "merged"), tmp_path / "own") / GRAPH_FILE
    other = by_torch(base, tmp_path / "other") / GRAPH_FILE
    graphs: list[ir.Model] = [load_graph(own), load_graph(other)]
    with Checkpoint(base) as checkpoint:
        matches = match_weights(graphs[0].graph, MergedWeights(checkpoint, read_adapter(adapter)))
    content = describe_graph(graphs[0], matches, read_adapter(adapter), graphs[1])
    assert content.check().passed, content.check()


def _exchanged(base: Path, out: Path, one: str, other: str) -> Path:
    """The checkpoint with two weights of one shape in each other's places."""
    shutil.copytree(base, out)
    with Checkpoint(base) as checkpoint:
        arrays = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}
    arrays[one], arrays[other] = arrays[other], arrays[one]
    (out / "model.safetensors").unlink()
    write_safetensors(out / "model.safetensors", arrays, {"format": "pt"})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("exporter", [by_genai, by_torch, by_optimum])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"),
    ],
)
def test_exchanged_weights_are_named_whoever_exports_them(
    tmp_path: Path, exporter: Callable[..., Path], one: str, other: str
) -> None:
    base = make_model(tmp_path / "base")
    model = load_graph(
        exporter(_exchanged(base, tmp_path / "wrong", one, other), tmp_path / "out") / GRAPH_FILE
    )
    with Checkpoint(base) as checkpoint:
        matches = match_weights(model.graph, MergedWeights(checkpoint))
    assert not matches.missing
    (line,) = describe_graph(model, matches).misplaced
    assert one in line
    assert other in line
