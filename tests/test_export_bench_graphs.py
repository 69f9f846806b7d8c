"""Each method's graph computes its formula: its outputs are those of a torch model with the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, VOCABULARY
from bench_fixtures import (
    FLOAT32,
    PARTS,
    POSITIONS,
    SETTING,
    Case,
    cases,
    feeds_of,
    parameters_of,
    put_adapters,
    ratio_of,
)
from transformers import DynamicCache

from loracle.export.bench import graphs as bench_graphs
from loracle.export.bench.bottlenecks import add_adapter_h, add_adapter_l
from loracle.export.bench.methods import (
    ADAPTER_H,
    ADAPTER_L,
    INPUTS,
    MERGED,
    PREFIX,
    PROMPT,
    UNMERGED,
)
from loracle.export.bench.places import ATTENTION, MLP, find_places
from loracle.export.external import load_graph
from loracle.reference import TargetError

BUDGET = SETTING.parameters
FAST = "gpt2"
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in PARTS if name != FAST]
MODELS = [FAST, *OTHERS]
DECODERS = [FAST, *(p for p in OTHERS if CASES[p.values[0]].task == "text-generation")]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    with pytest.MonkeyPatch.context() as patch:
        yield cases(tmp_path_factory.mktemp("bench"), patch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [ADAPTER_H, ADAPTER_L])
def test_an_adapter_computes_its_formula(case_of: Callable[[str], Case], name: str, method: str) -> None:
    case = case_of(name)
    graph = case.graphs.graph(method, BUDGET)
    tokens, got, _ = case.run(graph)
    model = case.truth()
    (base,) = model.evaluate_feeds(feeds_of(tokens), FLOAT32).values()
    put_adapters(model.module, name, parameters_of(graph))
    (truth,) = model.evaluate_feeds(feeds_of(tokens), FLOAT32).values()
    assert ratio_of(got, truth) < 1
    assert ratio_of(got, base) > 10  # the adapters are not to be overlooked
    assert sum(t.numel() for t in parameters_of(graph).values()) == graph.parameters
    parts = {tuple(key.split(".")[1:3]) for key in parameters_of(graph)}
    named = (ATTENTION, MLP) if method == ADAPTER_H else (MLP,)
    layers = CASES[name].config().num_hidden_layers
    assert parts == {(str(layer), part) for layer in range(layers) for part in named}


@pytest.mark.parametrize("name", MODELS)
def test_places_are_attention_and_mlp_of_each_layer(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    places = find_places(load_graph(case.graphs.base.graph).graph)
    layers = CASES[name].config().num_hidden_layers
    assert [(place.layer, place.part) for place in places] == [
        (layer, part) for layer in range(layers) for part in (ATTENTION, MLP)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "gptj"])
def test_a_model_that_adds_both_parts_at_once_is_refused_by_name(
    case_of: Callable[[str], Case], name: str
) -> None:
    with pytest.raises(
        TargetError, match="AdapterH and AdapterL have no place in this model, leave them out"
    ):
        case_of(name).graphs.graph(ADAPTER_H, BUDGET)


@pytest.mark.parametrize("name", [FAST, pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("insert", [add_adapter_h, add_adapter_l])
def test_adapters_that_add_zero_leave_the_outputs_alone(
    case_of: Callable[[str], Case], tmp_path: Path, name: str, insert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where the graph has no bias that is added in another order then."""
    case = case_of(name)

    def draw(parameter: str, shape: tuple[int, ...]) -> np.ndarray:
        if ".up." in parameter:
            return np.zeros(shape, np.float32)
        return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)

    monkeypatch.setattr(case.graphs, "_draw", draw)
    monkeypatch.setattr(case.graphs, "_made", {})
    graph = case.graphs.graph(ADAPTER_H if insert is add_adapter_h else ADAPTER_L, BUDGET)
    tokens, got, _ = case.run(graph)
    _, base, _ = case.run(case.graphs.base)
    if name == "llama":
        assert np.array_equal(got, base)
    (truth,) = case.truth().evaluate_feeds(feeds_of(tokens), FLOAT32).values()
    assert ratio_of(got, truth) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if name != "bloom"])
def test_merged_lora_is_the_base_s_graph_and_unmerged_lora_answers_alike(
    case_of: Callable[[str], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name)
    answers, graphs = {}, {}
    for method in (MERGED, UNMERGED, INPUTS):
        # The same numbers in each.
        monkeypatch.setattr(case.graphs, "_random", np.random.default_rng(7))
        graphs[method] = case.graphs.graph(method, BUDGET)
        tokens, answers[method], _ = case.run(graphs[method])
    _, base, _ = case.run(case.graphs.base)
    assert graphs[MERGED].is_base
    assert graphs[MERGED].graph.read_bytes() == case.graphs.base.graph.read_bytes()
    assert graphs[MERGED].size == graphs[UNMERGED].size == graphs[INPUTS].size > 0
    assert graphs[INPUTS].inputs
    assert len({own.graph for own in (case.graphs.base, *graphs.values())}) == 4
    (truth,) = case.truth().evaluate_feeds(feeds_of(tokens), FLOAT32).values()
    for method in (UNMERGED, INPUTS):
        assert np.abs(answers[method] - answers[MERGED]).max() < truth.tolerance
    assert np.abs(answers[MERGED] - base).max() > 10 * truth.tolerance


@pytest.mark.slow
def test_a_portable_graph_has_a_merged_form_and_no_unmerged_one(case_of: Callable[[str], Case]) -> None:
    case = case_of("bloom")
    assert case.graphs.graph(MERGED, BUDGET).is_base
    for method in (UNMERGED, INPUTS):
        with pytest.raises(TargetError, match="expected one product that uses it"):
            case.graphs.graph(method, BUDGET)


@pytest.mark.parametrize("name", MODELS)
def test_virtual_tokens_are_embeddings_before_the_text(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    graph = case.graphs.graph(PROMPT, BUDGET)
    tokens, got, _ = case.run(graph)
    assert tokens.shape == (SETTING.batch, SETTING.length + POSITIONS.prompt)
    assert (tokens[:, : POSITIONS.prompt] >= VOCABULARY).all()
    (virtual,) = (t for key, t in parameters_of(graph).items() if key == "prompt.embeddings")
    assert virtual.numel() == graph.parameters
    model = case.truth()
    table = model.module.get_input_embeddings()
    own = table(torch.from_numpy(tokens[:, POSITIONS.prompt :])).detach()
    virtual = virtual * getattr(table, "embed_scale", 1.0)  # as the rows of the table are
    embeddings = torch.cat([virtual.expand(SETTING.batch, -1, -1), own], 1).numpy()
    feeds = {"inputs_embeds": embeddings, "attention_mask": np.ones_like(tokens)}
    (truth,) = model.evaluate_feeds(feeds, FLOAT32).values()
    assert ratio_of(got, truth) < 1
    # A text without them is the base's.
    without = case.graphs.base
    _, base, _ = case.run(without)
    assert np.abs(got[:, POSITIONS.prompt :] - base).max() > 10 * truth.tolerance


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_is_keys_and_values_before_the_text(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    graph = case.graphs.graph(PREFIX, BUDGET)
    tokens, got, runner = case.run(graph)
    prefix = [torch.from_numpy(array).double() for array in runner.prefix()]
    assert sum(array.numel() for array in prefix) == graph.parameters
    model = case.truth()

    def with_prefix(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = DynamicCache()
        for layer in range(len(prefix) // 2):
            keys, values = (t.expand(SETTING.batch, -1, -1, -1) for t in prefix[2 * layer : 2 * layer + 2])
            cache.update(keys, values, layer)
        return args, {**kwargs, "past_key_values": cache}

    model.module.register_forward_pre_hook(with_prefix, with_kwargs=True)
    mask = np.ones((SETTING.batch, SETTING.length + POSITIONS.prefix), np.int64)
    (truth,) = model.evaluate_feeds({"input_ids": tokens, "attention_mask": mask}, FLOAT32).values()
    assert ratio_of(got, truth) < 1


@pytest.mark.slow
def test_a_prefix_is_refused_where_there_is_no_cache(case_of: Callable[[str], Case]) -> None:
    with pytest.raises(TargetError, match=r"^prefix: expected a model with a cache"):
        case_of("bert").graphs.graph(PREFIX, BUDGET)


def test_a_decoding_step_is_the_last_position_of_a_prefill(case_of: Callable[[str], Case]) -> None:
    """The step reads the text's last token once more, behind the whole text."""
    case = case_of(FAST)
    tokens, _, runner = case.run(case.graphs.base)
    runner.call("prefill")()
    runner.call("decode")()
    step = runner.buffer("logits", (SETTING.batch, 1, VOCABULARY))
    longer = np.concatenate([tokens, tokens[:, -1:]], 1)
    (truth,) = case.truth().evaluate_feeds(feeds_of(longer), FLOAT32).values()
    assert np.abs(step[:, 0] - truth.logits[:, -1]).max() < truth.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("method", [ADAPTER_H, ADAPTER_L])
def test_a_float16_graph_computes_the_formula_within_its_rounding(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases(tmp_path, monkeypatch, "fp16")("llama")
    graph = case.graphs.graph(method, BUDGET)
    tokens, got, _ = case.run(graph)
    assert got.dtype == np.float16
    model = case.truth()
    put_adapters(model.module, "llama", parameters_of(graph))
    (truth,) = model.evaluate_feeds(feeds_of(tokens), np.dtype(np.float16)).values()
    assert ratio_of(got, truth) < 1


@pytest.mark.slow
@pytest.mark.parametrize("method", [PROMPT, PREFIX, INPUTS, UNMERGED, MERGED])
def test_every_method_runs_in_float16(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases(tmp_path, monkeypatch, "fp16")("llama")
    _, got, runner = case.run(case.graphs.graph(method, BUDGET))
    runner.call("decode")()
    assert got.dtype == np.float16
    assert np.isfinite(got).all()


def test_graphs_are_made_once_and_hold_no_copy_of_the_weights(case_of: Callable[[str], Case]) -> None:
    graphs = case_of(FAST).graphs
    first = graphs.graph(ADAPTER_H, BUDGET)
    assert graphs.graph(ADAPTER_H, BUDGET) is first
    assert graphs.graph(ADAPTER_H, 4 * BUDGET).size > first.size
    assert first.graph.stat().st_size < 4 * first.parameters + 200_000
    paths = {graphs.graph(method, BUDGET).graph for method in (ADAPTER_H, ADAPTER_L, PROMPT)}
    assert len(paths) == 3
    assert graphs.base.graph not in paths
    assert graphs.graph(PREFIX, BUDGET).graph == graphs.base.graph
    assert bench_graphs.DATA_FILE in {path.name for path in first.graph.parent.iterdir()}
