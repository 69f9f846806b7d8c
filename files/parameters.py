"""The names of stacked parameters, which PEFT's files leave to the order of a module's parameters."""

from collections.abc import Mapping
from dataclasses import replace

from loracle.reference import TargetError

from .adapter import Adapter
from .adapter_checks import wrappers_of
from .peft_keys import BASE


def name_parameters(adapter: Adapter, order: Mapping[str, tuple[str, ...]]) -> Adapter:
    """Return the adapter with its stacked parameters under their own paths, in their modules' order.

    PEFT wraps a module once for each of its targeted parameters, the first of them innermost, and a file has
    the wrappers alone: ``mlp.experts.base_layer`` is the first of two parameters of ``mlp.experts``.

    Args:
        adapter: as `read_adapter` returns it. Pairs that have their names already are put in order.
        order: module path to the names of its targeted parameters, in the order of the module's own.

    Each pair gets the scaling that the configuration gives its parameter.

    Raises:
        TargetError: ``order`` and the adapter differ in their modules or in the number of parameters, or a
            name is not targeted.
        ShapeError: a pair's rank is not what the configuration says of its parameter.
    """
    config = adapter.config
    stacked = wrappers_of(config, adapter.pairs).stacked
    for module in (*order, *stacked):
        expected, got = order.get(module, ()), stacked.get(module, ())
        if len(expected) != len(got) or len(set(expected)) < len(expected):
            raise TargetError(
                f"{module}: expected lora_A and lora_B for {len(expected)} targeted parameters "
                f"({', '.join(expected) or 'none'}), got {len(got)}; is this adapter for another model?"
            )
    pairs = {path: pair for path, pair in adapter.pairs.items() if pair.kind != "parameter"}
    for module, paths in stacked.items():
        for number, name in enumerate(order[module]):
            own = f"{module}.{name}"
            if not config.targets_parameter(own):
                raise TargetError(
                    f"{own}: not among target_parameters {config.target_parameters!r}; leave it out"
                )
            places = (own, module + BASE * (len(paths) - 1 - number))
            found = next((path for path in paths if path in places), None)
            if found is None:
                raise TargetError(
                    f"{own}: expected lora_A and lora_B for it, got {', '.join(paths)}; correct the order"
                )
            pairs[own] = replace(adapter.pairs[found], scaling=config.scaling_of(own))
    return replace(adapter, pairs=pairs)
