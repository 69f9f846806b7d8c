"""The examples in the docstrings of the rank tools and of the analysis of adapters."""

import doctest
import importlib

import numpy as np
import pytest

import loracle.reference

PUBLIC = {name: getattr(loracle.reference, name) for name in loracle.reference.__all__}
WITH_EXAMPLES = {
    "rank": 13,
    "low_rank_approximation": 5,
    "spectra": 6,
    "subspace": 2,
    "amplification": 2,
    "extraction": 7,
}


@pytest.mark.parametrize(("module", "examples"), WITH_EXAMPLES.items())
def test_examples_are_true(module, examples):
    """With NumPy as np and the public names of the package, as a reader would have them."""
    results = doctest.testmod(
        importlib.import_module(f"loracle.reference.{module}"), extraglobs={"np": np, **PUBLIC}
    )
    assert results.failed == 0
    assert results.attempted == examples
