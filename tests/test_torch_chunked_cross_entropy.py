"""The chunked cross-entropy against float64 and autograd, inside bounds that its definition gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cross_entropy_problems import (
    PRECISIONS,
    Problem,
    cast_to,
    in_float64,
    inside,
    problem_of,
    run,
    squared_errors_of_16_bits,
)
from refusal import refused
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch_fixtures import same_bits

from loracle.reference import ConfigError, DataError, DTypeError, ShapeError, TargetError
from loracle.torch_impl import chunked_cross_entropy as module
from loracle.torch_impl.chunked_cross_entropy import chunked_cross_entropy
from loracle.torch_impl.encoding import IGNORED

ENTRY = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 6, torch.float16: 6}
"""What a logit takes in a chunk."""


class Products(TorchDispatchMode):
    """Records the shapes of matrix products' factors, those inside the operator too."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; the operator as the Python that it is made of."""
        if func is torch.ops.loracle.chunked_cross_entropy.default:
            with self:
                return module._loss_and_gradient(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.shapes.append(tuple(tuple(factor.shape) for factor in args[:2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_loss_and_gradient_lie_inside_the_bound(dtype: torch.dtype, bias: bool, rows: int) -> None:
    problem = problem_of(rows, dtype, bias=bias)
    got = run(problem, chunk_bytes=rows * 37 * ENTRY[dtype])
    assert got[0].dtype is torch.promote_types(dtype, torch.float32)
    assert got[1].dtype is dtype
    assert inside(problem, got, in_float64(problem)) == (True, True)
    assert not got[1][~problem.kept].any()
    given = run(problem, divisor=torch.tensor(300))
    assert inside(problem, given, in_float64(problem, 300), 300) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_wrong_lies_outside(dtype: torch.dtype, seed: int) -> None:
    problem = problem_of(seed, dtype)
    one_less, moved = problem.targets.clone(), problem.targets.clone()
    # The last, which is not one of those that are sure, whose loss is nearly zero.
    one_less[int(problem.kept.nonzero()[-1])] = IGNORED
    moved[problem.kept] = problem.targets[problem.kept].roll(1)
    truth, count = in_float64(problem), problem.count
    wrong = {
        "divisor": run(problem, divisor=count + 1),
        "a row missing": run(replace(problem, targets=one_less), divisor=count),
        "targets not shifted": run(replace(problem, targets=moved)),
        "bfloat16": run(cast_to(problem, torch.bfloat16)),
    }
    for name, got in wrong.items():
        assert inside(problem, got, truth) == (False, False), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_16_bits_is_rounded_as_often_as_transformers_rounds_it(dtype: torch.dtype) -> None:
    own, transformers = squared_errors_of_16_bits("cpu", dtype)
    assert own < 1.1 * transformers


def test_small_probabilities_survive_in_float16() -> None:
    # What the loss scale is for: 1 / divisor must not push the kept gradient out of the dtype's range.
    problem = problem_of(0, torch.float16)
    scaled = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets, divisor=2.0**20) * 2.0**20
    plain = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets, divisor=1.0)
    gradients = [torch.autograd.grad(loss, problem.hidden)[0] for loss in (scaled, plain)]
    assert same_bits(*gradients)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_as_it_does_for_linear(base: torch.dtype) -> None:
    problem = replace(problem_of(1, torch.float32), weight=problem_of(1, base).weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets)
    (gradient,) = torch.autograd.grad(loss, problem.hidden)
    assert gradient.dtype is torch.float32
    expected = run(cast_to(problem, torch.bfloat16))
    assert same_bits(loss.detach(), expected[0])
    assert same_bits(gradient.bfloat16(), expected[1])
    # A float32 gradient is scaled in float32: three times a number of 8 bits is exact there.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets)
    assert same_bits(torch.autograd.grad(3 * loss, problem.hidden)[0], 3 * gradient)


def test_without_a_gradient_none_is_computed() -> None:
    problem = problem_of(2, torch.float32)
    expected = run(problem)[0]
    products = Products()
    with torch.no_grad(), products:
        loss = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets, chunk_bytes=2 * 37 * 4)
    assert same_bits(loss, expected)
    assert not loss.requires_grad
    assert products.shapes == [((2, 12), (12, 37))] * (problem.count // 2) + [((1, 12), (12, 37))]
    with products:
        chunked_cross_entropy(problem.hidden.detach(), problem.weight, problem.targets)
    assert len(products.shapes) == problem.count // 2 + 2


def test_ignored_rows_enter_no_product_and_chunks_are_even() -> None:
    problem = problem_of(3, torch.float32)
    assert problem.count == 15
    products = Products()
    with products:
        chunked_cross_entropy(problem.hidden, problem.weight, problem.targets, chunk_bytes=14 * 37 * 4)
    sizes = [left[0] for left, right in products.shapes if right == (12, 37)]
    assert sizes == [8, 7]


def test_a_checkpoint_and_two_backward_passes_give_the_same_bits() -> None:
    problem = problem_of(4, torch.float32)
    expected = run(problem, chunk_bytes=None)

    def loss_of(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, problem.weight, problem.targets)

    for reentrant in (True, False):
        loss = checkpoint(loss_of, problem.hidden, use_reentrant=reentrant)
        assert same_bits(loss.detach(), expected[0])
        problem.hidden.grad = None
        loss.backward()
        assert problem.hidden.grad is not None
        assert same_bits(problem.hidden.grad, expected[1])
    loss = loss_of(problem.hidden)
    for _ in range(2):
        assert same_bits(torch.autograd.grad(loss, problem.hidden, retain_graph=True)[0], expected[1])


def test_compiled_it_is_one_graph_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunked_cross_entropy, backend=counter, fullgraph=True)
    for rows in (23, 31, 40, 57):
        problem = problem_of(rows, torch.float32, rows=rows)
        loss = compiled(problem.hidden, problem.weight, problem.targets)
        expected = run(problem, chunk_bytes=None)
        assert same_bits(loss.detach(), expected[0])
        assert same_bits(torch.autograd.grad(loss, problem.hidden)[0], expected[1])
    # One for the first number of rows, one for all others.
    assert counter.frame_count <= 2


def test_the_operator_keeps_its_word_to_torch() -> None:
    problem = problem_of(5, torch.float32)
    for hidden in (problem.hidden, problem.hidden.detach()):
        arguments = (hidden, problem.weight, None, problem.targets, torch.tensor(3.0), torch.float32, 999)
        torch.library.opcheck(
            module._operator,
            (*arguments, hidden.requires_grad),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_no_rows_give_what_torch_gives() -> None:
    problem = replace(problem_of(6, torch.float32), targets=torch.full((23,), IGNORED))
    loss, _ = run(problem)
    assert loss.isnan()
    loss, gradient = run(problem, divisor=4)
    assert float(loss) == 0.0
    assert not gradient.any()


def test_what_is_refused() -> None:
    problem = problem_of(7, torch.float32)
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    loss = chunked_cross_entropy(hidden, weight, targets)
    refused(
        lambda: torch.autograd.grad(loss, hidden, create_graph=True),
        ConfigError,
        "chunked loss: expected to be differentiated once, got create_graph=True; "
        "turn chunked_loss off for that",
    )
    refused(
        lambda: chunked_cross_entropy(hidden, weight.requires_grad_(), targets),
        TargetError,
        "weight: expected a frozen output head, got requires_grad=True; "
        "turn chunked_loss off to train the head",
    )
    with torch.no_grad():
        chunked_cross_entropy(hidden, weight, targets)
    weight.requires_grad_(False)
    refused(
        lambda: chunked_cross_entropy(hidden, weight, targets, bias=torch.ones(37, requires_grad=True)),
        TargetError,
        "weight: expected a frozen output head, got requires_grad=True; "
        "turn chunked_loss off to train the head",
    )
    refused(
        lambda: chunked_cross_entropy(hidden[None], weight, targets),
        ShapeError,
        "hidden: expected shape (1, 12) beside a weight of shape (37, 12), got (1, 23, 12); "
        "flatten batch and length into one axis",
    )
    refused(
        lambda: chunked_cross_entropy(hidden, weight, targets[1:]),
        ShapeError,
        "targets: expected shape (23,) beside a weight of shape (37, 12), got (22,); "
        "flatten batch and length into one axis",
    )
    refused(
        lambda: chunked_cross_entropy(hidden, weight[0], targets),
        ShapeError,
        "weight: expected (V, d), got shape (12,); give the head's weight",
    )
    refused(
        lambda: chunked_cross_entropy(hidden, weight, targets.int()),
        DTypeError,
        "targets: expected torch.int64, got torch.int32; cast them",
    )
    refused(
        lambda: chunked_cross_entropy(hidden.double(), weight, targets),
        DTypeError,
        "hidden: expected the weight's torch.float32, got torch.float64; "
        "cast one of them, or run under torch.autocast",
    )
    for wrong in (-1, 37):
        moved = targets.clone()
        moved[2] = wrong
        refused(
            lambda moved=moved: chunked_cross_entropy(hidden, weight, moved),
            DataError,
            f"targets: expected tokens below the vocabulary of 37, or -100, got {wrong}; "
            "check that labels and model have one tokenizer",
        )
    for wrong in (0, True, 1.5):
        refused(
            lambda wrong=wrong: chunked_cross_entropy(hidden, weight, targets, chunk_bytes=wrong),
            ConfigError,
            f"chunk_bytes: expected an integer of at least 1, got {wrong!r}; give the bytes",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_it_lies_inside_the_bound(dtype: torch.dtype) -> None:
    problem = problem_of(8, dtype, bias=True)
    there = Problem(
        problem.hidden.detach().cuda().requires_grad_(),
        problem.weight.cuda(),
        None if problem.bias is None else problem.bias.cuda(),
        problem.targets.cuda(),
    )
    loss, gradient = run(there)
    assert inside(problem, (loss.cpu(), gradient.cpu()), in_float64(problem)) == (True, True)
