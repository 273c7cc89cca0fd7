"""From a function to its symmetry.

`trace` makes a jaxpr, `interpreter` walks it, one of the `rules` says what each primitive does to
axes, `unification` keeps what has been learned, and `nesting` and `trace` read the groups off.
"""
