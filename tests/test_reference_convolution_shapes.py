import ml_dtypes
import numpy as np
import pytest
from convolution_cases import TENSORS

from loracle.reference import (
    ConfigError,
    Convolution,
    DTypeError,
    LowRank,
    ShapeError,
    convolution_backward,
    convolution_delta_factors,
    convolution_forward,
)
from loracle.reference.convolution_shapes import columns_of


def test_an_output_sees_a_window_of_each_of_its_channels():
    assert columns_of((7, 5, 3, 2)) == 30


# A layer with three axes, two groups and an adapter of rank 3: every size is another.
ARGUMENTS = {
    "x": np.ones((2, 4, 5, 6, 7)),
    "W0": np.ones((6, 2, 1, 2, 3)),
    "A": np.ones((3, 2, 1, 2, 3)),
    "B": np.ones((6, 3)),
    "bias": np.ones(6),
    "bias of lora_B": np.ones(6),
    "dropout": np.ones((2, 4, 5, 6, 7)),
    "dy": np.ones((2, 6, 5, 5, 5)),
}


def call(changed, geometry=None, rows=None, more=()):
    given = ARGUMENTS | changed
    geometry = Convolution(groups=2) if geometry is None else geometry
    own = LowRank(given["A"], given["B"], 1.0, given["bias of lora_B"], given["dropout"], rows)
    adapters = [*more, own]
    convolution_forward(given["x"], given["W0"], adapters, bias=given["bias"], geometry=geometry)
    convolution_backward(given["dy"], given["x"], given["W0"], adapters, geometry=geometry)


FIT_W0 = r"to fit W0 \(6, 2, 1, 2, 3\)"
FIT_A = FIT_W0 + r" and A \(3, 2, 1, 2, 3\)"
FIT_X = FIT_W0 + r" and x \(2, 4, 5, 6, 7\)"
WRONG_W0 = (
    r"^W0: expected \(out, in/groups, \*kernel\) with 1, 2 or 3 kernel sizes and none of them 0, got {}; "
)
OVER_GROUPS = (
    "an A over the channels of all groups, as PEFT trains it, is no update of a grouped weight: "
    "it cannot be merged$"
)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("W0", (6, 2), WRONG_W0.format(r"\(6, 2\)") + "pass the convolution's weight$"),
        ("W0", (6, 2, 1, 1, 1, 1), WRONG_W0.format(r"\(6, 2, 1, 1, 1, 1\)")),
        ("W0", (6, 2, 1, 0, 3), WRONG_W0.format(r"\(6, 2, 1, 0, 3\)")),
        ("W0", (0, 2, 1, 2, 3), WRONG_W0.format(r"\(0, 2, 1, 2, 3\)")),
        (
            "x",
            (2, 5, 5, 6, 7),
            rf"^x: expected \(N, 4, size, size, size\) {FIT_W0} with groups 2, got \(2, 5, 5, 6, 7\); "
            "check its axes$",
        ),
        (
            "x",
            (4, 5, 6, 7),
            rf"^x: expected \(N, 4, size, size, size\) {FIT_W0} with groups 2, got \(4, 5, 6",
        ),
        ("x", (2, 4, 5, 1, 7), "^x: expected at least 2 on spatial axis 1 for a kernel that spans 2"),
        ("A", (3, 2, 1, 2), rf"^A: expected \(r, 2, 1, 2, 3\) {FIT_W0}, got \(3, 2, 1, 2\); check its axes$"),
        ("A", (0, 2, 1, 2, 3), rf"^A: expected \(r, 2, 1, 2, 3\) {FIT_W0}, got \(0, 2, .*; check its axes$"),
        ("A", (3, 2, 1, 2, 2), r"^A: expected .*, got \(3, 2, 1, 2, 2\); check its axes$"),
        ("A", (3, 4, 1, 2, 2), r"^A: expected .*, got \(3, 4, 1, 2, 2\); check its axes$"),
        ("A", (3, 4), r"^A: expected .*, got \(3, 4\); check its axes$"),
        ("A", (3, 1, 1, 2, 3), r"^A: expected .*, got \(3, 1, 1, 2, 3\); check its axes$"),
        ("A", (3, 3, 1, 2, 3), r"^A: expected .*, got \(3, 3, 1, 2, 3\); check its axes$"),
        ("A", (3, 4, 1, 2, 3), r"^A: expected .*, got \(3, 4, 1, 2, 3\); " + OVER_GROUPS),
        (
            "B",
            (3, 6),
            rf"^B: expected \(6, 3\) or \(6, 3, 1, 1, 1\) {FIT_A}, got \(3, 6\); check its axes$",
        ),
        ("B", (6, 3, 1, 1), r"^B: expected .*, got \(6, 3, 1, 1\); check its axes$"),
        ("B", (6, 3, 1, 2, 3), r"^B: expected .*, got \(6, 3, 1, 2, 3\); check its axes$"),
        ("bias", (1, 6), rf"^bias: expected \(6,\) {FIT_X}, got \(1, 6\); check its axes$"),
        (
            "bias of lora_B",
            (3,),
            rf"^bias of lora_B: expected \(6,\) {FIT_A}, got \(3,\); check its axes$",
        ),
        (
            "dropout",
            (1, 4, 5, 6, 7),
            rf"^dropout: expected \(2, 4, 5, 6, 7\) {FIT_X}, got \(1, 4, 5, 6, 7\); check its axes$",
        ),
        (
            "dy",
            (2, 6, 5, 6, 7),
            rf"^dy: expected \(2, 6, 5, 5, 5\) {FIT_X}, got \(2, 6, 5, 6, 7\); check its axes$",
        ),
        (
            "dy",
            (1, 6, 5, 5, 5),
            r"^dy: expected \(2, 6, 5, 5, 5\) .*, got \(1, 6, 5, 5, 5\); check its axes$",
        ),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    with pytest.raises(ShapeError, match=message) as caught:
        call({name: np.ones(shape)})
    assert "\n" not in str(caught.value)


def test_the_arguments_of_these_tests_fit():
    call({})
    call({"B": np.ones((6, 3, 1, 1, 1)), "bias": None, "bias of lora_B": None, "dropout": None})
    call({}, Convolution(stride=1, padding="valid", groups=2))


def test_one_kernel_size_is_enough():
    y = convolution_forward(np.ones((1, 2, 5)), np.ones((3, 2, 2)), [], geometry=Convolution())
    assert y.tolist() == np.full((1, 3, 4), 4.0).tolist()


def test_groups_must_divide_the_outputs():
    with pytest.raises(ConfigError, match=r"^groups: expected a divisor of W0's 6 outputs, got 4; check W0$"):
        call({"x": np.ones((2, 8, 5, 6, 7))}, Convolution(groups=4))


def test_rows_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"^rows: expected None, got slice\(0, 6, None\); a convolution's adapter updates every output$",
    ):
        call({}, rows=slice(0, 6))


@pytest.mark.parametrize("name", TENSORS)
def test_of_several_adapters_the_wrong_one_is_named(name):
    first = LowRank(np.ones((1, 2, 1, 2, 3)), np.ones((6, 1)), 1.0)
    called = "bias of lora_B" if name == "bias" else name
    with pytest.raises(
        ShapeError, match=rf"^{called} of adapter 1: expected .*, got \(9,\); check its axes$"
    ):
        call({called: np.ones(9)}, more=[first])
    with pytest.raises(ConfigError, match=r"^rows of adapter 1: expected None"):
        call({}, rows=slice(0, 6), more=[first])


def test_the_factors_of_an_adapter_that_does_not_fit_are_refused():
    A, B = ARGUMENTS["A"], ARGUMENTS["B"]
    shape = ARGUMENTS["W0"].shape
    with pytest.raises(ShapeError, match=rf"^A: expected \(r, 2, 1, 2, 3\) {FIT_W0}, got"):
        convolution_delta_factors(LowRank(A[:, :1], B, 1.0), shape)
    with pytest.raises(ShapeError, match=rf"^B: expected .*{FIT_A}, got"):
        convolution_delta_factors(LowRank(A, B[:4], 1.0), shape)
    with pytest.raises(ConfigError, match=r"^rows: "):
        convolution_delta_factors(LowRank(A, B, 1.0, rows=slice(0, 6)), shape)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "x"])
def test_mixed_dtypes_are_refused(name):
    with pytest.raises(DTypeError, match=rf"^{name}: expected float64 as x has, got float32; convert it"):
        call({name: ARGUMENTS[name].astype(np.float32)})


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, ml_dtypes.float8_e5m2])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(
        DTypeError, match=r"^x: expected one of float16, bfloat16, float32, float64, object, got"
    ):
        call({name: array.astype(dtype) for name, array in ARGUMENTS.items()})
