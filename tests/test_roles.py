"""Checks which axes of parameters are found to produce units, and which to consume them."""

import numpy as np
from axes import BOTH_FEATURES, FEATURE, PARAMETER, assert_same, tie
from hypothesis import given, settings
from hypothesis import strategies as st

from otfusion_jax.tracing.axis import Axis, factors_of
from otfusion_jax.tracing.unification import Unifier

PRODUCES = {1}
CONSUMES = {-1}
BOTH = {1, -1}


def layer(unifier: Unifier, size: int) -> tuple[Axis, Axis]:
    """An axis of a parameter that produces features, and that of the features."""
    parameter = unifier.fresh(size)
    return parameter, unifier.enter(parameter, PARAMETER, FEATURE)


def signs(unifier: Unifier, axis: Axis) -> list[set[int]]:
    """For each factor of a parameter's axis, the signs with which it meets features."""
    by_key = unifier.role_signs()
    found = []
    expanded = unifier.expand(axis)
    for factor in factors_of(expanded):
        key, key_sign = unifier.role_key(factor)
        factor_signs = set()
        for sign in by_key.get(key, ()):
            factor_signs.add(key_sign * sign)
        found.append(factor_signs)
    return found


def assert_roles(unifier: Unifier, axis: Axis, *expected: set[int]) -> None:
    """The factors of a parameter's axis have these roles, one each."""
    assert signs(unifier, axis) == list(expected)


# --- one axis


def test_what_enters_features_produces_and_what_is_contracted_with_them_consumes():
    unifier = Unifier()
    kernel, features = layer(unifier, 4)
    next_kernel = unifier.fresh(4)
    unifier.contract(features, next_kernel, (FEATURE, PARAMETER))
    assert_roles(unifier, kernel, PRODUCES)
    assert_roles(unifier, next_kernel, CONSUMES)
    assert_same(unifier, kernel, next_kernel)


def test_elementwise_parameters_produce_what_they_meet():
    unifier = Unifier()
    kernel, features = layer(unifier, 4)
    bias = unifier.fresh(4)
    unifier.unify([features, bias], (FEATURE, PARAMETER))
    assert_roles(unifier, kernel, PRODUCES)
    assert_roles(unifier, bias, PRODUCES)


def test_a_parameter_used_in_both_ways_has_both_roles():
    unifier = Unifier()
    table, features = layer(unifier, 4)
    # An embedding that is tied reads its own features in the end.
    unifier.contract(features, table, (FEATURE, PARAMETER))
    assert_roles(unifier, table, BOTH)


def test_low_rank_factors_produce_and_consume_the_rank():
    unifier = Unifier()
    a = unifier.fresh(3)
    b = unifier.fresh(3)
    # x @ (a @ b) is (x @ a) @ b, whose features lie between the two.
    unifier.contract(a, b, (PARAMETER, PARAMETER))
    assert_roles(unifier, a, PRODUCES)
    assert_roles(unifier, b, CONSUMES)


# --- features that are contracted with features


def test_contracted_features_have_opposite_roles():
    unifier = Unifier()
    queries, query_features = layer(unifier, 4)
    keys, key_features = layer(unifier, 4)
    unifier.contract(query_features, key_features, BOTH_FEATURES)
    assert_roles(unifier, queries, PRODUCES)
    assert_roles(unifier, keys, CONSUMES)


def test_opposite_of_opposite_is_equal():
    unifier = Unifier()
    a, features_a = layer(unifier, 4)
    b, features_b = layer(unifier, 4)
    c, features_c = layer(unifier, 4)
    unifier.contract(features_a, features_b, BOTH_FEATURES)
    unifier.contract(features_b, features_c, BOTH_FEATURES)
    assert_roles(unifier, a, PRODUCES)
    assert_roles(unifier, b, CONSUMES)
    assert_roles(unifier, c, PRODUCES)


def test_features_contracted_with_themselves_have_both_roles():
    unifier = Unifier()
    kernel, features = layer(unifier, 4)
    unifier.contract(features, features, BOTH_FEATURES)
    assert_roles(unifier, kernel, BOTH)


def test_a_contradiction_further_off_gives_both_roles_to_all():
    unifier = Unifier()
    a, features_a = layer(unifier, 4)
    b, features_b = layer(unifier, 4)
    c, features_c = layer(unifier, 4)
    unifier.contract(features_a, features_b, BOTH_FEATURES)
    # b is equal to a by way of c, and opposite to it at once.
    tie(unifier, features_b, features_c)
    tie(unifier, features_c, features_a)
    for parameter in (a, b, c):
        assert_roles(unifier, parameter, BOTH)


LAYERS = st.integers(0, 5)
TIES = st.tuples(LAYERS, LAYERS, st.booleans())
Tie = tuple[int, int, bool]
"""Two layers, and whether they are opposite."""


@settings(max_examples=100, deadline=None)
@given(st.lists(TIES, max_size=12))
def test_role_parity_is_the_two_colouring_of_the_ties(ties: list[Tie]):
    """Roles agree with a brute-force search over all assignments of signs."""
    unifier = Unifier()
    layers = [layer(unifier, 3) for _ in range(6)]
    for i, j, opposite in ties:
        _, features_i = layers[i]
        _, features_j = layers[j]
        if opposite:
            unifier.contract(features_i, features_j, BOTH_FEATURES)
        else:
            tie(unifier, features_i, features_j)

    found = []
    for parameter, _ in layers:
        (factor_signs,) = signs(unifier, parameter)
        found.append(factor_signs)
    has_colouring = False
    for colours in np.ndindex(2, 2, 2, 2, 2, 2):
        has_colouring |= obeys(ties, colours)
    # Where one contradicts another, all that are connected to it have both roles.
    assert has_colouring == (BOTH not in found)
    for i, j, opposite in ties:
        if BOTH not in (found[i], found[j]):
            differ = found[i] != found[j]
            assert differ == opposite


def obeys(ties: list[Tie], colours: tuple[int, ...]) -> bool:
    """Whether two colours are equal where they are tied, and differ where they are opposite."""
    for i, j, opposite in ties:
        differ = colours[i] != colours[j]
        if differ != opposite:
            return False
    return True


# --- axes that are split


def test_factors_of_one_axis_have_roles_of_their_own():
    unifier = Unifier()
    queries, query_features = layer(unifier, 6)
    keys, key_features = layer(unifier, 6)
    query_heads, query_units = unifier.regroup([query_features], (2, 3), "heads")
    key_heads, key_units = unifier.regroup([key_features], (2, 3), "heads")
    # In attention each head of the queries meets the same head of the keys.
    tie(unifier, query_heads, key_heads)
    unifier.contract(query_units, key_units, BOTH_FEATURES)
    assert_roles(unifier, queries, PRODUCES, PRODUCES)
    assert_roles(unifier, keys, PRODUCES, CONSUMES)


def test_a_role_tied_before_the_split_holds_for_both_parts():
    unifier = Unifier()
    a, features_a = layer(unifier, 6)
    b, features_b = layer(unifier, 6)
    unifier.contract(features_a, features_b, BOTH_FEATURES)
    unifier.regroup([features_a], (2, 3), "split")
    assert_roles(unifier, a, PRODUCES, PRODUCES)
    assert_roles(unifier, b, CONSUMES, CONSUMES)


def test_both_roles_outlast_a_split():
    unifier = Unifier()
    kernel, features = layer(unifier, 6)
    unifier.contract(features, features, BOTH_FEATURES)
    unifier.regroup([features], (2, 3), "split")
    assert_roles(unifier, kernel, BOTH, BOTH)
