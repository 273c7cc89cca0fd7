"""Checks what becomes known of axis variables when axes meet: what is united, split and pinned."""

import pytest
from axes import (
    BOTH_FEATURES,
    CONSTANT,
    FEATURE,
    assert_free,
    assert_pinned,
    assert_same,
    divisors,
    free_units,
    product,
    reasons,
    single_positions,
    sizes,
    tie,
    variables,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from otfusion_jax.tracing.axis import Axis, Factor, concatenated, constant, size_of
from otfusion_jax.tracing.unification import Unifier

# --- united


def test_size_one_is_the_empty_product():
    unifier = Unifier()
    assert unifier.fresh(1) == ()
    assert unifier.pinned(1, "never shown") == ()
    assert constant(1) == ()
    assert unifier.unify([(), ()], BOTH_FEATURES) == ()


def test_equal_variables_become_one():
    unifier = Unifier()
    a = unifier.fresh(4)
    b = unifier.fresh(4)
    c = unifier.fresh(4)
    tie(unifier, a, b)
    assert_same(unifier, a, b)
    assert variables(unifier, a) != variables(unifier, c)
    tie(unifier, c, b)
    assert_same(unifier, a, c)


def test_a_factor_without_variable_is_left_alone():
    unifier = Unifier()
    axis = (Factor(3, None),)
    assert unifier.expand(axis) == axis
    unifier.pin(axis, "nothing to pin")


def test_constants_couple_nothing():
    unifier = Unifier()
    a = unifier.fresh(4)
    b = unifier.fresh(4)
    zeros = constant(4)
    result = unifier.unify([a, zeros], (FEATURE, CONSTANT))
    assert result == a
    result = unifier.unify([zeros, a], (CONSTANT, FEATURE))
    assert result == a
    unifier.unify([b, zeros], (FEATURE, CONSTANT))
    unifier.contract(a, zeros, (FEATURE, CONSTANT))
    assert variables(unifier, a) != variables(unifier, b)
    assert_free(unifier, a, b)


def test_a_constant_is_split_along_with_the_axis_it_meets():
    unifier = Unifier()
    axis = product(unifier, 2, 3)
    zeros = constant(6)
    result = unifier.unify([zeros, axis], (CONSTANT, FEATURE))
    assert_same(unifier, result, axis)
    assert_free(unifier, result)


# --- split


def test_a_product_splits_what_it_meets():
    unifier = Unifier()
    whole = unifier.fresh(6)
    parts = product(unifier, 2, 3)
    result = tie(unifier, whole, parts)
    assert sizes(unifier, whole) == [2, 3]
    assert sizes(unifier, result) == [2, 3]
    assert_same(unifier, whole, parts)
    assert_free(unifier, result)


def test_a_common_refinement_splits_both_sides():
    unifier = Unifier()
    a = product(unifier, 2, 6)
    b = product(unifier, 4, 3)
    tie(unifier, a, b)
    assert sizes(unifier, a) == [2, 2, 3]
    assert_same(unifier, a, b)
    assert_free(unifier, a)


def test_a_union_reaches_variables_split_earlier_and_later():
    unifier = Unifier()
    a = unifier.fresh(12)
    b = unifier.fresh(12)
    c = unifier.fresh(12)
    tie(unifier, a, product(unifier, 3, 4))
    tie(unifier, a, b)
    tie(unifier, c, product(unifier, 6, 2))
    tie(unifier, b, c)
    assert sizes(unifier, a) == [3, 2, 2]
    assert_same(unifier, a, b)
    assert_same(unifier, a, c)


def test_a_variable_met_twice_in_one_axis():
    unifier = Unifier()
    a = unifier.fresh(2)
    b = unifier.fresh(4)
    # The product of a variable with itself is the axis of a flattened square.
    square = a + a
    tie(unifier, square, b)
    assert_same(unifier, b, square)
    tie(unifier, b + b, product(unifier, 8, 2))
    assert_same(unifier, b + b, square + square)


# --- pinned


def test_no_common_refinement_pins_both():
    unifier = Unifier()
    a = product(unifier, 2, 3)
    b = product(unifier, 3, 2)
    result = tie(unifier, a, b)
    assert size_of(result) == 6
    reason = "two factorisations with no common refinement (2 against 3)"
    assert_pinned(unifier, reason, a, b, result)


def test_a_pin_does_not_cross_to_factors_that_agreed():
    unifier = Unifier()
    same = unifier.fresh(5)
    a = product(unifier, 2, 3)
    b = product(unifier, 3, 2)
    # What is read first agrees, and is united before the disagreement is found.
    tie(unifier, same + a, same + b)
    assert_free(unifier, same)
    assert None not in reasons(unifier, a + b)


@pytest.mark.parametrize("pin_first", [True, False])
def test_pins_reach_the_parts_of_a_split(pin_first: bool):
    unifier = Unifier()
    whole = unifier.fresh(6)
    outer = unifier.fresh(2)
    inner = unifier.fresh(3)
    # Before the split the pin is on the whole, after it on the two parts.
    if pin_first:
        unifier.pin(whole, "why")
    tie(unifier, whole, outer + inner)
    if not pin_first:
        unifier.pin(whole, "why")
    assert_pinned(unifier, "why", outer, inner)


def test_a_pinned_part_leaves_the_other_free():
    unifier = Unifier()
    whole = unifier.fresh(6)
    outer = unifier.pinned(2, "why")
    inner = unifier.fresh(3)
    tie(unifier, whole, outer + inner)
    outer_part, inner_part = unifier.expand(whole)
    assert_pinned(unifier, "why", (outer_part,))
    assert_free(unifier, (inner_part,))


@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_pins_spread_through_unions_and_the_first_reason_stays(pinned: int):
    unifier = Unifier()
    axes = [unifier.fresh(4) for _ in range(3)]
    unifier.pin(axes[pinned], "first")
    tie(unifier, axes[0], axes[1])
    tie(unifier, axes[1], axes[2])
    unifier.pin(axes[(pinned + 1) % 3], "second")
    assert_pinned(unifier, "first", *axes)


# --- expressions of any form


@st.composite
def expressions(draw: st.DrawFn, unifier: Unifier, size: int, depth: int = 2) -> Axis:
    """An axis of some size: a variable, a constant, a product or a sum."""
    outer_sizes = divisors(size)[1:-1]
    forms = ["variable", "constant"]
    if depth and outer_sizes:
        forms.append("product")
    if depth and size > 1:
        forms.append("sum")
    form = draw(st.sampled_from(forms))
    if form == "variable":
        return unifier.fresh(size)
    if form == "constant":
        return constant(size)
    if form == "product":
        outer_size = draw(st.sampled_from(outer_sizes))
        inner_size = size // outer_size
        outer = draw(expressions(unifier, outer_size, depth - 1))
        inner = draw(expressions(unifier, inner_size, depth - 1))
        return outer + inner
    first_size = draw(st.integers(1, size - 1))
    second_size = size - first_size
    first = draw(expressions(unifier, first_size, depth - 1))
    second = draw(expressions(unifier, second_size, depth - 1))
    return concatenated([first, second])


SIZES = st.sampled_from([4, 6, 8, 12])


@given(st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_axes_that_are_tied_read_the_same(data: st.DataObject):
    unifier = Unifier()
    size = data.draw(SIZES)
    a = data.draw(expressions(unifier, size))
    b = data.draw(expressions(unifier, size))
    result = tie(unifier, a, b)
    assert size_of(result) == size
    units_a = free_units(unifier, a)
    units_b = free_units(unifier, b)
    has_constant = None in variables(unifier, a + b)
    if not has_constant:
        assert units_a == units_b
    # Where one is constant the other varies alone, and the result varies as the two together.
    disagrees = reasons(unifier, result) - {None}
    if not disagrees:
        units = free_units(unifier, result)
        for at_a, at_b, at_result in zip(units_a, units_b, units, strict=True):
            assert {*at_a, *at_b} == {*at_result}
        # Single positions are no units, but it matters whether they are read.
        assert single_positions(unifier, result) == single_positions(unifier, a + b)
