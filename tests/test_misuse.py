"""Checks that arguments of a wrong kind are told what to pass, and that no call that works is."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals
from flax import linen as nn
from flax import nnx

import otfusion_jax as otf

otf_any: Any = otf  # for calls that a type checker would refuse

X, SHIFT = normal(4, 5), normal(4, 3, seed=1)
PARAMS = normals({"in": (5, 8), "out": (8, 3)})


def network(params, x, shift):
    return jnp.tanh(x @ params["in"]) @ params["out"] + shift


SYMMETRY = otf.trace_symmetry(network, PARAMS, X, SHIFT)

FUNCTIONS: dict[str, Callable] = {
    "trace_symmetry": otf_any.trace_symmetry,
    "features": lambda fn, params, *inputs: otf_any.features(SYMMETRY, fn, params, *inputs),
    "check_symmetry": lambda fn, params, *inputs: otf_any.check_symmetry(
        SYMMETRY, fn, params, *inputs
    ),
}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Recurrent:
    """A class whose constructor takes what a function would."""

    def __init__(self, params, x, shift):
        self.state = params, x, shift


# --- all three functions that call the user's


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_inputs_in_a_list_are_asked_for_one_by_one(call: Callable):
    for several in ([X, SHIFT], (X, SHIFT)):
        with pytest.raises(TypeError, match="given as one (list|tuple); pass each of them as an"):
            call(network, PARAMS, several)


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_inputs_that_the_function_does_not_take_are_to_be_left_out(call: Callable):
    def unlabelled(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    with pytest.raises(TypeError, match="than the 2 given: the first 1 do; leave out the rest"):
        call(unlabelled, PARAMS, X, SHIFT)
    with pytest.raises(TypeError, match="leave out the rest, such as labels"):
        otf.merge(unlabelled, [PARAMS, PARAMS], [(X, SHIFT)], outputs="logits")


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_class_is_no_function(call: Callable):
    with pytest.raises(TypeError, match=r"the function is the class Recurrent; pass a function fn"):
        call(Recurrent, PARAMS, X, SHIFT)
    with pytest.raises(TypeError, match="function of entry point 0 is the class Recurrent"):
        call([(Recurrent, (X, SHIFT))], PARAMS)


# In the tests, the annotations of `features` are checked before it is called.
@pytest.mark.parametrize("name", ["trace_symmetry", "check_symmetry"])
def test_entry_points_have_tuples_of_inputs(name: str):
    call = FUNCTIONS[name]
    with pytest.raises(TypeError, match="inputs of entry point 0 are a list; pass a tuple of"):
        call([(network, [X, SHIFT])], PARAMS)
    with pytest.raises(TypeError, match="entry point 0 is no pair .* but a function; pass fn"):
        call((network, (X, SHIFT)), PARAMS)


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("value", ["x", np.ndarray, object()])
def test_inputs_are_arrays(call: Callable, value: Any):
    with pytest.raises(TypeError, match="input 1 is (an?|the class) (str|ndarray|object); pass"):
        call(network, PARAMS, X, value)


@pytest.mark.parametrize("name", ["features", "check_symmetry"])
@pytest.mark.parametrize("given", [(X, PARAMS, SHIFT), (X, SHIFT, PARAMS)])
def test_parameters_come_before_inputs(name: str, given: tuple):
    number = 0 if given[1] is PARAMS else 1
    message = f"parameters were given as input {number}, .* call {name}.symmetry, fn, params, "
    with pytest.raises(TypeError, match=message):
        FUNCTIONS[name](network, *given)


# --- what a trace finds out by itself


@pytest.mark.parametrize("given", [(X, PARAMS, SHIFT), (X, SHIFT, PARAMS)])
def test_swapped_parameters_are_told_by_calling_the_other_way_round(given: tuple):
    number = 0 if given[1] is PARAMS else 1
    with pytest.raises(TypeError, match=f"params and input {number} are swapped") as info:
        otf.trace_symmetry(network, *given)
    assert info.value.__cause__ is not None  # what the function itself has raised


def test_modules_hold_the_function_to_pass():
    module = Linen()
    params = jax.eval_shape(module.init, jax.random.key(0), X)
    with pytest.raises(TypeError, match="the function is a Linen, which holds .* its `apply`"):
        otf.trace_symmetry(module, params, X)
    assert [group.size for group in otf.trace_symmetry(module.apply, params, X).groups] == [8]


def test_modules_that_hold_their_parameters_are_taken_apart_first():
    module = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    _, params = otf.functional(module)
    with pytest.raises(TypeError, match=r"holds its own parameters; .* functional\(module\)"):
        otf.trace_symmetry(module, params, X)


def test_pairs_of_init_and_apply_hold_the_function_to_pass():
    class Pair:
        def apply(self, params, x):
            return x @ params["in"]

    with pytest.raises(TypeError, match="a Pair was given as the function; .* its `apply`"):
        otf_any.trace_symmetry(Pair(), PARAMS, X)


# --- what a note says of a function that fails by itself


def of_one_sample(params, x, shift):
    return jnp.dot(jnp.tanh(params["in"].T @ x), params["out"]) + shift


CALLS_OF_BATCHES: dict[str, Callable] = FUNCTIONS | {
    "merge": lambda fn, params, *inputs: otf.merge(fn, [params] * 2, [inputs], outputs="values"),
    "merge with a loss": lambda fn, params, *inputs: otf.merge(
        network, [params] * 2, [inputs], loss=lambda p, *batch: fn(p, *batch).mean()
    ),
    "distill": lambda fn, params, *inputs: otf.distill(
        fn, params, [params], [inputs], outputs="values"
    ),
    "repair": lambda fn, params, *inputs: otf.repair(SYMMETRY, fn, [params] * 2, *inputs),
}


def notes_of(info: pytest.ExceptionInfo) -> str:
    return "\n".join(getattr(info.value, "__notes__", ()))


@pytest.mark.parametrize("call", CALLS_OF_BATCHES.values(), ids=CALLS_OF_BATCHES)
def test_functions_of_one_sample_are_told_of_vmap(call: Callable):
    # What the function itself raises stays what it is.
    with pytest.raises(TypeError, match="contracting dimensions") as info:
        call(of_one_sample, PARAMS, X, SHIFT)
    found = notes_of(info)
    assert re.search(r"on the parameters and input 0 of shape \(\d, 5\), input 1 of", found)
    assert "batches are [n, ...]" in found
    assert "jax.vmap(fn, in_axes=(None, 0))" in found


def test_batches_that_are_single_samples_are_told_by_their_shape():
    def plain(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    with pytest.raises(TypeError, match="contracting dimensions") as info:
        otf.merge(plain, [PARAMS, PARAMS], list(X), outputs="values")
    assert "input 0 of shape (2,); batches are [n, ...]" in notes_of(info)


def switched(params, x, shift, train):
    return network(params, x, shift) if not train else network(params, x, 2 * shift)


@pytest.mark.parametrize("name", ["trace_symmetry", "features"])
@pytest.mark.parametrize("flag", [False, np.bool_(True), 1])
def test_flags_are_closed_over(name: str, flag: Any):
    with pytest.raises(jax.errors.TracerBoolConversionError) as info:
        FUNCTIONS[name](switched, PARAMS, X, SHIFT, flag)
    assert "close over flags, as in lambda params, x: fn(params, x, train=False)" in notes_of(info)
    assert "vmap" not in notes_of(info)
    FUNCTIONS[name](lambda p, x, shift: switched(p, x, shift, train=flag), PARAMS, X, SHIFT)


def test_numbers_that_python_counts_by_are_closed_over():
    def repeated(params, x, shift, times):
        return sum(network(params, x, shift) for _ in range(times))

    with pytest.raises(jax.errors.TracerIntegerConversionError) as info:
        otf.trace_symmetry(repeated, PARAMS, X, SHIFT, 2)
    assert "close over flags" in notes_of(info)


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_inputs_that_are_missing_are_asked_for(call: Callable):
    with pytest.raises(TypeError, match="missing 2 required positional arguments") as info:
        call(network, PARAMS)
    assert "with no inputs after the parameters; pass every input" in notes_of(info)
    assert "jax.ShapeDtypeStruct will do" in notes_of(info)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'shift'") as info:
        call(network, PARAMS, X)
    assert "with input 0 of shape (4, 5) after the parameters; pass every" in notes_of(info)


def test_inputs_that_a_module_lacks_are_asked_for():
    module = Linen()
    params = jax.eval_shape(module.init, jax.random.key(0), X)
    with pytest.raises(TypeError, match="missing 1 required positional argument") as info:
        otf.trace_symmetry(module.apply, params)
    assert "with no inputs after the parameters" in notes_of(info)


# --- what is left alone


def test_flags_that_are_arrays_to_the_function_are_inputs():
    def masked(params, x, shift, flag):
        return jnp.where(flag, network(params, x, shift), 0.0)

    for call in FUNCTIONS.values():
        call(masked, PARAMS, X, SHIFT, jnp.array(True))
    assert otf.trace_symmetry(masked, PARAMS, X, SHIFT, True).groups == SYMMETRY.groups


def test_what_the_library_itself_refuses_has_no_note():
    with pytest.raises(ValueError, match="2 functions were put together") as info:
        otf.trace_symmetry(otf.together(network, network), PARAMS, (X, SHIFT))
    assert "function was called" not in notes_of(info)


def test_a_functions_own_mistakes_are_its_own():
    def faulty(params, x, shift):
        return x @ params["hidden"]

    for call in FUNCTIONS.values():
        with pytest.raises(KeyError, match="hidden"):
            call(faulty, PARAMS, X, SHIFT)


def test_inputs_may_be_lists_and_parameters_arrays():
    def listed(kernel, inputs):
        return jnp.tanh(inputs[0] @ kernel) + inputs[1]

    kernel = PARAMS["in"][:, :3]
    symmetry = otf.trace_symmetry(listed, kernel, [X, SHIFT])
    assert otf.check_symmetry(symmetry, listed, kernel, [X, SHIFT]) == 0
    assert otf.features(symmetry, listed, kernel, [X, SHIFT]) == {}


NARROW = normals({"in": (5, 6), "out": (6, 3)})


@pytest.mark.parametrize(
    ("call", "who"),
    [
        (lambda: otf.average([PARAMS, NARROW]), "model 1 does not fit model 0"),
        (lambda: otf.task_arithmetic([PARAMS], NARROW), "the base does not fit model 0"),
        (lambda: otf.slerp(PARAMS, NARROW, 0.5), "b does not fit a"),
        (lambda: otf.distill(network, PARAMS, [NARROW], [(X, SHIFT)]), "teacher 0 does not fit"),
        (lambda: otf.fuse(SYMMETRY, [PARAMS, NARROW]), "model 1 does not fit the model that was"),
    ],
)
def test_models_that_do_not_fit_are_called_by_their_part_in_the_call(call, who):
    with pytest.raises(ValueError, match=who) as error:
        call()
    assert "in: shape (5, 6), expected (5, 8)" in str(error.value)


def test_a_list_in_place_of_the_function_of_a_merge_is_told_the_order_of_arguments():
    with pytest.raises(TypeError, match="a list was given.*merge\\(fn, models, batches"):
        otf_any.merge([PARAMS, PARAMS], network, [(X, SHIFT)])
