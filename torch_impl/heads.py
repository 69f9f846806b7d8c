"""The heads of classifiers, which start at random and are trained whole."""

from dataclasses import replace

from loracle.files import LoraConfig

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
