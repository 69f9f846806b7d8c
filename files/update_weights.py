"""The weights that an adapter's updates are added to, as matrices (out, in)."""

from typing import Any

from numpy.typing import NDArray

from loracle.reference import TargetError

from .adapter import Adapter
from .base_tensors import BaseTensors
from .checkpoint import Tensors
from .experts import named_experts
from .plan import plan_updates, weight_name
from .ties import tied_tensors
from .updates import Convolution, Dora, Linear, Stacked


class UpdateWeights:
    """The base's weights of an adapter's pairs.

    Args:
        checkpoint: open for as long as weights are read.
        adapter: whose pairs are found in it.

    Raises:
        TargetError, DTypeError, ConfigError: the adapter does not fit; see `plan_updates`.
    """

    def __init__(self, checkpoint: Tensors, adapter: Adapter) -> None:
        self._base = BaseTensors(checkpoint)
        named = named_experts(adapter, self._base.experts)
        self._updates = plan_updates(self._base, named)
        self._kinds = {path: pair.kind for path, pair in adapter.pairs.items()}
        self._names = {
            path: self._name(own, named)
            for path, own in zip(adapter.pairs, _in_order(adapter, named), strict=True)
        }

    def matrix(self, path: str, number: int) -> NDArray[Any]:
        """Return the weight that the pair's delta (out, in) is added to: a view of the mapped file.

        Args:
            path: of a pair.
            number: of the expert, where several are stacked.

        Raises:
            TargetError: experts that the checkpoint has not stacked where the adapter has, or the other way
                round.
        """
        name, kind = self._names[path], self._kinds[path]
        update = self._updates.get(name)
        if not isinstance(update, Linear | Convolution | Dora | Stacked):
            raise TargetError(
                f"{path}: an expert whose weight is stacked in the base, or is not where the adapter's is; "
                "leave out --base"
            )
        weight = self._base.tensor(name)
        if isinstance(update, Stacked):
            expert: NDArray[Any] = weight[number]
            return expert.T if update.turned else expert
        if isinstance(update, Linear):
            # of tied embeddings the update may be the other pair's, which sees the weight turned
            turned = update.turned if update.pair.kind == kind else kind == "embedding"
            return weight.T if turned else weight
        return weight.reshape(len(weight), -1)

    def release(self, path: str) -> None:
        """Let the system drop the weight's pages from memory."""
        if self._names[path] in self._base:
            self._base.release(self._names[path])

    def _name(self, path: str, adapter: Adapter) -> str:
        name = weight_name(self._base, path, adapter.pairs[path])
        return name if name in self._updates else next(iter(tied_tensors(self._base, name)), name)


def _in_order(adapter: Adapter, named: Adapter) -> list[str]:
    """Return the paths in the named adapter of the pairs of the other, in its order."""
    by_factor = {id(pair.A): path for path, pair in named.pairs.items()}
    return [by_factor[id(pair.A)] for pair in adapter.pairs.values()]
