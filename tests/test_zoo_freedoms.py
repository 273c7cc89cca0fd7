"""What may be done to the units of networks of all kinds, beyond permuting them.

Worked out on paper for networks of the zoo. For each group the ways in which its units may move, as
`summary` says them; then all of it is drawn at once, and the outputs have to stay.
"""

from collections import Counter

import pytest
import zoo_attention  # noqa: F401, these add their networks to `CASES`
import zoo_convolution  # noqa: F401
import zoo_recurrent  # noqa: F401
from zoo import CASES

import otfusion_jax as otf

PERMUTED, SCALED = "permuted", "permuted, scaled"
SIGNED, BOTH = "permuted with signs", "permuted with signs, scaled"
ROTATED, ABOUT_ONES, LINEAR = "rotated", "rotated about the ones", "linear"

EXPECTED = {
    # ReLU everywhere.
    "mlp": {SCALED: 2},
    "vgg": {SCALED: 3},
    "unet": {SCALED: 4},
    # A batch norm in use may turn its units around; the ReLU behind it is scaled.
    "resnet": {BOTH: 4},
    # Between two matrices without a nonlinearity anything invertible will do.
    "low_rank": {SCALED: 2, LINEAR: 1},
    # An embedding that is tied makes and reads the stream by one matrix: at most orthogonal.
    "tied_embedding": {ROTATED: 1, SCALED: 1},
    "tied_autoencoder": {SIGNED: 1},
    # The stream, queries with keys, values with outputs. Heads are permuted.
    "attention": {LINEAR: 3, PERMUTED: 1},
    "multi_query": {LINEAR: 3, PERMUTED: 1},
    "grouped_queries": {LINEAR: 3, PERMUTED: 2},
    # LayerNorm takes a mean, RMSNorm does not; a scale in front of it may be folded.
    "vit": {f"{ABOUT_ONES}, scaled": 1, PERMUTED: 4, LINEAR: 4},
    "transformer_scanned_linen": {f"{ABOUT_ONES}, scaled": 1, PERMUTED: 2, LINEAR: 2},
    # Rotary positions pin queries and keys; the gate of the hidden layer looks at each unit.
    "llama": {f"{ROTATED}, scaled": 1, PERMUTED: 3, LINEAR: 1},
    # A norm of queries with a scale for each dimension leaves signs and these scales.
    "qk_norm_linen": {LINEAR: 2, PERMUTED: 1, BOTH: 1},
    "mlp_mixer": {BOTH: 1, PERMUTED: 2},
    # The cells of an LSTM and the states of a GRU are odd, where gates have kernels of their own.
    "lstm_linen": {SIGNED: 1},
    "gru_stacked_linen": {SIGNED: 2},
    "lstm_equinox": {PERMUTED: 1},
    # Linear in its state, unit by unit.
    "state_space_model": {BOTH: 2},
    "fixed_point_while": {SIGNED: 1},
    "residual_layers_scanned": {LINEAR: 1, SCALED: 1},
    "mixture_of_experts": {LINEAR: 1, PERMUTED: 1, SCALED: 1},
    "siamese_product": {SCALED: 1, SIGNED: 1},
    "bilinear": {SIGNED: 2, SCALED: 1},
}


def words(freedom: otf.Freedom) -> str:
    """How units may move, in the words above."""
    if freedom.linear:
        return LINEAR
    if freedom.rotates:
        found = ABOUT_ONES if freedom.fixes_ones else ROTATED
    else:
        found = SIGNED if freedom.signs else PERMUTED
    return f"{found}, scaled" if freedom.scales else found


@pytest.mark.parametrize("name", EXPECTED)
def test_networks_have_the_freedoms_worked_out_on_paper(name: str):
    case = CASES[name]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    assert Counter(map(words, symmetry.freedoms)) == EXPECTED[name]
    free = symmetry.with_rotations().with_signs().with_scales()
    assert otf.check_symmetry(free, case.fn, case.params, *case.inputs) < 1e-4
