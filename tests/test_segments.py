"""Checks axes that are sums: taken apart into segments, and matched segment by segment."""

import numpy as np
import pytest
from axes import (
    assert_pinned,
    assert_same,
    free_units,
    reasons,
    single_positions,
    sizes,
    tie,
    variables,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_axes import SIZES, expressions

from otfusion_jax.tracing.axis import Disagreement, Sum, concatenated, size_of
from otfusion_jax.tracing.unification import Unifier


def test_a_split_takes_every_occurrence_apart():
    unifier = Unifier()
    a = unifier.fresh(6)
    b = unifier.fresh(6)
    tie(unifier, a, b)
    pieces = unifier.split_segments(a, [2])
    assert sizes(unifier, b) == [[[2], [4]]]
    whole = concatenated(pieces)
    assert unifier.signature(whole) == unifier.signature(b)
    first, second = variables(unifier, b)
    assert first != second


def test_a_product_is_split_between_its_blocks_only():
    unifier = Unifier()
    inner = unifier.fresh(4)
    axis = unifier.fresh(3) + inner
    first, second = unifier.split_segments(axis, [4])
    assert size_of(first) == 4
    assert size_of(second) == 8
    assert_same(unifier, first, inner)
    with pytest.raises(Disagreement, match="split at 6 within blocks of 4"):
        unifier.split_segments(axis, [4, 6])


def test_what_is_pinned_is_not_taken_apart():
    unifier = Unifier()
    axis = unifier.pinned(6, "why")
    first, second, third = unifier.split_segments(axis, [1, 3])
    assert sizes(unifier, axis) == [6]
    assert size_of(first) == 1
    assert size_of(second) == 2
    assert size_of(third) == 3
    assert_pinned(unifier, "why", second, third)


def test_segments_meet_at_common_boundaries():
    unifier = Unifier()
    a = unifier.fresh(2)
    b = unifier.fresh(6)
    c = unifier.fresh(5)
    d = unifier.fresh(3)
    two_and_six = concatenated([a, b])
    five_and_three = concatenated([c, d])
    result = tie(unifier, two_and_six, five_and_three)
    # The boundaries of either are after 2 and after 5 units.
    assert sizes(unifier, result) == [[[2], [3], [3]]]
    assert sizes(unifier, b) == [[[3], [3]]]
    assert sizes(unifier, c) == [[[2], [3]]]
    _, *last_of_b = variables(unifier, b)
    assert variables(unifier, d) == last_of_b


def test_single_positions_are_found_within_the_range_that_holds_them():
    unifier = Unifier()
    axis = unifier.fresh(6)
    # Segments of 1, 2, 1 and 2 units.
    unifier.split_segments(axis, [1, 3, 4])
    (term,) = unifier.expand(axis, keep_single=True)
    assert isinstance(term, Sum)
    first = unifier.variables_of(term.segments[0])
    third = unifier.variables_of(term.segments[2])
    assert unifier.single_positions(axis, 0, 6) == first | third
    assert unifier.single_positions(axis, 0, 3) == first
    assert unifier.single_positions(axis, 1, 3) == set()
    assert unifier.single_positions(axis, 3, 6) == third


def test_shifting_units_for_ever_ends_in_a_pin():
    unifier = Unifier()
    axis = unifier.fresh(1000)
    # Tied to itself shifted by one, the tail is split again, and what is left of it again.
    head, tail = unifier.split_segments(axis, [1])
    shifted = concatenated([tail, head])
    result = tie(unifier, axis, shifted)
    assert None not in reasons(unifier, axis)
    assert size_of(result) == 1000


@given(st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_pieces_put_together_are_the_axis(data: st.DataObject):
    unifier = Unifier()
    size = data.draw(SIZES)
    axis = data.draw(expressions(unifier, size))
    positions = st.integers(1, size - 1)
    drawn = data.draw(st.sets(positions, max_size=3))
    boundaries = sorted(drawn)
    try:
        pieces = unifier.split_segments(axis, boundaries)
    except Disagreement:  # a boundary lies within a block
        return
    lengths = [size_of(piece) for piece in pieces]
    edges = [0, *boundaries, size]
    assert lengths == np.diff(edges).tolist()
    # Unit by unit, not term by term: a product in the axis may be a sum of products in the pieces.
    whole = concatenated(pieces)
    assert free_units(unifier, whole) == free_units(unifier, axis)
    assert single_positions(unifier, whole) == single_positions(unifier, axis)
