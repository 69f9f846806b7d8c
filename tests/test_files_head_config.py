"""What an adapter's folder says of its head: written and read back, PEFT's notes, and files gone wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from files_fixtures import small_adapter
from refusal import refused

from loracle.files import read_adapter, write_adapter
from loracle.files.head_config import HEAD_FILE, HeadConfig, labels_of
from loracle.reference import FileError

HEADS = [
    HeadConfig(
        "BertForSequenceClassification", ("ja", "nein", "weiß nicht"), "single_label_classification", 0
    ),
    HeadConfig("BertForTokenClassification", tuple(f"LABEL_{number}" for number in range(12))),
    HeadConfig(pad_token_id=7),
    HeadConfig(),
]


@pytest.mark.parametrize("head", HEADS)
def test_what_is_written_is_read_back(tmp_path: Path, head: HeadConfig) -> None:
    write_adapter(tmp_path / "adapter", replace(small_adapter(), head=head))
    assert read_adapter(tmp_path / "adapter").head == head


def test_the_file_has_the_keys_of_a_models_configuration(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", replace(small_adapter(), head=HEADS[0]))
    assert json.loads((tmp_path / "adapter" / HEAD_FILE).read_text("utf-8")) == {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "ja", "1": "nein", "2": "weiß nicht"},
        "label2id": {"ja": 0, "nein": 1, "weiß nicht": 2},
        "pad_token_id": 0,
        "problem_type": "single_label_classification",
    }


def test_without_a_head_there_is_no_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", small_adapter())
    assert not (tmp_path / "adapter" / HEAD_FILE).exists()
    assert read_adapter(tmp_path / "adapter").head is None


@pytest.mark.parametrize(
    ("mapping", "head"),
    [
        (
            {"base_model_class": "ViTForImageClassification", "parent_library": "x"},
            "ViTForImageClassification",
        ),
        ({"base_model_class": 3}, None),
        (None, None),
    ],
)
def test_pefts_note_of_the_class_is_read(tmp_path: Path, mapping: Any, head: str | None) -> None:
    write_adapter(tmp_path / "adapter", small_adapter())
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": mapping}))
    assert read_adapter(tmp_path / "adapter").head == (None if head is None else HeadConfig(head))


LABELS = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"num_labels": 2},
            "num_labels: expected only the keys architectures, id2label, label2id, pad_token_id, "
            "problem_type, got 2; restore the file",
        ),
        (
            {"architectures": ["A", "B"]},
            "architectures: expected the name of one class, got ['A', 'B']; restore the file",
        ),
        ({"architectures": [3]}, "architectures: expected the name of one class, got [3]; restore the file"),
        (
            {**LABELS, "id2label": {"1": "a", "2": "b"}},
            "id2label: expected labels by the numbers 0, 1, ..., got {'1': 'a', '2': 'b'}; restore the file",
        ),
        (
            {**LABELS, "id2label": {"0": "a", "1": 2}},
            "id2label: expected labels by the numbers 0, 1, ..., got {'0': 'a', '1': 2}; restore the file",
        ),
        (
            {**LABELS, "label2id": {"a": 1, "b": 0}},
            "label2id: expected the numbers of id2label's labels, got {'a': 1, 'b': 0}; restore the file",
        ),
        ({"label2id": {}}, "id2label: expected labels by the numbers 0, 1, ..., got None; restore the file"),
        ({"pad_token_id": True}, "pad_token_id: expected an integer, got True; restore the file"),
        ({"pad_token_id": "0"}, "pad_token_id: expected an integer, got '0'; restore the file"),
        ({"problem_type": 1}, "problem_type: expected a string, got 1; restore the file"),
    ],
)
def test_a_malformed_file_is_refused_by_its_key(tmp_path: Path, content: Any, message: str) -> None:
    folder = tmp_path / "adapter"
    write_adapter(folder, small_adapter())
    (folder / HEAD_FILE).write_text(json.dumps(content))
    refused(lambda: read_adapter(folder), FileError, f"{folder / HEAD_FILE}: {message}")


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", small_adapter())
    (tmp_path / "adapter" / HEAD_FILE).write_text("{")
    with pytest.raises(FileError, match=r"head\.json: not valid JSON"):
        read_adapter(tmp_path / "adapter")


def test_labels_come_in_the_order_of_their_numbers() -> None:
    numbers = {str(number): f"l{number}" for number in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    assert labels_of(numbers) == tuple(f"l{number}" for number in range(11))
    assert labels_of({1: "b", 0: "a"}) == ("a", "b")
    assert labels_of({}) is None
    assert labels_of(["a"]) is None
