"""State dicts of loralib become adapters with loralib's own update of every weight."""

from typing import Any

import loralib
import numpy as np
import pytest
import torch
from files_fixtures import Array, random_array
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loracle.files import Adapter, adapter_from_loralib
from loracle.reference import (
    ConfigError,
    DTypeError,
    FileError,
    LoracleError,
    NonFiniteError,
    ShapeError,
    TargetError,
)

R, ALPHA = 2, 6
Q_ONLY = (True, False, False)


class Model(nn.Module):
    """A layer of each of loralib's types, its adapter's numbers small integers, its scaling 3."""

    def __init__(
        self, enabled: tuple[bool, ...] = (True, False, True), turned: bool = False, k: int = 3
    ) -> None:
        super().__init__()
        own: dict[str, Any] = {"r": R, "lora_alpha": ALPHA}
        self.linear = loralib.Linear(5, 8, fan_in_fan_out=turned, **own)
        self.embed = loralib.Embedding(7, 4, **own)
        self.block = nn.ModuleDict(
            {"qkv": loralib.MergedLinear(5, 12, enable_lora=list(enabled), fan_in_fan_out=turned, **own)}
        )
        self.conv = loralib.Conv2d(3, 4, k, **own)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_" in name or name.endswith("bias"):
                    parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))
                else:
                    parameter.zero_()

    def state(self, bias: str = "none") -> dict[str, Array]:
        return {name: own.detach().numpy() for name, own in loralib.lora_state_dict(self, bias).items()}

    def merged(self) -> dict[str, Array]:
        """The updates: the zero weights after loralib has merged into them."""
        self.eval()
        return {name: parameter.detach().numpy() for name, parameter in self.named_parameters()}


def _delta(adapter: Adapter, path: str) -> Array:
    pair = adapter.pairs[path]
    A, B = pair.A.reshape(len(pair.A), -1), pair.B.reshape(len(pair.B), -1)
    delta = pair.scaling * B @ A
    return np.asarray(delta.T if pair.kind == "embedding" else delta.reshape(pair.shape))


def _read(state: dict[str, Array], **options: Any) -> Adapter:
    given: dict[str, Any] = {
        "enable_lora": {"qkv": (True, False, True)},
        "embeddings": ("embed",),
        "convolutions": ("conv",),
    }
    return adapter_from_loralib(state, **{"r": R, "lora_alpha": ALPHA, **given, **options})


@pytest.mark.parametrize("enabled", [(True, False, True), Q_ONLY, (False, True, True), (True, True, True)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_update_is_loralib_s(enabled: tuple[bool, ...], turned: bool, k: int) -> None:
    model = Model(enabled, turned, k)
    adapter = _read(model.state(), enable_lora={"block.qkv": enabled}, fan_in_fan_out=turned)
    weights = model.merged()
    assert set(adapter.pairs) == {"linear", "embed", "block.qkv", "conv"}
    for path, name in {"linear": "linear", "block.qkv": "block.qkv"}.items():
        expected = weights[f"{name}.weight"]
        np.testing.assert_array_equal(_delta(adapter, path), expected.T if turned else expected)
    np.testing.assert_array_equal(_delta(adapter, "embed"), weights["embed.weight"])
    np.testing.assert_array_equal(_delta(adapter, "conv"), weights["conv.conv.weight"])
    assert adapter.pairs["conv"].kind == "convolution"
    assert adapter.config.fan_in_fan_out is turned
    assert {path: pair.scaling for path, pair in adapter.pairs.items()} == dict.fromkeys(adapter.pairs, 3.0)
    assert adapter.config.bias == "none"


def test_linear_tensors_are_taken_as_they_are() -> None:
    state = Model().state()
    adapter = _read(state)
    assert adapter.pairs["linear"].A is state["linear.lora_A"]
    assert adapter.pairs["linear"].B is state["linear.lora_B"]
    assert adapter.config.target_modules == ("block.qkv", "conv", "embed", "linear")
    assert adapter.config.r == R
    assert adapter.config.rank_of("block.qkv") == 2 * R
    assert adapter.config.rank_of("other.block.qkv") == R


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ("none", set()),
        ("lora_only", {"linear.bias", "block.qkv.bias"}),
        ("all", {"linear.bias", "block.qkv.bias", "conv.bias"}),
    ],
)
def test_trained_biases_become_whole_tensors(bias: str, names: set[str]) -> None:
    model = Model()
    adapter = _read(model.state(bias))
    assert adapter.tensors.keys() == names
    for name in names:
        own = model.get_parameter("conv.conv.bias" if name == "conv.bias" else name)
        np.testing.assert_array_equal(adapter.tensors[name], own.detach().numpy())
    assert adapter.config.bias == {"all": "lora_only"}.get(bias, bias)


def test_a_bias_of_another_layer_is_one_of_all() -> None:
    state = {**Model().state(), "norm.bias": np.ones(3, np.float32)}
    assert _read(state).config.bias == "all"


@given(
    r=st.integers(1, 64),
    width=st.integers(2, 9),
    alpha=st.integers(1, 4096) | st.floats(0.01, 1000, allow_nan=False),
)
def test_wider_ranks_keep_the_scaling(r: int, width: int, alpha: float) -> None:
    state = {"x.lora_A": np.ones((r * width, 2)), "x.lora_B": np.ones((width, r))}
    adapter = adapter_from_loralib(state, r=r, lora_alpha=alpha, enable_lora={"x": (True,) * width})
    got, expected = adapter.pairs["x"].scaling, alpha / r
    assert got == expected if isinstance(alpha, int) else abs(got - expected) <= np.spacing(expected)


A, B = random_array((R, 5), 0), random_array((8, R), 1)


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        ({}, {}, TargetError, "the state dict has no lora_A"),
        ({"x.lora_A": A}, {}, FileError, r"^x\.lora_B is missing"),
        ({"x.lora_B": B}, {}, FileError, r"^x\.lora_A is missing"),
        ({"x.lora_A": A, "x.lora_B": B, "x.weight": B}, {}, FileError, r"tensor x\.weight is not understood"),
        ({"lora_A": A, "lora_B": B}, {}, FileError, r"tensor lora_A is not understood"),
        (
            {"x.lora_A": A[0], "x.lora_B": B},
            {},
            ShapeError,
            r"x\.lora_A: expected a matrix, got shape \(5,\)",
        ),
        ({"x.lora_A": A.astype(int), "x.lora_B": B}, {}, DTypeError, r"x\.lora_A: .* int64"),
        ({"x.lora_A": A * np.nan, "x.lora_B": B}, {}, NonFiniteError, r"x\.lora_A\.weight: holds NaN"),
        (
            {"x.lora_A": A, "x.lora_B": B},
            {"r": 3},
            ShapeError,
            r"x\.lora_A\.weight: expected shape \(3, in\)",
        ),
        ({"x.lora_A": A, "x.lora_B": B}, {"embeddings": ("y",)}, ConfigError, "^y: expected the name of"),
        (
            {"x.lora_A": A, "x.lora_B": B},
            {"embeddings": ("x",), "convolutions": ("x",)},
            ConfigError,
            "^x: expected one name for it, got x, x",
        ),
        (
            {"x.lora_A": A, "x.lora_B": B},
            {"enable_lora": {"x": (True, True)}},
            ShapeError,
            r"^x: A: expected \(4",
        ),
        ({"x.lora_A": A, "x.lora_B": B}, {"enable_lora": {"x": (False,)}}, ConfigError, "enable_lora of x"),
        (
            {"x.lora_A": A, "x.lora_B": B},
            {"enable_lora": {"x": (True,) * 3}},
            ConfigError,
            "enable_lora of x",
        ),
        (
            {"x.lora_A": A, "x.lora_B": B},
            {"convolutions": ("x",), "r": 3},
            ShapeError,
            r"^x: .* \(3 \* k, in",
        ),
        (
            {"x.lora_A": A, "x.lora_B": B},
            {"convolutions": ("x",), "r": 1},
            ShapeError,
            r"one group, got \(2, 5",
        ),
    ],
)
def test_what_is_not_loralib_s_is_refused_by_name(
    state: dict[str, Array], options: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        adapter_from_loralib(state, **{"r": R, "lora_alpha": ALPHA, **options})
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_factors_without_rows_are_refused() -> None:
    state = {"h.lora_A": np.zeros((0, 3), np.float32), "h.lora_B": np.zeros((4, 0), np.float32)}
    with pytest.raises(ShapeError, match=r"h\.lora_A.*expected shape"):
        adapter_from_loralib(state, r=2, lora_alpha=4)
