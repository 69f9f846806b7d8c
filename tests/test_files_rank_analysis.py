"""What is said of an adapter's ranks: against matrices with known answers, and against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Q0, V0, random_array, small_adapter, small_tensors, write_model
from numpy.typing import NDArray

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair
from loracle.files.rank_analysis import LayerRanks, analyse
from loracle.files.rank_choice import RankPattern
from loracle.files.update_weights import UpdateWeights
from loracle.reference import (
    ShapeError,
    TargetError,
    amplification_factor,
    amplification_factor_bound,
    delta_singular_values,
    effective_rank,
    stable_rank,
    subspace_similarity_grid,
)

Array = NDArray[Any]


def layer_of(A: Array, B: Array, **options: Any) -> LayerRanks:
    config = LoraConfig(r=len(A), lora_alpha=len(A), target_modules=("q",))
    (layer,) = analyse(Adapter.from_arrays(config, {"q": (A, B)}), **options).layers
    return layer


def test_the_talk_s_matrix_has_rank_one() -> None:
    """Columns 10, 12, 14 and 20, 24, 28 and 5, 6, 7: all of it is one singular value."""
    talk = np.array([[10.0, 20.0, 5.0], [12.0, 24.0, 6.0], [14.0, 28.0, 7.0]])
    layer = layer_of(talk, np.eye(3))
    assert layer.rank_for_energy == 1
    assert (layer.r, layer.shape, layer.kind, layer.name) == (3, (3, 3), "linear", "q")
    assert layer.effective_rank == pytest.approx(1, abs=1e-12)
    assert layer.stable_rank == pytest.approx(1, abs=1e-12)
    assert layer.frobenius == pytest.approx(np.sqrt((10**2 + 12**2 + 14**2) * (1 + 4 + 0.25)), rel=1e-14)
    changed = talk.copy()
    changed[2, 2] = 70  # as in the talk: not of rank one any more
    assert layer_of(changed, np.eye(3)).rank_for_energy == 2


def test_known_spectra() -> None:
    layer = layer_of(np.eye(3, 4), np.diag([0.0, 5.0, 5.0]))
    assert layer.singular_values.tolist() == [5, 5, 0]
    assert layer.effective_rank == pytest.approx(2, rel=1e-12)
    assert (layer.stable_rank, layer.rank_for_energy) == (2, 2)
    assert layer_of(np.eye(3, 4), np.diag([0.0, 5.0, 5.0]), energy=0.5).rank_for_energy == 1


def test_known_amplification(tmp_path: Path) -> None:
    """W0 has 2 where delta has 8, and 100 elsewhere: the adapter amplifies by 4."""
    W0 = np.full((3, 4), 100, np.float32)
    W0[1, 2] = 2
    A, B = np.zeros((1, 4), np.float32), np.zeros((3, 1), np.float32)
    A[0, 2], B[1, 0] = 4, 1
    config = LoraConfig(r=1, lora_alpha=2, target_modules=("q",))
    adapter = Adapter.from_arrays(config, {"q": (A, B)})
    with Checkpoint(write_model(tmp_path / "m", [{"q.weight": W0}])) as checkpoint:
        found = analyse(adapter, weights=UpdateWeights(checkpoint, adapter)).layers[0]
    assert found.amplification == pytest.approx(4, rel=1e-14)


def test_nothing_to_amplify(tmp_path: Path) -> None:
    A, B = np.ones((1, 4), np.float32), np.ones((3, 1), np.float32)
    config = LoraConfig(r=1, lora_alpha=2, target_modules=("q",))
    with Checkpoint(write_model(tmp_path / "m", [{"q.weight": np.zeros((3, 4), np.float32)}])) as checkpoint:
        for own in (B, np.zeros_like(B)):
            adapter = Adapter.from_arrays(config, {"q": (A, own)})
            layer = analyse(adapter, weights=UpdateWeights(checkpoint, adapter)).layers[0]
            assert layer.amplification is None
    assert (layer.rank_for_energy, layer.effective_rank, layer.stable_rank) == (0, 0, 0)


def test_known_similarity() -> None:
    """Rows along axes 1, 2 and 2, 3: the first directions are orthogonal, half of the planes is shared."""
    A1, A2 = np.array([[2.0, 0, 0], [0, 1, 0]]), np.array([[0, 3.0, 0], [0, 0, 1]])
    config = LoraConfig(r=2, target_modules=("q",))
    own, other = (Adapter.from_arrays(config, {"q": (A, np.eye(4, 2))}) for A in (A1, A2))
    (layer,) = analyse(own, other=other).layers
    assert layer.similarity_A is not None
    assert layer.similarity_B is not None
    assert np.abs(layer.similarity_A - [[0, 0], [1, 0.5]]).max() < 1e-14
    assert layer.similarity_B[1, 1] == pytest.approx(1)
    assert analyse(own).layers[0].similarity_A is None


def test_of_two_ranks_the_grid_is_the_reference_s() -> None:
    own, other = small_adapter(), small_adapter(r=2)
    wide = Adapter.from_arrays(
        LoraConfig(r=4, target_modules=("q_proj",)), {Q0: (random_array((4, 6), 9), random_array((8, 4), 10))}
    )
    first, second = analyse(own, other=wide).layers
    assert second.similarity_A is None  # the other has no such layer
    assert first.similarity_A is not None
    assert first.similarity_A.shape == (2, 4)
    assert np.array_equal(first.similarity_A, subspace_similarity_grid(own.pairs[Q0].A, wide.pairs[Q0].A))
    assert np.array_equal(first.similarity_B, subspace_similarity_grid(own.pairs[Q0].B.T, wide.pairs[Q0].B.T))
    assert analyse(own, other=other).layers[0].similarity_A[1, 1] == pytest.approx(1)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_figures_are_the_reference_s(tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracle.files.rank_analysis._BLOCK_ENTRIES", 18)  # three rows of W0 at a time
    adapter = small_adapter(dtype)
    with Checkpoint(write_model(tmp_path / "m", [small_tensors(dtype)])) as checkpoint:
        found = analyse(adapter, weights=UpdateWeights(checkpoint, adapter))
        for layer in found.layers:
            pair, W0 = adapter.pairs[layer.name], checkpoint.tensor(f"{layer.name}.weight")
            s = delta_singular_values(pair.A, pair.B, pair.scaling)
            assert np.array_equal(layer.singular_values, s)
            assert layer.effective_rank == effective_rank(s)
            assert layer.stable_rank == stable_rank(s)
            expected = amplification_factor(W0, pair.A, pair.B, pair.scaling)
            bound = amplification_factor_bound(W0, pair.A, pair.B, pair.scaling)
            assert layer.amplification is not None
            assert abs(layer.amplification - expected) <= bound


def test_the_proposal_counts_what_it_keeps() -> None:
    arrays = {
        "a": (np.eye(2, 6), np.diag([1.0, 1e-3])),
        "b": (np.eye(2, 6), np.diag([1.0, 1.0])),
        "c": (np.eye(2, 6), np.diag([1e-9, 0.0])),
    }
    config = LoraConfig(r=2, target_modules=("a", "b", "c"))
    found = analyse(Adapter.from_arrays(config, arrays))
    assert found.proposal == RankPattern({"b": 2}, 1)
    assert (found.parameters, found.proposed_parameters) == (3 * 16, 8 + 16 + 8)
    assert found.energy == 0.99


def test_every_kind_finds_its_weight(tmp_path: Path) -> None:
    """Weights stored turned, as embeddings and GPT-2's are, kernels, and stacks."""
    shapes = {"embed_tokens": (9, 4), "conv": (5, 2, 3, 3), "c_attn": (6, 8)}
    tensors = {f"{name}.weight": random_array(shape, 20) for name, shape in shapes.items()}
    tensors["experts.down"] = random_array((2, 5, 7), 21)
    pairs = {
        "embed_tokens": LoraPair(random_array((2, 9), 2), random_array((4, 2), 3), 1.0, "embedding"),
        "conv": LoraPair(random_array((2, 2, 3, 3), 4), random_array((5, 2, 1, 1), 5), 1.0, "convolution"),
        "c_attn": LoraPair(random_array((2, 6), 6), random_array((8, 2), 7), 1.0),
    }
    config = LoraConfig(r=2, lora_alpha=2, target_modules=tuple(pairs), fan_in_fan_out=True)
    matrices = {
        "embed_tokens": tensors["embed_tokens.weight"].T,
        "conv": tensors["conv.weight"].reshape(5, -1),
        "c_attn": tensors["c_attn.weight"].T,
    }
    stack = LoraPair(random_array((4, 7), 8), random_array((5, 4), 9), 1.0, "parameter")
    stacked = LoraConfig(r=2, lora_alpha=2, target_modules=(), target_parameters=("experts.down",))
    with Checkpoint(write_model(tmp_path / "m", [tensors])) as checkpoint:
        weights = UpdateWeights(checkpoint, Adapter(config, pairs))
        for path, matrix in matrices.items():
            assert np.array_equal(weights.matrix(path, 0), matrix)
            weights.release(path)
        own = Adapter(stacked, {"experts.down": stack})
        weights = UpdateWeights(checkpoint, own)
        assert np.array_equal(weights.matrix("experts.down", 1), tensors["experts.down"][1])
        layers = analyse(own, weights=weights).layers
    assert [layer.name for layer in layers] == ["experts.down[0]", "experts.down[1]"]
    for e, layer in enumerate(layers):
        A, B = stack.A.reshape(2, 2, 7)[e], stack.B.reshape(5, 2, 2)[:, :, e]
        assert layer.amplification == pytest.approx(
            amplification_factor(tensors["experts.down"][e], A, B), rel=1e-9
        )


def test_stacks_stored_in_out_and_tied_embeddings(tmp_path: Path) -> None:
    tensors = {
        "experts.down": random_array((2, 7, 5), 21),
        "model.embed_tokens.weight": random_array((9, 4), 20),
    }
    stack = LoraPair(random_array((4, 7), 8), random_array((5, 4), 9), 1.0, "parameter")
    stacked = LoraConfig(r=2, lora_alpha=2, target_modules=(), target_parameters=("experts.down",))
    A, B = random_array((2, 9), 2), random_array((4, 2), 3)
    tied = Adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=("embed_tokens",), ensure_weight_tying=True),
        {
            "lm_head": LoraPair(B.T.copy(), A.T.copy(), 1.0),
            "model.embed_tokens": LoraPair(A, B, 1.0, "embedding"),
        },
    )
    folder = write_model(tmp_path / "m", [tensors], {"tie_word_embeddings": True})
    with Checkpoint(folder) as checkpoint:
        weights = UpdateWeights(checkpoint, Adapter(stacked, {"experts.down": stack}))
        assert np.array_equal(weights.matrix("experts.down", 1), tensors["experts.down"][1].T)
        weights = UpdateWeights(checkpoint, tied)
        layers = analyse(tied, weights=weights).layers
    assert layers[0].amplification == pytest.approx(layers[1].amplification, rel=1e-9)


def test_adapters_of_other_models_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=("x",))
    with pytest.raises(TargetError, match=f"expected a layer of this one, such as {Q0}, got none, but x"):
        analyse(
            small_adapter(),
            other=Adapter.from_arrays(config, {"x": (random_array((2, 6), 1), random_array((8, 2), 1))}),
        )
    narrow = Adapter.from_arrays(
        LoraConfig(r=2, target_modules=("q_proj",)), {Q0: (random_array((2, 5), 1), random_array((8, 2), 1))}
    )
    with pytest.raises(ShapeError, match=f"{Q0}: lora_A: expected width 6 as this adapter has, got 5"):
        analyse(small_adapter(), other=narrow)
    with (
        Checkpoint(write_model(tmp_path / "m", [{"x.weight": random_array((8, 6), 1)}])) as checkpoint,
        pytest.raises(TargetError, match="the model has no such tensor"),
    ):
        UpdateWeights(checkpoint, small_adapter())


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int]] = []
    analyse(small_adapter(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert [layer.name for layer in analyse(small_adapter()).layers] == [Q0, V0]
