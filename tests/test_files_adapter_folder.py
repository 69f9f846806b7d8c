"""An adapter's folder: what is written to the byte, and in full words what is missing or does not fit."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import Q0, V0, random_array, small_adapter
from safetensors import safe_open

from loracle.files import Adapter, LoraConfig, LoraPair, read_adapter, write_adapter
from loracle.files.adapter import write_adapter_files
from loracle.files.head_config import HeadConfig
from loracle.files.safetensors_writer import write_safetensors
from loracle.reference import ConfigError, FileError, LoracleError, TargetError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refusal(message: str, error: type[LoracleError] = FileError) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def changed(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", small_adapter())
    return tmp_path / "adapter"


def test_two_files_in_peft_s_form(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    own = small_adapter()
    assert (folder / CONFIG).read_bytes() == (json.dumps(own.config.to_json(), indent=2) + "\n").encode()
    with safe_open(folder / WEIGHTS, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {
            f"base_model.model.{path}.lora_{part}.weight" for path in (Q0, V0) for part in ("A", "B")
        }


def test_nothing_is_written_over(folder: Path) -> None:
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(FileExistsError):
        write_adapter_files(folder, small_adapter(lora_alpha=9))
    assert (folder / CONFIG).read_bytes() == before


def test_names_that_are_not_ascii(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=("é",))
    pair = LoraPair(random_array((2, 6), 0), random_array((4, 2), 1), config.scaling_of("é"))
    write_adapter(tmp_path / "a", Adapter(config, {"é": pair}))
    assert list(read_adapter(tmp_path / "a").pairs) == ["é"]


def test_what_a_head_s_outputs_are_is_kept(tmp_path: Path) -> None:
    plain = small_adapter(modules_to_save=("score",))
    head = HeadConfig(labels=("no", "yes"))
    adapter = Adapter(plain.config, plain.pairs, {"score.weight": random_array((2, 6), 9)}, {}, head)
    write_adapter(tmp_path / "a", adapter)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS, "head.json"]
    again = read_adapter(tmp_path / "a")
    assert again.head == head
    assert list(again.tensors) == ["score.weight"]


def test_the_class_of_the_head_is_peft_s_where_nothing_else_says_it(folder: Path) -> None:
    changed(folder, auto_mapping={"base_model_class": "SomeModel"})
    assert read_adapter(folder).head == HeadConfig(architecture="SomeModel")


def test_folders_and_files_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with refusal(f"{absent}: no such adapter folder; check the path"):
        read_adapter(absent)
    with refusal(f"{folder / WEIGHTS}: no such adapter folder; check the path"):
        read_adapter(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "other")
    with refusal(f"{folder}: has no {WEIGHTS}; was the copy complete?"):
        read_adapter(str(folder))
    (folder / "adapter_model.bin").write_bytes(b"")
    with refusal(f"{folder}: has no {WEIGHTS}; save the adapter again with PEFT, which writes it"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with refusal(f"{folder}: has no {CONFIG}; is this an adapter folder written by loracle or PEFT?"):
        read_adapter(folder)


def test_a_configuration_is_named_by_its_file(folder: Path) -> None:
    changed(folder, magic=1)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(folder / CONFIG))}: magic: unknown key"):
        read_adapter(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(FileError, match=f"^{re.escape(str(folder / CONFIG))}: expected a JSON object"):
        read_adapter(folder)


def test_an_adapter_of_a_residual_base_is_read_where_that_is_at_hand(folder: Path) -> None:
    changed(folder, init_lora_weights="pissa")
    said = f"{folder / CONFIG}: init_lora_weights: 'pissa' took the adapter's start away from the base; it "
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}belongs to that residual base, which is"):
        read_adapter(folder)
    assert read_adapter(folder, residual_base=True).pairs.keys() == {Q0, V0}


def test_what_does_not_fit_is_named_by_the_file_of_the_weights(folder: Path) -> None:
    changed(folder, target_modules=["q_proj"])
    with pytest.raises(TargetError, match=f"^{re.escape(str(folder / WEIGHTS))}: base_model") as caught:
        read_adapter(folder)
    assert caught.value.__cause__ is None
    (folder / WEIGHTS).unlink()
    write_safetensors(folder / WEIGHTS, {"x": np.ones(2, np.float32)})
    with pytest.raises(FileError, match=f"^{re.escape(str(folder / WEIGHTS))}: tensor x is not understood"):
        read_adapter(folder)


def test_a_file_that_does_not_fit_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("loracle.files.adapter.parse_arrays", full)
    path = folder / WEIGHTS
    size = path.stat().st_size
    with refusal(f"{path}: expected an adapter that fits into memory, got {size} bytes; is it one?"):
        read_adapter(folder)


def test_an_adapter_without_pairs_is_none() -> None:
    message = "the adapter has no lora_A and lora_B tensors; was it saved before it was trained?"
    with refusal(message, TargetError):
        Adapter(LoraConfig(r=2, target_modules=("q",)), {})


def test_all_that_it_holds_is_checked_and_counted() -> None:
    plain = small_adapter()
    config = small_adapter(bias="all").config
    tokens = LoraConfig(
        r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"), bias="all", trainable_token_indices=(3,)
    )
    bias, rows = {"x.bias": np.ones(5, np.float32)}, {"e": random_array((1, 6), 8)}
    assert Adapter(tokens, plain.pairs, bias, rows).parameters == 2 * (6 + 8) + 2 * (6 + 4) + 5 + 6
    with pytest.raises(TargetError, match=r"x\.weight: lies in no module"):
        Adapter(config, plain.pairs, {"x.weight": np.ones(5, np.float32)})
    with pytest.raises(TargetError, match="expected a row for each"):
        Adapter(tokens, plain.pairs)
    with pytest.raises(TargetError, match="is not among trainable_token_indices"):
        Adapter(config, plain.pairs, {}, rows)
    with pytest.raises(TargetError, match="is not targeted"):
        Adapter(tokens, {**plain.pairs, "e": plain.pairs[Q0]}, {}, rows)
    # A weight of the input embedding belongs where its rows are trained.
    whole = {"e.weight": random_array((9, 6), 1)}
    assert Adapter(tokens, plain.pairs, whole, rows).tensors.keys() == {"e.weight"}
