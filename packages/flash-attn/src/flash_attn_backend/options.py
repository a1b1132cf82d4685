"""The options of attention in one vocabulary, and as the keywords of a function of the library."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypedDict

from torch import Tensor

from .forms import Form
from .loading import Library, parameters_of

Window = tuple[int | None, int | None]


class Options(TypedDict, total=False):
    """What every function here takes by keyword; the library's own default where it is left out.

    scale: the factor of QKᵀ; 1/sqrt(head_dim) by default.
    causal: "none", "bottom-right", or "top-left" where queries and keys are as many.
    window: (left, right), both inclusive, None on a side without a bound; None: no window.
    softcap: scores become softcap · tanh(scores / softcap); 0: off.
    alibi_slopes: (heads,) fp32; FlashAttention-2 alone.
    sinks: (heads,) fp32, one logit per head that joins the row sum; FlashAttention-4 alone.
    dropout_p: the probability with which a weight is dropped; FlashAttention-2 alone.
    deterministic: a backward that repeats to the bit.
    num_splits: pieces that the keys are split in; 0: by its own rule.
    """

    scale: float | None
    causal: str
    window: Window | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    deterministic: bool
    num_splits: int | None


# What each is called in the library, by the form; the first that a function has.
NAMES: Mapping[str, tuple[str, ...]] = {
    "scale": ("softmax_scale",),
    "causal": ("causal",),
    "window": ("window_size",),
    "softcap": ("softcap",),
    "alibi_slopes": ("alibi_slopes",),
    "sinks": ("learnable_sink",),
    "dropout_p": ("dropout_p",),
    "deterministic": ("deterministic",),
    "num_splits": ("num_splits",),
    "cache_seqlens": ("cache_seqlens", "seqused_k"),
    "page_table": ("page_table", "block_table"),
}
OFF: Mapping[str, object] = {"causal": "none", "softcap": 0.0, "dropout_p": 0.0}
LSE_SWITCHES = ("return_attn_probs", "return_softmax_lse", "return_lse")
CAUSAL = ("none", "bottom-right", "top-left")


def keywords(
    library: Library, name: str, options: Mapping[str, Any], *, square: bool
) -> dict[str, Any]:
    """``options``, and what else has a name above, as keywords of that function of the library.

    ``square``: as many queries as keys in each sequence, where both corners are one. What is None
    or off is left out. NotImplementedError, in a sentence, for what the function has no parameter
    for; TypeError for an unknown option; ValueError for a value that is none.
    """
    parameters = parameters_of(library.function(name))
    given = {}
    for option, value in options.items():
        if option not in NAMES:
            raise TypeError(
                f"unknown option {option!r}; known are {', '.join(Options.__annotations__)}"
            )
        if value is None or value == OFF.get(option, _NEVER):
            continue
        called = next((n for n in NAMES[option] if n in parameters), None)
        if called is None:
            raise NotImplementedError(f"{library}: {name} has no parameter for {option}")
        given[called] = _TRANSLATED.get(option, _same)(value, library.form, square)
    return given | lse_switch(parameters)


def lse_switch(parameters: Collection[str]) -> dict[str, bool]:
    """The keyword that makes the function return the LSE as well."""
    return {switch: True for switch in LSE_SWITCHES if switch in parameters}


def _same(value: Any, form: Form, square: bool) -> Any:
    return value


def _causal(value: Any, form: Form, square: bool) -> bool:
    if value not in CAUSAL:
        raise ValueError(f"causal={value!r}: accepted are {', '.join(CAUSAL)}")
    if value == "top-left" and not square:
        raise NotImplementedError(
            f"{form.title} aligns causality from the bottom right, which is the top left only "
            "where there are as many queries as keys"
        )
    return True


def _window(value: Any, form: Form, square: bool) -> Window:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"window={value!r}: accepted are None and a pair (left, right)")
    for side in value:
        if side is not None and (not isinstance(side, int) or side < 0):
            raise ValueError(f"window={value!r}: accepted on a side are None and 0 or more")
    left, right = (form.unbounded if side is None else side for side in value)
    return left, right


_TRANSLATED: Mapping[str, Callable[[Any, Form, bool], Any]] = {"causal": _causal, "window": _window}
_NEVER = object()
