"""Truncated adapters: exact ranks, the residuals that are reported, and what a merge makes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_matrices import frobenius, rational
from files_fixtures import BFLOAT16, Q0, V0, random_array, small_adapter, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loracle.files import (
    Adapter,
    Checkpoint,
    LoraConfig,
    LoraPair,
    MergedWeights,
    read_adapter,
    write_adapter,
)
from loracle.files.rank_choice import ranks_for_energy, ranks_for_rank
from loracle.files.rank_truncation import truncate
from loracle.reference import (
    ConfigError,
    delta_svd_error_bound,
    low_rank_approximation,
    merge,
    numerical_rank,
    rank,
    round_to,
    svd_error_bound,
)

Array = NDArray[Any]
# the talk's example: three columns that are multiples of one
TALK = np.array([[10.0, 20.0, 5.0], [12.0, 24.0, 6.0], [14.0, 28.0, 7.0]])


def delta(pair: LoraPair) -> Array:
    """The update, with the roundings of float64."""
    A, B = (own.astype(np.float64).reshape(len(own), -1) for own in (pair.A, pair.B))
    return pair.scaling * (B @ A)


def one_layer(A: Array, B: Array, **options: Any) -> Adapter:
    return Adapter.from_arrays(
        LoraConfig(**{"r": len(A), "target_modules": ("q",), **options}), {"q": (A, B)}
    )


def test_the_talk_s_matrix_is_one_column_times_one_row() -> None:
    """Eighteen numbers in factors become six: exactly of rank one, and the matrix but for roundings."""
    assert rank(TALK) == 1
    given = one_layer(TALK, np.eye(3), lora_alpha=3)
    done = truncate(given, ranks_for_energy(given, 0.99))
    pair, (layer,) = done.adapter.pairs["q"], done.layers
    assert (pair.B.shape, pair.A.shape, done.adapter.parameters) == ((3, 1), (1, 3), 6)
    assert rank(rational(pair.B) @ rational(pair.A)) == 1
    bound = delta_svd_error_bound(TALK, np.eye(3))
    assert np.abs(delta(pair) - TALK).max() <= bound
    assert max(layer.frobenius_residual, layer.spectral_residual) <= bound
    assert (layer.r_before, layer.r) == (3, 1)
    assert abs(layer.frobenius - np.linalg.norm(TALK)) <= bound


def test_by_hand() -> None:
    """Singular values 8, 4 and 1 with scaling 1/2: rank two leaves out the 1 of 9."""
    A, B = np.eye(3, 4), np.diag([2.0, 16.0, 8.0])
    done = truncate(one_layer(A, B, lora_alpha=1.5), {"q": 2})
    (layer,) = done.layers
    assert (
        np.abs(delta(done.adapter.pairs["q"]) - np.diag([0, 8, 4])[:, [0, 1, 2, 2]] * [1, 1, 1, 0]).max()
        < 1e-14
    )
    assert done.adapter.config.scaling_of("q") == 0.5
    assert layer.frobenius == pytest.approx(9, rel=1e-15)
    assert layer.frobenius_residual == pytest.approx(1, rel=1e-13)
    assert layer.relative_residual == pytest.approx(1 / 9, rel=1e-13)
    assert layer.spectral_residual == pytest.approx(1, rel=1e-13)


@settings(max_examples=25)
@given(st.data())
def test_it_is_the_best_of_its_rank_and_the_residual_is_its_own(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    r = data.draw(st.integers(2, 4))
    to = data.draw(st.integers(1, r - 1))
    alpha = data.draw(st.sampled_from((1.0, -3.0, 0.7)))
    dtype = data.draw(st.sampled_from((np.float64, np.float32, BFLOAT16)))
    seed = data.draw(st.integers(0, 2**31))
    A, B = random_array((r, shape[1]), seed, dtype), random_array((shape[0], r), seed + 1, dtype)
    given = one_layer(A, B, lora_alpha=alpha)
    done = truncate(given, {"q": to})
    before, after, (layer,) = given.pairs["q"], done.adapter.pairs["q"], done.layers
    assert (len(after.A), after.A.dtype, after.B.dtype) == (to, A.dtype, B.dtype)
    assert rank(rational(after.B) @ rational(after.A)) <= to
    missed = frobenius(exact(before) - exact(after))
    bound = delta_svd_error_bound(A, B, before.scaling) * 4
    assert abs(layer.frobenius_residual - missed) <= bound
    if dtype is np.float64 and to <= min(shape):
        best = low_rank_approximation(delta(before), to)
        assert layer.frobenius_residual <= best.frobenius_error + bound + svd_error_bound(
            shape, layer.frobenius
        )


def exact(pair: LoraPair) -> Array:
    from fractions import Fraction

    return rational(pair.B) @ rational(pair.A) * Fraction(pair.scaling)


def test_a_merge_of_a_truncated_adapter_is_the_merge_of_what_is_left(tmp_path: Path) -> None:
    """Through files, with other ranks and scalings for each layer, and rsLoRA before."""
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=("q_proj", "v_proj"))
    arrays = {
        Q0: (random_array((2, 6), 5), random_array((8, 2), 6)),
        V0: (random_array((2, 6), 7), np.zeros((4, 2))),
    }
    arrays[V0] = (arrays[V0][0], random_array((4, 2), 8))
    given = Adapter.from_arrays(config, arrays)
    done = truncate(given, {Q0: 1, V0: 2})
    write_adapter(tmp_path / "out", done.adapter)
    again = read_adapter(tmp_path / "out")
    assert again.config.rank_pattern or again.config.r == 1
    assert {path: pair.r for path, pair in again.pairs.items()} == {Q0: 1, V0: 2}
    assert again.pairs[V0].A.tobytes() == arrays[V0][0].tobytes()
    assert abs(again.pairs[V0].scaling - given.pairs[V0].scaling) <= math.ulp(given.pairs[V0].scaling)
    with Checkpoint(write_model(tmp_path / "model")) as checkpoint:
        W0 = checkpoint.tensor(f"{Q0}.weight")
        merged = MergedWeights(checkpoint, again).tensor(f"{Q0}.weight")
        kept = low_rank_approximation(delta(given.pairs[Q0]), 1)
        pair = again.pairs[Q0]
        assert np.array_equal(merged, merge(W0, pair.A, pair.B, pair.scaling))
        nearest = W0.astype(np.float64) + kept.B @ kept.A
        # factors are rounded to float32, each entry by 2^-24, and the merge once more
        assert (
            np.abs(merged - nearest).max()
            <= 2.0**-22 * (np.abs(nearest) + np.abs(kept.B) @ np.abs(kept.A)).max()
        )


def test_what_keeps_its_rank_misses_exactly_nothing() -> None:
    given = small_adapter()
    done = truncate(given, {Q0: 1, V0: 2})
    assert (done.layers[1].frobenius_residual, done.layers[1].spectral_residual) == (0, 0)
    assert done.adapter.pairs[V0].B.tobytes() == given.pairs[V0].B.tobytes()


def test_all_kinds_keep_their_shapes() -> None:
    pairs = {
        "embed": LoraPair(random_array((3, 9), 2), random_array((4, 3), 3), 2.0, "embedding"),
        "conv": LoraPair(random_array((3, 2, 3, 3), 4), random_array((5, 3, 1, 1), 5), 2.0, "convolution"),
        "mlp.experts.down": LoraPair(random_array((6, 7), 6), random_array((5, 6), 7), 2.0, "parameter"),
    }
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=("embed", "conv"), target_parameters=("experts.down",)
    )
    done = truncate(Adapter(config, pairs), {"embed": 1, "conv": 2, "mlp.experts.down": 2})
    after = done.adapter.pairs
    assert [pair.kind for pair in after.values()] == ["embedding", "convolution", "parameter"]
    assert (after["embed"].A.shape, after["embed"].B.shape) == ((1, 9), (4, 1))
    assert (after["conv"].A.shape, after["conv"].B.shape) == ((2, 2, 3, 3), (5, 2, 1, 1))
    assert (after["mlp.experts.down"].A.shape, after["mlp.experts.down"].B.shape) == ((4, 7), (5, 4))
    assert [layer.name for layer in done.layers] == [
        "embed",
        "conv",
        "mlp.experts.down[0]",
        "mlp.experts.down[1]",
    ]
    best = low_rank_approximation(delta(pairs["conv"]), 2)
    assert done.layers[1].frobenius_residual == pytest.approx(best.frobenius_error, rel=1e-5)


def test_biases_magnitudes_and_whole_tensors_stay() -> None:
    magnitude = random_array((8,), 1)
    pair = LoraPair(random_array((2, 6), 2), random_array((8, 2), 3), 2.0, magnitude=magnitude)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("q",), use_dora=True, modules_to_save=("norm",))
    done = truncate(Adapter(config, {"q": pair}, {"norm.weight": magnitude}), {"q": 1}).adapter
    assert done.pairs["q"].magnitude is magnitude
    assert done.tensors["norm.weight"] is magnitude
    assert done.config.use_dora


def test_a_tied_output_layer_keeps_the_embedding_s_update() -> None:
    A, B = random_array((3, 9), 2), random_array((4, 3), 3)
    pairs = {"embed": LoraPair(A, B, 1.0, "embedding"), "head": LoraPair(B.T.copy(), A.T.copy(), 1.0)}
    config = LoraConfig(r=3, lora_alpha=3, target_modules=("embed",), ensure_weight_tying=True)
    done = truncate(Adapter(config, pairs), {"embed": 2, "head": 2}).adapter.pairs
    assert np.array_equal(done["head"].A, done["embed"].B.T)
    assert np.array_equal(done["head"].B, done["embed"].A.T)
    assert (done["head"].kind, done["embed"].r) == ("linear", 2)


def test_an_update_of_zero_and_one_that_is_switched_off() -> None:
    done = truncate(one_layer(random_array((3, 4), 1), np.zeros((5, 3), np.float32), lora_alpha=3), {"q": 2})
    assert not done.adapter.pairs["q"].B.any()
    assert done.layers[0].relative_residual == 0
    off = truncate(one_layer(random_array((3, 4), 1), random_array((5, 3), 2), lora_alpha=0), {"q": 2})
    assert off.adapter.config.scaling_of("q") == 0
    assert off.layers[0].frobenius_residual == 0


def test_ranks_above_the_dimensions_become_zeros() -> None:
    given = one_layer(random_array((5, 2), 1, np.float64), random_array((3, 5), 2, np.float64), lora_alpha=5)
    done = truncate(given, {"q": 4})
    assert done.adapter.pairs["q"].A.shape == (4, 2)
    assert numerical_rank(delta(done.adapter.pairs["q"])) == 2
    assert done.layers[0].relative_residual < 1e-14


def test_wrong_ranks() -> None:
    for ranks in ({Q0: 0, V0: 1}, {Q0: 3, V0: 1}):
        with pytest.raises(ConfigError, match=r"q_proj: expected a rank from 1 to 2, which it has, got"):
            truncate(small_adapter(), ranks)


def test_parameters_without_names_get_one_rank() -> None:
    def pair(seed: int) -> LoraPair:
        return LoraPair(random_array((6, 7), seed), random_array((5, 6), seed + 1), 1.0, "parameter")

    config = LoraConfig(r=3, lora_alpha=3, target_modules=("q",), target_parameters=("experts.down",))
    linear = LoraPair(random_array((3, 4), 9), random_array((5, 3), 10), 1.0)
    own = Adapter(config, {"a.experts": pair(0), "b.experts": pair(2), "q": linear})
    with pytest.raises(ConfigError, match="without their names, which no rank_pattern can tell apart"):
        truncate(own, {"a.experts": 2, "b.experts": 1, "q": 1})
    done = truncate(own, {"a.experts": 2, "b.experts": 2, "q": 1}).adapter
    assert (done.config.r, done.config.rank_pattern) == (2, {"q": 1})
    one = pair(0)
    one.A[[1, 2, 4, 5]] *= 1e-4  # of each expert one row is left
    own = Adapter(config, {"a.experts": one, "b.experts": pair(2), "q": linear})
    assert ranks_for_energy(own, 0.99) == {"a.experts": 3, "b.experts": 3, "q": 2}


def test_rounding_is_to_the_dtype_of_each_factor() -> None:
    A, B = random_array((2, 6), 5, BFLOAT16), random_array((8, 2), 6)
    pair = truncate(one_layer(A, B, lora_alpha=2), ranks_for_rank(one_layer(A, B), 1)).adapter.pairs["q"]
    wide = low_rank_approximation(B.astype(np.float64) @ A.astype(np.float64), 1)
    sign = np.sign(wide.A[0, 0]) * np.sign(float(pair.A[0, 0]))
    assert np.array_equal(pair.A, round_to(wide.A * sign, BFLOAT16))
