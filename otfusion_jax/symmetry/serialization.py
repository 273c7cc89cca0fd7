"""A symmetry as JSON text, and back: what is found once serves every pair of that architecture.

The text has a version, and the fields of `Symmetry` by their names. What is read is checked field
by field against the annotations of the dataclasses, and then as a whole against the parameters that
it speaks of (`stored_symmetry`), since the text may come from anywhere.
"""

import contextlib
import dataclasses
import functools
import json
import math
import types
import typing
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.symmetry.groups import Freedom, Group, Leaf, LeafSplit, Pin
from otfusion_jax.symmetry.stored_symmetry import require_consistent

if TYPE_CHECKING:
    from otfusion_jax.symmetry.symmetry import Symmetry

FORMAT = "otfusion_jax.Symmetry"
VERSION = 4
# Trees are walked by recursion, here and in JAX.
_MOST_LEVELS = 200
_TOP = "the tree of parameters"
# What is shown of a wrong value at most.
_SHOWN_CHARACTERS = 60
_KEY_DTYPE = "key:"
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
# The fields of a symmetry that are tuples of dataclasses, in the order in which they are written.
_PARTS = {
    "groups": Group,
    "pinned": Pin,
    "leaves": Leaf,
    "leaf_splits": LeafSplit,
    "freedoms": Freedom,
}


# --- writing


def dumps(symmetry: "Symmetry") -> str:
    """Writes a symmetry as JSON.

    Args:
        symmetry: The symmetry.

    Returns:
        The text, see `Symmetry.to_json`.

    Raises:
        ValueError: If the parameters lie in other containers than dicts with string keys, lists and
            tuples, naming where, or have a dtype that has no name.
    """
    # The order of names is that of the dataclasses, so that texts can be compared.
    record: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    record["tree"] = _tree_to_json(symmetry.treedef, _TOP, 0)
    for name in _PARTS:
        record[name] = _to_json(getattr(symmetry, name))
    return json.dumps(record, indent=1) + "\n"


def _to_json(value: Any) -> Any:
    """Writes tuples as lists, dataclasses as objects, and dtypes by name; all else is itself."""
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    record = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if isinstance(value, Leaf) and field.name == "dtype":
            content = _dtype_to_json(content, value.path)
        record[field.name] = _to_json(content)
    return record


def _tree_to_json(treedef: Any, where: str, level: int) -> Any:
    """Writes the structure of the parameters: 0 for a leaf, an object with a kind for others."""
    _require_shallow(level)
    node = treedef.node_data()
    if node is None:
        return 0
    kind, keys = node
    children = treedef.children()
    # To JAX, None is a container without children.
    if kind is type(None):
        return {"none": []}
    if kind is dict:
        content = {}
        for key, child in zip(keys, children, strict=True):
            if not isinstance(key, str):
                raise ValueError(
                    f"{where} is a dict with the key {key!r}; a symmetry is saved with string keys"
                    " alone. Give the dict string keys, and trace again"
                )
            content[key] = _tree_to_json(child, _below(where, key), level + 1)
        return {"dict": content}
    if kind in (list, tuple):
        items = []
        for number, child in enumerate(children):
            items.append(_tree_to_json(child, _below(where, str(number)), level + 1))
        return {kind.__name__: items}
    raise ValueError(
        f"{where} is a {kind.__name__}, whose class JSON has no place for; a symmetry is saved of"
        " parameters in dicts, lists and tuples. Bring them into these (flax.core.unfreeze,"
        " nnx.to_pure_dict, dict(...)), and trace a function of the result"
    )


def _below(where: str, key: str) -> str:
    return key if where == _TOP else f"{where}/{key}"


def _dtype_to_json(dtype: Any, path: str) -> str:
    """Names a dtype, as `float32`, or `key:threefry2x32` for a random key."""
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        return np.dtype(dtype).name
    for name in _KEY_IMPLEMENTATIONS:
        if dtype == _key_dtype(name):
            return f"{_KEY_DTYPE}{name}"
    raise ValueError(f"{path} is of dtype {dtype}, which has no name to save it by")


@functools.cache
def _key_dtype(implementation: str) -> Any:
    """Returns the dtype of random keys of an implementation."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=implementation)).dtype


# --- reading


def loads(text: str) -> dict[str, Any]:
    """Reads the fields of a symmetry from JSON.

    Args:
        text: What `dumps` has written, or anything else.

    Returns:
        The fields of a `Symmetry` by their names.

    Raises:
        ValueError: If the text is no JSON, of another format or version, or if a field is missing,
            of another kind, or out of range. The message says where, as in
            `groups[3].members[0].role`.
    """
    record = _parsed(text)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f'this is no saved symmetry: it has no "format": "{FORMAT}"')
    version = record.get("version")
    # Whoever adds a field raises it, and reads the old ones in `_upgraded`.
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"the symmetry is saved in version {_shown(version)} of the format, and this library"
            f" reads versions 1 to {VERSION}: trace it again, or use the library that saved it"
        )
    _require_names(record, {"format", "version", "tree", *_PARTS}, "the symmetry")
    record = _upgraded(record, version)
    fields: dict[str, Any] = {}
    for name, kind in _PARTS.items():
        fields[name] = _from_json(record[name], tuple[kind, ...], name)
    tree = _tree_from_json(record["tree"], "tree", 0)
    fields["treedef"] = jax.tree_util.tree_structure(tree)
    require_consistent(tree, **fields)
    return fields


def _upgraded(record: dict[str, Any], version: int) -> dict[str, Any]:
    """Returns what an older version has as this one says it."""
    added: dict[str, dict[str, Any]] = {}
    if version < 2:
        added = {"groups": {"stretch": None}, "freedoms": {"stretch": None}}
    if version < 3:
        added["freedoms"] = {**added.get("freedoms", {}), "offsets": [], "unread_means": []}
    upgraded = dict(record)
    for name, fields in added.items():
        if not isinstance(record[name], list):
            continue
        entries = []
        for entry in record[name]:
            # What is no object is named where it is read.
            entries.append({**entry, **fields} if isinstance(entry, dict) else entry)
        upgraded[name] = entries
    if version < 4:
        _add_axes_of_folds(upgraded)
        _add_segments(upgraded)
    return upgraded


def _add_axes_of_folds(record: dict[str, Any]) -> None:
    """Says along which axis folds change parameters, which had the units along a single one."""
    # What is damaged is named where it is read.
    with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
        axes = {}
        for group in record["groups"]:
            for member in group["members"]:
                place = group["name"], member["leaf"]
                axes[place] = member["location"]["axis"]
        for freedom in record["freedoms"]:
            name = freedom["group"]
            for fold in freedom["folds"]:
                for other in fold["others"]:
                    # Of a group that was left out nothing is folded, along whichever axis.
                    axis = axes.get((name, other[0]), 0)
                    other.insert(1, axis)


def _add_segments(record: dict[str, Any]) -> None:
    """Says of scalings that none speaks of segments."""
    # What is damaged is named where it is read.
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        for freedom in record["freedoms"]:
            for scaling in (*freedom["scales"], *freedom["signs"]):
                scaling["segments"] = []


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("the saved symmetry is nested too deeply to be one") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the saved symmetry is no JSON: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"the saved symmetry has a key twice, among {_shown(list(record))}")
    return record


def _no_number(name: str) -> Any:
    raise ValueError(f"the saved symmetry has {name} in the place of a number")


def _require_names(record: dict[str, Any], names: set[str], where: str) -> None:
    """Refuses an object that has other fields."""
    missing = sorted(names - set(record))
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it is damaged, or not of this version")
    others = sorted(set(record) - names)
    if others:
        raise ValueError(f"{where} has {_shown(others[0])}, which is no field of this version")


def _from_json(value: Any, kind: Any, where: str) -> Any:
    """Reads a value of an annotated type: a dataclass, a tuple, a choice, or a plain one."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        # The one field of any type is the dtype of a leaf.
        return _dtype_from_json(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(value, kind, where)
    if origin is tuple:
        return _tuple_from_json(value, options, where)
    if origin is types.UnionType:
        # Of the unions there are all are of something and None.
        return None if value is None else _from_json(value, options[0], where)
    if origin is typing.Literal:
        if value not in options:
            wanted = ", ".join(map(repr, options))
            raise ValueError(f"{where} is {_shown(value)}, expected one of {wanted}")
        return value
    # To Python a bool is an integer.
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} is {_shown(value)}, expected {_KINDS[kind]}")
    return value


_KINDS = {
    int: "a whole number",
    float: "a number with a decimal point",
    str: "a text",
    bool: "true or false",
}


def _dataclass_from_json(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}, expected a {kind.__name__}")
    annotations = _annotations(kind)
    _require_names(value, set(annotations), where)
    fields = {}
    for name, annotation in annotations.items():
        fields[name] = _from_json(value[name], annotation, f"{where}.{name}")
    return kind(**fields)


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _tuple_from_json(value: Any, options: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_shown(value)}, expected a list")
    if options[-1] is Ellipsis:
        options = (options[0],) * len(value)
    elif len(value) != len(options):
        raise ValueError(f"{where} has {len(value)} entries, expected {len(options)}")
    items = []
    for number, (item, option) in enumerate(zip(value, options, strict=True)):
        items.append(_from_json(item, option, f"{where}[{number}]"))
    return tuple(items)


def _dtype_from_json(value: Any, where: str) -> Any:
    wrong = f"{where} is {_shown(value)}, expected the name of a dtype, as float32"
    if not isinstance(value, str):
        raise ValueError(wrong)
    if value.startswith(_KEY_DTYPE):
        name = value.removeprefix(_KEY_DTYPE)
        if name in _KEY_IMPLEMENTATIONS:
            return _key_dtype(name)
        raise ValueError(wrong)
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise ValueError(wrong) from None
    is_numeric = jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
    # Other spellings of a dtype (`f4`, `>f4`) are none that was saved.
    if not is_numeric or dtype.name != value:
        raise ValueError(wrong)
    return dtype


def _tree_from_json(value: Any, where: str, level: int) -> Any:
    """Reads the structure of the parameters: nested containers with 0 for each leaf."""
    _require_shallow(level)
    if value == 0 and type(value) is int:
        return 0
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{where} is {_shown(value)}, expected 0, or an object of one kind")
    ((kind, content),) = value.items()
    if kind == "none" and content == []:
        return None
    if kind == "dict" and isinstance(content, dict):
        children = {}
        for key, child in content.items():
            children[key] = _tree_from_json(child, f"{where}/{key}", level + 1)
        return children
    if kind in ("list", "tuple") and isinstance(content, list):
        items = []
        for number, child in enumerate(content):
            items.append(_tree_from_json(child, f"{where}/{number}", level + 1))
        return items if kind == "list" else tuple(items)
    raise ValueError(f"{where} is {_shown(value)}, expected a dict, list, tuple or none")


def _require_shallow(level: int) -> None:
    if level > _MOST_LEVELS:
        raise ValueError(f"the parameters are nested more than {_MOST_LEVELS} levels deep")


def _shown(value: Any) -> str:
    """Shows the beginning of what may be long."""
    if isinstance(value, dict | list) and len(value) > 3:
        return f"{kind_of(value)} of {len(value)} entries"
    return repr(value)[:_SHOWN_CHARACTERS]
