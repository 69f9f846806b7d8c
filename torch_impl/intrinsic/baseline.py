"""What a score is worth: that of a guess that ignores the text."""

import torch
from torch import Tensor

from ..batches import IGNORED
from ..classification import LabelledRow, TaggedRow
from ..encoded import EncodedData
from ..metrics import accuracy, macro_f1


def majority_score(train: EncodedData, test: EncodedData, classes: int, metric: str) -> float:
    """Return the metric on ``test`` of always naming the class that is most frequent in ``train``."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion[:, int(class_counts(train, classes).argmax())] = class_counts(test, classes)
    return {"accuracy": accuracy, "macro_f1": macro_f1}[metric](confusion)


def class_counts(data: EncodedData, classes: int) -> Tensor:
    """Return how many predictions have each class for their label, (classes,), int64."""
    labels: list[int] = []
    for row in data.examples:
        assert isinstance(row, LabelledRow | TaggedRow), row
        labels += [row.label] if isinstance(row, LabelledRow) else row.labels
    return torch.bincount(torch.tensor([label for label in labels if label != IGNORED]), minlength=classes)
