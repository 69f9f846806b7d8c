"""An adapter from two checkpoints, one weight at a time."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from loracle.files import Checkpoint, LoraPair, output_folder, write_adapter_files
from loracle.files.adapter_ranks import alpha_for
from loracle.reference import ConfigError, TargetError

from .adapter import adapter_of, files_bytes
from .budget import spend
from .decomposition import decompose, decompose_to_energy, difference
from .kinds import module_of, stores_turned, why_not_low_rank
from .options import ExtractOptions
from .others import Others, save_others
from .pairing import TensorPair, differs, pair_tensors
from .summary import ExtractedTensor, ExtractionSummary
from .weights import Weight, fit, left_out

Progress = Callable[[int, int], None]
"""Called with the entries that are done, and all; those of a weight that differs count several times."""

_FACTOR_BYTES = 4  # of an entry of a factor within a budget


def extract(
    base_dir: str | os.PathLike[str],
    tuned_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    options: ExtractOptions,
    *,
    progress: Progress | None = None,
) -> ExtractionSummary:
    """Write the adapter that is nearest to a full fine-tune's difference from its base, whole or not at all.

    The linear layers' weights that differ get an update each, made of their differences' largest singular
    values. Embeddings, norms, biases and all else that differs has none; see ``options.rest``.

    Where a difference is of the rank asked for, but for the roundings of the tuned weight, the factors are
    such that the correctly rounded merge is the tuned weight, bit for bit, if `refine` finds some.

    Args:
        base_dir, tuned_dir: model folders of one architecture.
        out_dir: absent or an empty folder.
        options: how large the updates are.
        progress: called after each tensor.

    Memory: a few times one weight in float64, and the adapter; whatever the models' size.

    Raises:
        FileError: a folder is missing or malformed, or the output exists or cannot be written.
        TargetError: the checkpoints have not the same tensors, or no linear layer's weight differs.
        ShapeError, DTypeError, NonFiniteError: a tensor does not fit its counterpart, or holds NaN.
        ConfigError: the rank is above a dimension, or the budget below a rank of the cheapest weight.
    """
    with Checkpoint(base_dir) as base, Checkpoint(tuned_dir) as tuned:
        pairs = pair_tensors(base, tuned)
        run = _Run(base, tuned, pairs, options, progress)
        low, rest = run.compare()
        with output_folder(out_dir) as folder:
            ranks = None if options.nbytes is None else run.ranks_within(options.nbytes, low, rest)
            found = [run.fit(pair, None if ranks is None else ranks[pair.name]) for pair in low]
            fitted = {report.name: pair for pair, report in found if pair is not None}
            others = run.others(rest, list(fitted))
            adapter = adapter_of(base, fitted, others)
            write_adapter_files(folder, adapter)
            nbytes = sum(entry.stat().st_size for entry in folder.iterdir())
        return ExtractionSummary(
            Path(out_dir),
            tuple(report for _, report in found),
            others.report,
            len(pairs) - len(low) - len(rest),
            adapter.parameters,
            nbytes,
        )


class _Run:
    """Two open checkpoints, and what is asked of them."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        pairs: Sequence[TensorPair],
        options: ExtractOptions,
        progress: Progress | None,
    ) -> None:
        self._base, self._tuned = base, tuned
        self._pairs, self._options, self._progress = pairs, options, progress
        self._done = 0
        self._total = base.total_parameters

    def compare(self) -> tuple[list[TensorPair], dict[str, str]]:
        """Return the weights that get an update, and what else differs, with what it is."""
        low: list[TensorPair] = []
        rest: dict[str, str] = {}
        for pair in self._pairs:
            if differs(self._base, self._tuned, pair):
                what = why_not_low_rank(self._base, pair.name)
                if what is None:
                    low.append(pair)
                else:
                    rest[pair.name] = what
            self._release(pair)
            self._advance(pair)
        if not low:
            found = f"only {', '.join(rest)}" if rest else "the same in all tensors"
            raise TargetError(
                f"{self._tuned.dir}: expected a linear layer's weight that differs from {self._base.dir}, "
                f"got {found}; is it the fine-tuned model?"
            )
        rounds = 1 if self._options.nbytes is None else 2
        self._total += rounds * sum(self._weight(pair).before.size for pair in low)
        if self._options.rank is not None:
            self._check_rank(self._options.rank, low)
        return low, rest

    def ranks_within(self, nbytes: int, low: Sequence[TensorPair], rest: dict[str, str]) -> dict[str, int]:
        """Return the rank of each weight, 0 included, such that the adapter has no more bytes."""
        options = self._options
        spectra: dict[str, Sequence[float]] = {}
        costs: dict[str, int] = {}
        for pair in low:
            weight = self._weight(pair)
            costs[pair.name] = _FACTOR_BYTES * sum(weight.before.shape)
            most = min(*weight.before.shape, nbytes // costs[pair.name])
            if most:
                D = difference(weight.before, weight.after, pair.name)
                spectra[pair.name] = decompose(D, most, options.seed).s[:most].tolist()
            self._release(pair)
            self._advance(pair)
        best: dict[str, int] = {}
        tried: list[dict[str, int]] = []
        # headers grow with ranks and names, so what they leave is known afterwards; names are added until
        # that is too much, and what is left then goes to the same names
        left = nbytes
        while left > 0:
            named = {name: spectra[name] for name in best} or spectra
            ranks = {name: r for name, r in spend(named, costs, left).items() if r}
            if not ranks or ranks in tried:
                break
            tried.append(ranks)
            free = nbytes - files_bytes(self._base, ranks, self.others(rest, list(ranks)), options.scaling)
            spent = sum(costs[name] * r for name, r in ranks.items())
            if free >= 0 and spent > sum(costs[name] * r for name, r in best.items()):
                best = ranks
            left = spent + free
        if best:
            return {**dict.fromkeys(costs, 0), **best}
        raise ConfigError(
            f"bytes: expected enough for a rank of one weight, {min(costs.values())} beside the files' "
            f"headers{' and what is saved whole' if rest and options.rest else ''}, got {nbytes}; "
            "give more"
        )

    def fit(self, pair: TensorPair, r: int | None) -> tuple[LoraPair | None, ExtractedTensor]:
        """Return a weight's pair, None for rank 0, and what it misses.

        Args:
            pair: that differs.
            r: the rank, where a budget has told it.
        """
        weight = self._weight(pair)
        D = difference(weight.before, weight.after, pair.name)
        options = self._options
        if r == 0:
            fitted: tuple[LoraPair | None, ExtractedTensor] = (None, left_out(weight, D, options.seed))
        else:
            if r is None and options.rank is None:
                assert options.energy is not None
                found, r = decompose_to_energy(D, options.energy, options.seed)
            else:
                r = options.rank if r is None else r
                assert r is not None
                found = decompose(D, r, options.seed)
            fitted = fit(
                weight,
                D,
                found,
                r,
                alpha_for(options.scaling, r) / r,
                narrow=options.nbytes is not None,
                seed=options.seed,
            )
        self._release(pair)
        self._advance(pair)
        return fitted

    def others(self, rest: dict[str, str], fitted: Sequence[str]) -> Others:
        """Return what is saved whole beside the weights that have an update."""
        adapted = [module_of(name) for name in fitted]
        return save_others(self._base, self._tuned, self._pairs, rest, adapted, rest=self._options.rest)

    def _weight(self, pair: TensorPair) -> Weight:
        before, after = self._base.tensor(pair.name), self._tuned.tensor(pair.source)
        turned = stores_turned(self._base.config)
        return Weight(pair.name, before.T if turned else before, after.T if turned else after, before.shape)

    def _check_rank(self, rank: int, low: Sequence[TensorPair]) -> None:
        for pair in low:
            shape = self._base.shape(pair.name)
            if rank > min(shape):
                raise ConfigError(
                    f"{pair.name}: expected a rank from 1 to {min(shape)}, the smaller side of {shape}, got "
                    f"{rank}; choose another, or --energy"
                )

    def _release(self, pair: TensorPair) -> None:
        self._base.release(pair.name)
        self._tuned.release(pair.source)

    def _advance(self, pair: TensorPair) -> None:
        size = 1
        for side in self._base.shape(pair.name):
            size *= side
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)
