"""Held-out metrics against counts by hand."""

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from task_fixtures import ids_of, tiny_bert
from torch import Tensor, nn

from loracle.torch_impl.batches import collate
from loracle.torch_impl.classification import LabelledRow
from loracle.torch_impl.metrics import accuracy, language_metrics, macro_f1, score_metrics
from loracle.torch_impl.scores import Scores

CPU = torch.device("cpu")


def test_macro_f1_weighs_classes_that_occur_alike() -> None:
    # rows are labels, columns predictions; the last class is neither
    confusion = torch.tensor([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert accuracy(confusion) == 5 / 8
    # class 0: 2*3 / (2*3 + 0 + 1); class 1: 2*2 / (2*2 + 1 + 2); class 2 is predicted and never right
    expected = (Fraction(6, 7) + Fraction(4, 7) + 0) / 3
    assert macro_f1(confusion) == pytest.approx(float(expected), rel=1e-15)
    assert macro_f1(torch.tensor([[4, 0], [0, 0]])) == 1.0


class Told(nn.Module):
    """Logits that are given with the batch."""


def told(model: nn.Module, inputs: Mapping[str, Tensor]) -> Scores:
    assert not model.training
    return inputs["logits"], inputs["labels"]


def test_batches_weigh_as_many_labels_as_they_have() -> None:
    batches = [
        {"logits": torch.tensor([[2.0, 0.0, 0.0]]), "labels": torch.tensor([0])},
        {"logits": torch.tensor([[0.0, 2.0, 0.0]] * 3), "labels": torch.tensor([1, 0, 0])},
    ]
    model = Told().train()
    metrics = score_metrics(told, ("accuracy", "macro_f1"), model, batches, CPU)
    right, wrong = math.log(1 + 2 * math.exp(-2)), math.log(1 + 2 * math.exp(-2)) + 2
    assert list(metrics) == ["loss", "accuracy", "macro_f1"]
    assert metrics["loss"] == pytest.approx((2 * right + 2 * wrong) / 4, rel=1e-6)
    assert metrics["accuracy"] == 0.5
    # class 0: 2*1 / (2*1 + 0 + 2); class 1: 2*1 / (2*1 + 2 + 0)
    assert metrics["macro_f1"] == 0.5
    assert model.training
    assert list(score_metrics(told, ("accuracy",), model, batches, CPU)) == ["loss", "accuracy"]


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    batches = [{"logits": torch.zeros(2, 8), "labels": torch.tensor([0, 3])}]
    metrics = score_metrics(told, ("perplexity",), Told(), batches, CPU)
    assert metrics["perplexity"] == math.exp(metrics["loss"]) == pytest.approx(8.0, rel=1e-6)
    endless = [{"logits": torch.tensor([[0.0, 1e4]]), "labels": torch.tensor([0])}]
    assert score_metrics(told, ("perplexity",), Told(), endless, CPU)["perplexity"] == math.inf


def test_a_classifiers_predictions_are_its_largest_logits() -> None:
    from loracle.torch_impl.tasks import task_named

    model = tiny_bert("BertForSequenceClassification", num_labels=3)
    rows = [LabelledRow(ids_of("[CLS]", letter, "[SEP]"), at % 3) for at, letter in enumerate("abcdefgh")]
    with torch.no_grad():
        logits = model(input_ids=collate(rows)["input_ids"]).logits
    hits = sum(int(int(logits[at].argmax()) == at % 3) for at in range(8))
    metrics = task_named("sequence-classification").measure(
        model, [collate(rows[:5]), collate(rows[5:])], CPU
    )
    assert metrics["accuracy"] == hits / 8


def test_a_causal_models_perplexity() -> None:
    from task_fixtures import tiny_causal

    from loracle.torch_impl.encoding import Encoded

    batch = collate([Encoded((5, 6, 7), (5, 6, 7))])
    metrics = language_metrics(tiny_causal(), [batch], CPU)
    assert metrics == {"loss": metrics["loss"], "perplexity": math.exp(metrics["loss"])}
    assert metrics["loss"] > 0
