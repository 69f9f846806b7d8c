"""The heads of classifiers, which start at random and are trained whole."""

from dataclasses import replace

from torch import nn

from loracle.files import LoraConfig
from loracle.files.architectures import CLASSIFIERS
from loracle.files.head_config import HeadConfig, labels_of

HEADS = ("classifier", "score")
"""What transformers calls the heads of its classifiers; a model has one of them."""

_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def with_head(config: LoraConfig) -> LoraConfig:
    """Return the configuration with `HEADS` in ``modules_to_save`` where its task is to classify.

    As PEFT does it by the task: a head that was neither trained nor saved would be lost with the adapter.
    """
    if config.task_type not in _CLASSIFIERS:
        return config
    saved = config.modules_to_save or ()
    return replace(config, modules_to_save=(*saved, *(name for name in HEADS if name not in saved)))


def head_of(model: nn.Module) -> HeadConfig | None:
    """Return what the configuration of a transformers classifier says of its head; None for other models."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not name.endswith(CLASSIFIERS):
        return None
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    return HeadConfig(name, labels_of(config.id2label), config.problem_type, padding)
