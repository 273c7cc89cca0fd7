"""Packages that the library can do without: they come with an extra, and are imported when met."""

import importlib
from types import ModuleType


def require_package(name: str, package: str, extra: str, why: str) -> ModuleType:
    """Imports a module of another package.

    Args:
        name: The module.
        package: The package that it comes with, as pip knows it.
        extra: The extra of this library that asks for packages of this kind.
        why: What needs it, for the message.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed, saying what to install.
    """
    # Not at the top of a module: `import otfusion_jax` needs none of them.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{why} needs the package {package}: pip install "otfusion-jax[{extra}]" {package}'
            f" ({error})"
        ) from error
