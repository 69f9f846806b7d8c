"""The float64 model: it is transformers' own, in float64 throughout, and its tolerance is tight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, feeds
from refusal import refused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth_cases import FLOAT32, TASK, Feeds, checkpoints, error_of, loaded, outputs, truth_of

from loracle.export.verification.float64_mode import in_float64, is_rotary
from loracle.export.verification.truth import Float64Model
from loracle.reference import ConfigError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a case, once."""
    return checkpoints(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", CASES)
def test_transformers_own_float32_outputs_lie_inside_the_tolerance_but_not_deep(
    bases: Callable[[str], Path], name: str
) -> None:
    """Catches a norm, a soft cap, a window, a mask or a head evaluated otherwise than the model's own, and
    noise that is far too large."""
    inputs = feeds(name)
    truths = truth_of(bases(name), None, name).evaluate_feeds(inputs, FLOAT32)
    assert tuple(truths) == TASK[CASES[name].task].outputs
    ratio = error_of(outputs(loaded(bases(name), name), inputs), truths, inputs, name)
    assert 0.001 < ratio < 1


class _Watch(TorchDispatchMode):
    """Sees what each operator returns to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: list[str] = []
        self.wide = 0
        self.within_rotary = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not self.within_rotary:
                self.wide += tensor.dtype is torch.float64
                if tensor.dtype is not torch.float64:
                    self.narrow.append(str(func))
        return result


@contextmanager
def rotary_watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    def add(by: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            watch.within_rotary += by

        return hook

    hooks = []
    for module in model.modules():
        if is_rotary(module):
            # Before the model's own hooks, and after them.
            hooks.append(module.register_forward_pre_hook(add(1), prepend=True))
            hooks.append(module.register_forward_hook(add(-1)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", CASES)
def test_no_operator_outside_rotary_angles_returns_less_than_float64(
    bases: Callable[[str], Path], name: str
) -> None:
    model = loaded(bases(name), name, torch.float64, "eager").double()
    tensors = {
        key: torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.float64))
        for key, array in feeds(name).items()
    }
    watch = _Watch()
    with in_float64(model, None), rotary_watched(model, watch), watch:
        model(**tensors)
    assert watch.narrow == []
    assert watch.wide > 50


def with_double_norms(model: nn.Module) -> nn.Module:
    """Put torch's RMS norm, which computes in its input's dtype, in the place of transformers'."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, leaf = path.rpartition(".")
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            setattr(model.get_submodule(parent), leaf, norm)
    return model


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "bert", "distilbert", "vit", "bart"],
)
def test_a_model_that_transformers_can_run_in_float64_agrees_to_the_rounding_of_float64(
    bases: Callable[[str], Path], name: str
) -> None:
    """Fused attention in float64 beside ours, in which the softmax of transformers is lifted from float32."""
    inputs = feeds(name)
    truths = truth_of(bases(name), None, name).evaluate_feeds(inputs, np.dtype(np.float64))
    model = with_double_norms(loaded(bases(name), name, torch.float64)).double()
    got = outputs(model, inputs, torch.float64)
    assert max(truth.tolerance for truth in truths.values()) < 1e-12
    assert error_of(got, truths, inputs, name) < 1


def test_sequences_and_feeds_are_evaluated_alike(bases: Callable[[str], Path]) -> None:
    model = truth_of(bases("llama"), None, "llama")
    ids = np.random.default_rng(3).integers(3, 264, (2, 9))
    ids[1, 3:] = 0
    mask = np.array([[1] * 9, [1] * 3 + [0] * 6])
    sequences = model.evaluate([ids[0].tolist(), ids[1, :3].tolist()], FLOAT32)
    masked = model.evaluate_feeds({"input_ids": ids, "attention_mask": mask}, FLOAT32)["logits"]
    for row, truth in enumerate(sequences):
        assert np.array_equal(truth.logits, masked.logits[row, : len(truth.logits)])
    assert masked.deviation == max(truth.deviation for truth in sequences)


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is zero and deviates by its number of position, from 1; the last row by 10 more."""

    def sampled(self: Float64Model, feeds: Feeds, *_: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ids = feeds.get("decoder_input_ids", feeds["input_ids"])
        spread = torch.arange(1, ids.shape[1] + 1).expand(ids.shape).double().clone()
        spread[-1] += 10
        return [(torch.zeros(*spread.shape, 2), spread[..., None].expand(-1, -1, 2))]

    monkeypatch.setattr(Float64Model, "_sampled", sampled)


@pytest.mark.usefixtures("growing")
def test_padding_does_not_count(bases: Callable[[str], Path]) -> None:
    model = truth_of(bases("llama"), None, "llama")
    assert [truth.deviation for truth in model.evaluate([[5] * 9, [5] * 3], FLOAT32)] == [9, 13]
    ids, mask = np.full((2, 9), 5), np.array([[1] * 9, [0] * 2 + [1] * 2 + [0] * 5])
    assert model.evaluate_feeds({"input_ids": ids, "attention_mask": mask}, FLOAT32)["logits"].deviation == 14
    assert model.evaluate_feeds({"input_ids": ids}, FLOAT32)["logits"].deviation == 19


@pytest.mark.usefixtures("growing")
def test_a_decoders_outputs_count_by_its_own_mask_and_not_by_the_encoders(
    bases: Callable[[str], Path],
) -> None:
    model = truth_of(bases("bart"), None, "bart")
    inputs = {"input_ids": np.full((1, 6), 5), "attention_mask": np.array([[1, 1, 0, 0, 0, 0]])}
    inputs["decoder_input_ids"] = inputs["input_ids"]
    assert model.evaluate_feeds(inputs, FLOAT32)["logits"].deviation == 16
    inputs["decoder_attention_mask"] = np.array([[1, 1, 1, 0, 0, 0]])
    assert model.evaluate_feeds(inputs, FLOAT32)["logits"].deviation == 13


def test_a_deviation_counts_whether_it_is_up_or_down(bases: Callable[[str], Path]) -> None:
    ((_, spread),) = truth_of(bases("vit"), None, "vit")._sampled(feeds("vit"), FLOAT32, 1, 0)
    assert bool((spread > 0).all())


def test_the_tolerance_is_twice_the_largest_deviation_of_four_draws(bases: Callable[[str], Path]) -> None:
    model = truth_of(bases("bert_question"), None, "bert_question")
    inputs = feeds("bert_question")
    draws = [model.evaluate_feeds(inputs, FLOAT32, samples=1, seed=seed) for seed in range(6, 10)]
    for key, truth in model.evaluate_feeds(inputs, FLOAT32, seed=6).items():
        deviations = [draw[key].deviation for draw in draws]
        assert truth.deviation == max(deviations)
        assert truth.tolerance == 2 * truth.deviation
        # One draw fewer would be seen.
        assert max(deviations[:3]) < deviations[3]


def test_one_answer_for_each_row_counts_though_there_are_as_many_as_tokens(
    bases: Callable[[str], Path],
) -> None:
    """Three classes, three tokens, the last two of them padding: no class is left out."""
    model = truth_of(bases("bert_sequence"), None, "bert_sequence")
    ids = np.array([[7, 0, 0]])
    truth = model.evaluate_feeds({"input_ids": ids, "attention_mask": np.array([[1, 0, 0]])}, FLOAT32)[
        "logits"
    ]
    only = model.evaluate_feeds({"input_ids": ids[:, :1]}, FLOAT32, samples=1)["logits"]
    assert truth.logits.shape == (1, 3)
    assert np.abs(truth.logits - only.logits).max() < 1e-12
    raw = model._sampled({"input_ids": ids, "attention_mask": np.array([[1, 0, 0]])}, FLOAT32, 4, 0)
    assert truth.deviation == float(raw[0][1].max())
    assert int(raw[0][1].argmax()) > 0


def test_noise_may_send_tokens_to_other_experts(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Routers that are undecided: every draw chooses for itself, and multiplies other numbers of tokens."""
    model = loaded(bases("mixtral"), "mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight[:1].expand(4, -1).clone())
    model.save_pretrained(tmp_path / "undecided")
    truth = truth_of(tmp_path / "undecided", None, "mixtral").evaluate_feeds(feeds("mixtral"), FLOAT32)[
        "logits"
    ]
    assert 1e-2 < truth.deviation < np.abs(truth.logits).max() * 2


def test_inference_mode_changes_nothing(bases: Callable[[str], Path]) -> None:
    model = truth_of(bases("gpt2"), None, "gpt2")
    expected = model.evaluate([[5, 6, 7]], FLOAT32)[0]
    with torch.inference_mode():
        got = model.evaluate([[5, 6, 7]], FLOAT32)[0]
    assert np.array_equal(got.logits, expected.logits)
    assert got.deviation == expected.deviation > 0


def test_an_error_leaves_torch_and_the_model_as_they_were(bases: Callable[[str], Path]) -> None:
    model = truth_of(bases("llama"), None, "llama")
    with pytest.raises(IndexError):
        model.evaluate([[5, 6, 70000]], FLOAT32)
    assert torch.get_default_dtype() is torch.float32
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model._model.modules())
    assert torch.ones(1).add(1).dtype is torch.float32


def test_what_cannot_be_evaluated_is_refused_in_one_line(bases: Callable[[str], Path]) -> None:
    causal, masked = (
        truth_of(bases("llama"), None, "llama"),
        truth_of(bases("bert_masked"), None, "bert_masked"),
    )
    refused(
        lambda: causal.evaluate([[5]], FLOAT32, samples=0), ConfigError, "samples: expected at least 1, got 0"
    )
    refused(
        lambda: masked.evaluate([[5]], FLOAT32),
        ConfigError,
        "task: expected text-generation for sequences of tokens, got fill-mask; evaluate its feeds",
    )
