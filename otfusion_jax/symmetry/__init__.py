"""Which parameter axes move together, and moving them.

A `Symmetry` is what tracing finds: static, hashable, without arrays. `groups` has its parts and
`location` says at which positions of an axis units lie. `partition` takes arrays apart into
`blocks`, in which units are a dimension; `leaf_structure` and `units` use it for parameters and for
single groups. `validation` and `checks` refuse what does not fit, `display` and `drawing` show a
symmetry. `canonical` brings parameters into the form in which units may be rotated, and `rotation`
has the orthogonal matrices. `plans` says what a plan is, `correspondence` which groups of two
networks are the same, and `transport` and `training_state` push parameters, and what belongs to
them, along plans.
"""
