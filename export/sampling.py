"""Which token comes next: the most likely one, or one drawn as transformers' generation does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from loracle.reference import ConfigError, NonFiniteError, ShapeError

Array = np.ndarray[Any, Any]

_FLOAT32 = np.finfo(np.float32)
_GROUPS = 8
_RUN = 512


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Names and meanings are those of transformers' generation config.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: only tokens as likely as the k-th are kept; 0 keeps all.
        top_p: of what top_k kept, the fewest tokens whose probabilities sum to this are kept; 1 keeps all.
        seed: of the random numbers.
        do_sample: False is greedy whatever the rest says.

    Raises ConfigError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    do_sample: bool = True

    def __post_init__(self) -> None:
        lowest, highest = float(_FLOAT32.tiny), float(_FLOAT32.max)
        if self.temperature != 0 and not lowest <= self.temperature <= highest:
            raise ConfigError(
                f"temperature: expected 0 (greedy), or {lowest:.2g} to {highest:.2g}, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected 0 (all tokens) or more, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p: expected 0 to 1, got {self.top_p}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return not self.do_sample or self.temperature == 0


def distribution(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The tokens that may come next, and how likely each is.

    In transformers' order: `softmax(logits / temperature)` over the tokens whose logit is at least the k-th
    largest, then the shortest run of the most likely whose sum is at least `top_p`, at least one, and their
    probabilities divided by their sum. Tokens tied with the k-th are all kept; of tokens tied at the end of
    that run, those of smaller id.

    Args:
        logits: (vocabulary,), floating point; -inf excludes a token.
        sampling: with a temperature above 0.

    Returns:
        ids, ascending, and probabilities in float32: quotients and exponentials are computed in float32, as
        transformers does, sums in float64.

    Raises:
        NonFiniteError: a NaN, +inf, or no finite logit.
    """
    ids, p = _distribution(logits, sampling)
    return np.arange(logits.shape[0]) if ids is None else ids, p


def _distribution(logits: Array, sampling: Sampling) -> tuple[Array | None, Array]:
    """As `distribution`; ids None stands for all."""
    logits = logits.astype(np.float32, copy=False)
    peak = logits.max()  # NaN where there is one
    if not math.isfinite(peak):
        _refuse(float(peak))
    ids: Array | None = None
    if 0 < sampling.top_k < logits.shape[0]:
        ids = np.flatnonzero(logits >= _kth_largest(logits, sampling.top_k))
        logits = logits[ids]
    with np.errstate(over="ignore"):
        p = (logits - peak) / np.float32(sampling.temperature)
    np.exp(p, out=p)
    p /= p.sum(dtype=np.float64)
    if sampling.top_p < 1:
        kept = _nucleus(p, sampling.top_p)
        ids, p = kept if ids is None else ids[kept], p[kept]
        p /= p.sum(dtype=np.float64)
    return ids, p


def _kth_largest(x: Array, k: int) -> Any:
    groups = _GROUPS * k
    if x.shape[0] >= _GROUPS * groups:
        # That of the groups' maxima is no larger, so few entries are left to be ordered.
        maxima = x[: x.shape[0] // groups * groups].reshape(-1, groups).max(0)
        x = x[x >= np.partition(maxima, -k)[-k]]
    return np.partition(x, -k)[-k]


def _nucleus(p: Array, top_p: float) -> Array:
    """Places of the fewest most likely tokens whose sum is at least `top_p`, ascending; at least one."""
    # All tokens up to this sum to at most 1 - top_p, so none of them is needed: few are left to be ordered.
    likely = np.flatnonzero(p > (1 - top_p) / p.shape[0])
    if not likely.size:
        return np.array([int(p.argmax())])
    order = likely[np.argsort(-p[likely], kind="stable")]
    sums = np.cumsum(p[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(sums, top_p)) + 1])


def draw(p: Array, number: float) -> int:
    """The first place at which the running sum of p exceeds `number * sum(p)`: never one where p is 0.

    Args:
        p: (n,), floating point, at least 0, with a positive sum; sums are in float64.
        number: in [0, 1).
    """
    begin = 0
    if p.shape[0] <= _RUN:
        own = np.cumsum(p, dtype=np.float64)
        target = number * own[-1]
    else:
        # Sums of runs first: a running sum over all entries takes far longer than a plain one.
        sums = np.cumsum(np.add.reduceat(p, np.arange(0, p.shape[0], _RUN), dtype=np.float64))
        target = number * sums[-1]
        run = int(np.searchsorted(sums, target, side="right"))
        if run:
            target -= sums[run - 1]
        begin = run * _RUN
        own = np.cumsum(p[begin : begin + _RUN], dtype=np.float64)
    # Where the two sums of a run were rounded differently the target may be past the end.
    last = np.searchsorted(own, own[-1])
    return begin + int(min(np.searchsorted(own, target, side="right"), last))


def _refuse(peak: float) -> NoReturn:
    found = "no finite one" if peak == -math.inf else peak
    raise NonFiniteError(
        f"logits: expected finite numbers or -inf, got {found}; a model in fp16 may overflow: export in fp32"
    )


class Sampler:
    """Chooses the next token of each row of a batch.

    A row has its own stream of random numbers, and a token takes one number: what is drawn for it does not
    depend on the other rows. The seed and the prompt decide the stream. Rows of one sampling with equal
    prompts get different answers: there the number of earlier rows with that prompt counts as well. A row
    with a sampling of its own is answered as it would be alone.

    Args:
        sampling: how; or for each row its own.
        prompts: the tokens of each row's prompt.

    Raises ShapeError where there are several samplings, and not one for each prompt.
    """

    def __init__(self, sampling: Sampling | Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> None:
        shared = isinstance(sampling, Sampling)
        rows = len(prompts)
        self._samplings = [sampling] * rows if isinstance(sampling, Sampling) else list(sampling)
        if len(self._samplings) != rows:
            raise ShapeError(
                f"sampling: expected {rows}, one a row, got {len(self._samplings)}; give one for all"
            )
        self._greedy = all(own.greedy for own in self._samplings)
        self._streams: list[np.random.Generator | None] = []
        seen: dict[tuple[int, ...], int] = {}
        for own, prompt in zip(self._samplings, map(tuple, prompts), strict=True):
            earlier = seen.get(prompt, 0)
            if shared:
                seen[prompt] = earlier + 1
            stream = None
            if not own.greedy:
                sequence = np.random.SeedSequence((own.seed, *prompt), spawn_key=(earlier,))
                stream = np.random.default_rng(sequence)
            self._streams.append(stream)

    def choose(self, logits: Array, rows: Sequence[int]) -> list[int]:
        """The next token of each row. Greedy: ties go to the smaller id.

        Args:
            logits: (n, vocabulary).
            rows: (n,) which row of the batch each is.

        Raises:
            NonFiniteError: see `distribution`.
        """
        if self._greedy:
            return _most_likely(logits)
        return [self._next(own, row) for own, row in zip(logits, rows, strict=True)]

    def _next(self, logits: Array, row: int) -> int:
        stream = self._streams[row]
        if stream is None:
            return _most_likely(logits[None])[0]
        ids, p = _distribution(logits, self._samplings[row])
        place = draw(p, stream.random())
        return place if ids is None else int(ids[place])


def _most_likely(logits: Array) -> list[int]:
    """The most likely token of each row; of equals the smallest."""
    if logits.dtype != _FLOAT32.dtype:
        logits = logits.astype(np.float32)  # NumPy is slow in float16
    tokens: list[int] = logits.argmax(1).tolist()  # a NaN's place where there is one
    for place, token in enumerate(tokens):
        if not math.isfinite(peak := logits.item(place, token)):
            _refuse(peak)
    return tokens
