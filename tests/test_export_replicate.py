"""A deep model's graph from a few layers' is that of tracing them all, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import transformers as hf
from architectures import AUTO, CASES, DECODER, Case, make
from torch import nn

from loracle.export import export
from loracle.export.replicate import replicate, trace_replicated, trace_seq2seq_replicated
from loracle.export.stack import NotedInt, Stack, find_stacks, keep_layers, layer_paths
from loracle.export.tasks import TASKS, Task
from loracle.export.template import GraphTemplate, to_bytes
from loracle.export.trace import torch_dtype, trace, trace_model, trace_seq2seq
from loracle.export.verification.graph_diff import first_difference
from loracle.export.weightless import WeightlessModel, build_weightless

FLOAT32 = np.dtype(np.float32)
LAYERS = 5
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {"gemma3": {"num_hidden_layers": 6, "layer_types": MIXED}}
EVERY_RUN = ["llama", "gpt2", "bert"]
THOROUGH = [
    "gemma3",
    "mixtral",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "opt",
    "roberta_sequence",
    "distilbert",
    "vit",
    "llama_sequence",
    "qwen2_moe",
    "qwen3_moe",
]


def _task(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def _deep(folder: Path, name: str, **own: Any) -> tuple[Path, Task]:
    """The configuration of a case with more layers, in `folder`, and its task."""
    case = CASES[name]
    values = case.config().to_dict()
    values |= {count: LAYERS for count in COUNTS if count in values}
    values.pop("layer_types", None)
    config = type(case.config())(**{**values, **OWN.get(name, {}), **own})
    config.architectures = [getattr(hf, AUTO[case.task])._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    return folder, _task(case.task)


def _weightless(folder: Path, name: str, **own: Any) -> WeightlessModel:
    return build_weightless(*_deep(folder, name, **own), torch_dtype(FLOAT32))


def _assert_same(replicated: GraphTemplate, traced: GraphTemplate) -> None:
    weights = frozenset(traced.aliases)
    assert first_difference(replicated.model, traced.model, weights) is None
    assert first_difference(traced.model, replicated.model, weights) is None
    assert list(replicated.aliases.items()) == list(traced.aliases.items())
    assert list(replicated.model.graph.initializers) == list(traced.model.graph.initializers)
    assert to_bytes(replicated) == to_bytes(traced)


@pytest.mark.parametrize(
    "name", [*EVERY_RUN, *(pytest.param(name, marks=pytest.mark.slow) for name in THOROUGH)]
)
def test_a_replicated_graph_is_byte_for_byte_that_of_a_full_trace(tmp_path: Path, name: str) -> None:
    folder, task = _deep(tmp_path, name)
    replicated = trace_replicated(folder, task, FLOAT32)
    assert replicated is not None
    _assert_same(replicated, trace(folder, task, FLOAT32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_all_graphs_of_a_sequence_to_sequence_model_are_those_of_full_traces(
    tmp_path: Path, name: str
) -> None:
    folder, task = _deep(tmp_path, name)
    replicated = trace_seq2seq_replicated(folder, task, FLOAT32)
    assert replicated is not None
    traced = trace_seq2seq(folder, task, FLOAT32)
    assert list(replicated) == list(traced)
    for file, template in traced.items():
        _assert_same(replicated[file], template)


@pytest.mark.slow
def test_half_precision_replicates_as_well(tmp_path: Path) -> None:
    folder, task = _deep(tmp_path, "llama")
    half = np.dtype(np.float16)
    replicated = trace_replicated(folder, task, half)
    assert replicated is not None
    _assert_same(replicated, trace(folder, task, half))


def test_an_exported_deep_model_answers_bit_for_bit_as_its_full_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = Case(lambda: hf.LlamaConfig(**{**DECODER, "num_hidden_layers": LAYERS}))
    monkeypatch.setitem(CASES, "llama", deep)
    model = make(tmp_path / "model", "llama")
    answers = []
    for run in ("replicated", "traced"):
        monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / f"{run} cache"))
        if run == "traced":
            monkeypatch.setattr("loracle.export.replicate.trace_replicated", lambda *_, **__: None)
        export(model, tmp_path / run)
        session = onnxruntime.InferenceSession(str(tmp_path / run / "model.onnx"))
        feeds = {
            i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past_key_values")
        }
        assert len(feeds) == 2 * LAYERS
        feeds["input_ids"] = np.arange(14).reshape(2, 7)
        feeds["attention_mask"] = np.ones((2, 7), np.int64)
        answers.append(session.run(None, feeds))
    for replicated, traced in zip(*answers, strict=True):
        assert np.array_equal(replicated, traced)


# ---- what is not replicated


def test_layers_that_scale_by_their_own_index_are_not_alike(tmp_path: Path) -> None:
    folder, task = _deep(tmp_path, "gpt2", scale_attn_by_inverse_layer_idx=True)
    assert trace_replicated(folder, task, FLOAT32) is None


def test_layers_that_compute_from_their_index_while_traced_are_not_replicated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that are traced are all below the threshold: only the comparison itself gives it away."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward

    def deep_layers_differ(self: Any, x: Any) -> Any:
        return original(self, x) * (2.0 if self.layer_idx >= LAYERS - 1 else 1.0)

    initialize = modeling_llama.LlamaDecoderLayer.__init__

    def with_index(self: Any, config: Any, layer_idx: int) -> None:
        initialize(self, config, layer_idx)
        self.mlp.layer_idx = layer_idx

    folder, task = _deep(tmp_path, "llama")
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", with_index)
    assert trace_replicated(folder, task, FLOAT32) is not None
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", deep_layers_differ)
    assert trace_replicated(folder, task, FLOAT32) is None


def test_a_model_whose_layers_do_not_run_alone_is_not_replicated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaModel.forward

    def needs_the_last(self: Any, *arguments: Any, **more: Any) -> Any:
        assert self.layers[LAYERS - 1] is not None
        return original(self, *arguments, **more)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", needs_the_last)
    folder, task = _deep(tmp_path, "llama")
    assert trace_replicated(folder, task, FLOAT32) is None


def test_a_model_no_deeper_than_its_samples_has_no_stack(tmp_path: Path) -> None:
    assert find_stacks(_weightless(tmp_path, "llama", num_hidden_layers=3)) == ()


def test_an_unknown_list_with_an_entry_for_each_layer_is_not_guessed_at(tmp_path: Path) -> None:
    weightless = _weightless(tmp_path, "llama")
    weightless.model.config.strengths = [1.0] * LAYERS
    assert find_stacks(weightless) == ()
    weightless.model.config.strengths = [1.0] * (LAYERS + 1)
    assert len(find_stacks(weightless)) == 1


def test_a_list_as_long_as_the_stack_beside_it_may_go_along_with_it(tmp_path: Path) -> None:
    weightless = _weightless(tmp_path, "llama")
    weightless.model.extras = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    assert find_stacks(weightless) == ()
    weightless.model.extras = nn.ModuleList(nn.Identity() for _ in range(LAYERS + 1))
    assert len(find_stacks(weightless)) == 1


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[GraphTemplate, tuple[Stack, ...], dict[str, Any]]:
    """The graph of a Llama's samples, its stack and the aliases of all its weights."""
    folder, task = _deep(tmp_path_factory.mktemp("few"), "llama")
    weightless = build_weightless(folder, task, torch_dtype(FLOAT32))
    stacks = find_stacks(weightless)
    kept, _ = keep_layers(weightless, stacks)
    return trace_model(kept, task, FLOAT32), stacks, weightless.aliases


def _reader(model: ir.Model, weight: str) -> ir.Node:
    return next(iter(model.graph.initializers[weight].uses())).node


def _change_attribute(model: ir.Model) -> None:
    node = _reader(model, "model.layers.1.post_attention_layernorm.weight")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


def _change_operator(model: ir.Model) -> None:
    next(n for n in reversed(list(model.graph)) if n.op_type == "Sigmoid").op_type = "Tanh"


def _exchange_weights(model: ir.Model) -> None:
    key = _reader(model, "model.layers.1.self_attn.k_proj.weight")
    value = _reader(model, "model.layers.1.self_attn.v_proj.weight")
    for node, weight in ((key, value.inputs[1]), (value, key.inputs[1])):
        node.replace_input_with(1, weight)


def _read_another_layers_weight(model: ir.Model) -> None:
    weight = model.graph.initializers["model.layers.1.mlp.up_proj.weight"]
    _reader(model, "model.layers.2.mlp.up_proj.weight").replace_input_with(1, weight)


def _skip_a_layer(model: ir.Model) -> None:
    first = _reader(model, "model.layers.1.input_layernorm.weight").inputs[0]
    _reader(model, "model.layers.2.input_layernorm.weight").replace_input_with(0, first)


def _read_an_early_layer_at_the_end(model: ir.Model) -> None:
    first = _reader(model, "model.layers.1.input_layernorm.weight").inputs[0]
    _reader(model, "model.norm.weight").replace_input_with(0, first)


def _add_a_node(model: ir.Model) -> None:
    node = _reader(model, "model.layers.1.mlp.down_proj.weight")
    extra = ir.node("Identity", [node.inputs[0]])
    extra.outputs[0].dtype = node.outputs[0].dtype
    node.replace_input_with(0, extra.outputs[0])
    model.graph.insert_before(node, extra)


def _change_a_cache_input(model: ir.Model) -> None:
    node = _reader(model, "model.layers.2.self_attn.o_proj.weight").inputs[0].producer()
    node.replace_input_with(4, node.inputs[3])


def _widen_a_weight(model: ir.Model) -> None:
    model.graph.initializers["model.layers.2.mlp.up_proj.weight"].shape = ir.Shape([81, 48])


CHANGES: dict[str, Callable[[ir.Model], None]] = {
    change.__name__.strip("_"): change
    for change in (
        _change_attribute,
        _change_operator,
        _exchange_weights,
        _read_another_layers_weight,
        _skip_a_layer,
        _read_an_early_layer_at_the_end,
        _add_a_node,
        _change_a_cache_input,
        _widen_a_weight,
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_samples_of_one_kind_that_are_not_alike_are_refused(
    few: tuple[GraphTemplate, tuple[Stack, ...], dict[str, Any]], change: str
) -> None:
    template, stacks, aliases = few
    changed = replace(template, model=template.model.clone())
    assert replicate(changed, stacks, aliases) is not None
    CHANGES[change](changed.model)
    assert replicate(changed, stacks, aliases) is None


# ---- the layers


def test_the_samples_are_the_first_of_each_kind_and_then_the_second_of_each() -> None:
    assert Stack("h", (0,) * 6).samples == (0, 1, 2)
    assert Stack("h", (0, 0, 1, 0, 0, 1)).samples == (0, 2, 1, 5)
    assert Stack("h", (0, 1, 1, 1)).samples == (0, 1, 2)
    assert Stack("h", (0, 0, 0, 1)).samples == (0, 3, 1)


def test_the_stacks_are_found_by_the_first_number_in_the_names_of_weights() -> None:
    names = ("wte.weight", "h.0.mlp.experts.3.w.weight", "h.1.mlp.experts.3.w.weight", "head.0.weight")
    assert layer_paths(names) == ["h", "head"]


@pytest.mark.parametrize(
    ("name", "own", "kinds"),
    [
        ("gemma2", {}, (0, 1, 0, 1, 0)),
        ("gemma3", {}, (0, 0, 1, 0, 0, 1)),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, (0, 1, 1, 0, 1)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (0, 1, 0, 1, 0)),
        ("mistral", {}, (0, 0, 0, 0, 0)),
    ],
)
def test_layers_are_of_one_kind_where_only_weights_and_index_differ(
    tmp_path: Path, name: str, own: dict[str, Any], kinds: tuple[int, ...]
) -> None:
    assert find_stacks(_weightless(tmp_path, name, **own)) == (Stack("model.layers", kinds),)


def test_what_is_kept_are_the_samples_in_their_order_with_numbers_of_their_own(tmp_path: Path) -> None:
    weightless = _weightless(tmp_path, "gemma3")
    layers = list(weightless.model.get_submodule("model.layers"))
    stacks = find_stacks(weightless)
    few, used = keep_layers(weightless, stacks)
    kept = list(few.model.get_submodule("model.layers"))
    assert kept == [layers[0], layers[2], layers[1], layers[5]]
    assert [layer.self_attn.layer_idx for layer in kept] == [0, 1, 2, 3]
    assert few.model.config.num_hidden_layers == few.config.num_hidden_layers == 4
    assert few.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert "model.layers.3.mlp.up_proj.weight" in few.aliases
    assert "model.layers.4.mlp.up_proj.weight" not in few.aliases
    assert set(few.aliases) == {name for name, _ in few.model.named_parameters()}
    assert used == []


def test_a_noted_number_tells_what_is_computed_from_it_and_keeps_lookups_to_itself() -> None:
    used: list[str] = []
    three = NotedInt(3, used)
    assert ([0, 1, 2, "x"][three], {3: "y"}[three], list(range(three)), int(three)) == (
        "x",
        "y",
        [0, 1, 2],
        3,
    )
    assert used == []
    assert (three + 1, 1 + three, three % 2, three >= 2) == (4, 4, 1, True)
    assert used == ["__add__", "__radd__", "__mod__", "__ge__"]
