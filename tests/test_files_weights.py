"""Each tensor of a merged model is the base's, the correctly rounded merge, or a conversion rounded once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Q0, V0, Array, random_array, small_adapter, small_tensors, write_model

from loracle.files import Adapter, Checkpoint, LoraConfig, MergedWeights, updates
from loracle.reference import (
    DTypeError,
    FileError,
    LoracleError,
    NonFiniteError,
    TargetError,
    merge_exact,
    round_fraction,
)

FLOATS = [np.float16, BFLOAT16, np.float32, np.float64]
MERGED = (f"{Q0}.weight", f"{V0}.weight")


def _exact(name: str, tensors: dict[str, Array], adapter: Adapter, dtype: Any) -> Array:
    pair = adapter.pairs[name.removesuffix(".weight")]
    exact: Array = merge_exact(tensors[name], pair.A, pair.B, pair.scaling, dtype)
    return exact


@pytest.mark.parametrize("base", FLOATS)
@pytest.mark.parametrize("wanted", [None, *FLOATS])
def test_every_tensor_is_the_exact_value_rounded_once(tmp_path: Path, base: Any, wanted: Any) -> None:
    tensors, adapter = small_tensors(base), small_adapter(BFLOAT16)
    with Checkpoint(write_model(tmp_path / "m", [tensors])) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        assert merged.names == tuple(tensors)
        assert merged.merged_names == MERGED
        for name in merged.names:
            ours = merged.tensor(name, None if name == "model.steps" else wanted)
            target = tensors[name].dtype if wanted is None or name == "model.steps" else np.dtype(wanted)
            assert ours.dtype == target
            assert ours.shape == merged.shape(name) == tensors[name].shape
            assert merged.dtype(name) == tensors[name].dtype
            if name in MERGED:
                expected = _exact(name, tensors, adapter, target)
            elif target == tensors[name].dtype:
                expected = tensors[name]
            else:
                entries = [round_fraction(_fraction(value), target) for value in tensors[name].ravel()]
                expected = np.array(entries, target).reshape(ours.shape)
            assert ours.tobytes() == np.asarray(expected).tobytes(), name


def _fraction(value: Any) -> Any:
    from fractions import Fraction

    return Fraction(float(value))


def test_a_tensor_without_a_pair_is_the_mapped_view(tmp_path: Path) -> None:
    with Checkpoint(write_model(tmp_path / "m")) as checkpoint:
        merged = MergedWeights(checkpoint, small_adapter())
        view = merged.tensor("lm_head.weight")
        assert not view.flags.owndata
        assert not view.flags.writeable
        assert np.shares_memory(view, checkpoint.tensor("lm_head.weight"))
        assert np.shares_memory(merged.tensor("lm_head.weight", np.float32), view)
        assert not np.shares_memory(merged.tensor(MERGED[0]), checkpoint.tensor(MERGED[0]))


@pytest.mark.parametrize("wanted", [None, np.float16])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 4), (3, 4), (0, 4), (2, 2)])
def test_rows_are_the_tensors_rows(tmp_path: Path, wanted: Any, start: int, stop: int) -> None:
    with Checkpoint(write_model(tmp_path / "m")) as checkpoint:
        merged = MergedWeights(checkpoint, small_adapter())
        for name in merged.names:
            dtype = None if name == "model.steps" else wanted
            whole = merged.tensor(name, dtype)[start:stop]
            assert merged.rows(name, start, stop, dtype).tobytes() == np.ascontiguousarray(whole).tobytes()


def test_without_an_adapter_nothing_is_merged(tmp_path: Path) -> None:
    with Checkpoint(write_model(tmp_path / "m")) as checkpoint:
        merged = MergedWeights(checkpoint)
        assert merged.merged_names == ()
        for name, array in small_tensors().items():
            np.testing.assert_array_equal(merged.tensor(name), array)
        with pytest.raises(FileError, match="no tensor nope"):
            merged.tensor("nope")


def _adapter(path: str, out: int, columns: int) -> Adapter:
    config = LoraConfig(r=2)
    return Adapter.from_arrays(config, {path: (random_array((2, columns), 0), random_array((out, 2), 1))})


@pytest.mark.parametrize(
    ("path", "out", "columns", "config", "error", "message"),
    [
        ("model.layers.7.q_proj", 8, 6, {}, TargetError, r"^model\.layers\.7\.q_proj\.weight: .* no .*\(8"),
        (Q0, 8, 5, {}, TargetError, r"q_proj\.weight: .* \(8, 6\), the adapter's \(8, 5\).*another"),
        (Q0, 6, 8, {}, TargetError, r"\(8, 6\), the adapter's \(6, 8\)"),
        ("model.norm", 6, 6, {}, TargetError, r"model\.norm\.weight: the model's shape is \(6,\)"),
        ("lm_head", 10, 6, {"tie_word_embeddings": True}, TargetError, r"lm_head\.weight: .* one tensor"),
        ("model.embed_tokens", 10, 6, {"tie_word_embeddings": True}, TargetError, "one tensor"),
        ("packed", 2, 2, {}, DTypeError, r"packed\.weight: .* got uint8; .* before quantisation"),
    ],
)  # fmt: skip
def test_an_adapter_for_another_model_is_refused_at_once(
    tmp_path: Path,
    path: str,
    out: int,
    columns: int,
    config: dict[str, Any],
    error: type[LoracleError],
    message: str,
) -> None:
    tensors = {**small_tensors(), "packed.weight": np.zeros((2, 2), np.uint8)}
    with (
        Checkpoint(write_model(tmp_path / "m", [tensors], config)) as checkpoint,
        pytest.raises(error, match=message),
    ):
        MergedWeights(checkpoint, _adapter(path, out, columns))


def test_an_output_layer_of_its_own_may_have_a_pair(tmp_path: Path) -> None:
    with Checkpoint(write_model(tmp_path / "m")) as checkpoint:
        assert MergedWeights(checkpoint, _adapter("lm_head", 10, 6)).merged_names == ("lm_head.weight",)


def test_a_tied_output_layer_that_is_not_stored_is_refused_as_tied(tmp_path: Path) -> None:
    tensors = small_tensors()
    del tensors["lm_head.weight"]
    with (
        Checkpoint(write_model(tmp_path / "m", [tensors], {"tie_word_embeddings": None})) as checkpoint,
        pytest.raises(TargetError, match="one tensor"),
    ):
        MergedWeights(checkpoint, _adapter("lm_head", 10, 6))


def test_overflow_and_wrong_dtypes_name_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BLOCK_BYTES", 8 * 4)  # the entry in question lies in the third block
    tensors = small_tensors()
    tensors["model.norm.weight"] = np.array([0, 65519, -np.inf, np.nan, 1, 1], np.float32)
    tensors["lm_head.weight"][1, 3] = -70000
    tensors[f"{Q0}.weight"][0, 1] = 3e38
    with Checkpoint(write_model(tmp_path / "m", [tensors])) as checkpoint:
        merged = MergedWeights(checkpoint, small_adapter())
        kept = np.array([0, 65504, -np.inf, np.nan, 1, 1], np.float16)
        np.testing.assert_array_equal(merged.tensor("model.norm.weight", np.float16), kept)
        with pytest.raises(NonFiniteError, match=r"lm_head\.weight: -70000\.0 at \(1, 3\) overflows float16"):
            merged.tensor("lm_head.weight", np.float16)
        with pytest.raises(NonFiniteError, match=r"q_proj\.weight"):
            merged.tensor(MERGED[0], np.float16)
        with pytest.raises(DTypeError, match=r"model\.steps"):
            merged.tensor("model.steps", np.float32)
        with pytest.raises(DTypeError, match=r"lm_head\.weight.*int8"):
            merged.tensor("lm_head.weight", np.int8)


def test_nan_in_a_weight_with_a_pair_is_refused_by_name(tmp_path: Path) -> None:
    tensors = small_tensors()
    tensors[f"{V0}.weight"][2, 2] = np.nan
    with Checkpoint(write_model(tmp_path / "m", [tensors])) as checkpoint:
        merged = MergedWeights(checkpoint, small_adapter())
        with pytest.raises(NonFiniteError, match=r"v_proj\.weight"):
            merged.tensor(f"{V0}.weight")
