"""Which primitives share a rule: one entry per family, the whole family by name.

To give a primitive of JAX the rule of a family is to add its name here. A primitive that not every
supported version of JAX exports has its name in a list of `otfusion_jax.tracing.primitives`, which
the family adds: a test checks that each name that stands here is a primitive.
"""

from jax.extend import core

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.primitives import named

P = core.primitives

# Functions of single elements: operands and result move together.
ELEMENTWISE = named(
    "abs acos acosh add add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt "
    "ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq_to erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow "
    "is_finite le le_to lgamma log log1p logistic lt lt_to max min mul neg nextafter not or "
    "polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round "
    "rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt "
    "square stop_gradient sub tan tanh xor zeta"
)
ELEMENTWISE += primitives.NEW_ELEMENTWISE

# Each operand is returned as it is.
ONE_BY_ONE = [*primitives.RELOCATIONS, *primitives.VARYING]

# Axes are dropped, and their order does not matter.
REDUCTION = named("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor")
COLLECTIVE = named("pmax pmin psum") + primitives.SUMMED_OVER_DEVICES
WINDOW = named("reduce_window_max reduce_window_min reduce_window_sum")

# Order matters along the axis that is gone through.
CUMULATIVE = named("cumlogsumexp cummax cummin cumprod cumsum")

SCATTER = named("scatter scatter_add scatter_max scatter_min scatter_mul") + primitives.SCATTER_SUB

# Functions of matrices, which are the last axes of their operands.
MATRIX = named(
    "cholesky eig eigh fft hessenberg householder_product lu qr schur triangular_solve "
    "tridiagonal tridiagonal_solve"
)
MATRIX += [*primitives.NEW_MATRIX, *primitives.PIVOTS]

# Numbers that depend on their positions in an array.
RANDOM = named("random_bits random_fold_in random_gamma random_seed random_split")
RANDOM += named("rng_bit_generator rng_uniform threefry2x32")
RANDOM += [*primitives.WRAP, *primitives.NEW_RANDOM]

# What nothing is known of, and what is too rare for a rule that would say more.
PINNED = named(
    "approx_top_k linear_solve reduce_window select_and_gather_add select_and_scatter "
    "select_and_scatter_add"
)
PINNED += primitives.OPAQUE

# Operations of two numbers that commute and associate, up to rounding.
SYMMETRIC = {P.add_p, P.and_p, P.max_p, P.min_p, P.mul_p, P.or_p, P.xor_p}
