"""The learning rate's factor is transformers' own, and its ends are where they should be."""

import pytest
import torch
from transformers import get_scheduler

from loracle.torch_impl.schedule import SCHEDULES, Schedule, rate_factor, warmup_steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "share"), [(8, 0.0), (8, 0.5), (7, 0.05), (1, 0.5), (40, 0.13)])
def test_it_is_transformers_schedule(schedule: Schedule, steps: int, share: float) -> None:
    warmup = warmup_steps(share, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert rate_factor(schedule, step, steps, warmup) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("schedule", "warmup", "eighths"),
    [
        ("linear", 4, [0, 2, 4, 6, 8, 6, 4, 2]),
        ("linear", 0, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("constant", 4, [0, 2, 4, 6, 8, 8, 8, 8]),
    ],
)
def test_it_rises_and_falls(schedule: Schedule, warmup: int, eighths: list[int]) -> None:
    assert [8 * rate_factor(schedule, step, 8, warmup) for step in range(8)] == eighths


def test_a_cosine_is_half_down_in_the_middle() -> None:
    assert rate_factor("cosine", 0, 8, 0) == 1.0
    assert abs(rate_factor("cosine", 4, 8, 0) - 0.5) < 2**-52
    assert 0.0 < rate_factor("cosine", 7, 8, 0) < 0.1


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.0, 9, 0), (0.05, 9, 1), (0.5, 9, 5), (0.5, 8, 4)]
)
def test_the_warmup_is_rounded_up(share: float, steps: int, expected: int) -> None:
    assert warmup_steps(share, steps) == expected
