"""Which parameter axes move together, and moving them.

A `Symmetry` is what tracing finds: static, hashable, without arrays. `groups` has its parts,
`partition` and `units` say where units lie in an array, and `transport` pushes parameters along.
"""
