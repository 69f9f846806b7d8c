"""Embeddings that are one tensor get one update, wherever the checkpoint and the adapter have them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import Array, random_array, write_model
from refusal import refused

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair, MergedWeights
from loracle.reference import TargetError, merge_exact

EMBED, HEAD = "model.embed_tokens", "lm_head"
A, B = random_array((2, 9), 1), random_array((6, 2), 2)
WEIGHT = random_array((9, 6), 3)
SCALING = 1.5
OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ("embed_tokens", "lm_head", "shared"),
    "ensure_weight_tying": True,
}
EMBEDDING = LoraPair(A, B, SCALING, "embedding")
OUTPUT = LoraPair(np.ascontiguousarray(B.T), np.ascontiguousarray(A.T), SCALING)
EXACT = np.asarray(merge_exact(WEIGHT.T, A, B, SCALING, np.float32)).T


def merged(
    folder: Path, names: tuple[str, ...], pairs: dict[str, LoraPair], **options: Any
) -> dict[str, Array]:
    """What becomes of a checkpoint of a tied model that stores its one embedding under `names`."""
    own = {"tie_word_embeddings": True, "vocab_size": 9}
    with Checkpoint(write_model(folder, [{f"{name}.weight": WEIGHT for name in names}], own)) as checkpoint:
        weights = MergedWeights(checkpoint, Adapter(LoraConfig(**{**OPTIONS, **options}), pairs))
        assert weights.merged_names == weights.names
        return {name: np.array(weights.tensor(name)) for name in weights.names}


@pytest.mark.parametrize("names", [(EMBED,), (EMBED, HEAD), (HEAD,), ("shared",)])
@pytest.mark.parametrize("pairs", [{EMBED: EMBEDDING}, {HEAD: OUTPUT}, {EMBED: EMBEDDING, HEAD: OUTPUT}])
def test_one_update_counts_once_in_each_tensor_that_is_stored(
    tmp_path: Path, names: tuple[str, ...], pairs: dict[str, LoraPair]
) -> None:
    found = merged(tmp_path / "model", names, pairs)
    assert len(found) == len(names)
    for tensor in found.values():
        assert tensor.tobytes() == np.ascontiguousarray(EXACT).tobytes()


@pytest.mark.parametrize(
    ("other", "options"),
    [
        (LoraPair(OUTPUT.A, OUTPUT.B + 1, SCALING), {}),
        (LoraPair(OUTPUT.A, OUTPUT.B, 2 * SCALING), {"alpha_pattern": {"lm_head": 6.0}}),
    ],
)
def test_two_updates_of_one_tensor_are_refused(
    tmp_path: Path, other: LoraPair, options: dict[str, Any]
) -> None:
    pairs = {EMBED: EMBEDDING, HEAD: other}
    refused(
        lambda: merged(tmp_path / "model", (EMBED,), pairs, **options),
        TargetError,
        "lm_head: expected the update of model.embed_tokens, whose weight it shares, got another; one tensor "
        "cannot have two: train with ensure_weight_tying, or untie the model first",
    )


def test_an_update_of_one_of_them_alone_is_refused(tmp_path: Path) -> None:
    """Of encoder and decoder too, whose embedding is one though the output layer is not tied."""
    for names, path, own in (((EMBED,), EMBED, True), (("shared", HEAD), "shared", False)):
        tensors = {f"{name}.weight": WEIGHT for name in names}
        adapter = Adapter(LoraConfig(**{**OPTIONS, "ensure_weight_tying": False}), {path: EMBEDDING})
        folder = write_model(tmp_path / path, [tensors], {"tie_word_embeddings": own})
        with Checkpoint(folder) as checkpoint:
            refused(
                lambda checkpoint=checkpoint, adapter=adapter: MergedWeights(checkpoint, adapter),
                TargetError,
                f"{path}.weight: input and output embeddings of this model are one tensor, so merging into "
                f"{path} would change both; train the adapter without {path}, or with ensure_weight_tying",
            )
