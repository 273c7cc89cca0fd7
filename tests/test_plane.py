"""Checks the plane through three models against NumPy, and against functions of known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normals

import otfusion_jax as otf

SHAPES = {"kernel": (4, 3), "bias": (3,), "scale": (1, 2, 2)}


def models(count=3):
    return [{**normals(SHAPES, seed=seed), "steps": jnp.array(7)} for seed in range(count)]


def flat(params):
    return jnp.concatenate([params[name].ravel() for name in SHAPES])


def basis(a, b, c):
    """Orthonormal directions by QR, another way than Gram and Schmidt's."""
    steps = np.stack([flat(b) - flat(a), flat(c) - flat(a)], axis=1).astype(np.float64)
    q, r = np.linalg.qr(steps)
    signs = np.sign(np.diag(r))
    return q * signs, r * signs[:, None]


def test_points_are_those_of_an_orthonormal_basis():
    a, b, c = models()
    found = otf.plane(flat, a, b, c, points=4, margin=0.5, batch_size=3)
    q, r = basis(a, b, c)
    corners = np.array([[0.0, 0.0], r[:, 0], r[:, 1]])
    np.testing.assert_allclose(found.models, corners, rtol=1e-5, atol=1e-5)
    x, y = np.meshgrid(found.x, found.y)
    expected = np.asarray(flat(a)) + x[..., None] * q[:, 0] + y[..., None] * q[:, 1]
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-5)
    # Half of what the models take up is left free on every side.
    for positions, axis in ((found.x, 0), (found.y, 1)):
        low, high = corners[:, axis].min(), corners[:, axis].max()
        beyond = (high - low) / 2
        assert positions[0] == pytest.approx(low - beyond, abs=1e-5)
        assert positions[-1] == pytest.approx(high + beyond, abs=1e-5)


def test_distances_are_those_between_parameters():
    """A metric that is the squared distance to a model is a paraboloid over the plane."""
    a, b, c = models()

    def metric(params):
        return jnp.stack([jnp.sum((flat(params) - flat(model)) ** 2) for model in (a, b, c)])

    found = otf.plane(metric, a, b, c, points=5, margin=0.0)
    x, y = np.meshgrid(found.x, found.y)
    for number, (p, q) in enumerate(np.asarray(found.models)):
        expected = (x - p) ** 2 + (y - q) ** 2
        np.testing.assert_allclose(found.values[..., number], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2.0**-90, 2.0**90])
def test_models_whose_squares_are_out_of_range(size):
    trees = models()
    resized = [{**tree, **{name: size * tree[name] for name in SHAPES}} for tree in trees]
    expected = otf.plane(lambda p: flat(p).sum(), *trees, points=3)
    found = otf.plane(lambda p: flat(p).sum(), *resized, points=3)
    np.testing.assert_allclose(found.models / size, expected.models, rtol=1e-6)
    np.testing.assert_allclose(found.values / size, expected.values, rtol=1e-4, atol=1e-5)


def test_complex_and_narrow_parameters():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 2, 3)).astype(np.float16)
    trees = [{"c": array(v[0] + 1j * v[1], np.complex64), "h": array(v, v.dtype)} for v in vectors]
    found = otf.plane(lambda p: jnp.sum(jnp.abs(p["c"])), *trees, points=2)
    real = np.concatenate([vectors, vectors], axis=1).reshape(3, -1).astype(np.float64)
    assert found.models[1, 0] == pytest.approx(np.linalg.norm(real[1] - real[0]), rel=1e-3)
    assert jnp.hypot(*found.models[2]) == pytest.approx(np.linalg.norm(real[2] - real[0]), rel=1e-3)


def test_under_jit_and_with_gradients():
    a, b, c = models()

    def corner(a):
        return otf.plane(lambda p: jnp.sum(flat(p) ** 2), a, b, c, points=2, margin=0.0).values[
            0, 0
        ]

    np.testing.assert_allclose(jax.jit(corner)(a), corner(a), rtol=1e-5)
    assert jnp.isfinite(jax.grad(corner, allow_int=True)(a)["bias"]).all()


def test_what_spans_no_plane_is_refused():
    a, b, c = models()
    for third in (a, b, otf.average([a, b]), otf.interpolate(a, b, 3.0)):
        with pytest.raises(
            ValueError, match=r"one line and span no plane; .*barrier\(metric, a, b\)"
        ):
            otf.plane(lambda p: flat(p).sum(), a, b, third)
    with pytest.raises(ValueError, match="one line"):
        otf.plane(lambda p: flat(p).sum(), a, a, c)
    with pytest.raises(ValueError, match="steps"):
        otf.plane(lambda p: flat(p).sum(), a, b, {**c, "steps": jnp.array([7])})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"points": 1}, ValueError, "points is 1; give 2 or more"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; give 1 or more"),
        ({"margin": -0.1}, ValueError, "margin is -0.1; give 0 or more"),
        ({"margin": float("nan")}, ValueError, "margin is nan; give 0 or more"),
    ],
)
def test_settings_that_are_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        otf.plane(lambda p: flat(p).sum(), *models(), **settings)


def test_a_metric_that_returns_no_number_is_refused():
    with pytest.raises(TypeError, match="the metric returned a dict; it must return a number"):
        otf.plane(lambda p: p, *models())
