"""Experts stacked or apart, in the checkpoint and in the adapter: one merge, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_fixtures import OWN_NAMES, R, adapter_apart, adapter_stacked, stacked_checkpoint
from files_fixtures import BFLOAT16, Array, random_array, write_model
from refusal import refused

from loracle.files import (
    Adapter,
    Checkpoint,
    LoraConfig,
    LoraPair,
    MergedWeights,
    read_adapter,
    write_adapter,
    write_merged_checkpoint,
)
from loracle.reference import ConfigError, TargetError, merge

LAYERS, EXPERTS, HIDDEN, INNER = 2, 3, 6, 4
KINDS = list(OWN_NAMES)


def apart_checkpoint(folder: Path, kind: str, dtype: Any = np.float32) -> Path:
    module, (gate, up, down) = OWN_NAMES[kind]
    shapes = {gate: (INNER, HIDDEN), up: (INNER, HIDDEN), down: (HIDDEN, INNER)}
    tensors = {
        f"model.layers.{layer}.{module}.experts.{e}.{part}.weight": random_array(
            shape, 100 * layer + 10 * e + number, dtype
        )
        for layer in range(LAYERS)
        for e in range(EXPERTS)
        for number, (part, shape) in enumerate(shapes.items())
    }
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.{module}.gate.weight"] = random_array((EXPERTS, HIDDEN), layer, dtype)
    return write_model(folder, [tensors], {"model_type": kind})


def adapters(kind: str) -> tuple[Adapter, Adapter]:
    apart = adapter_apart(kind, LAYERS, EXPERTS, HIDDEN, INNER)
    return apart, adapter_stacked(kind, apart, LAYERS, EXPERTS)


def expected(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Array]:
    """Each tensor, merged alone."""
    found = {}
    for name in checkpoint.names:
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        W0 = checkpoint.tensor(name)
        found[name] = W0 if pair is None else merge(W0, pair.A, pair.B, pair.scaling)
    return found


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [0, 1], ids=["adapter apart", "adapter stacked"])
@pytest.mark.parametrize("kind", KINDS)
def test_either_form_of_the_adapter_merges_into_either_form_of_the_checkpoint(
    tmp_path: Path, kind: str, form: int, dtype: Any
) -> None:
    """Catches rows of gate and up exchanged, an expert's factors given to another, a wrong scaling."""
    base = apart_checkpoint(tmp_path / "apart", kind, dtype)
    both = adapters(kind)
    with Checkpoint(base) as checkpoint:
        merged = MergedWeights(checkpoint, both[form])
        right = expected(checkpoint, both[0])
        assert set(merged.names) == set(right)
        assert set(merged.merged_names) == set(right)
        for name, array in right.items():
            assert merged.tensor(name).tobytes() == array.tobytes(), name
    stacked = stacked_checkpoint(base, tmp_path / "stacked", kind)
    module, (gate, up, down) = OWN_NAMES[kind]
    with Checkpoint(stacked) as checkpoint:
        merged = MergedWeights(checkpoint, both[form])
        for layer in range(LAYERS):
            own = f"model.layers.{layer}.{module}.experts"
            path = f"model.layers.{layer}.mlp.experts"
            for e in range(EXPERTS):
                gate_up = merged.tensor(f"{path}.gate_up_proj")[e]
                halves = [right[f"{own}.{e}.{part}.weight"] for part in (gate, up)]
                assert gate_up.tobytes() == np.concatenate(halves).tobytes()
                assert merged.rows(f"{path}.gate_up_proj", e, e + 1)[0].tobytes() == gate_up.tobytes()
                low = merged.rows(f"{path}.down_proj", e, e + 1, np.float64)[0]
                pair = both[0].pairs[f"{own}.{e}.{down}"]
                W0 = checkpoint.tensor(f"{path}.down_proj")[e]
                assert low.tobytes() == merge(W0, pair.A, pair.B, pair.scaling, dtype=np.float64).tobytes()


def test_experts_without_an_update_keep_their_bits(tmp_path: Path) -> None:
    base = apart_checkpoint(tmp_path / "apart", "mixtral")
    stacked = stacked_checkpoint(base, tmp_path / "stacked", "mixtral")
    apart, _ = adapters("mixtral")
    path = "model.layers.1.block_sparse_moe.experts.2.w3"
    with Checkpoint(stacked) as checkpoint:
        config = replace(apart.config, target_modules=("w3",))
        merged = MergedWeights(checkpoint, Adapter(config, {path: apart.pairs[path]}))
        (name,) = merged.merged_names
        assert name == "model.layers.1.mlp.experts.gate_up_proj"
        W0, W = checkpoint.tensor(name), merged.tensor(name)
        assert (W[2, INNER:] != W0[2, INNER:]).all()
        W = W.copy()
        W[2, INNER:] = W0[2, INNER:]
        assert W.tobytes() == W0.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_parameters_read_from_a_file_are_named_by_the_architecture(tmp_path: Path, kind: str) -> None:
    """A file has wrappers in the place of names."""
    _, named = adapters(kind)
    write_adapter(tmp_path / "adapter", named)
    read = read_adapter(tmp_path / "adapter")
    assert set(read.pairs) != set(named.pairs)
    with Checkpoint(apart_checkpoint(tmp_path / "apart", kind)) as checkpoint:
        ours, wanted = MergedWeights(checkpoint, read), MergedWeights(checkpoint, named)
        assert ours.merged_names == wanted.merged_names
        for name in ours.names:
            assert ours.tensor(name).tobytes() == wanted.tensor(name).tobytes()


def test_other_architectures_parameters_have_no_order(tmp_path: Path) -> None:
    _, stacked = adapters("qwen3_moe")
    write_adapter(tmp_path / "adapter", stacked)
    base = apart_checkpoint(tmp_path / "apart", "qwen3_moe")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with Checkpoint(base) as checkpoint, pytest.raises(ConfigError, match=r"name it with name_parameters$"):
        MergedWeights(checkpoint, read_adapter(tmp_path / "adapter"))


def test_a_merged_checkpoint_keeps_the_base_s_form(tmp_path: Path) -> None:
    base = apart_checkpoint(tmp_path / "apart", "mixtral")
    apart, stacked = adapters("mixtral")
    write_adapter(tmp_path / "adapter", stacked)
    write_merged_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    with Checkpoint(base) as before, Checkpoint(tmp_path / "merged") as after:
        assert after.names == before.names
        for name, array in expected(before, apart).items():
            assert after.tensor(name).tobytes() == array.tobytes()


def test_dora_of_an_expert_is_that_of_its_rows(tmp_path: Path) -> None:
    base = apart_checkpoint(tmp_path / "apart", "qwen3_moe")
    apart, _ = adapters("qwen3_moe")
    pairs = {
        path: replace(pair, magnitude=np.abs(random_array((len(pair.B),), 3)) + 1)
        for path, pair in apart.pairs.items()
    }
    dora = Adapter(replace(apart.config, use_dora=True), pairs)
    stacked = stacked_checkpoint(base, tmp_path / "stacked", "qwen3_moe")
    with Checkpoint(base) as one, Checkpoint(stacked) as all_:
        alone, together = MergedWeights(one, dora), MergedWeights(all_, dora)
        for e in range(EXPERTS):
            path = "model.layers.1.mlp.experts"
            rows = together.tensor(f"{path}.gate_up_proj")[e, INNER:]
            assert rows.tobytes() == alone.tensor(f"{path}.{e}.up_proj.weight").tobytes()


def _turned(pair: LoraPair) -> LoraPair:
    """The transposed update of each expert, as older versions of PEFT have it."""
    if len(pair.A) == R:  # a router's
        return pair
    A = pair.A.reshape(EXPERTS, -1, pair.A.shape[1])
    B = pair.B.reshape(len(pair.B), -1, EXPERTS)
    return replace(
        pair,
        A=B.transpose(2, 1, 0).reshape(-1, len(pair.B)),
        B=A.transpose(2, 1, 0).reshape(pair.A.shape[1], -1),
    )


def test_updates_of_transposed_experts_are_told_by_their_shapes(tmp_path: Path) -> None:
    base = apart_checkpoint(tmp_path / "apart", "mixtral")
    _, stacked = adapters("mixtral")
    turned = Adapter(stacked.config, {path: _turned(pair) for path, pair in stacked.pairs.items()})
    with Checkpoint(base) as checkpoint:
        ours, wanted = MergedWeights(checkpoint, turned), MergedWeights(checkpoint, stacked)
        for name in wanted.merged_names:
            assert ours.tensor(name).tobytes() == wanted.tensor(name).tobytes()


OTHER = "is this adapter for another model?"
G0 = "model.layers.0.mlp.experts"


def _stacked_with(**shape: int) -> Adapter:
    sizes = {"experts": EXPERTS, "hidden": HIDDEN, "inner": INNER, **shape}
    apart = adapter_apart("qwen3_moe", 1, sizes["experts"], sizes["hidden"], sizes["inner"])
    return adapter_stacked("qwen3_moe", apart, 1, sizes["experts"])


def _counted(experts: int, shape: tuple[int, int], got: str) -> str:
    return (
        f"{G0}.0.gate_proj.weight: expected {experts} experts whose rows are {shape}, as the adapter has "
        f"them for {G0}.gate_up_proj, got {got} of (8, 6); {OTHER}"
    )


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            lambda: _stacked_with(experts=2),
            _counted(2, (8, 6), "more"),
        ),
        (
            lambda: _stacked_with(experts=4),
            _counted(4, (8, 6), "3"),
        ),
        (
            lambda: _stacked_with(inner=5),
            _counted(3, (10, 6), "3"),
        ),
    ],
    ids=["fewer experts", "more experts", "other rows"],
)
def test_a_stacked_update_of_other_shapes_is_refused(
    tmp_path: Path, adapter: Callable[[], Adapter], message: str
) -> None:
    with Checkpoint(apart_checkpoint(tmp_path / "apart", "qwen3_moe")) as checkpoint:
        refused(lambda: MergedWeights(checkpoint, adapter()), TargetError, message)


def test_an_update_of_an_expert_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = apart_checkpoint(tmp_path / "apart", "qwen3_moe")
    stacked = stacked_checkpoint(base, tmp_path / "stacked", "qwen3_moe")
    for experts, inner in ((EXPERTS, 5), (4, INNER)):
        adapter = adapter_apart("qwen3_moe", 1, experts, HIDDEN, inner)
        path = f"{G0}.{experts - 1 if inner == INNER else 0}.gate_proj"
        with Checkpoint(stacked) as checkpoint:
            refused(
                lambda adapter=adapter: MergedWeights(checkpoint, adapter),
                TargetError,
                f"{G0}.gate_up_proj: the model's shape is (3, 8, 6), the adapter has ({inner}, 6) for "
                f"{path}; {OTHER}",
            )


def test_a_weight_with_two_updates_is_refused(tmp_path: Path) -> None:
    base = apart_checkpoint(tmp_path / "apart", "mixtral")
    apart, _ = adapters("mixtral")
    path = "model.layers.0.block_sparse_moe.experts.0.w1"
    twin = path.replace("block_sparse_moe", "mlp")
    twice = Adapter(apart.config, {path: apart.pairs[path], twin: apart.pairs[path]})
    stacked = stacked_checkpoint(base, tmp_path / "stacked", "mixtral")
    with Checkpoint(stacked) as checkpoint:
        refused(
            lambda: MergedWeights(checkpoint, twice),
            TargetError,
            f"{G0}.gate_up_proj: two pairs of the adapter are of it, {twin} is one; {OTHER}",
        )


def test_square_experts_do_not_tell_how_they_are_updated(tmp_path: Path) -> None:
    square = 4
    module = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (square // 2, square), "up_proj": (square // 2, square)}
    tensors = {
        f"{module}.{e}.{part}.weight": random_array(shape, e)
        for e in range(2)
        for part, shape in shapes.items()
    }
    config = LoraConfig(r=1, lora_alpha=1, target_parameters=("experts.gate_up_proj",))
    pair = LoraPair(random_array((2, square), 1), random_array((square, 2), 2), 1.0, "parameter")
    base = write_model(tmp_path / "base", [tensors], {"model_type": "qwen3_moe"})
    with Checkpoint(base) as checkpoint:
        refused(
            lambda: MergedWeights(checkpoint, Adapter(config, {f"{module}.gate_up_proj": pair})),
            TargetError,
            f"{module}.gate_up_proj: updates (out, in) or (in, out) of each expert, which its shape (4, 4) "
            "does not tell; merge it in memory, with loracle.torch_impl.merge",
        )
