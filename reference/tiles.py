"""Walking over a matrix in pieces of bounded size, on several threads, with an answer that does not depend
on them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Tile = tuple[slice, slice]
Position = tuple[int, int]


def tiles(shape: tuple[int, int], entries: int, columns: int) -> list[Tile]:
    """Cut a matrix into tiles of at most ``entries`` entries and ``columns`` columns, panel after panel of
    columns."""
    columns = max(1, min(shape[1], columns, entries))
    rows = max(1, entries // columns)
    return [
        (slice(i, min(i + rows, shape[0])), slice(j, min(j + columns, shape[1])))
        for j in range(0, shape[1], columns)
        for i in range(0, shape[0], rows)
    ]


def first_position(
    work: Sequence[Tile], threads: int, make_worker: Callable[[], Callable[[Tile], Position | None]]
) -> Position | None:
    """Run a worker over all of ``work`` and return the first (in the order of rows, then columns) position
    reported.

    A worker reports a position within its tile, or None. Each thread has a worker of its own and takes every
    ``threads``-th tile; all tiles are visited, whatever is reported.
    """
    threads = max(1, min(threads, len(work)))

    def run(thread: int) -> Position | None:
        worker = make_worker()
        found = []
        for rows, columns in work[thread::threads]:
            position = worker((rows, columns))
            if position is not None:
                found.append((rows.start + position[0], columns.start + position[1]))
        return min(found, default=None)

    if threads == 1:
        return run(0)
    with ThreadPoolExecutor(threads) as pool:
        return min(
            (position for position in pool.map(run, range(threads)) if position is not None), default=None
        )
