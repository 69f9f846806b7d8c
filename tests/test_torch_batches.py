"""Rows stacked into batches: what pads each column."""

import torch

from loracle.torch_impl.batches import IGNORED, collate
from loracle.torch_impl.classification import LabelledRow
from loracle.torch_impl.encoding import Encoded
from loracle.torch_impl.packing import Packed
from loracle.torch_impl.seq2seq import TranslatedRow


def listed(batch: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    assert all(tensor.dtype is torch.int64 for tensor in batch.values())
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_a_class_is_one_number_and_types_are_padded() -> None:
    rows = [LabelledRow((2, 5, 3), 1, (0, 1, 1)), LabelledRow((2, 3), 0, (0, 0))]
    assert listed(collate(rows, pad_id=9)) == {
        "input_ids": [[2, 5, 3], [2, 3, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
        "labels": [1, 0],
    }
    assert "token_type_ids" not in collate([LabelledRow((2, 3), 0)])


def test_source_and_target_are_padded_apart() -> None:
    assert listed(collate([TranslatedRow((4, 3), (5, 6, 3)), TranslatedRow((4, 4, 4, 3), (3,))], 7)) == {
        "input_ids": [[4, 3, 7, 7], [4, 4, 4, 3]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[5, 6, 3], [3, IGNORED, IGNORED]],
    }


def test_padding_of_a_packed_row_is_a_sequence_of_its_own() -> None:
    rows = [
        Packed((Encoded((4, 5), (4, 5)), Encoded((6, 7, 8), (IGNORED, 7, 8)))),
        Packed((Encoded((9, 1), (IGNORED, 1)),)),
    ]
    assert listed(collate(rows, 2)) == {
        "input_ids": [[4, 5, 6, 7, 8], [9, 1, 2, 2, 2]],
        "labels": [[IGNORED, 5, IGNORED, 7, 8], [IGNORED, 1, IGNORED, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]],
    }
