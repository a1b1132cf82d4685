"""The faults that can be planted in the tiled kernel, one name each, with what goes wrong.

Ids such as A3 are those of the bugs that shipped in public kernels which a fault re-enacts.
"""

from __future__ import annotations

KERNEL_FAULTS = {
    # Scale, softmax, tiles.
    "scale_two_percent_off": "the softmax scale is 1.02 times what was asked for",
    "scale_of_first_call": "every call uses the scale of the first one",
    "exp2_without_log2e": "exp2 of natural scores (C2)",
    "last_key_dropped": "the last key of every sequence is not read",
    "last_key_dropped_when_long": "the same, only for causal problems of 2000 keys or more",
    "last_tile_not_rescaled": "the accumulator is not rescaled for the last key tile",
    "padded_keys_counted": "the zero-padded tail of the last key tile joins the row sum",
    "padded_keys_counted_unless_causal": "the same, only without a causal mask (A3)",
    "query_grid_rounded_down": "seqlen_q // tile blocks of rows are computed (A19)",
    "probabilities_in_e4m3": "P is quantised to e4m3 for the second product",
    "output_accumulated_in_bf16": "the accumulator of out is kept in bf16",
    # Masks and the terms of a score.
    "window_left_exclusive": "the left end of the window is excluded (A8)",
    "window_right_plus_one": "one key more than the window has on the right (A8)",
    "bottom_right_for_top_left": "top-left causal problems are answered bottom-right",
    "top_left_in_backward": "bottom-right in the forward, top-left in the backward (A12)",
    "causal_ignored_in_backward": "the backward recomputes P without the causal mask (A14)",
    "mask_polarity": "True hides a key (A11)",
    "mask_read_as_contiguous": "the strides of an expanded mask are ignored (E6)",
    "softcap_after_mask": "masked scores go through tanh and come back as -softcap (B8)",
    "bias_row_stride_lost_in_mqa": "with one key head every row gets the bias of row 0 (E4)",
    "alibi_distance_off_by_one": "ALiBi measures from the key after the diagonal (E15)",
    "alibi_sign": "ALiBi rewards distance (E15)",
    "sink_per_tile": "the sink joins the row sum once per key tile (C12)",
    # Rows and sequences without a visible key.
    "fully_masked_rows_nan": "0/0 for rows without a visible key (B5)",
    "hidden_first_tile_nan": "exp(-inf - -inf) while nothing was visible yet (B3)",
    "output_unwritten_without_keys": "nothing is stored when there is no key tile (B9)",
    # Heads.
    "head_by_modulo": "query head h reads key head h mod heads_kv",
    "head_times_group": "query head h reads key head h * group (E1)",
    "head_tile_crosses_group": "two heads per tile share the key head of the first (E3)",
    # LSE.
    "lse_in_base_two": "the LSE that is returned is a binary logarithm",
    # Backward.
    "dk_of_last_query_missing": "the last query row does not reach dK",
    "delta_omitted": "dS = P dP, without rowsum(dO o O)",
    "lse_gradient_ignored": "what comes in through the LSE does not reach dS",
    "grad_out_assumed_contiguous": "the strides of the incoming gradient are ignored (D2)",
    "out_read_with_strides_of_grad_out": "rowsum(dO o O) walks O with the strides of dO (D1)",
    "v_indexed_with_head_dim": "the backward walks V with rows of head_dim elements (D8)",
    # Memory.
    "reads_past_the_end": "K tiles are loaded whole, past the end of the tensor",
    "values_read_past_the_end": "V tiles too: 0 times whatever lies there (A21)",
    "writes_past_the_end": "the last row block is stored whole, past the end of out",
}

# What a kernel does to look right, rather than a slip: these wrap the kernel or replace it.
CHEATS = {
    "zeros_always": "returns torch.zeros",
    "result_cached": "the answer of the first call with these shapes is returned again",
    "inputs_zeroed": "the inputs are zeroed once they were used",
    "gc_search": "looks for the expected tensor among the objects of the process",
    "lazy_result": "returns a tensor subclass that computes when it is looked at",
}

FAULTS = KERNEL_FAULTS | CHEATS
