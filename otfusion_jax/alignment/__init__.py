"""Finding the plans that move one model onto another.

`align` is the entry. An `AlignmentProblem` compares units (`costs`), a method decides in which
order groups are solved (`forward_pass`, `coordinate_descent`), and `solvers` finds each plan.
"""
