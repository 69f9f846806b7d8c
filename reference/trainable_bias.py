"""Which biases of a model train beside the adapters."""

from .errors import ConfigError


def bias_is_trained(mode: str, adapted: bool) -> bool:
    """Return whether the bias of a layer of the base model is trained, by PEFT's option ``bias``.

    Args:
        mode: "none": no bias; "all": every bias of the model; "lora_only": those of layers with an adapter.
        adapted: whether the layer has an adapter.

    A bias of ``lora_B`` is part of the adapter and always trains. Where biases of the base model train, the
    model with the adapter disabled is no longer the base model.

    Raises:
        ConfigError: any other mode.

    Source: PEFT's ``LoraConfig.bias``; loralib's ``mark_only_lora_as_trainable``.
    """
    match mode:
        case "none":
            return False
        case "all":
            return True
        case "lora_only":
            return adapted
    raise ConfigError(f"bias: expected one of none, all, lora_only, got {mode!r}; choose one")
