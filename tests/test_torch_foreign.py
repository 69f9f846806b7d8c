"""Files of loralib and LitGPT in a model: the same numbers; and files that are not what they say."""

import os
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from refusal import refused
from torch import Tensor, nn
from torch_fixtures import fill_integers, same_bits, tiny_llama

from loracle.reference import ConfigError, FileError, NonFiniteError, ShapeError, TargetError
from loracle.torch_impl import lora_layers, merge
from loracle.torch_impl.foreign import load_litgpt, load_loralib


class Layers(nn.Module):
    """Every layer that loralib has and that works, or the plain ones of the same paths."""

    def __init__(self, adapted: bool) -> None:
        super().__init__()
        own: dict[str, Any] = {"r": 2, "lora_alpha": 4}
        self.embed: Any = loralib.Embedding(7, 3, **own) if adapted else nn.Embedding(7, 3)
        self.first: Any = loralib.Linear(3, 5, **own) if adapted else nn.Linear(3, 5)
        merged = {"enable_lora": [True, False, True], **own}
        self.qkv: Any = loralib.MergedLinear(5, 9, **merged) if adapted else nn.Linear(5, 9)
        self.conv: Any = loralib.Conv2d(1, 2, 3, **own) if adapted else nn.Conv2d(1, 2, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.qkv(self.first(self.embed(ids)))
        z: Tensor = self.conv(y[None, None])
        return z


OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 4,
    "enable_lora": {"qkv": (True, False, True)},
    "embeddings": ("embed",),
    "convolutions": ("conv",),
}
IDS = torch.tensor([[1, 6, 0, 3]])[0]


def pair_of_models() -> tuple[Layers, Layers]:
    """loralib's with small integers, and a plain one with the same frozen weights."""
    theirs, ours = Layers(True), Layers(False)
    fill_integers(theirs, 3, bound=1)
    frozen = {name.replace("conv.conv.", "conv."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: tensor for name, tensor in frozen.items() if "lora_" not in name})
    return theirs, ours


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_model_computes_what_loralibs_does(tmp_path: Path, bias: str, legacy: bool) -> None:
    theirs, ours = pair_of_models()
    theirs.train()
    if bias != "none":
        with torch.no_grad():
            for name in ("first", "qkv"):
                getattr(theirs, name).bias.add_(1)
    y = theirs(IDS)
    base = ours(IDS)
    torch.save(
        loralib.lora_state_dict(theirs, bias),
        tmp_path / "lora.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    assert load_loralib(ours, tmp_path / "lora.pt", **OPTIONS) == ("embed", "first", "qkv", "conv")
    assert torch.equal(ours(IDS), y)
    assert not torch.equal(base, y)
    merge(ours)
    assert torch.equal(ours(IDS), y)


def test_an_adapter_of_other_shapes_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    theirs, ours = pair_of_models()
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    ours.first = nn.Linear(4, 5)
    with pytest.raises(TargetError, match=r"first\.lora_A: expected shape \(2, 4\)"):
        load_loralib(ours, tmp_path / "lora.pt", **OPTIONS)
    with pytest.raises(ShapeError, match="qkv"):
        load_loralib(ours, tmp_path / "lora.pt", **{**OPTIONS, "enable_lora": {"qkv": (True, True, True)}})
    assert not lora_layers(ours)


def litgpt_state(r: int = 2) -> dict[str, Tensor]:
    """Tensors of integers for `tiny_llama`: 4 query heads of 4, 2 groups, every layer but the head."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, int, int]] = {
        "attn.qkv": (16, 16 + 8 + 8, 3),
        "attn.proj": (16, 16, 1),
        "mlp.fc_1": (16, 24, 1),
        "mlp.fc_2": (16, 24, 1),
        "mlp.proj": (24, 16, 1),
    }
    state = {}
    for layer in range(2):
        for name, (inputs, outputs, slices) in shapes.items():
            for part, shape in (("A", (r * slices, inputs)), ("B", (outputs, r))):
                values = torch.randint(-2, 3, shape, generator=generator).float()
                state[f"transformer.h.{layer}.{name}.lora_{part}"] = values
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_litgpts_fused_tensors_arrive_at_their_layers(tmp_path: Path, wrapped: bool) -> None:
    state = litgpt_state()
    torch.save({"model": state} if wrapped else state, tmp_path / "lit_model.pth.lora")
    model = tiny_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = load_litgpt(model, tmp_path / "lit_model.pth.lora", lora_r=2, lora_alpha=1, lora_key=True)
    assert len(paths) == 14
    merge(model)
    for layer in range(2):
        A, B = (state[f"transformer.h.{layer}.attn.qkv.lora_{part}"] for part in "AB")
        # The fused update of LitGPT: one block for each of query, key and value.
        blocks = zip(A.split(2), B.split([16, 8, 8]), ("q", "k", "v"), strict=True)
        for own_A, own_B, name in blocks:
            full = f"model.layers.{layer}.self_attn.{name}_proj"
            wanted = (weights[f"{full}.weight"].double() + 0.5 * (own_B @ own_A).double()).float()
            assert same_bits(model.get_submodule(full).base_layer.weight.detach(), wanted)  # type: ignore[union-attr, operator]


def test_litgpt_needs_a_model_that_tells_its_heads(tmp_path: Path) -> None:
    torch.save(litgpt_state(), tmp_path / "lit_model.pth.lora")
    with pytest.raises(ConfigError, match=r"model\.config: expected num_attention_heads .*, got Layers"):
        load_litgpt(Layers(False), tmp_path / "lit_model.pth.lora", lora_r=2, lora_alpha=1)


# Files that are not what they say.


class Runs:
    """Unpickled by the plain reader it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def load(path: Path) -> None:
    load_loralib(Layers(False), path, r=2, lora_alpha=4)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"x.lora_A": Runs(tmp_path / "ran")}, tmp_path / "lora.pt")
    refused(
        lambda: load(tmp_path / "lora.pt"),
        FileError,
        f"{tmp_path / 'lora.pt'}: expected a file of torch.save with tensors alone, got one that can't be "
        "read as such (UnpicklingError); save the state dict again",
    )
    assert not (tmp_path / "ran").exists()


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "a list": ([torch.ones(2)], "expected a dict of tensors, got list"),
    "a tensor": (torch.ones(2), "expected a dict of tensors, got Tensor"),
    "a number": ({"x.lora_A": 3}, "expected a dict of names and tensors, got int at 'x.lora_A'"),
    "no name": ({1: torch.ones(2)}, "expected a dict of names and tensors, got Tensor at 1"),
    "a huge view": (
        {"x.lora_A": torch.ones(1).expand(2**20, 2**20)},
        "x.lora_A: expected a plain floating-point tensor, got torch.float32",
    ),
    "sparse": ({"x.lora_A": torch.eye(3).to_sparse()}, "got torch.float32 torch.sparse_coo"),
    "meta": ({"x.lora_A": torch.ones(2, 2, device="meta")}, r"of shape \(2, 2\) on meta"),
    "integers": ({"x.lora_A": torch.ones(2, 2, dtype=torch.int32)}, "got torch.int32"),
    "complex": ({"x.lora_A": torch.ones(2, 2, dtype=torch.complex64)}, "got torch.complex64"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_what_is_no_dict_of_plain_tensors_is_refused(tmp_path: Path, name: str) -> None:
    value, message = BAD_VALUES[name]
    torch.save(value, tmp_path / "lora.pt")
    with pytest.raises(FileError, match=message) as caught:
        load(tmp_path / "lora.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02", b"PK\x03\x04", b"\x80\x02K\x01.", b"\x00" * 64]
)
def test_what_torch_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lora.pt").write_bytes(content)
    with pytest.raises(FileError, match=r"lora\.pt: expected a "):
        load(tmp_path / "lora.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_file_is_refused_or_read_whole(tmp_path: Path, legacy: bool) -> None:
    """Cut anywhere, or with bytes exchanged: a `LoracleError`, or an adapter; never another exception."""
    theirs, _ = pair_of_models()
    path = tmp_path / "lora.pt"
    torch.save(loralib.lora_state_dict(theirs), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refusals: list[str] = []
    for _ in range(60):
        cut, at, value = (
            int(torch.randint(n, (), generator=generator)) for n in (len(whole), len(whole), 256)
        )
        damaged = bytearray(whole)
        damaged[at] = value
        for content in (whole[:cut], bytes(damaged)):
            path.write_bytes(content)
            try:
                load_loralib(pair_of_models()[1], path, **OPTIONS)
            except (FileError, ConfigError, TargetError, ShapeError, NonFiniteError) as error:
                refusals.append(str(error))
    assert len(refusals) > 60
    assert not any("\n" in message for message in refusals)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        refused(lambda path=path: load(path), FileError, f"{path}: no such file; check the path")
