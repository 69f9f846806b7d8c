"""Whether every layer that an adapter's configuration names has its update in the adapter's file."""

import re

from loracle.reference import TargetError

from .adapter import Adapter
from .base_tensors import BaseTensors
from .matching import matches
from .ties import tied_tensors

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_targets(base: BaseTensors, adapter: Adapter, adapted: frozenset[str]) -> None:
    """Check that no weight of the base is left out that is targeted as others are.

    It counts as left out where the same weight of another layer has an update, or where no update is of the
    name in ``target_modules`` that targets it. Names alone do not tell layers of a head that the adapter's
    model had not from others, nor experts that a model stacks; these are not missed.

    Args:
        base: the model that the adapter is merged into.
        adapter: with its pairs.
        adapted: the base's names of the weights that have one.

    Raises:
        TargetError: a weight is left out; the message names it.
    """
    config = adapter.config
    targets = config.target_modules
    if targets is None or config.names_all_linear or config.names_attention:
        return
    kinds = {_LAYER.sub("N", name) for name in adapted}
    for name in base.names:
        path = name.removesuffix(".weight")
        if path == name or name in adapted or ".experts." in name or len(base.shape(name)) < 2:
            continue
        if not config.targets(path) or tied_tensors(base, name):
            continue
        own = (
            tuple(entry for entry in targets if matches(path, (entry,))) if isinstance(targets, tuple) else ()
        )
        unused = own and not any(matches(other, own) for other in adapter.pairs)
        if unused or _LAYER.sub("N", name) in kinds:
            raise TargetError(
                f"{name}: targeted by the adapter's config (target_modules {targets!r}), but the adapter has "
                f"no lora_A and lora_B for it; was the copy complete?"
            )
