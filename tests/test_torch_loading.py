"""Loading a model: its dtype, and folders that are not what they should be."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_fixtures import same_bits, tiny_llama, write_model

from loracle.reference import FileError
from loracle.torch_impl.loading import check_model_source, load_model, native_bf16

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("stored", "bf16", "loaded"),
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
    ],
)
def test_weights_are_wide_enough_and_no_wider(
    tmp_path: Path, stored: torch.dtype, bf16: bool, loaded: torch.dtype
) -> None:
    folder = write_model(tmp_path / "model")
    tiny_llama().to(stored).save_pretrained(folder)
    model, tokenizer = load_model(str(folder), bf16=bf16)
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
    assert same_bits(model.lm_head.weight, tiny_llama().lm_head.weight.to(stored).to(loaded))
    assert tokenizer.eos_token == "<eos>"


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"expected the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder), bf16=False)


@pytest.mark.parametrize("damage", ["cut", "absent", "shape", "tokenizer", "config"])
def test_a_damaged_folder_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / WEIGHTS
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "absent":
        path.unlink()
    elif damage == "shape":
        tiny_llama(hidden_size=8).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / WEIGHTS).rename(path)
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match="expected a model folder, got") as caught:
        load_model(str(folder), bf16=False)
    assert "\n" not in str(caught.value)


def test_sources_that_cannot_be_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (str(tmp_path / "absent"), "got nothing there"),
        ("absent", "got nothing there"),
        ("", "without config"),
        ("a b/c", "got nothing there"),
        (str(tmp_path / "file"), "got a file"),
        (str(tmp_path / "empty"), r"without config\.json"),
    ):
        with pytest.raises(FileError, match=message):
            check_model_source(source)
    check_model_source("owner/name-1.5_x")


def test_only_hardware_bfloat16_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, native in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert native_bf16(torch.device("cpu")) is native
    assert not native_bf16(torch.device("meta"))
