"""What the papers claim, in their words, and the figures that they give for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LORA = "Hu et al. 2021, arXiv 2106.09685"
INTRINSIC = "Aghajanyan et al. 2020, arXiv 2012.13255"

TABLE_6_RANKS = (1, 2, 4, 8, 64)
TABLE_6: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "WikiSQL": {
        "q": (68.8, 69.6, 70.5, 70.4, 70.0),
        "qv": (73.4, 73.3, 73.7, 73.8, 73.5),
        "qkvo": (74.1, 73.7, 74.0, 74.0, 73.9),
    },
    "MultiNLI": {
        "q": (90.7, 90.9, 91.1, 90.7, 90.7),
        "qv": (91.3, 91.4, 91.3, 91.6, 91.4),
        "qkvo": (91.2, 91.7, 91.7, 91.5, 91.4),
    },
}
"""Accuracy of GPT-3 by rank, percent, of the LoRA paper."""


@dataclass(frozen=True)
class Statement:
    """A claim.

    Attributes:
        title: in our words.
        quote, source: the paper's, and where it stands.
        figure: what the paper gives for it.
        commands: that measure it here.
    """

    title: str
    quote: str
    source: str
    figure: str
    commands: tuple[str, ...]


LATENCY = Statement(
    "Adapters cost latency, merged LoRA does not",
    "LoRA performs on-par or better than fine-tuning in model quality […] despite having fewer trainable "
    "parameters, a higher training throughput, and, unlike adapters, no additional inference latency.",
    f"{LORA}, abstract; table 1",
    "GPT-2 medium, one forward pass on an RTX 8000: a merged model takes what a full fine-tune takes; "
    "AdapterL takes 2.2%, 5.0% and 20.7% more, AdapterH 3.0%, 8.4% and 30.3% more, at batch and length "
    "32 × 512, 16 × 256 and 1 × 128.",
    ("loracle bench --out DIR",),
)
NUMBERS = Statement(
    "A handful of numbers for each matrix is enough",
    "LoRA can reduce the number of trainable parameters by 10,000 times and the GPU memory requirement by 3 "
    "times.",
    f"{LORA}, abstract",
    "GPT-3: 4.7 million numbers are trained in the place of 175,255.8 million (table 4).",
    ("loracle rank sweep --model DIR --data FILE --out DIR",),
)
RANK = Statement(
    "Rank 1 is enough for query and value together, query alone wants more",
    "LoRA already performs competitively with a very small r (more so for {Wq, Wv} than just Wq).",
    f"{LORA}, section 7.2; table 6",
    "GPT-3 on WikiSQL: query and value at rank 1 reach 73.4% where the best rank reaches 73.8%; query alone "
    "68.8% at rank 1 and 70.5% at rank 4.",
    ("loracle rank sweep --model DIR --data FILE --out DIR --targets 'q;qv;qkvo'",),
)
FILES = Statement(
    "Small files for each task replace whole models",
    "With r = 4 and only the query and value projection matrices being adapted, the checkpoint size is "
    "reduced by roughly 10,000× (from 350GB to 35MB).",
    f"{LORA}, section 4.2",
    "GPT-3: 35 MB for a task in the place of 350 GB.",
    (
        "loracle verify CANDIDATE --model DIR --adapter DIR --certificate FILE",
        "loracle extract --base DIR --tuned DIR --rank R --out DIR --json",
    ),
)
DIMENSION = Statement(
    "Pretrained models have a low intrinsic dimension",
    "[…] by optimizing only 200 trainable parameters randomly projected back into the full space, we can "
    "tune a RoBERTa model to achieve 90% of the full parameter performance levels on MRPC.",
    f"{INTRINSIC}, abstract",
    "RoBERTa on MRPC: d90 is about 200 of some hundred million parameters.",
    ("loracle intrinsic --model DIR --data FILE --out DIR",),
)
MERGE = Statement(
    "The merge is right",
    "When deployed in production, we can explicitly compute and store W = W0 + BA and perform inference as "
    "usual.",
    f"{LORA}, section 4.1",
    "No figure: the paper’s W is exact mathematics. Here a merged weight is right where every entry is that "
    "exact number, rounded once.",
    ("loracle verify CANDIDATE --model DIR --adapter DIR --certificate FILE",),
)
