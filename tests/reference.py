"""Answers to compare with: both methods rewritten in NumPy, layer by layer, as the papers have it.

Nothing here knows groups, members or jaxprs. A network is a list of layers, each with a `kernel`
(dense `[in, out]` or convolution HWIO, 3x3) and perhaps a `bias`; convolutions come first, and what
they put out is flattened for the first dense layer. The last layer's outputs stay in place. A plan
is an index vector: `plan[j]` is the unit of the source that lands at position `j`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from arrays import array
from jax import lax
from scipy.optimize import linear_sum_assignment

Net = list[dict[str, np.ndarray]]
SHAPES = {
    "mlp": ((5, 8), (8, 8), (8, 3)),
    "conv": ((3, 3, 2, 8), (3, 3, 8, 8), (128, 8), (8, 3)),
}
INPUTS = {"mlp": (20, 5), "conv": (6, 4, 4, 2)}


def random_net(seed: int, kind: str, bias: bool = True) -> list[dict[str, jax.Array]]:
    """Draws a network."""
    rng = np.random.default_rng(seed)
    net = []
    for shape in SHAPES[kind]:
        layer = {"kernel": array(rng.standard_normal(shape) * np.prod(shape[:-1]) ** -0.5)}
        if bias:
            layer["bias"] = array(0.3 * rng.standard_normal(shape[-1:]))
        net.append(layer)
    return net


def network(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The network in JAX: what the library gets to see."""
    for i, layer in enumerate(params):
        x = jax.nn.relu(x) if i else x
        if layer["kernel"].ndim == 4:
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", None, None, numbers)
        else:
            x = x.reshape(len(x), -1) @ layer["kernel"]
        if "bias" in layer:
            x = x + jnp.broadcast_to(layer["bias"], x.shape)
    return x


def activations(net: Net, x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs the network in NumPy.

    Returns:
        For each hidden layer what its weights put out, before bias and nonlinearity, and what the
        next layer takes up, after both.
    """
    before, after = [], []
    for layer in net:
        kernel = layer["kernel"]
        if kernel.ndim == 4:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            z = np.zeros((*x.shape[:3], kernel.shape[3]))
            for di in range(3):
                for dj in range(3):
                    patch = padded[:, di : di + x.shape[1], dj : dj + x.shape[2]]
                    z += patch @ kernel[di, dj]
        else:
            z = x.reshape(len(x), -1) @ kernel
        x = np.maximum(z + layer.get("bias", 0.0), 0)
        before.append(z)
        after.append(x)
    return before[:-1], after[:-1]


def distances(a: np.ndarray, b: np.ndarray, squared: bool, unit_norm: bool) -> np.ndarray:
    """Euclidean distances of the columns of two matrices, subtracted one by one."""
    if unit_norm:
        a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    found = np.sum((a[:, :, None] - b[:, None, :]) ** 2, axis=0)
    return found if squared else np.sqrt(found)


def assign(cost: np.ndarray) -> np.ndarray:
    rows, columns = linear_sum_assignment(cost)
    plan = np.empty(len(rows), int)
    plan[columns] = rows
    return plan


def move_inputs(kernel: np.ndarray, plan: np.ndarray) -> np.ndarray:
    """Applies the previous layer's plan to the inputs of a layer."""
    if kernel.ndim == 4:
        return kernel[:, :, plan, :]
    # A flattened image is a run of positions with all channels at each.
    rows = [at + unit for at in range(0, len(kernel), len(plan)) for unit in plan]
    return kernel[rows]


def incoming(layer: dict[str, np.ndarray]) -> np.ndarray:
    """One column per unit: its incoming weights, the bias as that of a constant input."""
    columns = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
    return np.vstack([columns, layer["bias"]]) if "bias" in layer else columns


def algorithm_1(
    a: Net,
    b: Net,
    x: np.ndarray | None = None,
    *,
    squared: bool = True,
    unit_norm: bool = False,
) -> tuple[list[np.ndarray], Net]:
    """Singh and Jaggi, Algorithm 1, uniform masses, exact plans, output layer in place.

    Args:
        a: is moved.
        b: stays.
        x: inputs to compare activations on; weights are compared if None.
        squared: the cost is the squared distance instead of the distance.
        unit_norm: units are scaled to norm 1 for the cost.

    Returns:
        The plan of each hidden layer, and `0.5 moved + 0.5 b`.
    """
    features_a, features_b = (
        [z.reshape(-1, z.shape[-1]) for z in activations(net, x)[0]] if x is not None else []
        for net in (a, b)
    )
    plans, fused = [], []
    for i, (layer_a, layer_b) in enumerate(zip(a, b, strict=True)):
        moved = dict(layer_a)
        if i > 0:
            moved["kernel"] = move_inputs(moved["kernel"], plans[-1])
        if i < len(a) - 1:
            pair = (incoming(moved), incoming(layer_b)) if x is None else ()
            cost = distances(*(pair or (features_a[i], features_b[i])), squared, unit_norm)
            plans.append(assign(cost))
            moved = {name: value[..., plans[-1]] for name, value in moved.items()}
        fused.append({name: 0.5 * moved[name] + 0.5 * layer_b[name] for name in moved})
    return plans, fused


def moved_by(net: Net, plans: list[np.ndarray]) -> Net:
    """Moves a network along one plan per hidden layer."""
    moved = []
    for i, layer in enumerate(net):
        layer = dict(layer)
        if i > 0:
            layer["kernel"] = move_inputs(layer["kernel"], plans[i - 1])
        if i < len(plans):
            layer = {name: value[..., plans[i]] for name, value in layer.items()}
        moved.append(layer)
    return moved


def squared_distance(a: Net, b: Net) -> float:
    pairs = zip(a, b, strict=True)
    return float(sum(np.sum((p[name] - q[name]) ** 2) for p, q in pairs for name in p))


def weight_matching(a: Net, b: Net) -> tuple[list[np.ndarray], list[float]]:
    """Ainsworth et al., Algorithm 1, from the identity, layers in order.

    Returns:
        The plan of each hidden layer, and the squared distance at the start and after each sweep.
    """
    plans = [np.arange(layer["kernel"].shape[-1]) for layer in a[:-1]]
    history = [squared_distance(a, b)]
    improved = True
    while improved:
        improved = False
        for i in range(len(plans)):
            here, after = dict(a[i]), a[i + 1]["kernel"]
            if i > 0:
                here["kernel"] = move_inputs(here["kernel"], plans[i - 1])
            if i + 1 < len(plans):
                after = after[..., plans[i + 1]]
            size = len(plans[i])
            # Outgoing weights, one row per unit: [positions, units, outputs] put in order.
            after, outgoing = (
                np.moveaxis(k.reshape(-1, size, k.shape[-1]), 1, 0).reshape(size, -1)
                for k in (after, b[i + 1]["kernel"])
            )
            similarity = incoming(here).T @ incoming(b[i]) + after @ outgoing.T
            plan = assign(-similarity)
            units = np.arange(size)
            if similarity[plan, units].sum() > similarity[plans[i], units].sum() + 1e-9:
                plans[i], improved = plan, True
        history.append(squared_distance(moved_by(a, plans), b))
    return plans, history


def to_numpy(net: list[dict[str, jax.Array]]) -> Net:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), net)


def central_difference(f: Callable[[float], float], step: float) -> float:
    return (f(step) - f(-step)) / (2 * step)
