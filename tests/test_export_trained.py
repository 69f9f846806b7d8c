"""An adapter is a PEFT folder or a loralib file, and what a file does not hold has to be given."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loracle.export.verification.trained import LoralibLayers, read_trained
from loracle.files import adapter_from_loralib, write_adapter
from loracle.reference import ConfigError, FileError, LoracleError
from tests.files_fixtures import Q0, small_adapter


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "lora.pt"
    tensors = {"lora_A": torch.arange(6.0).reshape(2, 3), "lora_B": torch.ones(4, 2)}
    torch.save({f"{Q0}.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


def test_a_loralib_file_with_its_rank_and_alpha(state: Path) -> None:
    adapter = read_trained(state, LoralibLayers(2, 6.0))
    pair = adapter.pairs[Q0]
    assert pair.scaling == 3.0
    assert np.array_equal(pair.A, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(pair.B, np.ones((4, 2), np.float32))


def test_what_the_layers_are_is_passed_on(tmp_path: Path) -> None:
    """A packed layer adapts some of its parts; a weight that is stored the other way round swaps nothing of
    what is trained, but its record says so."""
    path = tmp_path / "packed.pt"
    tensors = {"lora_A": torch.arange(12.0).reshape(4, 3), "lora_B": torch.ones(4, 2)}
    torch.save({f"h.qkv.{name}": tensor for name, tensor in tensors.items()}, path)
    flags = {"h.qkv": [True, False, True]}
    adapter = read_trained(path, LoralibLayers(2, 6.0, fan_in_fan_out=True, enable_lora=flags))
    expected = adapter_from_loralib(
        {f"h.qkv.{name}": tensor.numpy() for name, tensor in tensors.items()},
        r=2,
        lora_alpha=6.0,
        fan_in_fan_out=True,
        enable_lora=flags,
    )
    assert adapter.config == expected.config
    assert adapter.config.fan_in_fan_out
    assert np.array_equal(adapter.pairs["h.qkv"].B, expected.pairs["h.qkv"].B)
    with pytest.raises(LoracleError):
        read_trained(path, LoralibLayers(2, 6.0))


def test_a_file_needs_them_and_a_folder_has_them(state: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.pt: expected the rank and alpha .* or the folder of a PEFT adapter$"
    ):
        read_trained(state)
    write_adapter(tmp_path / "adapter", small_adapter())
    assert read_trained(tmp_path / "adapter").pairs.keys() == small_adapter().pairs.keys()
    with pytest.raises(ConfigError, match="leave them out"):
        read_trained(tmp_path / "adapter", LoralibLayers(2, 6.0))


def test_what_is_wrong_names_the_file(state: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, state)
    with pytest.raises(FileError, match=r"lora\.pt: tensor weight"):
        read_trained(state, LoralibLayers(2, 6.0))
    state.write_bytes(b"not a pickle")
    with pytest.raises(FileError, match=r"lora\.pt"):
        read_trained(state, LoralibLayers(2, 6.0))
