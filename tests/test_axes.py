"""Checks the algebra of axes against numpy: what is tied, split and pinned, and with which role."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otfusion_jax.axes import (
    Axis,
    Disagreement,
    Factor,
    Kind,
    Space,
    Sum,
    concatenated,
    constant,
    factors_of,
    size_of,
)

FEATURE, PARAMETER, CONSTANT = Kind.FEATURE, Kind.PARAMETER, Kind.CONSTANT
BOTH_FEATURES = (FEATURE, FEATURE)


def sizes(space: Space, axis: Axis) -> tuple[int, ...]:
    return tuple(f.size for f in space.expand(axis))


def atoms(space: Space, axis: Axis) -> tuple[int | None, ...]:
    return tuple(f.atom for f in factors_of(space.expand(axis)))


def reasons(space: Space, axis: Axis) -> set[str | None]:
    return {space.reason(atom) for atom in atoms(space, axis) if atom is not None}


def free(space: Space, axis: Axis) -> list[int]:
    return [a for a in atoms(space, axis) if a is not None and space.reason(a) is None]


def tie(space: Space, a: Axis, b: Axis) -> Axis:
    return space.unify([a, b], BOTH_FEATURES)


# --- atoms


def test_size_one_is_the_empty_product():
    space = Space()
    assert space.fresh(1) == space.pinned(1, "never shown") == constant(1) == ()
    assert space.unify([(), ()], BOTH_FEATURES) == ()


def test_equal_atoms_become_one():
    space = Space()
    a, b, c = (space.fresh(4) for _ in range(3))
    tie(space, a, b)
    assert atoms(space, a) == atoms(space, b) != atoms(space, c)
    tie(space, c, b)
    assert atoms(space, a) == atoms(space, c)


def test_factorisation_splits_what_it_meets():
    space = Space()
    whole, outer, inner = space.fresh(6), space.fresh(2), space.fresh(3)
    out = tie(space, whole, outer + inner)
    assert sizes(space, whole) == sizes(space, out) == (2, 3)
    assert atoms(space, whole) == atoms(space, outer + inner)
    assert reasons(space, out) == {None}


def test_common_refinement_splits_both_sides():
    space = Space()
    a, b, c, d = (space.fresh(n) for n in (2, 6, 4, 3))
    tie(space, a + b, c + d)  # [2, 6] and [4, 3] both refine to [2, 2, 3]
    assert sizes(space, a + b) == sizes(space, c + d) == (2, 2, 3)
    assert atoms(space, a + b) == atoms(space, c + d)
    assert reasons(space, a + b) == {None}


def test_no_common_refinement_pins_both():
    space = Space()
    a, b, c, d = (space.fresh(n) for n in (2, 3, 3, 2))
    out = tie(space, a + b, c + d)
    for axis in (a, b, c, d, out):
        assert all(reason and "refinement" in reason for reason in reasons(space, axis))
    assert math.prod(sizes(space, out)) == 6


def test_a_pin_does_not_cross_to_factors_that_agreed():
    space = Space()
    same = space.fresh(5)
    a, b, c, d = (space.fresh(n) for n in (2, 3, 3, 2))
    tie(space, same + a + b, same + c + d)
    assert reasons(space, same) == {None}
    assert None not in reasons(space, a + b + c + d)


@pytest.mark.parametrize("pin_first", [True, False])
def test_pins_reach_the_parts_of_a_split(pin_first: bool):
    space = Space()
    whole, outer, inner = space.fresh(6), space.fresh(2), space.fresh(3)
    if pin_first:
        space.pin(whole, "why")
    tie(space, whole, outer + inner)
    if not pin_first:
        space.pin(whole, "why")
    assert reasons(space, outer) == reasons(space, inner) == {"why"}


def test_a_pinned_part_leaves_the_other_free():
    space = Space()
    whole, outer, inner = space.fresh(6), space.pinned(2, "why"), space.fresh(3)
    tie(space, whole, outer + inner)
    assert [space.reason(a) for a in atoms(space, whole) if a is not None] == ["why", None]


@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_pins_spread_through_unions_and_the_first_reason_stays(pinned: int):
    space = Space()
    axes = [space.fresh(4) for _ in range(3)]
    space.pin(axes[pinned], "first")
    tie(space, axes[0], axes[1])
    tie(space, axes[1], axes[2])
    space.pin(axes[(pinned + 1) % 3], "second")
    assert all(reasons(space, axis) == {"first"} for axis in axes)


def test_a_union_reaches_atoms_split_earlier_and_later():
    space = Space()
    a, b, c = (space.fresh(12) for _ in range(3))
    tie(space, a, space.fresh(3) + space.fresh(4))
    tie(space, a, b)
    tie(space, c, space.fresh(6) + space.fresh(2))
    tie(space, b, c)
    assert sizes(space, a) == sizes(space, b) == sizes(space, c) == (3, 2, 2)
    assert atoms(space, a) == atoms(space, b) == atoms(space, c)


def test_an_atom_met_twice_in_one_axis():
    space = Space()
    a, b = space.fresh(2), space.fresh(4)
    tie(space, a + a, b)  # [A, A] is the axis of a square
    assert atoms(space, b) == atoms(space, a) * 2
    tie(space, b + b, space.fresh(8) + space.fresh(2))
    assert atoms(space, b + b) == atoms(space, a) * 4


def test_constants_couple_nothing():
    space = Space()
    a, b, zeros = space.fresh(4), space.fresh(4), constant(4)
    kinds = (FEATURE, CONSTANT)
    assert space.unify([a, zeros], kinds) == space.unify([zeros, a], kinds[::-1]) == a
    space.unify([b, zeros], kinds)
    space.contract(a, zeros, kinds)
    assert atoms(space, a) != atoms(space, b)
    assert reasons(space, a + b) == {None}


def test_a_constant_is_split_along_with_the_axis_it_meets():
    space = Space()
    outer, inner = space.fresh(2), space.fresh(3)
    out = space.unify([constant(6), outer + inner], (CONSTANT, FEATURE))
    assert atoms(space, out) == atoms(space, outer + inner)
    assert reasons(space, out) == {None}


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


def permuted(space: Space, array: np.ndarray, axes: list[Axis], seed: int) -> np.ndarray:
    """Permutes every free atom of an array, each by a permutation of its own."""
    flat = [f for axis in axes for f in factors_of(space.expand(axis))]
    full = array.reshape([f.size for f in flat])
    for dim, factor in enumerate(flat):
        assert factor.atom is not None
        if space.reason(factor.atom) is None:
            rng = np.random.default_rng([seed, factor.atom])
            full = full.take(rng.permutation(factor.size), axis=dim)
    return full.reshape(array.shape)


@settings(max_examples=100, deadline=None)
@given(regroupings(), st.integers(0, 9))
def test_permuting_atoms_commutes_with_reshape(regrouping, seed):
    factors, target = regrouping
    space = Space()
    axes = [sum((space.fresh(n) for n in axis), ()) for axis in factors]
    array = np.arange(math.prod(target)).reshape([math.prod(a) for a in factors])
    out = space.regroup(axes, target, "cut across")
    assert [math.prod(f.size for f in axis) for axis in out] == target
    before = permuted(space, array, axes, seed).reshape(target)
    after = permuted(space, array.reshape(target), out, seed)
    assert np.array_equal(before, after)


@settings(max_examples=100, deadline=None)
@given(regroupings())
def test_regrouping_there_and_back_keeps_what_is_free(regrouping):
    factors, target = regrouping
    space = Space()
    axes = [sum((space.fresh(n) for n in axis), ()) for axis in factors]
    there = space.regroup(axes, target, "there")
    back = space.regroup(there, [math.prod(a) for a in factors], "back")
    for old, new in zip(axes, back, strict=True):
        assert free(space, old) == free(space, new)
        assert reasons(space, old) != {None} or atoms(space, old) == atoms(space, new)


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
    space = Space()
    axes = [space.fresh(n) for n in before]
    out = space.regroup(axes, after, "cut across")
    expected = {None} if whole else {"cut across"}
    assert set().union(*(reasons(space, a) for a in [*axes, *out])) == expected


def test_regroup_pins_only_the_run_that_is_cut():
    space = Space()
    spared, a, b = space.fresh(5), space.fresh(2), space.fresh(3)
    out = space.regroup([spared, a, b], [5, 3, 2], "cut across")
    assert atoms(space, out[0]) == atoms(space, spared)
    assert reasons(space, spared) == {None}
    assert reasons(space, a + b) == {"cut across"}


def test_regroup_of_nothing():
    space = Space()
    out = space.regroup([space.fresh(3), constant(0)], (0, 7), "empty")
    assert [math.prod(f.size for f in a) for a in out] == [0, 7]


# --- roles


def feature(space: Space, size: int) -> tuple[Axis, Axis]:
    """A parameter that produces features, and those."""
    parameter = space.fresh(size)
    return parameter, space.enter(parameter, PARAMETER, FEATURE)


def signs(space: Space, axis: Axis) -> list[set[int]]:
    """Per factor of a parameter, the signs of its uses, as seen from the parameter."""
    table, out = space.signs(), []
    for factor in factors_of(space.expand(axis)):
        use, flip = space.use(factor)
        out.append({flip * sign for sign in table.get(use, ())})
    return out


def test_both_roles_outlast_a_split():
    space = Space()
    kernel, features = feature(space, 6)
    space.contract(features, features, BOTH_FEATURES)
    space.regroup([features], (2, 3), "split")
    assert signs(space, kernel) == [{1, -1}, {1, -1}]


def test_the_first_contact_produces_and_a_contraction_consumes():
    space = Space()
    kernel, features = feature(space, 4)
    after = space.fresh(4)
    space.contract(features, after, (FEATURE, PARAMETER))
    assert signs(space, kernel) == [{1}]
    assert signs(space, after) == [{-1}]
    assert atoms(space, kernel) == atoms(space, after)


def test_elementwise_parameters_produce_what_they_meet():
    space = Space()
    kernel, features = feature(space, 4)
    bias = space.fresh(4)
    space.unify([features, bias], (FEATURE, PARAMETER))
    assert signs(space, kernel) == signs(space, bias) == [{1}]


def test_contracted_features_have_opposite_roles():
    space = Space()
    (q, q_features), (k, k_features) = feature(space, 4), feature(space, 4)
    space.contract(q_features, k_features, BOTH_FEATURES)
    assert signs(space, q) == [{1}]
    assert signs(space, k) == [{-1}]


def test_opposite_of_opposite_is_equal():
    space = Space()
    (a, fa), (b, fb), (c, fc) = (feature(space, 4) for _ in range(3))
    space.contract(fa, fb, BOTH_FEATURES)
    space.contract(fb, fc, BOTH_FEATURES)
    assert [signs(space, axis) for axis in (a, b, c)] == [[{1}], [{-1}], [{1}]]


def test_a_parameter_used_in_both_ways_has_both_roles():
    space = Space()
    table, features = feature(space, 4)
    space.contract(features, table, (FEATURE, PARAMETER))
    assert signs(space, table) == [{1, -1}]


def test_features_contracted_with_themselves_have_both_roles():
    space = Space()
    kernel, features = feature(space, 4)
    space.contract(features, features, BOTH_FEATURES)
    assert signs(space, kernel) == [{1, -1}]


def test_a_contradiction_further_off_gives_both_roles_to_all():
    space = Space()
    (a, fa), (b, fb), (c, fc) = (feature(space, 4) for _ in range(3))
    space.contract(fa, fb, BOTH_FEATURES)
    tie(space, fb, fc)
    tie(space, fc, fa)
    assert [signs(space, axis) for axis in (a, b, c)] == [[{1, -1}]] * 3


def test_low_rank_factors_produce_and_consume_the_rank():
    space = Space()
    a, b = space.fresh(3), space.fresh(3)
    space.contract(a, b, (PARAMETER, PARAMETER))
    assert signs(space, a) == [{1}]
    assert signs(space, b) == [{-1}]


def test_factors_of_one_axis_have_roles_of_their_own():
    space = Space()
    (q, q_features), (k, k_features) = feature(space, 6), feature(space, 6)
    halves = [space.regroup([axis], (2, 3), "heads") for axis in (q_features, k_features)]
    (q_heads, q_dim), (k_heads, k_dim) = halves
    tie(space, q_heads, k_heads)
    space.contract(q_dim, k_dim, BOTH_FEATURES)
    assert signs(space, q) == [{1}, {1}]
    assert signs(space, k) == [{1}, {-1}]


def test_a_role_tied_before_the_split_holds_for_both_parts():
    space = Space()
    (a, fa), (b, fb) = feature(space, 6), feature(space, 6)
    space.contract(fa, fb, BOTH_FEATURES)
    space.regroup([fa], (2, 3), "split")
    assert signs(space, a) == [{1}, {1}]
    assert signs(space, b) == [{-1}, {-1}]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=12))
def test_role_parity_is_the_two_colouring_of_the_ties(ties):
    """Roles agree with a brute-force search over all assignments of signs."""
    space = Space()
    pairs = [feature(space, 3) for _ in range(6)]
    for i, j, opposite in ties:
        a, b = pairs[i][1], pairs[j][1]
        if opposite:
            space.contract(a, b, BOTH_FEATURES)
        else:
            tie(space, a, b)
    colourings = [
        colours
        for colours in np.ndindex(*(2,) * 6)
        if all((colours[i] != colours[j]) == opposite for i, j, opposite in ties)
    ]
    found = [signs(space, parameter)[0] for parameter, _ in pairs]
    assert bool(colourings) == all(len(f) == 1 for f in found)
    for i, j, opposite in ties:
        if len(found[i]) == len(found[j]) == 1:
            assert (found[i] != found[j]) == opposite


def test_factor_without_atom_is_left_alone():
    space = Space()
    assert space.expand((Factor(3, None),)) == (Factor(3, None),)
    space.pin((Factor(3, None),), "nothing to pin")


# --- sums


def of_sizes(space: Space, axis: Axis) -> list:
    """The sizes that an axis is made of, segments as lists."""
    return [
        [of_sizes(space, segment) for segment in term.segments]
        if isinstance(term, Sum)
        else term.size
        for term in space.expand(axis)
    ]


def test_a_cut_takes_every_occurrence_apart():
    space = Space()
    a, b = space.fresh(6), space.fresh(6)
    tie(space, a, b)
    first, second = space.cut(a, [2])
    assert of_sizes(space, b) == [[[2], [4]]]
    assert space.signature(concatenated([first, second])) == space.signature(b)
    assert len(set(atoms(space, b))) == 2


def test_blocks_of_a_product_are_cut_between_only():
    space = Space()
    outer, inner = space.fresh(3), space.fresh(4)
    pieces = space.cut(outer + inner, [4])
    assert [size_of(piece) for piece in pieces] == [4, 8]
    assert atoms(space, pieces[0]) == atoms(space, inner)
    with pytest.raises(Disagreement, match="within blocks of 4"):
        space.cut(outer + inner, [6])


def test_what_is_pinned_is_not_taken_apart():
    space = Space()
    axis = space.pinned(6, "why")
    pieces = space.cut(axis, [1, 3])
    assert of_sizes(space, axis) == [6]
    assert [size_of(piece) for piece in pieces] == [1, 2, 3]
    assert reasons(space, pieces[2]) == {"why"}


def test_segments_meet_at_common_edges():
    space = Space()
    a, b, c, d = (space.fresh(n) for n in (2, 6, 5, 3))
    out = tie(space, concatenated([a, b]), concatenated([c, d]))
    assert of_sizes(space, out) == [[[2], [3], [3]]]
    assert of_sizes(space, b) == [[[3], [3]]]
    assert of_sizes(space, c) == [[[2], [3]]]
    assert atoms(space, d) == atoms(space, b)[1:]


def test_equal_segments_read_as_rows_move_alike():
    space = Space()
    a, b = space.fresh(4), space.fresh(8)
    rows, columns = space.regroup([concatenated([a, b])], [3, 4], "why")
    assert size_of(rows) == 3
    assert atoms(space, columns) == atoms(space, a) == atoms(space, b)[1:]


def test_shifting_units_for_ever_ends_in_a_pin():
    space = Space()
    axis = space.fresh(1000)
    head, tail = space.cut(axis, [1])
    out = tie(space, axis, concatenated([tail, head]))
    assert None not in reasons(space, axis)
    assert size_of(out) == 1000


@st.composite
def expressions(draw: st.DrawFn, space: Space, size: int, depth: int = 2) -> Axis:
    """An axis of some size: an atom, a product or a sum."""
    divisors = [n for n in range(2, size) if size % n == 0]
    kind = draw(st.sampled_from(["atom"] + ["product"] * bool(divisors) + ["sum"] * (size > 1)))
    if depth == 0 or kind == "atom":
        return draw(st.sampled_from([space.fresh(size), constant(size)]))
    if kind == "product":
        outer = draw(st.sampled_from(divisors))
        parts = (outer, size // outer)
        return tuple(t for n in parts for t in draw(expressions(space, n, depth - 1)))
    mark = draw(st.integers(1, size - 1))
    return concatenated(draw(expressions(space, n, depth - 1)) for n in (mark, size - mark))


@given(st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_axes_that_are_tied_read_the_same(data: st.DataObject):
    space = Space()
    size = data.draw(st.sampled_from([4, 6, 8, 12]))
    a, b = data.draw(expressions(space, size)), data.draw(expressions(space, size))
    out = tie(space, a, b)
    assert size_of(out) == size
    found = [atoms(space, axis) for axis in (a, b)]
    if None not in reasons(space, a) | reasons(space, b):
        return  # no common refinement, or taken apart to the last
    free = [[atom for atom in row if atom is not None] for row in found]
    if all(None not in row for row in found):
        assert not (set(free[0]) ^ set(free[1])) or any(
            space.reason(atom) for atom in set(free[0]) ^ set(free[1])
        )


@given(st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_pieces_put_together_are_the_axis(data: st.DataObject):
    space = Space()
    size = data.draw(st.sampled_from([4, 6, 12]))
    axis = data.draw(expressions(space, size))
    marks = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3)))
    try:
        pieces = space.cut(axis, marks)
    except Disagreement:
        return
    assert [size_of(p) for p in pieces] == np.diff([0, *marks, size]).tolist()
    assert atoms(space, concatenated(pieces)) == atoms(space, axis) or None in atoms(space, axis)
