"""Checks what a reshape does to axes, against NumPy's."""

import math

import numpy as np
import pytest
from axes import (
    assert_free,
    assert_pinned,
    assert_same,
    divisors,
    free_variables,
    product,
    sizes,
    variables,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from otfusion_jax.tracing.axis import Axis, concatenated, constant, factors_of, size_of
from otfusion_jax.tracing.unification import Unifier

Products = list[list[int]]
"""The sizes of the factors of each axis."""


def elements(products: Products) -> int:
    """The number of elements of an array whose axes are products of factors."""
    shape = [math.prod(factor_sizes) for factor_sizes in products]
    return math.prod(shape)


FACTORS = st.lists(st.integers(2, 4), max_size=3)
SHAPES = st.lists(FACTORS, min_size=1, max_size=3)
PRODUCTS = SHAPES.filter(lambda products: elements(products) <= 512)


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[Products, list[int]]:
    """Axes, each a product of factors, and other sizes of the same product."""
    products = draw(PRODUCTS)
    left = elements(products)
    new_sizes = []
    while left > 1 and len(new_sizes) < 5:
        size = draw(st.sampled_from(divisors(left)))
        new_sizes.append(size)
        left //= size
    return products, [*new_sizes, left]


def fresh_axes(unifier: Unifier, products: Products) -> list[Axis]:
    """Axes of new variables, each a product of those of some sizes."""
    return [product(unifier, *factor_sizes) for factor_sizes in products]


def shape_of(axes: list[Axis]) -> list[int]:
    return [size_of(axis) for axis in axes]


def permuted(unifier: Unifier, array: np.ndarray, axes: list[Axis], seed: int) -> np.ndarray:
    """Permutes every free variable of an array, each by a permutation of its own."""
    factors = []
    for axis in axes:
        factors += factors_of(unifier.expand(axis))
    unmerged = array.reshape([factor.size for factor in factors])
    for dim, factor in enumerate(factors):
        assert factor.variable is not None
        if unifier.is_free(factor.variable):
            rng = np.random.default_rng([seed, factor.variable])
            order = rng.permutation(factor.size)
            unmerged = unmerged.take(order, axis=dim)
    return unmerged.reshape(array.shape)


@settings(max_examples=100, deadline=None)
@given(regroupings(), st.integers(0, 9))
def test_permuting_units_commutes_with_reshape(regrouping, seed: int):
    """Whatever is left free may be permuted before a reshape or after it."""
    products, new_sizes = regrouping
    unifier = Unifier()
    axes = fresh_axes(unifier, products)
    shape = shape_of(axes)
    array = np.arange(elements(products)).reshape(shape)
    new_axes = unifier.regroup(axes, new_sizes, "cut across")
    assert shape_of(new_axes) == new_sizes
    permuted_before = permuted(unifier, array, axes, seed)
    reshaped = array.reshape(new_sizes)
    permuted_after = permuted(unifier, reshaped, new_axes, seed)
    expected = permuted_before.reshape(new_sizes)
    assert np.array_equal(expected, permuted_after)


@settings(max_examples=100, deadline=None)
@given(regroupings())
def test_regrouping_there_and_back_keeps_what_is_free(regrouping):
    products, new_sizes = regrouping
    unifier = Unifier()
    axes = fresh_axes(unifier, products)
    shape = shape_of(axes)
    there = unifier.regroup(axes, new_sizes, "there")
    back = unifier.regroup(there, shape, "back")
    for old, new in zip(axes, back, strict=True):
        # What is pinned has other variables on the way back.
        assert free_variables(unifier, old) == free_variables(unifier, new)


@pytest.mark.parametrize(
    ("before", "after", "whole"),
    [
        ([6], [2, 3], True),
        ([2, 3], [6], True),
        ([2, 2, 3], [4, 3], True),
        ([4, 1, 3], [2, 6], True),
        ([3, 4], [3, 2, 2], True),
        ([2, 3], [3, 2], False),
        ([4, 9], [6, 6], False),
    ],
)
def test_regroup_pins_only_where_sizes_cut_across(before: list[int], after: list[int], whole: bool):
    unifier = Unifier()
    axes = [unifier.fresh(size) for size in before]
    new_axes = unifier.regroup(axes, after, "cut across")
    all_axes = axes + new_axes
    longer_than_one = [axis for axis in all_axes if axis]
    if whole:
        assert_free(unifier, *longer_than_one)
    else:
        assert_pinned(unifier, "cut across", *longer_than_one)


def test_regroup_pins_only_the_run_that_is_cut():
    unifier = Unifier()
    spared = unifier.fresh(5)
    a = unifier.fresh(2)
    b = unifier.fresh(3)
    axes = [spared, a, b]
    first, *_ = unifier.regroup(axes, [5, 3, 2], "cut across")
    assert_same(unifier, first, spared)
    assert_free(unifier, spared)
    assert_pinned(unifier, "cut across", a, b)


def test_regroup_of_nothing():
    unifier = Unifier()
    axes = [unifier.fresh(3), constant(0)]
    new_axes = unifier.regroup(axes, (0, 7), "empty")
    assert shape_of(new_axes) == [0, 7]


def test_segments_read_as_rows_move_alike_within_a_row():
    unifier = Unifier()
    a = unifier.fresh(4)
    b = unifier.fresh(8)
    axis = concatenated([a, b])
    rows, columns = unifier.regroup([axis], [3, 4], "why")
    assert sizes(unifier, rows) == [[[], [2]]]
    assert_same(unifier, columns, a)
    # The segment of 8 units has two rows.
    _, *of_b = variables(unifier, b)
    assert variables(unifier, columns) == of_b


def test_rows_within_segments_are_free():
    unifier = Unifier()
    a = unifier.fresh(6)
    b = unifier.fresh(3)
    axis = concatenated([a, b])
    unifier.regroup([axis], [3, 3], "cut across")
    assert_free(unifier, a, b)


def test_rows_across_segments_are_pinned():
    unifier = Unifier()
    a = unifier.fresh(4)
    b = unifier.fresh(5)
    axis = concatenated([a, b])
    # The second row has one unit of the first segment and two of the second.
    unifier.regroup([axis], [3, 3], "cut across")
    assert_pinned(unifier, "cut across", a, b)
