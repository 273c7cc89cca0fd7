"""From a function to its symmetry.

The modules, in the order in which a function passes through them:

- `programs` reads what the user gives: a function, or several with their inputs. `modules` makes
  functions of NNX and Equinox modules, and `misuse` tells why a function fails on its arguments.
- `program_traces` makes jaxprs of the function, on the inputs given and on longer ones.
- `interpretation` lets the `interpreter` go over the jaxprs, with a fresh axis variable for every
  axis of every parameter. Of each value the interpreter knows the axes (`values`, `constants`).
- For each equation it makes a `context` (and `equation`), and applies the rule of the primitive.
  The package `rules` has those of JAX's primitives, `package_rules` those of other packages, and
  the `registry` knows them all. `primitives` and `jaxprs` hold what differs between versions of
  JAX. What rules note for later is in `records`.
- `unification` keeps what rules state: which axes are tied, split, or pinned. Axes are expressions
  (`axis`) over variables (`axis_variables`); `matching`, `segments` and `regrouping` say how two of
  them are brought together, `roles` and `parity` what is produced and what consumed.
- `leaf_splits` looks for leaves that the program picks apart by index. If there are any, the
  program is rewritten (`split_jaxpr`, `piecewise`, `pieces`) and interpreted again.
- `freedoms` goes over the equations once more, group by group, and asks by the law of each
  primitive (`laws`) what units may do beyond being permuted, and what could be made 1 (`algebras`).
- `occurrences` says where variables lie along an axis, and `nesting` which of them lie within
  others. `group_collection`, `pins` and `views` read off the result: the groups, what stays and
  why, and where features can be read.
- `trace` does all of this in turn. Its `trace_symmetry` is the way in.

Two modules use what was traced: `activations` evaluates the jaxpr and returns the features of every
group, and `verification` certifies a symmetry by moving units and comparing outputs.
"""
