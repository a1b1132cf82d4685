"""The kernels and the device functions that they share, in Triton's language.

``masks`` is the file to change for another mask. ``v1_forward`` and ``v1_backward`` are the first
paper's algorithms; V2 is ``v2_forward``, ``v2_combine`` (splits), ``v2_backward`` and
``v2_bias_gradient``.
"""
