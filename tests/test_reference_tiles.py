import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference.tiles import first_position, tiles


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 200), st.integers(1, 50))
def test_tiles_cover_a_matrix_once_and_keep_their_size(rows, columns, entries, most_columns):
    count = np.zeros((rows, columns), int)
    for tile in tiles((rows, columns), entries, most_columns):
        count[tile] += 1
        assert 1 <= count[tile].size <= entries
        assert count[tile].shape[1] <= most_columns
    assert (count == 1).all()


def test_a_narrow_matrix_has_tiles_of_whole_rows_and_as_many_as_fit():
    assert tiles((10, 3), 12, 100) == [
        (slice(0, 4), slice(0, 3)),
        (slice(4, 8), slice(0, 3)),
        (slice(8, 10), slice(0, 3)),
    ]


def test_a_wide_matrix_is_cut_panel_after_panel():
    assert tiles((3, 5), 8, 4) == [
        (slice(0, 2), slice(0, 4)),
        (slice(2, 3), slice(0, 4)),
        (slice(0, 2), slice(4, 5)),
        (slice(2, 3), slice(4, 5)),
    ]


@pytest.mark.parametrize("threads", [1, 2, 7, 100])
def test_every_tile_is_visited_by_a_worker_of_its_thread_and_the_first_report_in_row_order_wins(threads):
    work = tiles((10, 12), 10, 4)
    visited, workers = [], []

    def make_worker():
        mine = threading.get_ident()
        workers.append(mine)

        def worker(tile):
            assert threading.get_ident() == mine
            visited.append(tile)
            rows, columns = tile
            if rows.start == 4:
                return (1, 2) if columns.start != 8 else (0, 3)
            return None

        return worker

    assert first_position(work, threads, make_worker) == (4, 11)
    assert sorted(visited, key=str) == sorted(work, key=str)
    assert len(workers) == min(threads, len(work))


def test_as_many_threads_run_at_once_as_were_asked_for():
    threads = 40  # more than a pool has by default, on any machine
    together = threading.Barrier(threads)

    def worker(tile):
        together.wait(timeout=5)

    assert first_position(tiles((threads, 1), 1, 1), threads, lambda: worker) is None


def test_nothing_reported_is_none_and_no_work_is_fine():
    assert first_position(tiles((3, 3), 2, 2), 2, lambda: lambda tile: None) is None
    assert first_position([], 2, lambda: lambda tile: (0, 0)) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller(threads):
    def worker(tile):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        first_position(tiles((3, 3), 2, 2), threads, lambda: worker)
