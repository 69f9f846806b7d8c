"""A task's document: what it says of the adapter, and every field that is not what it should be refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusal import refused

from loracle.export.task_document import document_text, parse_document, task_document
from loracle.files import Adapter, LoraConfig, LoraPair, read_adapter, write_adapter
from loracle.reference import FileError

DIGEST = "0123456789abcdef" * 4


def whole(**changed: Any) -> dict[str, Any]:
    """A document that is right, but for what is changed; None takes a field away."""
    content = {
        "version": 1,
        "form": "linked",
        "r": [2, 8],
        "lora_alpha": 16,
        "use_rslora": False,
        "use_dora": True,
        "target_modules": ["q_proj", "v_proj"],
        "adapter_sha256": DIGEST,
        "tensors": 4,
        "bytes": 4096,
        "sha256": DIGEST[::-1],
    }
    return {name: value for name, value in {**content, **changed}.items() if value is not None}


def test_what_is_written_is_read() -> None:
    document = parse_document(json.dumps(whole()), "x")
    assert document.r == (2, 8)
    assert document.target_modules == ("q_proj", "v_proj")
    assert {"version": 1, **document.to_json()} == whole()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("version", True),
        ("form", "baked"),
        ("form", 1),
        ("r", []),
        ("r", [8, 2]),
        ("r", [2, 2]),
        ("r", [0]),
        ("r", [True]),
        ("r", [1.0]),
        ("r", 8),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("use_rslora", 0),
        ("use_dora", "false"),
        ("target_modules", []),
        ("target_modules", ["v_proj", "q_proj"]),
        ("target_modules", [""]),
        ("target_modules", [1]),
        ("adapter_sha256", DIGEST[1:]),
        ("adapter_sha256", DIGEST.upper()),
        ("adapter_sha256", f"{DIGEST}\n"),
        ("sha256", 0),
        ("tensors", -1),
        ("tensors", 1.0),
        ("bytes", True),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(FileError, match=rf"^x: {field}: expected .*, got .*; add the task again$"):
        parse_document(json.dumps(whole(**{field: value})), "x")


@pytest.mark.parametrize("field", whole())
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    with pytest.raises(FileError, match=rf"^x: {field}: expected .*, found none; add the task again$"):
        parse_document(json.dumps(whole(**{field: None})), "x")


def test_a_field_too_many_is_refused() -> None:
    message = "x: 'name': expected no such field, found one; add the task again"
    refused(lambda: parse_document(json.dumps(whole(name="french")), "x"), FileError, message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nothing",
        '{"version": 1, "version": 1}',
        json.dumps(whole(lora_alpha=math.inf)),
        json.dumps(whole(lora_alpha=10**400)),
        "\ud800",
    ],
)
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(FileError, match=r"^x"):
        parse_document(text, "x")


def test_it_says_what_the_adapter_is(tmp_path: Path) -> None:
    paths = {
        "model.layers.0.self_attn.v_proj": 4,
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 4,
    }
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        target_modules=("q_proj", "v_proj"),
    )
    pairs = {
        path: LoraPair(np.ones((r, 3), np.float32), np.ones((5, r), np.float32), config.scaling_of(path))
        for path, r in paths.items()
    }
    write_adapter(tmp_path / "adapter", Adapter(config, pairs))
    document = task_document("swappable", read_adapter(tmp_path / "adapter"), tmp_path / "adapter")
    data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert document == {
        "version": 1,
        "form": "swappable",
        "r": [2, 4],
        "lora_alpha": 6,
        "use_rslora": True,
        "use_dora": False,
        "target_modules": ["q_proj", "v_proj"],
        "adapter_sha256": hashlib.sha256(data).hexdigest(),
    }
    parsed = parse_document(document_text(document, 3, 180, DIGEST), "x")
    assert (parsed.tensors, parsed.bytes, parsed.sha256) == (3, 180, DIGEST)
