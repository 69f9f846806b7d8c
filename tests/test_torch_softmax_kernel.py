"""The kernel of the softmax's error: inside the bounds of its definition, for one block of logits and many.

The kernel is compiled on CUDA; elsewhere Triton's interpreter runs it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cross_entropy_problems import (
    IGNORED,
    LEAST_BLOCK,
    Problem,
    Result,
    in_float64,
    inside,
    problem_of,
    run,
    squared_errors_of_16_bits,
)
from torch import Tensor
from torch_fixtures import same_bits

from loracle.torch_impl import chunked_cross_entropy as module
from loracle.torch_impl.chunked_cross_entropy import chunked_cross_entropy

triton = pytest.importorskip("triton")
from loracle.torch_impl import softmax_kernel  # noqa: E402

# Triton's interpreter is NumPy, which warns of what a device computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors lie, with the kernel that the parameter names."""
    if request.param == "compiled":
        return "cuda"
    if not triton.knobs.runtime.interpret:
        pytest.skip("the kernel is compiled here")
    monkeypatch.setattr(module, "has_triton", lambda device: True)
    return "cpu"


def on(device: str, problem: Problem) -> Problem:
    """The problem on a device."""
    return Problem(
        problem.hidden.detach().to(device).requires_grad_(),
        problem.weight.to(device),
        None if problem.bias is None else problem.bias.to(device),
        problem.targets.to(device),
    )


def result_of(problem: Problem, device: str, **options: object) -> Result:
    loss, gradient = run(on(device, problem), **options)
    return loss.cpu(), gradient.cpu()


@pytest.fixture(params=[LEAST_BLOCK, 8192])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Logits at a time: three blocks, the last of five logits, or one."""
    small: Callable[..., None] = partial(softmax_kernel.softmax_errors, block=request.param)
    monkeypatch.setattr(softmax_kernel, "softmax_errors", small)
    return int(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("block")
def test_loss_and_gradient_lie_inside_the_bound(
    device: str, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    problem = problem_of(seed, dtype, bias=bias)
    got = result_of(problem, device)
    assert got[0].dtype is torch.float32
    assert got[1].dtype is dtype
    assert inside(problem, got, in_float64(problem)) == (True, True)
    assert not got[1][~problem.kept].any()
    given = result_of(problem, device, divisor=torch.tensor(300.0, device=device))
    assert inside(problem, given, in_float64(problem, 300), 300) == (True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_16_bits_is_rounded_as_often_as_transformers_rounds_it(
    device: str, dtype: torch.dtype
) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16, a device rounds")
    own, transformers = squared_errors_of_16_bits(device, dtype)
    assert own < 1.1 * transformers


@pytest.mark.usefixtures("block")
def test_logits_of_minus_infinity_have_no_part(device: str) -> None:
    # As where a vocabulary is padded; the first block of 16 has nothing else.
    problem = replace(problem_of(0, torch.float32, bias=True), targets=torch.full((23,), 36))
    bias = torch.zeros(37)
    bias[:19] = -torch.inf
    got = result_of(replace(problem, bias=bias), device)
    short = Problem(problem.hidden, problem.weight[19:], None, problem.targets - 19)
    assert inside(short, got, in_float64(short)) == (True, True)


@pytest.mark.usefixtures("block")
def test_logits_far_below_zero_are_as_good_as_others(device: str) -> None:
    problem = replace(problem_of(5, torch.float32), bias=torch.full((37,), -1e4))
    assert inside(problem, result_of(problem, device), in_float64(problem)) == (True, True)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_seen(device: str, bad: float) -> None:
    problem = problem_of(1, torch.float32, bias=True)
    assert problem.bias is not None
    problem.bias[20] = bad
    assert result_of(problem, device)[0].isnan()


@pytest.mark.parametrize(("dtype", "bytes_of_one"), [(torch.float32, 4), (torch.float16, 2)], ids=str)
def test_a_chunk_holds_logits_alone(
    device: str, dtype: torch.dtype, bytes_of_one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(2, dtype)
    given: list[tuple[tuple[int, ...], bool]] = []
    own = softmax_kernel.softmax_errors

    def recorded(z: Tensor, *others: Tensor, write: bool) -> None:
        given.append((tuple(z.shape), write))
        before = z.clone()
        own(z, *others, write=write)
        assert torch.equal(z, before) is not write

    monkeypatch.setattr(softmax_kernel, "softmax_errors", recorded)
    result_of(problem, device, chunk_bytes=14 * 37 * bytes_of_one)
    assert problem.count == 15
    assert given == [((8, 37), True), ((7, 37), True)]
    there = on(device, problem)
    with torch.no_grad():
        loss = chunked_cross_entropy(there.hidden, there.weight, there.targets)
    assert given[2:] == [((15, 37), False)]
    bounded = inside(problem, (loss.cpu(), result_of(problem, device)[1]), in_float64(problem))
    assert bounded == (True, True)


def test_float64_is_left_to_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(3, torch.float64)
    monkeypatch.delattr(softmax_kernel, "softmax_errors")
    assert inside(problem, result_of(problem, device), in_float64(problem)) == (True, True)


def test_no_rows_launch_nothing(device: str) -> None:
    problem = replace(problem_of(4, torch.float16), targets=torch.full((23,), IGNORED))
    loss, gradient = result_of(problem, device, divisor=4)
    assert float(loss) == 0.0
    assert not gradient.any()


def test_small_probabilities_survive_in_float16(device: str) -> None:
    # The kept gradient is divided by the divisor's fraction alone, so that 2^20 changes no bit.
    problem = on(device, problem_of(0, torch.float16))
    gradients: list[Tensor] = []
    for divisor in (2.0**20, 1.0):
        loss = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets, divisor=divisor)
        gradients += torch.autograd.grad(loss * divisor, problem.hidden)
    assert same_bits(*gradients)
