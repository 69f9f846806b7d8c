"""Triton's kernels compile for GPUs that need not be here, and move 16 bytes at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from loracle.torch_impl.device_factors import DeviceFactors

pytest.importorskip("triton")
from loracle.torch_impl import merge_kernel, prove_kernel, softmax_kernel

PROGRAM = Path(__file__).with_name("compile_kernels.py")
WIDE_LOAD, WIDE_STORE = "ld.global.v4.b32", "st.global.v4.b32"


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of each kernel, variant and architecture, those that load and store global memory."""
    cache = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(PROGRAM)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_all_variants_compile_to_machine_code(instructions: dict[str, list[str]]) -> None:
    kinds = [f"softmax {dtype} {way}" for dtype in ("fp32", "bf16", "fp16") for way in ("write", "read")]
    for dtype in ("fp32", "bf16", "fp16"):
        kinds.append(f"prove {dtype}")
        for wide in (True, False) if dtype == "bf16" else (True,):
            kinds += [f"merge {dtype} wide={wide} whole={whole}" for whole in (True, False)]
    assert set(instructions) == {f"{kind} sm_{number}" for kind in kinds for number in (80, 90)}


def test_the_large_operands_move_16_bytes_at_a_time(instructions: dict[str, list[str]]) -> None:
    # Entry by entry, 2 bytes each, a kernel is far from the bandwidth.
    large = {name: found for name, found in instructions.items() if not name.startswith("prove")}
    for name, found in large.items():
        assert WIDE_LOAD in found, name
        assert (WIDE_STORE in found) == (" read " not in name), name
        assert "st.global.b16" not in found, name


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a model on several GPUs most tensors are not on the current one.
    current: list[torch.Tensor] = []
    launched: list[tuple[str, bool]] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda first, *others, **options: launched.append(
                (self.name, current[-1].data_ptr() == first.data_ptr())
            )

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in (
        (merge_kernel, "_merge"),
        (prove_kernel, "_prove"),
        (softmax_kernel, "_softmax_errors"),
    ):
        monkeypatch.setattr(module, name, Kernel(name))
    W0 = torch.ones(2, 8)
    factors = DeviceFactors([(torch.ones(1, 8), torch.ones(2, 1), 1.0)], (2, 8), W0.device)
    merge_kernel.merge_all(factors, W0, W0.clone())
    prove_kernel.prove(factors, W0, W0.clone(), torch.zeros(1, dtype=torch.int64))
    softmax_kernel.softmax_errors(W0, torch.zeros(2).long(), torch.ones(1), torch.ones(2, 1), write=True)
    assert launched == [("_merge", True), ("_prove", True), ("_softmax_errors", True)]
    assert not current
