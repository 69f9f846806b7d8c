import math

import numpy as np
import pytest

from loracle.reference import ConfigError, lora_scaling


@pytest.mark.parametrize(
    ("r", "alpha", "use_rslora", "expected"),
    [
        (8, 16, False, 2.0),
        (8, 8.0, False, 1.0),
        (3, 1, False, 1 / 3),
        (4, 1, True, 0.5),
        (8, 16, True, 16 / math.sqrt(8)),
        (np.int64(4), np.float32(2.0), False, 0.5),
        (2, 0, False, 0.0),
        (2, -1, False, -0.5),
    ],
)
def test_scaling_is_alpha_over_r_or_over_its_square_root(r, alpha, use_rslora, expected):
    scaling = lora_scaling(r, alpha, use_rslora)
    assert type(scaling) is float
    assert scaling == expected


@pytest.mark.parametrize("r", [0, -1, 8.0, "8", True, None])
def test_rank_must_be_a_positive_integer(r):
    with pytest.raises(ConfigError, match=r"^r: expected an integer of at least 1, got "):
        lora_scaling(r, 16)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_must_be_finite(alpha):
    with pytest.raises(ConfigError, match="lora_alpha: expected a finite number, got"):
        lora_scaling(8, alpha)
