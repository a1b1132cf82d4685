"""The truth about attention: vocabulary, forward, LSE and gradients. Imports torch alone."""

from .autograd import differentiable_attention
from .backward import gradients
from .forward import attention
from .inputs import Attention, Gradients, Inputs, standard_alibi_slopes
from .masks import Mask
from .precision import EAGER, FLASH, FLASH_FP32_P, FLASH_TF32, PROFILES, Precision
from .problem import FEATURES, Problem
from .validation import validate

__all__ = [
    "EAGER",
    "FEATURES",
    "FLASH",
    "FLASH_FP32_P",
    "FLASH_TF32",
    "PROFILES",
    "Attention",
    "Gradients",
    "Inputs",
    "Mask",
    "Precision",
    "Problem",
    "attention",
    "differentiable_attention",
    "gradients",
    "standard_alibi_slopes",
    "validate",
]
