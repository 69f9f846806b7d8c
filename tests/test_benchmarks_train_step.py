"""The side-by-side training step: its order, its parity check, its count of operations, its result file."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("loralib")

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step, train_step_parity
from benchmarks.intervals import median_interval
from benchmarks.train_step_flops import step_flops
from benchmarks.train_step_memory import Job
from benchmarks.train_step_parity import errors_of, fill_factors, parity, true_gradients
from benchmarks.train_step_report import checks
from benchmarks.train_step_subjects import (
    ADAPTED,
    FLOOR,
    FLOOR_CHUNKED,
    FULL,
    LORALIB,
    OURS,
    OURS_CHUNKED,
    PEFT,
    TARGETS,
    Case,
    Workload,
    base_model,
    cases,
    shared_copy,
    subject,
)
from loracle.files import LoraConfig

TINY = Workload("float32", attention="eager", layers=2, vocabulary=64, batch=2, length=8)
CASE = Case("q+v", 2, 0.0)


@pytest.fixture(autouse=True)
def _shared_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_way_stands_twice_between_two_steps_of_the_floor() -> None:
    called = []
    # The floor slows down: 1, 2, 4 seconds; X takes 3 and 6, Y 12 and 24.
    clock = {"F": iter((1.0, 2.0, 4.0)), "X": iter((3.0, 6.0)), "Y": iter((12.0, 24.0))}

    def runner(name: str) -> Any:
        def run() -> float:
            called.append(name)
            return next(clock[name])

        return run

    ratios = list(train_step.chain(runner("F"), [runner("X"), runner("Y")]))
    assert "".join(called) == "FXXFYYF"
    assert ratios == [(3 + 6) / (1 + 2), (12 + 24) / (2 + 4)]


def test_every_second_round_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[Any]] = []

    def fake(floor: Any, runs: Any) -> Iterator[float]:
        orders.append(list(runs))
        # Each way's ratio is its place in the first round.
        return iter([float(orders[0].index(run)) for run in runs])

    monkeypatch.setattr(train_step, "chain", fake)
    ways = train_step.ways_of([CASE], controls=True)
    _, results = train_step.measure(TINY, ways, rounds=3)
    assert orders[1] == orders[0][::-1]
    assert orders[2] == orders[0]
    assert [result["ratios"] for result in results] == [[float(at)] * 3 for at in range(len(ways))]


def test_frozen_tensors_are_shared_and_survive_a_step_of_every_way() -> None:
    base = base_model(TINY)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    storages = {parameter.data_ptr() for parameter in base.parameters()}
    tokens = TINY.tokens(TINY.vocabulary)
    for name in (FLOOR, FLOOR_CHUNKED, *ADAPTED):
        own = subject(name, shared_copy(base), CASE if name in ADAPTED else None)
        own.step(tokens)
        frozen = [parameter for parameter in own.model.parameters() if not parameter.requires_grad]
        assert {parameter.data_ptr() for parameter in frozen} == storages, name
        moved = {key for key, parameter in own.factors().items() if parameter.grad is not None}
        assert len(moved) == (8 if name in ADAPTED else 0), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("targets", list(TARGETS))
# Not ours: torch's counter does not look into products in place and operators of our own.
@pytest.mark.parametrize("name", [FLOOR, PEFT, LORALIB, FULL])
def test_the_counted_operations_are_those_that_torch_sees(name: str, targets: str) -> None:
    case = Case(targets, 2, 0.0) if name in ADAPTED else None
    own = subject(name, base_model(TINY), case)
    with FlopCounterMode(display=False) as counter:
        own.differentiate(TINY.tokens(TINY.vocabulary))
    assert train_step.flops(base_model(TINY), TINY, (name, case)) == counter.get_total_flops()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_agree(dtype: str) -> None:
    errors = parity(Workload(dtype, vocabulary=64, length=8), Case("all-linear", 4, 0.05))
    assert set(errors) == set(ADAPTED)
    largest = max(max(own.values()) for own in errors.values())
    assert 0.0 < largest < math.sqrt(torch.finfo(getattr(torch, dtype)).eps)


def _scale(model: Any, factor: float) -> None:
    """Multiply the scaling of PEFT's or loralib's layers."""
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            scaling["default"] *= factor
        elif scaling is not None and hasattr(module, "lora_A"):
            module.scaling *= factor


@pytest.mark.parametrize("wrong", [OURS, PEFT, LORALIB])
def test_a_scaling_that_is_off_by_one_percent_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, model: Any, case: Case) -> Any:
        own = subject(name, model, case)
        if name == wrong:
            _scale(own.model, 1.01)
        return own

    if wrong == OURS:
        # Both of our ways at once: they must not excuse each other.
        config = LoraConfig(r=CASE.r, lora_alpha=2.02 * CASE.r, target_modules=TARGETS[CASE.targets])
        monkeypatch.setattr(Case, "lora_config", lambda self: config)
    else:
        monkeypatch.setattr(train_step_parity, "make", make)
    with pytest.raises(SystemExit) as error:
        parity(TINY, CASE)
    found = {tuple(line.split(" is off")[0].split(": ")) for line in str(error.value).splitlines()[1:]}
    ours = {OURS, OURS_CHUNKED}
    assert found >= set(product(ours if wrong == OURS else {wrong}, ("lora_A", "lora_B")))
    assert {name for name, _ in found} == (ours if wrong == OURS else {wrong})


def test_a_missing_adapter_is_noticed() -> None:
    base, tokens = base_model(TINY), TINY.tokens(TINY.vocabulary)
    whole = subject(OURS, shared_copy(base), CASE)
    truth = true_gradients(base, fill_factors(whole), 2.0, tokens)
    model = shared_copy(base)
    own = subject(LORALIB, model, CASE)
    fill_factors(own)
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(576, 192, bias=False)
    with pytest.raises(SystemExit, match=r"loralib: other factors .* model\.layers\.1\.self_attn\.v_proj\."):
        errors_of(own, tokens, truth)


@pytest.mark.parametrize(
    ("n", "ranks", "coverage"), [(1, (1, 1), 0.0), (5, (1, 5), 0.9375), (6, (1, 6), 0.96875)]
)
def test_few_rounds_give_the_extremes(n: int, ranks: tuple[int, int], coverage: float) -> None:
    assert median_interval([float(n - i) for i in range(n)]) == (*ranks, coverage)


def test_the_interval_is_the_narrowest_that_covers() -> None:
    # Binomial(20, 1/2): P(< 6) = 0.0207, P(< 7) = 0.0577; the table of the sign test.
    low, high, coverage = median_interval([float(i) for i in range(1, 21)])
    assert (low, high) == (6.0, 15.0)
    assert coverage == pytest.approx(0.9586, abs=1e-4)


def test_one_thing_varies_at_a_time_unless_all_is_asked_for() -> None:
    some = cases(("q+v",), (8, 64), (0.0, 0.05), every=False)
    assert some == (Case("q+v", 8, 0.0), Case("q+v", 8, 0.05), Case("q+v", 64, 0.0))
    assert cases(("q+v",), (8, 64), (0.0, 0.05), every=True) == (*some, Case("q+v", 64, 0.05))
    assert cases(("q+v",), (64,), (0.05,), every=False) == (Case("q+v", 64, 0.05),)


def test_a_job_survives_its_command_line() -> None:
    for job in (Job(TINY, OURS, CASE, 2), Job(TINY, None, None, 1)):
        assert Job.from_json(job.to_json()) == job


def test_the_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "train_step.json"
    options = "--quick --rounds 1 --threads 1 --dtype bfloat16 --targets all-linear --rank 4 --dropout 0.05"
    train_step.main([*options.split(), "--parts", "time", "--out", str(out)])
    result = json.loads(out.read_text())
    assert set(result) == {"machine", "threads", "rounds", "workloads", "parity", "rows", "checks"}
    assert [row["way"] for row in result["rows"]] == [
        FLOOR,
        "A/A control",
        *ADAPTED,
        FULL,
        FLOOR_CHUNKED,
    ]
    floor, control, ours, peft, *_ = result["rows"]
    assert floor["ratio"] is None
    assert floor["seconds"] > 0
    assert floor["flop_ratio"] == control["flop_ratio"] == 1.0
    assert ours["r"] == 4
    assert ours["dropout"] == 0.05
    assert ours["ratio"] == ours["ratios"][0]
    assert ours["interval"] == [ours["ratio"], ours["ratio"], 0.0]
    assert ours["ratio_to_peft"] == pytest.approx(ours["ratio"] / peft["ratio"])
    assert ours["peak_bytes"] is None
    assert [check["check"] for check in result["checks"]] == [
        "step, over the floor",
        "overhead, half of PEFT's",
        "step, over PEFT's",
    ]
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "loracle + chunked" in printed


def test_the_aims_are_judged_row_by_row() -> None:
    def row(way: str, targets: str | None, ratio: float, peak: int | None) -> dict[str, Any]:
        return {
            "dtype": "float32",
            "targets": targets,
            "r": 8,
            "dropout": 0.0,
            "way": way,
            "flop_ratio": 1.0,
            "ratio": ratio,
            "ratios": [ratio],
            "ratio_to_peft": 0.8 if way == OURS_CHUNKED else None,
            "peak_bytes": peak,
        }

    rows = [row("A/A control", None, ratio, None) for ratio in (0.99, 1.01)]
    for targets, ours, peft in (("q+v", 1.005, 1.03), ("all-linear", 1.09, 1.2)):
        rows += [
            row(OURS, targets, ours, 11),
            row(PEFT, targets, peft, 10),
            row(OURS_CHUNKED, targets, 0.9, 10),
        ]
    found = {(check["targets"], check["way"], check["check"]): check["holds"] for check in checks(rows)}
    assert found == {
        ("q+v", OURS, "step, in the A/A interval"): True,
        ("q+v", OURS, "peak GB, PEFT's"): False,
        ("q+v", OURS_CHUNKED, "step, over PEFT's"): True,
        ("q+v", OURS_CHUNKED, "peak GB, PEFT's"): True,
        ("all-linear", OURS, "step, over the floor"): False,
        ("all-linear", OURS, "overhead, half of PEFT's"): True,
        ("all-linear", OURS, "peak GB, PEFT's"): False,
        ("all-linear", OURS_CHUNKED, "step, over PEFT's"): True,
        ("all-linear", OURS_CHUNKED, "peak GB, PEFT's"): True,
    }


def test_only_what_the_mathematics_needs_is_counted() -> None:
    model = base_model(TINY)
    counts = [step_flops(model, 2, 8, adapted=TARGETS["q+v"], r=r) for r in (0, 1, 2, 3)]
    steps = [after - before for before, after in pairwise(counts[1:])]
    assert steps[0] == steps[1]
    # A step of r: q is (576, 576), v (192, 576), N = 16; the first layer's input needs no gradient.
    expected = sum(2 * 16 * (3 * out + 3 * 576) for out in (576, 192)) * 2 - 2 * 16 * 2 * 576
    assert steps[0] == expected
