import pytest

from loracle.reference import ConfigError, bias_is_trained


@pytest.mark.parametrize(
    ("mode", "with_adapter", "without"),
    [("none", False, False), ("all", True, True), ("lora_only", True, False)],
)
def test_which_biases_train(mode, with_adapter, without):
    assert bias_is_trained(mode, True) is with_adapter
    assert bias_is_trained(mode, False) is without


@pytest.mark.parametrize("mode", ["lora", "ALL", "", None])
def test_another_mode_is_refused(mode):
    with pytest.raises(ConfigError) as caught:
        bias_is_trained(mode, True)
    assert str(caught.value) == f"bias: expected one of none, all, lora_only, got {mode!r}; choose one"
