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

FREE_STREAM = f"{ROTATED}, scaled"
CENTRED_STREAM = f"{ABOUT_ONES}, scaled"
"""Streams that normalisations look at, so that there is a scale to each of their vectors."""

EXPECTED = {
    # ReLU everywhere.
    "mlp": {SCALED: 2},
    "mlp_without_bias": {SCALED: 2},
    "mlp_plain": {SCALED: 2},
    "mlp_nnx": {SCALED: 2},
    "mlp_haiku": {SCALED: 2},
    "mlp_equinox": {SCALED: 2},
    "hidden_layers_scanned": {SCALED: 1},
    "vgg": {SCALED: 3},
    "inception": {SCALED: 5},
    "unet": {SCALED: 4},
    "pixel_shuffle": {SCALED: 1},
    "average_pool_channels_first": {SCALED: 1},
    "convolution_over_channels": {SCALED: 1},
    "squeeze_excite": {SCALED: 2},
    # Channels in groups of a convolution or of a normalisation: the groups, and what is in each.
    "depthwise_separable": {PERMUTED: 2, SCALED: 1},
    "grouped_conv_group_norm": {PERMUTED: 2, SCALED: 1},
    "group_norm_resnet": {PERMUTED: 2, SCALED: 2},
    "shufflenet": {PERMUTED: 4},
    "conv_haiku": {SCALED: 3, PERMUTED: 1},
    "conv_equinox": {SCALED: 2, PERMUTED: 1},
    "locally_connected": {PERMUTED: 1, SCALED: 1},
    "ensemble_by_vmap": {PERMUTED: 1, SCALED: 2},
    # What a softmax, a sum with a constant, or another nonlinearity looks at is permuted.
    "split_attention": {PERMUTED: 2, SCALED: 1},
    "film": {SCALED: 2, SIGNED: 1},
    "vae": {SCALED: 2, PERMUTED: 1},
    "maxout": {PERMUTED: 2},
    # A batch norm in use may turn its units around; the ReLU behind it is scaled.
    "resnet": {BOTH: 4},
    "pre_activation_dropout": {BOTH: 2},
    "densenet": {BOTH: 3, SCALED: 1},
    "conv_nnx": {BOTH: 1, SCALED: 1},
    "weight_norm": {SIGNED: 1},
    "weight_standardised_conv": {SIGNED: 1, BOTH: 1},
    "convnext": {BOTH: 1, PERMUTED: 2},
    # Between two matrices without a nonlinearity anything invertible will do.
    "low_rank": {SCALED: 2, LINEAR: 1},
    "residual_layers_scanned": {LINEAR: 1, SCALED: 1},
    "shared_layer_fori": {LINEAR: 1, SCALED: 1},
    "wavenet": {LINEAR: 1, SIGNED: 2, SCALED: 1},
    "two_towers": {SCALED: 2, ROTATED: 1},
    # An embedding that is tied makes and reads the stream by one matrix: at most orthogonal.
    "tied_embedding": {ROTATED: 1, SCALED: 1},
    "tied_autoencoder": {SIGNED: 1},
    # tanh is odd; of a product of two units both signs are free.
    "weight_sharing": {SIGNED: 1},
    "sequential_haiku": {SCALED: 1, SIGNED: 1},
    "siamese_difference": {SCALED: 1, SIGNED: 1},
    "siamese_product": {SCALED: 1, SIGNED: 1},
    "bilinear": {SIGNED: 2, SCALED: 1},
    # The stream, queries with keys, values with outputs. Heads are permuted.
    "attention": {LINEAR: 3, PERMUTED: 1},
    "multi_query": {LINEAR: 3, PERMUTED: 1},
    "grouped_queries": {LINEAR: 3, PERMUTED: 2},
    "relative_position_bias": {LINEAR: 3, PERMUTED: 1},
    "partial_rotary": {LINEAR: 3, PERMUTED: 1},
    # Each head has a slope of its own, and stays.
    "alibi": {LINEAR: 3},
    "linear_attention": {LINEAR: 2, PERMUTED: 2},
    "perceiver": {LINEAR: 3, PERMUTED: 3, SCALED: 1},
    "attention_with_biases_linen": {SCALED: 1, PERMUTED: 1, LINEAR: 2},
    # LayerNorm takes a mean, RMSNorm does not; a scale in front of it may be folded.
    "vit": {CENTRED_STREAM: 1, PERMUTED: 4, LINEAR: 4},
    "transformer_encoder_linen": {CENTRED_STREAM: 1, PERMUTED: 2, LINEAR: 2},
    "transformer_scanned_linen": {CENTRED_STREAM: 1, PERMUTED: 2, LINEAR: 2},
    "attention_haiku": {CENTRED_STREAM: 1, PERMUTED: 1, LINEAR: 2},
    "attention_equinox": {CENTRED_STREAM: 1, PERMUTED: 1, LINEAR: 2},
    "residual_layer_norm": {CENTRED_STREAM: 1, PERMUTED: 2},
    "layers_stacked_nnx": {CENTRED_STREAM: 1, PERMUTED: 1},
    "attention_nnx": {FREE_STREAM: 1, PERMUTED: 1, LINEAR: 2},
    "grouped_queries_nnx": {FREE_STREAM: 1, PERMUTED: 2, LINEAR: 2},
    # Queries and keys beside each other in one leaf have one matrix for both.
    "gpt_neox": {CENTRED_STREAM: 1, PERMUTED: 2, ROTATED: 1, LINEAR: 1},
    # The embedding is tied, behind a scale that can't be folded into what also makes the stream.
    "gpt2": {BOTH: 1, PERMUTED: 4, ROTATED: 2, LINEAR: 2},
    # Patches are merged side by side, each with a copy of the units.
    "swin_windows_and_patch_merging": {BOTH: 1, PERMUTED: 1, ROTATED: 1, LINEAR: 1, SCALED: 1},
    # Rotary positions pin queries and keys; the gate of the hidden layer looks at each unit.
    "llama": {FREE_STREAM: 1, PERMUTED: 2, SIGNED: 1, LINEAR: 1},
    # A norm of queries with a scale for each dimension leaves signs and these scales.
    "qk_norm_linen": {LINEAR: 2, PERMUTED: 1, BOTH: 1},
    "qk_norm_with_fused_biases": {LINEAR: 2, PERMUTED: 1, BOTH: 1},
    "mlp_mixer": {BOTH: 1, PERMUTED: 2},
    # The cells of an LSTM and the states of a GRU are odd, also where gates share a kernel.
    "lstm_linen": {SIGNED: 1},
    "lstm_nnx": {SIGNED: 1},
    "gru_stacked_linen": {SIGNED: 2},
    "gru_bidirectional_linen": {SIGNED: 2},
    "lstm_equinox": {SIGNED: 1},
    "lstm_haiku_unrolled": {SIGNED: 1},
    "conv_lstm_linen": {SIGNED: 1},
    "gru_nnx": {SIGNED: 1},
    "gru_haiku": {SCALED: 1, SIGNED: 1},
    "gru_equinox": {SIGNED: 1},
    "gated_linear_unit": {PERMUTED: 1, SIGNED: 1},
    # Linear in its state, unit by unit.
    "state_space_model": {BOTH: 2},
    "fixed_point_while": {SIGNED: 1},
    "mixture_of_experts": {LINEAR: 1, PERMUTED: 1, SCALED: 1},
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


def test_every_network_states_what_it_may_do():
    assert EXPECTED.keys() == CASES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_networks_have_the_freedoms_worked_out_on_paper(name: str):
    case = CASES[name]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    assert Counter(map(words, symmetry.freedoms)) == EXPECTED[name]
    free = symmetry.with_rotations().with_signs().with_scales()
    assert otf.check_symmetry(free, case.fn, case.params, *case.inputs) < 1e-4
