"""Exported decoders against transformers and against the oracle's merge: every family, tied or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_fixtures import SHAPE, make_adapter, make_model
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from task_fixtures import tiny_bert, write_words_model

from loracle.export import DecoderSession, export, open_session
from loracle.export.verification.outputs_check import generate_with_logits
from loracle.export.verification.truth import Float64Model, Truth
from loracle.files import read_adapter
from loracle.reference import LoracleError, TargetError, merge

FLOAT32 = np.dtype(np.float32)
PROMPT = [5, 77, 30, 12, 90, 41, 3]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def truth_of(base: Path, adapter: Path | None, ids: Sequence[int], dtype: np.dtype = FLOAT32) -> Truth:
    model = Float64Model(base, None if adapter is None else read_adapter(adapter))
    return model.evaluate([ids], dtype)[0]


def initializers(folder: Path) -> dict[str, np.ndarray]:
    """Every initializer by the `onnx` package, an independent reader of the format; query, key and value,
    which lie in one, by their own names."""
    model = onnx.load(str(folder / "model.onnx"))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    for name in [name for name in held if "q_proj+k_proj+v_proj" in name]:
        packed = held.pop(name)
        parts = np.split(packed, [len(packed) - 2 * keys, len(packed) - keys])
        for own, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            held[name.replace("q_proj+k_proj+v_proj", own)] = part
    return held


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True)]
)
def test_merged_logits_lie_inside_the_bound_of_the_unmerged_model(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """Prefill and cached decode steps; catches a wrong layout, rotary, scale, cache or a lost bias."""
    base = make_model(tmp_path / "base", kind, tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, ALL_LINEAR)
    export(base, tmp_path / "onnx", adapter)
    run = generate_with_logits(DecoderSession(tmp_path / "onnx", 20), PROMPT, 10)
    merged = truth_of(base, adapter, run.ids[:-1])
    untuned = truth_of(base, None, run.ids[:-1])
    assert run.logits.shape == merged.logits.shape
    assert np.abs(run.logits - merged.logits).max() <= merged.tolerance
    assert np.abs(run.logits - untuned.logits).max() > 100 * untuned.tolerance


def test_float64_truth_is_transformers_own_model(tmp_path: Path) -> None:
    """The truth replaces norms and attention; against transformers' own float32 logits it must agree."""
    base = make_model(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = plain(torch.tensor([PROMPT])).logits[0].double().numpy()
    truth = truth_of(base, None, PROMPT)
    assert np.abs(expected - truth.logits).max() <= truth.tolerance


def test_weights_are_the_oracles_merge_bit_for_bit_and_no_adapter_remains(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    folder = make_adapter(tmp_path / "adapter", base, ("q_proj", "down_proj"))
    summary = export(base, tmp_path / "onnx", folder)
    plain = export(base, tmp_path / "plain")
    got, unmerged = initializers(tmp_path / "onnx"), initializers(tmp_path / "plain")
    adapter = read_adapter(folder)
    assert got.keys() == unmerged.keys()
    assert summary.nodes == plain.nodes
    assert plain.merged_names == ()
    assert sorted(summary.merged_names) == sorted(f"{path}.weight" for path in adapter.pairs)
    for name, array in got.items():
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        expected = unmerged[name] if pair is None else merge(unmerged[name], pair.A, pair.B, pair.scaling)
        assert array.tobytes() == expected.tobytes(), name
        assert (pair is None) == (array.tobytes() == unmerged[name].tobytes()), name
    graph = onnx.load(str(tmp_path / "onnx/model.onnx"), load_external_data=False).graph
    assert not [node for node in graph.node if "lora" in " ".join([*node.input, *node.output]).lower()]


def test_a_bfloat16_base_is_rounded_once_to_the_graphs_float32(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    folder = make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "onnx", folder)
    name, pair = next(iter(read_adapter(folder).pairs.items()))
    from loracle.files import Checkpoint

    with Checkpoint(base) as checkpoint:
        expected = merge(
            checkpoint.tensor(f"{name}.weight"), pair.A, pair.B, pair.scaling, dtype=np.dtype(np.float32)
        )
    assert np.array_equal(initializers(tmp_path / "onnx")[f"{name}.weight"], expected)


def test_float16_graph_lies_inside_its_own_bound(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "onnx", adapter, dtype="fp16")
    run = generate_with_logits(DecoderSession(tmp_path / "onnx", 16), PROMPT, 4)
    truth = truth_of(base, adapter, run.ids[:-1], np.dtype(np.float16))
    assert initializers(tmp_path / "onnx")["model.norm.weight"].dtype == np.float16
    assert np.abs(run.logits - truth.logits).max() <= truth.tolerance


def test_batch_with_padding_on_the_right_equals_each_sequence_alone(tmp_path: Path) -> None:
    """The exported graph takes batches; a shorter sequence must not see the padding."""
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "onnx")
    session = open_session(tmp_path / "onnx")
    short = PROMPT[:4]
    ids = np.array([PROMPT, short + [0] * (len(PROMPT) - len(short))])
    mask = (np.arange(len(PROMPT))[None] < np.array([[len(PROMPT)], [len(short)]])).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask}
    past = {i.name: (2, i.shape[1], 0, i.shape[3]) for i in session.get_inputs() if i.name.startswith("past")}
    feeds |= {name: np.zeros(shape, np.float32) for name, shape in past.items()}
    logits = session.run(["logits"], feeds)[0]
    for row, prompt in enumerate((PROMPT, short)):
        alone = DecoderSession(session, 16).step(np.array(prompt))
        truth = truth_of(base, None, prompt)
        assert np.abs(logits[row, : len(prompt)] - alone).max() <= 2 * truth.tolerance


def test_prefill_in_pieces_equals_prefill_at_once(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "onnx")
    session = DecoderSession(tmp_path / "onnx", 16)
    whole = session.step(np.array(PROMPT)).copy()
    session.reset()
    pieces = np.concatenate(
        [session.step(np.array(part)).copy() for part in (PROMPT[:3], PROMPT[3:4], PROMPT[4:])]
    )
    truth = truth_of(base, None, PROMPT)
    assert np.abs(whole - pieces).max() <= 2 * truth.tolerance


def test_the_cache_is_bounded_and_says_so(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "onnx")
    session = DecoderSession(tmp_path / "onnx", 4)
    session.step(np.array([1, 2, 3]))
    with pytest.raises(LoracleError, match=r"input_ids: expected 1 to 1 more tokens, got 2"):
        session.step(np.array([4, 5]))
    with pytest.raises(LoracleError, match=r"got 0"):
        session.step(np.array([], np.int64))
    assert session.step(np.array([4])).shape == (1, session.vocabulary)


def test_export_is_deterministic(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for out in ("one", "two"):
        export(base, tmp_path / out, adapter)
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_onnx_checker_accepts_the_folder_and_files_travel_along(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "onnx")
    moved = (tmp_path / "onnx").rename(tmp_path / "moved")
    onnxruntime.InferenceSession(str(moved / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {path.name for path in moved.iterdir()}
    assert {"model.onnx", "model.onnx_data", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [path for path in tmp_path.iterdir() if path.name not in ("base", "moved")]


def test_the_chat_template_is_where_transformers_js_reads_it_too(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "onnx")
    held = json.loads((base / "tokenizer_config.json").read_text())
    template = (tmp_path / "onnx/chat_template.jinja").read_text()
    assert template == (base / "chat_template.jinja").read_text()
    written = json.loads((tmp_path / "onnx/tokenizer_config.json").read_text())
    assert written == {**held, "chat_template": template}


def test_buffers_that_were_saved_as_weights_once_are_passed_over(tmp_path: Path) -> None:
    """As by transformers; many published encoders hold `position_ids`."""
    base = write_words_model(tmp_path / "base", tiny_bert("BertModel"))
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "embeddings.position_ids": np.arange(64)[None]}, path, {"format": "pt"})
    export(base, tmp_path / "onnx")
    save_file({**tensors, "embeddings.position_idx": np.arange(64)[None]}, path, {"format": "pt"})
    with pytest.raises(TargetError, match="position_idx: in the checkpoint, but the graph has"):
        export(base, tmp_path / "other")


def test_weights_of_another_model_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tied=False)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"intermediate_size": 80', '"intermediate_size": 96'))
    with pytest.raises(LoracleError, match=r"mlp\.\w+_proj\.weight: expected shape"):
        export(base, tmp_path / "onnx")
    (base / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(
        TargetError, match=r"layers\.1\..*in the checkpoint, but the graph has no such weight"
    ):
        export(base, tmp_path / "onnx")
    (base / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(TargetError, match=r"layers\.2\..*expected in the checkpoint, found none"):
        export(base, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"LlamaForCausalLM"', '"LlamaForCuriosity"', "architectures: expected a class whose name ends in"),
        ('"LlamaForCausalLM"', '"A", "B"', "architectures: expected the name of one class"),
        ('"model_type"', '"auto_map": {"AutoModel": "m.M"}, "model_type"', "auto_map: expected none"),
        ('"head_dim": 16', '"head_dim": 12', "head size: expected a multiple of 8, got 12"),
        ('"rope_type": "default"', '"rope_type": "dynamic"', "rope_type: expected one of"),
    ],
)
def test_architectures_that_would_be_wrong_are_refused(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    base = make_model(tmp_path / "base")
    config = (base / "config.json").read_text()
    assert old in config
    (base / "config.json").write_text(config.replace(old, new))
    with pytest.raises(LoracleError, match=words):
        export(base, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
