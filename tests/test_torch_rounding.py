"""float64 tensors are rounded once, to nearest with ties to even, as the reference rounds."""

import numpy as np
import pytest
import torch
from torch_fixtures import same_bits

from loracle.reference.rounding import round_float64 as round_array
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.rounding import BITS, round_float64

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_the_formats_are_those_with_integers_of_their_width() -> None:
    assert {dtype: torch.empty(0, dtype=bits).itemsize for dtype, bits in BITS.items()} == {
        torch.float16: 2,
        torch.bfloat16: 2,
        torch.float32: 4,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(BITS))
def test_numbers_of_every_size_are_rounded_as_the_reference_rounds_them(
    dtype: torch.dtype, device: str
) -> None:
    rng = np.random.default_rng(3)
    patterns = rng.integers(0, 1 << 64, 1 << 14, np.uint64, endpoint=False).view(np.float64)
    sizes = np.ldexp(rng.uniform(-2, 2, 1 << 14), rng.integers(-160, 130, 1 << 14))
    # A number of the format, the midpoint above it, and both sides of that.
    form = round_array(np.concatenate([sizes, [0.0, -0.0, 1.0]]), array_of(torch.empty(0, dtype=dtype)).dtype)
    bits = form.view(f"u{form.itemsize}")
    with np.errstate(invalid="ignore"):
        above = (bits + 1).astype(bits.dtype).view(form.dtype).astype(np.float64)
        middle = (form.astype(np.float64) + above) / 2
    values = np.concatenate(
        [
            patterns,
            sizes,
            form.astype(np.float64),
            middle,
            np.nextafter(middle, np.inf),
            np.nextafter(middle, -np.inf),
            [np.inf, -np.inf, 3e38, 3.5e38, -65520.0, 65519.99, 2.0**-150, -(2.0**-1074)],
        ]
    )
    values = values[~np.isnan(values)]
    rounded = round_float64(torch.from_numpy(values).to(device), dtype)
    assert rounded.device.type == device
    assert same_bits(rounded.cpu(), tensor_of(round_array(values, form.dtype)))


def test_a_number_just_above_a_midpoint_is_not_rounded_by_way_of_float32() -> None:
    value = torch.tensor([1 + 2.0**-8 + 2.0**-30], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1.0
    assert round_float64(value, torch.bfloat16).item() == 1 + 2.0**-7
    assert round_float64(torch.full((2, 3), torch.nan, dtype=torch.float64), torch.float16).isnan().all()
