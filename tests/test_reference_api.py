"""What `import loracle.reference` gives, and what it does not bring along."""

import subprocess
import sys

import pytest

import loracle.reference


def test_every_public_name_is_there_documented_and_in_order():
    names = loracle.reference.__all__
    assert names == sorted(set(names))
    for name in names:
        assert getattr(loracle.reference, name).__doc__, name


@pytest.mark.parametrize(
    "name",
    [
        "merge",
        "merge_adapters",
        "merge_embedding",
        "merge_convolution",
        "merge_experts",
        "merge_bias",
        "merge_dora",
        "unmerge",
        "linear_forward",
        "linear_backward",
        "adapted_linear_forward",
        "embedding_forward",
        "convolution_forward",
        "experts_forward",
        "dora_forward",
        "attention_forward",
        "lora_scaling",
        "LowRank",
        "fused_adapters",
        "Precision",
        "linear_forward_bound",
        "linear_backward_bound",
        "merge_bound",
        "merged_against_unmerged_bound",
        "adapter_start",
        "adamw_step",
        "loraplus_rates",
        "train_linear",
        "rank",
        "rank_factorization",
        "parameter_counts",
        "low_rank_approximation",
        "subspace_similarity",
        "amplification_factor",
        "extract_adapter",
        "delta_singular_values",
    ],
)
def test_names_that_others_rely_on(name):
    assert name in loracle.reference.__all__


def test_importing_brings_neither_torch_nor_onnx_nor_scipy():
    code = "import loracle.reference, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"loracle", "numpy", "ml_dtypes"} <= loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "safetensors", "scipy"}
