"""Checks the algebra of axes against numpy: what is tied, split and pinned, and with which role."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otfusion_jax.tracing.axis import (
    Axis,
    Disagreement,
    Factor,
    Kind,
    Sum,
    concatenated,
    constant,
    factors_of,
    size_of,
)
from otfusion_jax.tracing.unification import Unifier

FEATURE, PARAMETER, CONSTANT = Kind.FEATURE, Kind.PARAMETER, Kind.CONSTANT
BOTH_FEATURES = (FEATURE, FEATURE)


def sizes(unifier: Unifier, axis: Axis) -> tuple[int, ...]:
    return tuple(f.size for f in unifier.expand(axis))


def variables(unifier: Unifier, axis: Axis) -> tuple[int | None, ...]:
    return tuple(f.variable for f in factors_of(unifier.expand(axis)))


def reasons(unifier: Unifier, axis: Axis) -> set[str | None]:
    return {
        unifier.reason(variable) for variable in variables(unifier, axis) if variable is not None
    }


def free(unifier: Unifier, axis: Axis) -> list[int]:
    return [a for a in variables(unifier, axis) if a is not None and unifier.reason(a) is None]


def tie(unifier: Unifier, a: Axis, b: Axis) -> Axis:
    return unifier.unify([a, b], BOTH_FEATURES)


# --- atoms


def test_size_one_is_the_empty_product():
    unifier = Unifier()
    assert unifier.fresh(1) == unifier.pinned(1, "never shown") == constant(1) == ()
    assert unifier.unify([(), ()], BOTH_FEATURES) == ()


def test_equal_atoms_become_one():
    unifier = Unifier()
    a, b, c = (unifier.fresh(4) for _ in range(3))
    tie(unifier, a, b)
    assert variables(unifier, a) == variables(unifier, b) != variables(unifier, c)
    tie(unifier, c, b)
    assert variables(unifier, a) == variables(unifier, c)


def test_factorisation_splits_what_it_meets():
    unifier = Unifier()
    whole, outer, inner = unifier.fresh(6), unifier.fresh(2), unifier.fresh(3)
    out = tie(unifier, whole, outer + inner)
    assert sizes(unifier, whole) == sizes(unifier, out) == (2, 3)
    assert variables(unifier, whole) == variables(unifier, outer + inner)
    assert reasons(unifier, out) == {None}


def test_common_refinement_splits_both_sides():
    unifier = Unifier()
    a, b, c, d = (unifier.fresh(n) for n in (2, 6, 4, 3))
    tie(unifier, a + b, c + d)  # [2, 6] and [4, 3] both refine to [2, 2, 3]
    assert sizes(unifier, a + b) == sizes(unifier, c + d) == (2, 2, 3)
    assert variables(unifier, a + b) == variables(unifier, c + d)
    assert reasons(unifier, a + b) == {None}


def test_no_common_refinement_pins_both():
    unifier = Unifier()
    a, b, c, d = (unifier.fresh(n) for n in (2, 3, 3, 2))
    out = tie(unifier, a + b, c + d)
    for axis in (a, b, c, d, out):
        assert all(reason and "refinement" in reason for reason in reasons(unifier, axis))
    assert math.prod(sizes(unifier, out)) == 6


def test_a_pin_does_not_cross_to_factors_that_agreed():
    unifier = Unifier()
    same = unifier.fresh(5)
    a, b, c, d = (unifier.fresh(n) for n in (2, 3, 3, 2))
    tie(unifier, same + a + b, same + c + d)
    assert reasons(unifier, same) == {None}
    assert None not in reasons(unifier, a + b + c + d)


@pytest.mark.parametrize("pin_first", [True, False])
def test_pins_reach_the_parts_of_a_split(pin_first: bool):
    unifier = Unifier()
    whole, outer, inner = unifier.fresh(6), unifier.fresh(2), unifier.fresh(3)
    if pin_first:
        unifier.pin(whole, "why")
    tie(unifier, whole, outer + inner)
    if not pin_first:
        unifier.pin(whole, "why")
    assert reasons(unifier, outer) == reasons(unifier, inner) == {"why"}


def test_a_pinned_part_leaves_the_other_free():
    unifier = Unifier()
    whole, outer, inner = unifier.fresh(6), unifier.pinned(2, "why"), unifier.fresh(3)
    tie(unifier, whole, outer + inner)
    assert [unifier.reason(a) for a in variables(unifier, whole) if a is not None] == ["why", None]


@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_pins_spread_through_unions_and_the_first_reason_stays(pinned: int):
    unifier = Unifier()
    axes = [unifier.fresh(4) for _ in range(3)]
    unifier.pin(axes[pinned], "first")
    tie(unifier, axes[0], axes[1])
    tie(unifier, axes[1], axes[2])
    unifier.pin(axes[(pinned + 1) % 3], "second")
    assert all(reasons(unifier, axis) == {"first"} for axis in axes)


def test_a_union_reaches_atoms_split_earlier_and_later():
    unifier = Unifier()
    a, b, c = (unifier.fresh(12) for _ in range(3))
    tie(unifier, a, unifier.fresh(3) + unifier.fresh(4))
    tie(unifier, a, b)
    tie(unifier, c, unifier.fresh(6) + unifier.fresh(2))
    tie(unifier, b, c)
    assert sizes(unifier, a) == sizes(unifier, b) == sizes(unifier, c) == (3, 2, 2)
    assert variables(unifier, a) == variables(unifier, b) == variables(unifier, c)


def test_an_atom_met_twice_in_one_axis():
    unifier = Unifier()
    a, b = unifier.fresh(2), unifier.fresh(4)
    tie(unifier, a + a, b)  # [A, A] is the axis of a square
    assert variables(unifier, b) == variables(unifier, a) * 2
    tie(unifier, b + b, unifier.fresh(8) + unifier.fresh(2))
    assert variables(unifier, b + b) == variables(unifier, a) * 4


def test_constants_couple_nothing():
    unifier = Unifier()
    a, b, zeros = unifier.fresh(4), unifier.fresh(4), constant(4)
    kinds = (FEATURE, CONSTANT)
    assert unifier.unify([a, zeros], kinds) == unifier.unify([zeros, a], kinds[::-1]) == a
    unifier.unify([b, zeros], kinds)
    unifier.contract(a, zeros, kinds)
    assert variables(unifier, a) != variables(unifier, b)
    assert reasons(unifier, a + b) == {None}


def test_a_constant_is_split_along_with_the_axis_it_meets():
    unifier = Unifier()
    outer, inner = unifier.fresh(2), unifier.fresh(3)
    out = unifier.unify([constant(6), outer + inner], (CONSTANT, FEATURE))
    assert variables(unifier, out) == variables(unifier, outer + inner)
    assert reasons(unifier, out) == {None}


# --- regrouping, against numpy


@st.composite
def regroupings(draw) -> tuple[list[list[int]], list[int]]:
    """Axes, each a product of factors, and other sizes of the same product."""
    axes = draw(
        st.lists(st.lists(st.integers(2, 4), max_size=3), min_size=1, max_size=3).filter(
            lambda axes: math.prod(math.prod(a) for a in axes) <= 512
        )
    )
    left = math.prod(math.prod(a) for a in axes)
    target = []
    while left > 1 and len(target) < 5:
        target.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= target[-1]
    return axes, [*target, left]


def permuted(unifier: Unifier, array: np.ndarray, axes: list[Axis], seed: int) -> np.ndarray:
    """Permutes every free atom of an array, each by a permutation of its own."""
    flat = [f for axis in axes for f in factors_of(unifier.expand(axis))]
    full = array.reshape([f.size for f in flat])
    for dim, factor in enumerate(flat):
        assert factor.variable is not None
        if unifier.reason(factor.variable) is None:
            rng = np.random.default_rng([seed, factor.variable])
            full = full.take(rng.permutation(factor.size), axis=dim)
    return full.reshape(array.shape)


@settings(max_examples=100, deadline=None)
@given(regroupings(), st.integers(0, 9))
def test_permuting_atoms_commutes_with_reshape(regrouping, seed):
    factors, target = regrouping
    unifier = Unifier()
    axes = [sum((unifier.fresh(n) for n in axis), ()) for axis in factors]
    array = np.arange(math.prod(target)).reshape([math.prod(a) for a in factors])
    out = unifier.regroup(axes, target, "cut across")
    assert [math.prod(f.size for f in axis) for axis in out] == target
    before = permuted(unifier, array, axes, seed).reshape(target)
    after = permuted(unifier, array.reshape(target), out, seed)
    assert np.array_equal(before, after)


@settings(max_examples=100, deadline=None)
@given(regroupings())
def test_regrouping_there_and_back_keeps_what_is_free(regrouping):
    factors, target = regrouping
    unifier = Unifier()
    axes = [sum((unifier.fresh(n) for n in axis), ()) for axis in factors]
    there = unifier.regroup(axes, target, "there")
    back = unifier.regroup(there, [math.prod(a) for a in factors], "back")
    for old, new in zip(axes, back, strict=True):
        assert free(unifier, old) == free(unifier, new)
        assert reasons(unifier, old) != {None} or variables(unifier, old) == variables(unifier, new)


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
def test_regroup_pins_only_where_sizes_cut_across(before, after, whole):
    unifier = Unifier()
    axes = [unifier.fresh(n) for n in before]
    out = unifier.regroup(axes, after, "cut across")
    expected = {None} if whole else {"cut across"}
    assert set().union(*(reasons(unifier, a) for a in [*axes, *out])) == expected


def test_regroup_pins_only_the_run_that_is_cut():
    unifier = Unifier()
    spared, a, b = unifier.fresh(5), unifier.fresh(2), unifier.fresh(3)
    out = unifier.regroup([spared, a, b], [5, 3, 2], "cut across")
    assert variables(unifier, out[0]) == variables(unifier, spared)
    assert reasons(unifier, spared) == {None}
    assert reasons(unifier, a + b) == {"cut across"}


def test_regroup_of_nothing():
    unifier = Unifier()
    out = unifier.regroup([unifier.fresh(3), constant(0)], (0, 7), "empty")
    assert [math.prod(f.size for f in a) for a in out] == [0, 7]


# --- roles


def feature(unifier: Unifier, size: int) -> tuple[Axis, Axis]:
    """A parameter that produces features, and those."""
    parameter = unifier.fresh(size)
    return parameter, unifier.enter(parameter, PARAMETER, FEATURE)


def signs(unifier: Unifier, axis: Axis) -> list[set[int]]:
    """Per factor of a parameter, the signs of its uses, as seen from the parameter."""
    table, out = unifier.signs(), []
    for factor in factors_of(unifier.expand(axis)):
        use, flip = unifier.use(factor)
        out.append({flip * sign for sign in table.get(use, ())})
    return out


def test_both_roles_outlast_a_split():
    unifier = Unifier()
    kernel, features = feature(unifier, 6)
    unifier.contract(features, features, BOTH_FEATURES)
    unifier.regroup([features], (2, 3), "split")
    assert signs(unifier, kernel) == [{1, -1}, {1, -1}]


def test_the_first_contact_produces_and_a_contraction_consumes():
    unifier = Unifier()
    kernel, features = feature(unifier, 4)
    after = unifier.fresh(4)
    unifier.contract(features, after, (FEATURE, PARAMETER))
    assert signs(unifier, kernel) == [{1}]
    assert signs(unifier, after) == [{-1}]
    assert variables(unifier, kernel) == variables(unifier, after)


def test_elementwise_parameters_produce_what_they_meet():
    unifier = Unifier()
    kernel, features = feature(unifier, 4)
    bias = unifier.fresh(4)
    unifier.unify([features, bias], (FEATURE, PARAMETER))
    assert signs(unifier, kernel) == signs(unifier, bias) == [{1}]


def test_contracted_features_have_opposite_roles():
    unifier = Unifier()
    (q, q_features), (k, k_features) = feature(unifier, 4), feature(unifier, 4)
    unifier.contract(q_features, k_features, BOTH_FEATURES)
    assert signs(unifier, q) == [{1}]
    assert signs(unifier, k) == [{-1}]


def test_opposite_of_opposite_is_equal():
    unifier = Unifier()
    (a, fa), (b, fb), (c, fc) = (feature(unifier, 4) for _ in range(3))
    unifier.contract(fa, fb, BOTH_FEATURES)
    unifier.contract(fb, fc, BOTH_FEATURES)
    assert [signs(unifier, axis) for axis in (a, b, c)] == [[{1}], [{-1}], [{1}]]


def test_a_parameter_used_in_both_ways_has_both_roles():
    unifier = Unifier()
    table, features = feature(unifier, 4)
    unifier.contract(features, table, (FEATURE, PARAMETER))
    assert signs(unifier, table) == [{1, -1}]


def test_features_contracted_with_themselves_have_both_roles():
    unifier = Unifier()
    kernel, features = feature(unifier, 4)
    unifier.contract(features, features, BOTH_FEATURES)
    assert signs(unifier, kernel) == [{1, -1}]


def test_a_contradiction_further_off_gives_both_roles_to_all():
    unifier = Unifier()
    (a, fa), (b, fb), (c, fc) = (feature(unifier, 4) for _ in range(3))
    unifier.contract(fa, fb, BOTH_FEATURES)
    tie(unifier, fb, fc)
    tie(unifier, fc, fa)
    assert [signs(unifier, axis) for axis in (a, b, c)] == [[{1, -1}]] * 3


def test_low_rank_factors_produce_and_consume_the_rank():
    unifier = Unifier()
    a, b = unifier.fresh(3), unifier.fresh(3)
    unifier.contract(a, b, (PARAMETER, PARAMETER))
    assert signs(unifier, a) == [{1}]
    assert signs(unifier, b) == [{-1}]


def test_factors_of_one_axis_have_roles_of_their_own():
    unifier = Unifier()
    (q, q_features), (k, k_features) = feature(unifier, 6), feature(unifier, 6)
    halves = [unifier.regroup([axis], (2, 3), "heads") for axis in (q_features, k_features)]
    (q_heads, q_dim), (k_heads, k_dim) = halves
    tie(unifier, q_heads, k_heads)
    unifier.contract(q_dim, k_dim, BOTH_FEATURES)
    assert signs(unifier, q) == [{1}, {1}]
    assert signs(unifier, k) == [{1}, {-1}]


def test_a_role_tied_before_the_split_holds_for_both_parts():
    unifier = Unifier()
    (a, fa), (b, fb) = feature(unifier, 6), feature(unifier, 6)
    unifier.contract(fa, fb, BOTH_FEATURES)
    unifier.regroup([fa], (2, 3), "split")
    assert signs(unifier, a) == [{1}, {1}]
    assert signs(unifier, b) == [{-1}, {-1}]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=12))
def test_role_parity_is_the_two_colouring_of_the_ties(ties):
    """Roles agree with a brute-force search over all assignments of signs."""
    unifier = Unifier()
    pairs = [feature(unifier, 3) for _ in range(6)]
    for i, j, opposite in ties:
        a, b = pairs[i][1], pairs[j][1]
        if opposite:
            unifier.contract(a, b, BOTH_FEATURES)
        else:
            tie(unifier, a, b)
    colourings = [
        colours
        for colours in np.ndindex(*(2,) * 6)
        if all((colours[i] != colours[j]) == opposite for i, j, opposite in ties)
    ]
    found = [signs(unifier, parameter)[0] for parameter, _ in pairs]
    assert bool(colourings) == all(len(f) == 1 for f in found)
    for i, j, opposite in ties:
        if len(found[i]) == len(found[j]) == 1:
            assert (found[i] != found[j]) == opposite


def test_factor_without_atom_is_left_alone():
    unifier = Unifier()
    assert unifier.expand((Factor(3, None),)) == (Factor(3, None),)
    unifier.pin((Factor(3, None),), "nothing to pin")


# --- sums


def of_sizes(unifier: Unifier, axis: Axis) -> list:
    """The sizes that an axis is made of, segments as lists."""
    return [
        [of_sizes(unifier, segment) for segment in term.segments]
        if isinstance(term, Sum)
        else term.size
        for term in unifier.expand(axis)
    ]


def test_a_cut_takes_every_occurrence_apart():
    unifier = Unifier()
    a, b = unifier.fresh(6), unifier.fresh(6)
    tie(unifier, a, b)
    first, second = unifier.cut(a, [2])
    assert of_sizes(unifier, b) == [[[2], [4]]]
    assert unifier.signature(concatenated([first, second])) == unifier.signature(b)
    assert len(set(variables(unifier, b))) == 2


def test_blocks_of_a_product_are_cut_between_only():
    unifier = Unifier()
    outer, inner = unifier.fresh(3), unifier.fresh(4)
    pieces = unifier.cut(outer + inner, [4])
    assert [size_of(piece) for piece in pieces] == [4, 8]
    assert variables(unifier, pieces[0]) == variables(unifier, inner)
    with pytest.raises(Disagreement, match="within blocks of 4"):
        unifier.cut(outer + inner, [6])


def test_what_is_pinned_is_not_taken_apart():
    unifier = Unifier()
    axis = unifier.pinned(6, "why")
    pieces = unifier.cut(axis, [1, 3])
    assert of_sizes(unifier, axis) == [6]
    assert [size_of(piece) for piece in pieces] == [1, 2, 3]
    assert reasons(unifier, pieces[2]) == {"why"}


def test_segments_meet_at_common_edges():
    unifier = Unifier()
    a, b, c, d = (unifier.fresh(n) for n in (2, 6, 5, 3))
    out = tie(unifier, concatenated([a, b]), concatenated([c, d]))
    assert of_sizes(unifier, out) == [[[2], [3], [3]]]
    assert of_sizes(unifier, b) == [[[3], [3]]]
    assert of_sizes(unifier, c) == [[[2], [3]]]
    assert variables(unifier, d) == variables(unifier, b)[1:]


def test_equal_segments_read_as_rows_move_alike():
    unifier = Unifier()
    a, b = unifier.fresh(4), unifier.fresh(8)
    rows, columns = unifier.regroup([concatenated([a, b])], [3, 4], "why")
    assert size_of(rows) == 3
    assert variables(unifier, columns) == variables(unifier, a) == variables(unifier, b)[1:]


def test_shifting_units_for_ever_ends_in_a_pin():
    unifier = Unifier()
    axis = unifier.fresh(1000)
    head, tail = unifier.cut(axis, [1])
    out = tie(unifier, axis, concatenated([tail, head]))
    assert None not in reasons(unifier, axis)
    assert size_of(out) == 1000


@st.composite
def expressions(draw: st.DrawFn, unifier: Unifier, size: int, depth: int = 2) -> Axis:
    """An axis of some size: an atom, a product or a sum."""
    divisors = [n for n in range(2, size) if size % n == 0]
    kind = draw(st.sampled_from(["atom"] + ["product"] * bool(divisors) + ["sum"] * (size > 1)))
    if depth == 0 or kind == "atom":
        return draw(st.sampled_from([unifier.fresh(size), constant(size)]))
    if kind == "product":
        outer = draw(st.sampled_from(divisors))
        parts = (outer, size // outer)
        return tuple(t for n in parts for t in draw(expressions(unifier, n, depth - 1)))
    mark = draw(st.integers(1, size - 1))
    return concatenated(draw(expressions(unifier, n, depth - 1)) for n in (mark, size - mark))


@given(st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_axes_that_are_tied_read_the_same(data: st.DataObject):
    unifier = Unifier()
    size = data.draw(st.sampled_from([4, 6, 8, 12]))
    a, b = data.draw(expressions(unifier, size)), data.draw(expressions(unifier, size))
    out = tie(unifier, a, b)
    assert size_of(out) == size
    found = [variables(unifier, axis) for axis in (a, b)]
    if None not in reasons(unifier, a) | reasons(unifier, b):
        return  # no common refinement, or taken apart to the last
    free = [[variable for variable in row if variable is not None] for row in found]
    if all(None not in row for row in found):
        assert not (set(free[0]) ^ set(free[1])) or any(
            unifier.reason(variable) for variable in set(free[0]) ^ set(free[1])
        )


@given(st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_pieces_put_together_are_the_axis(data: st.DataObject):
    unifier = Unifier()
    size = data.draw(st.sampled_from([4, 6, 12]))
    axis = data.draw(expressions(unifier, size))
    marks = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3)))
    try:
        pieces = unifier.cut(axis, marks)
    except Disagreement:
        return
    assert [size_of(p) for p in pieces] == np.diff([0, *marks, size]).tolist()
    assert variables(unifier, concatenated(pieces)) == variables(
        unifier, axis
    ) or None in variables(unifier, axis)
