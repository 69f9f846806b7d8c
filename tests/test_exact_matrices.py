from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import (
    frobenius,
    inverse,
    projector,
    rational,
    reflector,
    singular_values_above,
    with_singular_values,
)


def identity(n):
    return rational(np.eye(n))


def test_norm_inverse_and_projector_by_hand():
    assert frobenius(rational([[1.0, 2.0], [2.0, 4.0]])) == 5
    swapped = rational([[0.0, 2.0], [4.0, 1.0]])
    assert inverse(swapped).tolist() == [[Fraction(-1, 8), Fraction(1, 4)], [Fraction(1, 2), 0]]
    assert projector(rational([[3.0, 4.0]])).tolist() == [
        [Fraction(9, 25), Fraction(12, 25)],
        [Fraction(12, 25), Fraction(16, 25)],
    ]
    with pytest.raises(ZeroDivisionError):
        inverse(rational([[1.0, 2.0], [2.0, 4.0]]))


def test_reflectors_are_orthogonal_and_singular_values_as_ordered():
    Q = reflector(rational([1.0, 2.0, 3.0]))
    assert np.array_equal(Q @ Q.T, identity(3))
    assert not np.array_equal(Q, identity(3))
    U, M, Vh = with_singular_values(np.random.default_rng(0), [5, 2], 4, 3)
    assert np.array_equal(U.T @ U, identity(2))
    assert np.array_equal(Vh @ Vh.T, identity(2))
    assert np.array_equal(M @ Vh.T, U * [5, 2])
    for matrix in (M, M.T):
        assert [singular_values_above(matrix, t) for t in (-1, 1, Fraction(3), 4.5, 6)] == [3, 2, 1, 1, 0]
    assert singular_values_above(identity(3), 0.5) == 3
    assert singular_values_above(identity(3) * 0, 0) == 0
    with pytest.raises(ZeroDivisionError):
        singular_values_above(rational([[1.0, 1.0], [0.0, 1.0]]), 1)
