"""What a check needs beyond the problem; a target that lacks it is told so, as unsupported."""

from __future__ import annotations

from ..device import current_device
from ..requirement import Requirement
from ..subject import Subject
from ..verdict import Status


def require_lse(subject: Subject) -> None:
    """The target returns the LSE."""
    if not subject.description.capabilities.returns_lse:
        raise subject.verdict_error(Status.UNSUPPORTED, "the LSE is not returned")


def require_keep_mask(subject: Subject) -> None:
    """The target has dropout, and says what it kept."""
    capabilities = subject.description.capabilities
    if "dropout" not in capabilities.features:
        raise subject.verdict_error(Status.UNSUPPORTED, "dropout is not supported")
    if not capabilities.keep_mask:
        raise subject.verdict_error(Status.UNSUPPORTED, "what dropout kept is not returned")


def require_cuda(subject: Subject, what: str) -> None:
    """The target runs on a GPU; ``what`` is what only GPUs have."""
    if subject.device != "cuda":
        raise subject.verdict_error(Status.UNSUPPORTED, f"{what}: there are none on the CPU")


def require_device_memory(subject: Subject, nbytes: int) -> None:
    """A GPU with that much memory; on the CPU what is asked for is address space alone."""
    if subject.device != "cuda":
        return
    lacks = Requirement(who="this case", memory=nbytes).unmet(current_device())
    if lacks:
        raise subject.verdict_error(Status.UNAVAILABLE, "; ".join(lacks))
