"""What held-out data is measured by."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .loss import mean_loss
from .scores import Scores, cross_entropy

Batches = Iterable[Mapping[str, Tensor]]


def language_metrics(model: nn.Module, batches: Batches, device: torch.device) -> dict[str, float]:
    """Return ``loss``, in nats a labelled token, and ``perplexity``, its exponential, of a causal model."""
    return _with_perplexity(mean_loss(model, batches, device))


@torch.no_grad()
def score_metrics(
    scores: Callable[[nn.Module, Mapping[str, Tensor]], Scores],
    names: tuple[str, ...],
    model: nn.Module,
    batches: Batches,
    device: torch.device,
) -> dict[str, float]:
    """Return ``loss``, in nats a label, and the metrics called ``names``; in evaluation mode.

    ``"accuracy"`` is the share of labels with the largest logit; ``"macro_f1"`` see `macro_f1`;
    ``"perplexity"`` the exponential of the loss.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    confusion = torch.zeros(0, 0, dtype=torch.int64)
    try:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            logits, labels = scores(model, inputs)
            total += float(cross_entropy((logits, labels), 1))
            count += labels.numel()
            if "perplexity" not in names:
                confusion = _counted(confusion, logits, labels)
    finally:
        model.train(training)
    if "perplexity" in names:
        return _with_perplexity(total / count)
    found = {"accuracy": accuracy(confusion), "macro_f1": macro_f1(confusion)}
    return {"loss": total / count, **{name: found[name] for name in names}}


def accuracy(confusion: Tensor) -> float:
    """Return the share of right predictions; ``confusion`` is (classes, classes): label, prediction."""
    return float(confusion.diagonal().sum()) / float(confusion.sum())


def macro_f1(confusion: Tensor) -> float:
    """Return the mean of ``2 TP / (2 TP + FP + FN)`` over the classes that are a label or a prediction."""
    twice = 2.0 * confusion.diagonal().double()
    seen = (confusion.sum(dim=0) + confusion.sum(dim=1)).double()  # 2 TP + FP + FN
    present = seen > 0
    return float((twice[present] / seen[present]).mean())


def _counted(confusion: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    classes = logits.shape[-1]
    pairs = labels * classes + logits.argmax(dim=-1)
    counts = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()
    return counts if confusion.numel() == 0 else confusion + counts


def _with_perplexity(loss: float) -> dict[str, float]:
    # exp(709.8) is the largest that float64 holds.
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 709.0 else math.inf}
