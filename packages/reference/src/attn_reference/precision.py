"""What an attention kernel does to its numbers inside, as declared data.

The low-precision reference follows a ``Precision``; the error budget of the harness is
derived from one. Unit roundoffs u (half of torch's finfo.eps): fp32 2^-24, tf32 and fp16
2^-11, bf16 2^-8.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

UNIT_ROUNDOFF = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}
# Half of the smallest subnormal: the largest error of an underflow to it, or to zero.
UNDERFLOW = {"fp64": 2.0**-1075, "fp32": 2.0**-150, "fp16": 2.0**-25, "bf16": 2.0**-134}
SMALLEST_NORMAL_FP32 = 2.0**-126
INPUT = "input"  # the dtype of q, k and v


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Where an implementation rounds. Dtypes are fp32, fp16, bf16 or 'input' (that of q, k, v)."""

    name: str
    scores: str = "fp32"  # dtype in which S (and dP, dS before their products) is kept
    probabilities: str = INPUT  # dtype of P and dS as operands of the second product
    # dtype of the P that dS = P (dP - Delta) is formed from; unfused attention has one P alone.
    gradient_probabilities: str = "fp32"
    # A fused kernel drops P as stored: P, 1 / (1 - dropout) and their product are each rounded.
    drops_stored_probabilities: bool = False
    accumulate_out: str = "fp32"
    accumulate_dq: str = "fp32"
    accumulate_dk: str = "fp32"
    accumulate_dv: str = "fp32"
    # Terms whose sum a 16-bit accumulator adds at a time: rows for dK, dV, keys for out, dQ.
    accumulate_rows: int = 32
    products: str = INPUT  # dtype to which the operands of products are rounded: 'tf32' for fp32
    exp_error: float = 0.0  # of the exponential with 16-bit inputs, relative, beyond fp32 rounding
    tanh_error: float = 0.0  # relative error of tanh, beyond fp32 rounding
    flushes_subnormals: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "name" or not isinstance(value, str):
                continue
            accepted = (INPUT, *UNIT_ROUNDOFF)
            if value not in accepted:
                raise ValueError(f"{f.name}={value!r}: accepted are {', '.join(accepted)}")

    def dtype_of(self, role: str, dtype: str) -> str:
        """The dtype of that role (a field's name) for inputs of ``dtype``.

        Nothing is kept in less than it could be: a 16-bit declaration does not touch fp64,
        and 'fp32' means fp64 for fp64 inputs.
        """
        declared: str = getattr(self, role)
        if dtype == "fp64" or declared == INPUT:
            return dtype
        return declared

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(**values)


# A fused kernel: scores, softmax and accumulators in fp32, P cast to the dtype of V.
FLASH = Precision(name="flash")
# A fused kernel that also keeps P in fp32 for the second product.
FLASH_FP32_P = Precision(name="flash-fp32-p", probabilities="fp32")
# Unfused attention in the dtype of its inputs: scores are stored in 16 bits.
EAGER = Precision(name="eager", scores=INPUT)
# fp32 inputs whose products run on tf32 tensor cores.
FLASH_TF32 = Precision(name="flash-tf32", products="tf32")

PROFILES = {p.name: p for p in (FLASH, FLASH_FP32_P, EAGER, FLASH_TF32)}
