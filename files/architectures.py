"""What transformers calls the body and the heads of each architecture.

Source: transformers 5.23, ``base_model_prefix`` of the models' classes, ``modeling_auto`` and
``conversion_mapping``. A test holds the tables against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
QUESTION, IMAGE = "ForQuestionAnswering", "ForImageClassification"

CLASS_ENDS: Mapping[str, str] = {"SEQ_CLS": SEQUENCE, "TOKEN_CLS": TOKEN, "QUESTION_ANS": QUESTION}
"""PEFT's ``task_type`` and how the name of a class with its head ends."""

CLASSIFIERS = (SEQUENCE, TOKEN, IMAGE)
"""How the names of classes end whose outputs are labels."""

Renames = tuple[tuple[str, str], ...]
Experts = Mapping[str, tuple[str, ...]]

OLD_NAMES: Renames = ((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias"))
"""Expressions for parts of names in old checkpoints, and what transformers takes them for."""


@dataclass(frozen=True)
class HeadedClass:
    """A class with a head.

    Attributes:
        name: of the class, as ``architectures`` in ``config.json`` has it.
        modules: the modules beside the body, and the body's pooler where the class has one; that of the
            outputs last.
    """

    name: str
    modules: tuple[str, ...]

    @property
    def classifies(self) -> bool:
        """Whether the outputs are labels."""
        return self.name.endswith(CLASSIFIERS)


@dataclass(frozen=True)
class Architecture:
    """One ``model_type``.

    Attributes:
        prefix: ``base_model_prefix``: what the body's names begin with in a class with a head.
        heads: end of a class's name to the class.
        renames: expressions for parts of names in checkpoints, and what the model calls them.
        experts: the parameters of a mixture's module ``experts``, in its order, (E, out, in) each; and the
            modules of one expert, in a checkpoint that has not stacked them, whose weights' rows follow one
            another in such a parameter.
    """

    prefix: str
    heads: Mapping[str, HeadedClass] = field(default_factory=dict)
    renames: Renames = ()
    experts: Experts = field(default_factory=dict)


def _with_heads(stem: str, prefix: str, **heads: tuple[str, ...]) -> Architecture:
    ends = {"sequence": SEQUENCE, "token": TOKEN, "question": QUESTION, "image": IMAGE}
    classes = {ends[kind]: HeadedClass(stem + ends[kind], modules) for kind, modules in heads.items()}
    return Architecture(prefix, classes)


def _encoder(stem: str, prefix: str, *before: str) -> Architecture:
    """An encoder; ``before`` are the modules that a classifier of sequences has before ``classifier``."""
    head = ("classifier",)
    return _with_heads(stem, prefix, sequence=(*before, *head), token=head, question=("qa_outputs",))


def _decoder(
    stem: str, prefix: str = "model", token: str | None = "score", renames: Renames = ()
) -> Architecture:
    heads = {} if token is None else {"token": (token,)}
    return replace(_with_heads(stem, prefix, sequence=("score",), **heads), renames=renames)


def _mixture(stem: str, gate: str, up: str, down: str, renames: Renames = ()) -> Architecture:
    """A decoder with experts; the arguments are the names of an expert's three modules."""
    experts = {"gate_up_proj": (gate, up), "down_proj": (down,)}
    return replace(_decoder(stem, renames=renames), experts=experts)


def _seq2seq(stem: str, prefix: str) -> Architecture:
    return _with_heads(stem, prefix, sequence=("classification_head",))


ARCHITECTURES: Mapping[str, Architecture] = {
    "albert": _encoder("Albert", "albert", "albert.pooler"),
    "bart": _seq2seq("Bart", "model"),
    "bert": _encoder("Bert", "bert", "bert.pooler"),
    "bloom": _decoder("Bloom", "transformer", "classifier"),
    "camembert": _encoder("Camembert", "roberta"),
    "deberta": _encoder("Deberta", "deberta", "pooler"),
    "deberta-v2": _encoder("DebertaV2", "deberta", "pooler"),
    "distilbert": _encoder("DistilBert", "distilbert", "pre_classifier"),
    "electra": _encoder("Electra", "electra"),
    "falcon": _decoder("Falcon", "transformer", "classifier"),
    "gemma": _decoder("Gemma"),
    "gemma2": _decoder("Gemma2"),
    "gemma3_text": _decoder("Gemma3Text", token=None),
    "gpt2": _decoder("GPT2", "transformer", "classifier"),
    "gpt_neo": _decoder("GPTNeo", "transformer", "classifier"),
    "gpt_neox": _decoder("GPTNeoX", "gpt_neox", "classifier", ((r"^embed_out\.", "lm_head."),)),
    "gptj": _decoder("GPTJ", "transformer", None),
    "llama": _decoder("Llama"),
    "mbart": _seq2seq("MBart", "model"),
    "mistral": _decoder("Mistral"),
    "mixtral": _mixture("Mixtral", "w1", "w3", "w2", ((r"\.block_sparse_moe\.", ".mlp."),)),
    "mpnet": _encoder("MPNet", "mpnet"),
    "mt5": _seq2seq("MT5", "transformer"),
    "opt": _decoder("OPT", token=None),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3"),
    "qwen2": _decoder("Qwen2"),
    "qwen2_moe": _mixture("Qwen2Moe", "gate_proj", "up_proj", "down_proj"),
    "qwen3": _decoder("Qwen3"),
    "qwen3_moe": _mixture("Qwen3Moe", "gate_proj", "up_proj", "down_proj"),
    "roberta": _encoder("Roberta", "roberta"),
    "smollm3": _decoder("SmolLM3"),
    "stablelm": _decoder("StableLm"),
    "starcoder2": _decoder("Starcoder2"),
    "t5": _seq2seq("T5", "transformer"),
    "vit": Architecture(
        "vit",
        {IMAGE: HeadedClass(f"ViT{IMAGE}", ("classifier",))},
        (
            (r"encoder\.layer\.", "layers."),
            (r"attention\.query", "q_proj"),
            (r"attention\.key", "k_proj"),
            (r"attention\.value", "v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ),
    ),
    "xlm-roberta": _encoder("XLMRoberta", "roberta"),
}


def architecture_of(config: Mapping[str, object]) -> Architecture | None:
    """Return what is known of the ``model_type`` in a ``config.json``; None where nothing is."""
    kind = config.get("model_type")
    return ARCHITECTURES.get(kind) if isinstance(kind, str) else None
