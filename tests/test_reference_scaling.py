import math
import re

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
        (1, 16, False, 16.0),
        (1, 16, True, 16.0),
    ],
)
def test_scaling_is_alpha_over_r_or_over_its_square_root(r, alpha, use_rslora, expected):
    scaling = lora_scaling(r, alpha, use_rslora)
    assert type(scaling) is float
    assert scaling == expected


def test_rank_stabilisation_is_off_by_default():
    assert lora_scaling(4, 2) == 0.5


@pytest.mark.parametrize("r", [0, -1, 8.0, "8", True, None])
def test_rank_must_be_a_positive_integer(r):
    message = f"r: expected an integer of at least 1, got {r!r}; set the adapter's rank"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        lora_scaling(r, 16)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_must_be_finite(alpha):
    message = f"lora_alpha: expected a finite number, got {alpha!r}; correct the adapter's config"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        lora_scaling(8, alpha)
