from dataclasses import replace

import numpy as np
import pytest
from convolution_cases import NUMPYS_MODES, layouts
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import ConfigError, Convolution, ShapeError
from loracle.reference.windows import spatial_axes, windows_on


def test_the_defaults_are_torchs():
    default = Convolution()
    fields = default.stride, default.padding, default.padding_mode, default.dilation, default.groups
    assert fields == (1, 0, "zeros", 1, 1)
    assert default == Convolution(1, 0, "zeros", 1, 1)
    with pytest.raises(AttributeError):
        default.groups = 2


# Size, kernel, stride, padding, dilation and the number of windows, counted on paper.
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "windows"),
    [
        (5, 3, 1, 0, 1, 3),
        (5, 3, 2, 0, 1, 2),
        (6, 3, 2, 0, 1, 2),
        (6, 3, 2, 1, 1, 3),
        (5, 3, 1, 0, 2, 1),
        (6, 2, 3, 2, 3, 3),
        (1, 1, 4, 0, 9, 1),
        (1, 3, 1, 1, 1, 1),
        (4, 3, 1, "same", 3, 4),
        (4, 2, 1, "same", 1, 4),
        (4, 2, 1, "valid", 1, 3),
    ],
)
def test_the_number_of_windows(size, kernel, stride, padding, dilation, windows):
    geometry = Convolution(stride, padding, dilation=dilation)
    assert spatial_axes((size,), (kernel,), geometry)[0].windows == windows
    assert windows_on((1, size), (kernel,), geometry).output_sizes == (windows,)


# 0 is the padding zero, 1, 2, 3 the input's numbers; kernel 2, dilation 2, padding 2.
@pytest.mark.parametrize(
    ("mode", "seen"),
    [
        ("zeros", [[0, 1], [0, 2], [1, 3], [2, 0], [3, 0]]),
        ("reflect", [[3, 1], [2, 2], [1, 3], [2, 2], [3, 1]]),
        ("replicate", [[1, 1], [1, 2], [1, 3], [2, 3], [3, 3]]),
        ("circular", [[2, 1], [3, 2], [1, 3], [2, 1], [3, 2]]),
    ],
)
def test_what_the_windows_see(mode, seen):
    x = np.array([[[1, 2, 3]]])
    geometry = Convolution(padding=2, padding_mode=mode, dilation=2)
    assert windows_on((1, 3), (2,), geometry).gather(x).tolist() == [seen]


def test_same_puts_the_odd_number_at_the_far_end():
    x = np.array([[[1, 2, 3]]])
    windows = windows_on((1, 3), (4,), Convolution(padding="same"))
    assert windows.gather(x).tolist() == [[[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 0]]]


def test_rows_are_windows_of_a_group_and_columns_are_channel_then_tap():
    """Two images, four channels in two groups, 2 x 3 windows on 2 x 4 pixels: each number is its own name."""
    x = np.arange(2 * 4 * 2 * 4).reshape(2, 4, 2, 4)
    windows = windows_on((4, 2, 4), (2, 3), Convolution(groups=2))
    assert windows.output_sizes == (1, 2)
    columns = windows.gather(x)
    assert columns.shape == (2, 4, 12)
    for group, row in np.ndindex(2, 4):
        image, place = divmod(row, 2)
        own = x[image, 2 * group : 2 * group + 2, :, place : place + 3]
        assert columns[group, row].tolist() == own.ravel().tolist()


def test_outputs_lie_group_after_group_and_output_rows_is_the_inverse():
    windows = windows_on((4, 2, 4), (2, 3), Convolution(groups=2))
    y = np.arange(3 * 6 * 1 * 2).reshape(3, 6, 1, 2)
    rows = windows.output_rows(y)
    assert rows.shape == (2, 6, 3)
    for group, row, output in np.ndindex(rows.shape):
        image, place = divmod(row, 2)
        assert rows[group, row, output] == y[image, 3 * group + output, 0, place]
    assert windows.outputs(rows).tolist() == y.tolist()


@given(layouts(), st.integers(1, 2), st.integers(1, 2))
def test_scatter_is_the_transpose_of_gather(layout, per_group, groups):
    """Column by column of the identity, gather is a matrix; most is the largest sum of one of its columns."""
    geometry, spatial, kernel = layout
    geometry = replace(geometry, groups=groups)
    shape = (per_group * groups, *spatial)
    windows = windows_on(shape, kernel, geometry)
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (2, *shape))
    columns = windows.gather(x)
    other = rng.integers(-9, 10, columns.shape)
    assert windows.scatter(other).shape == x.shape
    assert (columns * other).sum() == (x * windows.scatter(other)).sum()
    ones = np.ones_like(columns)
    assert windows.most == max(1, windows.scatter(ones).max())


@given(layouts(), st.integers(1, 2))
def test_the_windows_see_what_numpy_pads(layout, channels):
    geometry, spatial, kernel = layout
    axes = spatial_axes(spatial, kernel, geometry)
    x = np.arange(1, 1 + channels * int(np.prod(spatial))).reshape(1, channels, *spatial)
    ends = [(axis.before, axis.after) for axis in axes]
    padded = np.pad(x, [(0, 0), (0, 0), *ends], mode=NUMPYS_MODES[geometry.padding_mode])
    windows = windows_on(x.shape[1:], kernel, geometry)
    columns = windows.gather(x)[0].reshape(*windows.output_sizes, channels, *kernel)
    for place in np.ndindex(windows.output_sizes):
        taps = [p * a.stride + a.dilation * np.arange(a.kernel) for p, a in zip(place, axes, strict=True)]
        assert (columns[place] == padded[0][(slice(None), *np.ix_(*taps))]).all()
        assert all(t[-1] - t[0] + 1 == a.span for t, a in zip(taps, axes, strict=True))


@pytest.mark.parametrize("dtype", ["f4", "f8", "O"])
def test_the_dtype_is_kept(dtype):
    x = np.array([[[1, 2, 3]]], dtype)
    windows = windows_on((1, 3), (2,), Convolution(padding=1))
    gathered = windows.gather(x)
    assert gathered.dtype == windows.scatter(gathered).dtype == x.dtype
    assert windows.scatter(gathered).tolist() == [[[2, 4, 6]]]


def test_a_number_that_no_window_sees_gets_nothing():
    windows = windows_on((1, 3), (1,), Convolution(stride=2))
    assert windows.scatter(np.array([[[5], [7]]])).tolist() == [[[5, 0, 7]]]
    assert windows.most == 1
    beside = windows_on((1, 1), (1,), Convolution(stride=3, padding=1))
    assert beside.gather(np.array([[[8]]])).tolist() == [[[0]]]
    assert beside.scatter(np.array([[[5]]])).tolist() == [[[0]]]
    assert beside.most == 1


def test_most_counts_the_copies_that_padding_makes_and_no_zeros():
    assert windows_on((1, 3), (3,), Convolution()).most == 1
    assert windows_on((1, 4), (3,), Convolution()).most == 2
    assert windows_on((1, 2), (3,), Convolution(padding=2)).most == 3
    assert windows_on((1, 2), (3,), Convolution(padding=2, padding_mode="replicate")).most == 6


NUMBERS = "or a tuple of them, got {}; give one for each axis$"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 0}, "^stride: expected a number of at least 1 " + NUMBERS.format(0)),
        ({"stride": (1, 0)}, "^stride: expected a number of at least 1 " + NUMBERS.format(r"\(1, 0\)")),
        ({"dilation": 0}, "^dilation: expected a number of at least 1 " + NUMBERS.format(0)),
        ({"padding": -1}, "^padding: expected a number of at least 0 " + NUMBERS.format(-1)),
        ({"padding": [1]}, "^padding: expected a number of at least 0 " + NUMBERS.format(r"\[1\]")),
        ({"stride": True}, "^stride: expected a number of at least 1 " + NUMBERS.format(True)),
        ({"stride": 1.0}, "^stride: expected a number of at least 1 " + NUMBERS.format(r"1\.0")),
        ({"groups": 0}, "^groups: expected a number of at least 1, got 0; 1 is no groups$"),
        ({"groups": (1,)}, r"^groups: expected a number of at least 1, got \(1,\); 1 is no groups$"),
        (
            {"padding_mode": "wrap"},
            "^padding_mode: expected one of zeros, reflect, replicate, circular, got 'wrap'; name one$",
        ),
        (
            {"padding": "full"},
            "^padding: expected numbers, 'valid' or 'same', got 'full'; name one of them$",
        ),
        (
            {"padding": "same", "stride": 2},
            "^padding: expected numbers with stride 2, got 'same'; it needs a stride of 1$",
        ),
        (
            {"padding": "same", "stride": (1, 2)},
            r"^padding: expected numbers with stride \(1, 2\), got 'same'; it needs a stride of 1$",
        ),
    ],
)
def test_a_wrong_geometry_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Convolution(**fields)


def test_the_least_numbers_are_accepted():
    Convolution(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    Convolution(padding="same", stride=(1, 1))
    Convolution(padding="valid", stride=2)
    assert windows_on((1, 3), (1,), Convolution(np.int64(2), groups=np.int64(1))).output_sizes == (2,)


@pytest.mark.parametrize("padding", [0, "same"])
@pytest.mark.parametrize("kernel", [(1,), (1, 1, 1)])
def test_a_kernel_of_more_or_fewer_axes_than_the_input_is_never_cut_to_fit(kernel, padding):
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is"):
        spatial_axes((3, 3), kernel, Convolution(padding=padding))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_number_for_each_axis_or_one_for_all(name):
    geometry = Convolution(**{name: (1, 2)})
    assert len(spatial_axes((6, 6), (2, 2), geometry)) == 2
    for count in (1, 3):
        with pytest.raises(
            ConfigError,
            match=rf"^{name}: expected a number or {count} of them, one for each spatial axis, got \(1, 2\); "
            r"W0 has the axes \(out, in/groups, \*spatial\)$",
        ):
            spatial_axes((6,) * count, (2,) * count, geometry)


@pytest.mark.parametrize(
    ("geometry", "least", "why"),
    [
        (Convolution(padding=2, padding_mode="reflect"), 3, " for reflect padding of 2"),
        (Convolution(padding=2, padding_mode="circular"), 2, " for circular padding of 2"),
        (Convolution(padding=2, padding_mode="replicate"), 1, " for replicate padding of 2"),
        (Convolution(padding=2), 1, " for zeros padding of 2"),
        (Convolution(padding_mode="reflect"), 1, ""),
        (Convolution(padding_mode="circular"), 1, ""),
        (Convolution(padding="same", padding_mode="reflect", dilation=3), 3, " for reflect padding of 2"),
    ],
)
def test_an_input_too_small_for_its_padding_is_refused(geometry, least, why):
    """The kernel is 1 or, for "same", 2 with one more at the far end than at the near one."""
    kernel = (2, 2) if geometry.padding == "same" else (1, 1)
    assert spatial_axes((9, least), kernel, geometry)[1].size == least
    with pytest.raises(
        ShapeError,
        match=rf"^x: expected at least {least} on spatial axis 1{why}, got {least - 1}; give it more$",
    ):
        spatial_axes((9, least - 1), kernel, geometry)


def test_an_input_smaller_than_the_kernel_is_refused():
    geometry = Convolution(padding=(0, 1), dilation=(1, 3))
    assert [axis.windows for axis in spatial_axes((3, 5), (3, 3), geometry)] == [1, 1]
    with pytest.raises(
        ShapeError,
        match=r"^x: expected at least 5 on spatial axis 1 for a kernel that spans 7 "
        r"with 2 of padding, got 4; pad more$",
    ):
        spatial_axes((3, 4), (3, 3), geometry)
