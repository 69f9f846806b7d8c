"""An accidental cast to a narrower dtype, in any of the three implementations, is outside the bound.

Each implementation is broken on purpose, one product at a time: its result goes through bfloat16, float16 or
float32 and back. The check is the derived tier's: within the a-priori bound of the dtype around the exact
value.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from exact_linear import backward, error, forward, rational_problem
from implementations import (
    F32,
    F64,
    Arrays,
    Nodes,
    numpy_layer,
    onnx_layer,
    onnx_merged,
    torch_layer,
    torch_module,
)
from onnx import TensorProto, helper
from strategies import LoraProblem
from torch.utils._python_dispatch import TorchDispatchMode

from loracle.reference import (
    LowRank,
    linear_backward_bound,
    linear_forward_bound,
    merge,
    merged_against_unmerged_bound,
)
from loracle.reference import linear as reference_linear
from loracle.torch_impl import merge as torch_merge

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
CASTS = [(F32, BF16), (F32, F16), (F64, F32), (F64, BF16)]
BY_CAST = pytest.mark.parametrize(("dtype", "narrow"), CASTS, ids=str)
TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}
ONNX = {BF16: TensorProto.BFLOAT16, F16: TensorProto.FLOAT16, F32: TensorProto.FLOAT, F64: TensorProto.DOUBLE}
# Products of a forward and a backward pass: 3 and 5, and x A^T once more where it is not kept.
NUMPY_PRODUCTS, TORCH_PRODUCTS, ONNX_PRODUCTS = 9, 8, 9


def problem_of(dtype: np.dtype[Any]) -> LoraProblem:
    """Gaussians of size one: k = 24, so that a bound is small beside a cast's error."""
    rng = np.random.default_rng(5)
    shapes = [(6, 24), (6, 12), (12, 24), (4, 24), (12, 4), (12,), (6, 24)]
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return LoraProblem(*arrays, scaling=0.5)


def caught(computed: Arrays, problem: LoraProblem) -> set[str]:
    """Return the names of the results that are outside their bound."""
    p, exact = problem, rational_problem(problem)
    arguments = (p.x, p.W0, p.A, p.B, p.scaling)
    gradients, bounds = backward(exact, dropout=False), linear_backward_bound(p.dy, *arguments, p.x.dtype)
    outside = set()
    for name, value in computed.items():
        assert value.dtype == p.x.dtype
        truth = forward(exact, dropout=False) if name == "y" else getattr(gradients, name)
        y_bound = linear_forward_bound(*arguments, p.x.dtype, bias=p.bias)
        if (error(value, truth) > (y_bound if name == "y" else getattr(bounds, name))).any():
            outside.add(name)
    return outside


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("implementation", [numpy_layer, torch_layer, onnx_layer], ids=lambda f: f.__name__)
def test_without_a_cast_nothing_is_caught(implementation: Any, dtype: np.dtype[Any]) -> None:
    assert caught(implementation(problem_of(dtype)), problem_of(dtype)) == set()


@pytest.mark.parametrize("number", range(NUMPY_PRODUCTS))
@BY_CAST
def test_a_cast_of_any_product_in_numpy_is_caught(
    monkeypatch: pytest.MonkeyPatch, dtype: np.dtype[Any], narrow: np.dtype[Any], number: int
) -> None:
    plain, calls = reference_linear.product, iter(range(100))

    def product(a: Any, b: Any) -> Any:
        result = plain(a, b)
        return result.astype(narrow).astype(dtype) if next(calls) == number else result

    problem = problem_of(dtype)
    monkeypatch.setattr(reference_linear, "product", product)
    computed = numpy_layer(problem)
    monkeypatch.undo()
    assert next(calls) == NUMPY_PRODUCTS
    assert caught(computed, problem)


class _Casting(TorchDispatchMode):
    """Rounds the result of one product, by its number, to a narrower dtype and back."""

    PRODUCTS = ("mm", "addmm", "addmm_")

    def __init__(self, number: int, narrow: torch.dtype) -> None:
        super().__init__()
        self.number, self.narrow, self.count = number, narrow, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.PRODUCTS:
            if self.count == self.number:
                result.copy_(result.to(self.narrow))
            self.count += 1
        return result


@pytest.mark.parametrize("number", range(TORCH_PRODUCTS))
@BY_CAST
def test_a_cast_of_any_product_in_torch_is_caught(
    dtype: np.dtype[Any], narrow: np.dtype[Any], number: int
) -> None:
    problem = problem_of(dtype)
    with _Casting(number, TORCH[narrow]) as mode:
        computed = torch_layer(problem)
    assert mode.count == TORCH_PRODUCTS
    assert caught(computed, problem)


@pytest.mark.parametrize("number", range(ONNX_PRODUCTS))
@BY_CAST
def test_a_cast_of_any_product_in_onnxruntime_is_caught(
    dtype: np.dtype[Any], narrow: np.dtype[Any], number: int
) -> None:
    seen = []

    def cast(nodes: Nodes) -> Nodes:
        changed = []
        for node in nodes:
            if node.op_type == "MatMul":
                seen.append(node.output[0])
                if len(seen) - 1 == number:
                    name = node.output[0]
                    wide, thin = f"{name}_wide", f"{name}_narrow"
                    changed += [
                        helper.make_node("MatMul", list(node.input), [wide]),
                        helper.make_node("Cast", [wide], [thin], to=ONNX[narrow]),
                        helper.make_node("Cast", [thin], [name], to=ONNX[dtype]),
                    ]
                    continue
            changed.append(node)
        return changed

    problem = problem_of(dtype)
    computed = onnx_layer(problem, cast)
    assert len(seen) == ONNX_PRODUCTS
    assert caught(computed, problem)


@BY_CAST
@pytest.mark.parametrize("where", ["weight", "product"])
@pytest.mark.parametrize("implementation", ["numpy", "torch", "onnxruntime"])
def test_a_cast_in_a_merged_layer_is_caught(
    implementation: str, where: str, dtype: np.dtype[Any], narrow: np.dtype[Any]
) -> None:
    """Merged against unmerged: the merged weight, or the product with it, through a narrower dtype."""
    p = problem_of(dtype)
    W = merge(p.W0, p.A, p.B, p.scaling)
    adapters = [LowRank(p.A, p.B, p.scaling)]
    bound = merged_against_unmerged_bound(p.x, p.W0, adapters, dtype, bias=p.bias)

    def run(W: Any) -> Any:
        if implementation == "numpy":
            return reference_linear.adapted_linear_forward(p.x, W, (), bias=p.bias)
        if implementation == "onnxruntime":
            return onnx_merged(p, W)
        layer = torch_module(p)
        torch_merge(torch.nn.Sequential(layer))
        layer.base_layer.weight.data = torch.from_numpy(W.copy())
        with torch.no_grad():
            return layer(torch.from_numpy(p.x.copy())).numpy()

    unmerged = numpy_layer(p)["y"]
    assert (np.abs(run(W).astype(F64) - unmerged) <= bound).all()
    broken = run(W.astype(narrow).astype(dtype)) if where == "weight" else run(W).astype(narrow).astype(dtype)
    assert (np.abs(broken.astype(F64) - unmerged) > bound).any()
