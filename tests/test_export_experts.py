"""Mixtures of experts: the operator is the model's, and its tensors hold every expert in its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from architecture_runs import run
from architectures import CASES, make
from expert_fixtures import adapter_apart, adapter_stacked, stacked_checkpoint
from export_fixtures import make_adapter, write_tokenizer
from numpy.typing import NDArray
from refusal import refused
from torch import nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from loracle.export import export, verify
from loracle.export.experts import FusedExperts, fuse_experts
from loracle.export.recipes import RECIPES, STACKED, STACKED_IN_TURN
from loracle.export.unmerged import export_unmerged
from loracle.files import Adapter, write_adapter
from loracle.reference import ConfigError, TargetError

Array = NDArray[Any]
EXPERTS, HIDDEN, INNER, TOKENS = 4, 6, 5, 9
LAYERS, MODEL_EXPERTS, MODEL_HIDDEN, MODEL_INNER = 2, 4, 48, {"mixtral": 80, "qwen3_moe": 40}
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


class Holder(nn.Module):
    """A model of one mixture."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(x)
        return y


def mixtral(**own: Any) -> MixtralConfig:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    return MixtralConfig(**{**sizes, "num_experts_per_tok": 2, **own})


def qwen3(**own: Any) -> Qwen3MoeConfig:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
    return Qwen3MoeConfig(**{**sizes, "num_experts_per_tok": 2, **own})


def answers(block: nn.Module, router: Array, gate: Array, up: Array, down: Array, x: Array) -> Array:
    """What onnxruntime answers for a traced mixture with these weights."""
    model = Holder(block).eval()
    fuse_experts(model)
    program = torch.onnx.export(
        model, (torch.zeros(1, len(x), x.shape[1]),), dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    graph = program.model.graph
    weights = [weight for pair in zip(gate, up, strict=True) for weight in pair]
    values = {
        "mlp.gate.weight": router,
        "mlp.experts.gate_up_proj": np.concatenate(list(RECIPES[STACKED_IN_TURN].pieces(weights))).reshape(
            RECIPES[STACKED_IN_TURN].shape([weight.shape for weight in weights])
        ),
        "mlp.experts.down_proj": np.stack(list(RECIPES[STACKED].pieces(down))),
    }
    for name, value in values.items():
        graph.initializers[name].const_value = ir.tensor(value.astype(np.float32), name=name)
    assert [node.op_type for node in graph].count("MoE") == 1
    session = onnxruntime.InferenceSession(ir.to_proto(program.model).SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x[None].astype(np.float32)})
    return np.asarray(y[0])


@pytest.mark.parametrize("block", [MixtralSparseMoeBlock(mixtral()), Qwen3MoeSparseMoeBlock(qwen3())])
def test_the_operator_computes_the_chosen_experts_on_small_integers_exactly(block: nn.Module) -> None:
    """Two logits of each token are equal and far above the others, so either weight is 1/2; and products with
    G are multiples of 128, where silu is exact in float32. Catches gate and up exchanged or not in turn, an
    expert's rows given to another, and D's axes exchanged."""
    rng = np.random.default_rng(0)
    chosen = np.array(list(itertools.combinations(range(EXPERTS), 2)))
    x = np.zeros((len(chosen), HIDDEN), np.int64)
    # A one for each of the two experts, and other small numbers that the router does not see.
    x[np.arange(len(chosen))[:, None], chosen] = 1
    x[:, EXPERTS:] = rng.integers(-2, 3, (len(chosen), HIDDEN - EXPERTS))
    router = 200 * np.eye(EXPERTS, HIDDEN, dtype=np.int64)
    gate = 128 * rng.integers(-3, 4, (EXPERTS, INNER, HIDDEN))
    up = rng.integers(-3, 4, (EXPERTS, INNER, HIDDEN))
    down = rng.integers(-3, 4, (EXPERTS, HIDDEN, INNER))
    each = np.stack(
        [
            np.einsum(
                "nei,ehi->neh",
                np.maximum(np.einsum("nh,eih->nei", x, gate), 0) * np.einsum("nh,eih->nei", x, up),
                down,
            )[np.arange(len(x)), own]
            for own in chosen.T
        ]
    )
    expected = each.sum(0) / 2
    assert (expected != 0).any(1).all()
    np.testing.assert_array_equal(answers(block, router, gate, up, down, x), expected)


@pytest.mark.parametrize(
    ("block", "weight"),
    [
        (MixtralSparseMoeBlock(mixtral()), 1),
        (Qwen3MoeSparseMoeBlock(qwen3(norm_topk_prob=True)), 1),
        (Qwen3MoeSparseMoeBlock(qwen3(norm_topk_prob=False)), 0.5),
        (Qwen3MoeSparseMoeBlock(qwen3(norm_topk_prob=False, num_experts_per_tok=1)), 0.25),
    ],
    ids=["mixtral", "normalized", "not normalized", "one expert"],
)
def test_weights_are_divided_by_their_sum_where_the_model_does_it(block: nn.Module, weight: float) -> None:
    """Four equal experts and equal logits: whichever are chosen, each has the probability 1/4."""
    rng = np.random.default_rng(1)
    gate, up = (rng.integers(1, 4, (1, INNER, HIDDEN)).repeat(EXPERTS, 0) for _ in range(2))
    down = rng.integers(-3, 4, (1, HIDDEN, INNER)).repeat(EXPERTS, 0)
    x = rng.integers(1, 4, (TOKENS, HIDDEN))
    router = np.zeros((EXPERTS, HIDDEN), np.int64)
    inner = 128 * (x @ gate[0].T) * (x @ up[0].T)
    got = answers(block, router, 128 * gate, up, down, x)
    np.testing.assert_array_equal(got, weight * (inner @ down[0].T))


@pytest.mark.parametrize("sizes", [(64, 96), (96, 48), (64, 64)], ids=["wide", "twice", "square"])
def test_a_mixture_is_recognised_whatever_its_sizes(sizes: tuple[int, int]) -> None:
    """It is probed on a small copy, whose sizes must not be mixed up where the model's are alike."""
    hidden, inner = sizes
    own = {"hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": 64}
    model = Holder(Qwen3MoeSparseMoeBlock(qwen3(**own, num_experts_per_tok=6)))
    fuse_experts(model)
    fused = model.mlp.experts
    assert isinstance(fused, FusedExperts)
    assert fused.routing == (6, qwen3().norm_topk_prob)


class Scaled(MixtralSparseMoeBlock):  # type: ignore[misc]
    """The experts' sum, doubled by what the router answers."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(x)
        y: torch.Tensor = self.experts(x, index, 2 * weights).reshape(hidden_states.shape)
        return y


class Biased(MixtralSparseMoeBlock):  # type: ignore[misc]
    """A router with a bias."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.gate.bias = nn.Parameter(torch.zeros(EXPERTS))


class TwoInputs(MixtralSparseMoeBlock):  # type: ignore[misc]
    """A mixture that is given more than states."""

    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(hidden_states) * scale
        return y


@pytest.mark.parametrize(
    ("block", "path", "kind"),
    [
        (Scaled(mixtral()), "mlp", "Scaled"),
        (MixtralSparseMoeBlock(mixtral(hidden_act="gelu")), "mlp", "MixtralSparseMoeBlock"),
        (TwoInputs(mixtral()), "mlp", "TwoInputs"),
        (Biased(mixtral()), "mlp.experts", "MixtralExperts"),
    ],
    ids=["scaled", "gelu", "two inputs", "biased router"],
)
def test_a_mixture_of_another_form_is_refused_by_name(block: nn.Module, path: str, kind: str) -> None:
    message = (
        f"{path}: expected a router's softmax and experts silu(x G^T) * (x U^T) with a product after them, "
        f"got {kind}, which answers otherwise; this model cannot be exported"
    )
    refused(lambda: fuse_experts(Holder(block)), TargetError, message)


@pytest.mark.slow
def test_shared_experts_stay_beside_the_mixture(tmp_path: Path) -> None:
    outcome = run("qwen2_moe", tmp_path)
    assert outcome.error <= outcome.tolerance
    assert outcome.effect > 10 * outcome.tolerance


def test_a_mixture_that_is_not_known_is_refused_by_its_type(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama")
    config = (base / "config.json").read_text().replace('"vocab_size"', '"n_routed_experts": 8, "vocab_size"')
    (base / "config.json").write_text(config)
    with pytest.raises(
        ConfigError, match=r"n_routed_experts: expected none for the model_type 'llama', got 8;"
    ):
        export(base, tmp_path / "onnx")


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """base and adapter, each with experts apart and stacked, and onnx, of what is apart."""
    kind: str = request.param
    root = tmp_path_factory.mktemp(kind)
    base = make(root / "base apart", kind)
    write_tokenizer(base)
    stacked_checkpoint(base, root / "base stacked", kind)
    for form, adapter in adapters(kind).items():
        write_adapter(root / f"adapter {form}", adapter)
    export(base, root / "onnx", root / "adapter apart")
    return root


def adapters(kind: str) -> dict[str, Adapter]:
    apart = adapter_apart(kind, LAYERS, MODEL_EXPERTS, MODEL_HIDDEN, MODEL_INNER[kind])
    return {"apart": apart, "stacked": adapter_stacked(kind, apart, LAYERS, MODEL_EXPERTS)}


FORMS = list(itertools.product(("apart", "stacked"), repeat=2))


@pytest.mark.parametrize(("base", "adapter"), FORMS[1:])
def test_either_form_of_checkpoint_and_adapter_gives_the_same_files(
    made: Path, tmp_path: Path, base: str, adapter: str
) -> None:
    export(made / f"base {base}", tmp_path / "onnx", made / f"adapter {adapter}")
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "onnx" / file).read_bytes() == (made / "onnx" / file).read_bytes()


@pytest.mark.parametrize("form", ["apart", "stacked"])
def test_verify_passes_what_is_right_in_either_form(made: Path, form: str) -> None:
    report = verify(made / "onnx", made / f"base {form}", made / f"adapter {form}", new_tokens=3)
    assert [check.passed for check in report.checks] == [True] * 4, report


def swapped(folder: Path, name: str, first: int, second: int) -> None:
    """Exchange two experts' parts of an initializer in the data file."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    data = np.memmap(folder / "model.onnx_data", np.float32, "r+", offset, tuple(tensor.dims))
    data[[first, second]] = data[[second, first]]
    data.flush()


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_verify_finds_two_experts_exchanged_and_names_them(made: Path, tmp_path: Path, name: str) -> None:
    adapter = made / "adapter apart"
    export(made / "base apart", tmp_path / "onnx", adapter)
    swapped(tmp_path / "onnx", name, 1, 3)
    report = verify(tmp_path / "onnx", made / "base apart", adapter, new_tokens=3)
    graph, bits, logits, _ = report.checks
    assert graph.passed
    assert not bits.passed
    assert not logits.passed
    path = name.rpartition(".")[0]
    named = {failure.partition(":")[0] for failure in bits.failures}
    assert {name.removeprefix(f"{path}.").partition(".")[0] for name in named} == {"1", "3"}


def test_verify_says_that_no_expert_was_merged(made: Path, tmp_path: Path) -> None:
    export(made / "base stacked", tmp_path / "onnx")
    report = verify(tmp_path / "onnx", made / "base stacked", made / "adapter stacked", new_tokens=3)
    *named, others = report.checks[1].failures
    assert len({name.partition(".experts.")[2].partition(".")[0] for name in named}) > 2
    assert all("the adapter was not merged into it" in line for line in named)
    assert others.endswith("more tensors")


def test_a_linked_task_shares_the_experts_that_its_adapter_leaves_alone(made: Path, tmp_path: Path) -> None:
    """In the data file of a base with stacked experts; and has those of its own that it changes."""
    base, deployment = made / "base stacked", tmp_path / "linked"
    make_adapter(tmp_path / "attention", base)
    export(base, deployment, tmp_path / "attention", form="linked", name="attention")
    export(base, deployment, made / "adapter stacked", form="linked", name="experts")
    own = {}
    for task in ("attention", "experts"):
        graph = onnx.load(str(deployment / f"{task}.onnx"), load_external_data=False).graph
        held = {t.name: t.external_data[0].value for t in graph.initializer if t.external_data}
        own[task] = {name for name, location in held.items() if location != "model.onnx_data"}
    assert not any(".mlp." in name for name in own["attention"])
    assert own["experts"] == {name for name in held if ".experts." in name or ".gate." in name}
    data = ir.load(deployment / "experts.onnx").graph.initializers
    baked = ir.load(made / "onnx/model.onnx").graph.initializers
    for name in own["experts"]:
        one, other = (held[name].const_value for held in (data, baked))
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_an_adapter_of_experts_cannot_stay_in_the_graph(made: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"expected one product that uses it, .* found 0 uses in the graph"):
        export_unmerged(made / "base apart", made / "adapter apart", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_an_expert_is_asked_for_when_it_is_due() -> None:
    """Memory holds one expert at a time, not a layer's."""
    asked = 0

    def weights() -> Iterator[Array]:
        nonlocal asked
        for expert in range(6):
            asked += 1
            yield np.full((2, 3), expert, np.float32)

    for turn, piece in enumerate(RECIPES[STACKED_IN_TURN].pieces(weights()), 1):
        assert asked == 2 * turn
        assert piece.reshape(-1, 3)[:, 0].tolist() == [asked - 2, asked - 1] * 2


def test_the_recipes_parts_are_what_they_were_made_of() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(6)]
    for name in (STACKED, STACKED_IN_TURN):
        recipe = RECIPES[name]
        shapes = [weight.shape for weight in weights]
        whole = np.concatenate([piece.reshape(-1) for piece in recipe.pieces(weights)])
        parts = recipe.parts
        assert parts is not None
        for part, weight in zip(parts(whole.reshape(recipe.shape(shapes)), shapes), weights, strict=True):
            np.testing.assert_array_equal(part, weight)


def test_the_cases_are_of_the_tests_sizes() -> None:
    for kind, inner in MODEL_INNER.items():
        config = CASES[kind].config()
        assert (config.hidden_size, config.num_hidden_layers) == (MODEL_HIDDEN, LAYERS)
        assert getattr(config, "moe_intermediate_size", config.intermediate_size) == inner
