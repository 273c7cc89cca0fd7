"""Warnings that name the line of the user's that led to them, however deep they are found."""

import sys
import warnings

# What may stand between a line of the user's and this package: transformations, checks of types.
_NOT_THE_USER = ("otfusion_jax", "jax", "jaxtyping", "beartype")


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line outside of this package, of JAX and of checks of types.

    Args:
        message: What to say.
        category: The class of the warning.
    """
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _package(frame.f_globals) in _NOT_THE_USER:
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    """Returns the name of the package that a frame's global names are of."""
    return str(names.get("__name__", "")).partition(".")[0]
