"""Finding the plans that move one model onto another.

`align` is the entry: it checks its arguments (`checks`) and calls a method (`method`). The method
gets an `AlignmentProblem` (`problem`), which compares units of the two models by inner products
(`costs`), and decides in which order groups are solved: once in dataflow order (`forward_pass`), or
again and again until nothing improves (`coordinate_descent`). Both go over *group trees*, a group
and what is nested in it (`group_tree`), in one loop (`visit`), and each tree is solved as a whole
(`solve_tree`).

Known values are gone over by Python, parameter by parameter, in programs that equal ones share
(`leaf_programs`); a descent remembers what it has compared (`descent_memory`). What is traced
becomes one program.

Around it: inner products of activations (`feature_gram`), masses of units (`marginals`), weights of
parameters (`leaf_weights`), and alignments learned by descent on a loss (`learned`).
"""
