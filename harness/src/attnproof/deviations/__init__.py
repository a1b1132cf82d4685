"""Known deviations: bugs of a target, with proof, that a run expects and prints.

The files beside this one ship with the harness. A file names the targets it belongs to, as
they are written on the command line, and lists what deviates:

    targets = ["my-kernel", "my_package:attention"]

    [[deviation]]
    cases = "masks/window/*fp16*"       # case ids, * and ? match anything; or a list
    except = "*_k1_*"                   # optional: but not these, in the same form
    reason = "the window is one key too wide in fp16"
    proof = "https://…"                 # where it is shown, or how to see it
    verdict = "deviates"                # optional: deviates (default), crashed or timed out
    torch = ">=2.5,<2.14"               # optional
    device = "cpu"                      # optional
    always = false                      # optional: chance decides, or what ran before it
"""

from .files import DeviationsError, load_deviations, read_deviations
from .known import Deviation, Deviations

__all__ = ["Deviation", "Deviations", "DeviationsError", "load_deviations", "read_deviations"]
