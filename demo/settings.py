"""What the demo does with each task; the figures were chosen on training text, to fit two processor cores."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """The options of one fine-tune; words and meanings are those of ``loracle finetune``."""

    max_steps: int
    batch_size: int
    lr: float
    max_length: int
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One use of the model.

    Attributes:
        name: also the stem of its files.
        title: for people.
        system: the instruction, the same in training and in use.
        metric: how held-out answers are scored.
        heldout_percent: share of the distinct sources that is held out.
        max_new_tokens: where an answer is cut.
        training: the fine-tune's options.
    """

    name: str
    title: str
    system: str
    metric: Literal["chrF", "ROUGE-L"]
    heldout_percent: int
    max_new_tokens: int
    training: Training


TRANSLATE = Task(
    name="translate",
    title="English to French interface strings",
    system="Translate to French.",
    metric="chrF",
    heldout_percent=12,
    max_new_tokens=48,
    training=Training(max_steps=100, batch_size=16, lr=2e-3, max_length=160),
)

SUMMARIZE = Task(
    name="summarize",
    title="Docstring to its summary line",
    system="Summarize in one line.",
    metric="ROUGE-L",
    heldout_percent=8,
    max_new_tokens=40,
    training=Training(max_steps=100, batch_size=16, lr=2e-3, max_length=320),
)

TASKS = (TRANSLATE, SUMMARIZE)
