"""What is checked, one chapter per property: ``test_<chapter>.py``.

To add a chapter, add such a module; a check is a function ``test_<check>(problem, subject)``
that declares its problems with ``@cases``, and calls ``subject.check`` or makes its own plan and
raises ``subject.deviates``. docs/chapters.md says what each chapter can and cannot see.

Problems come as pairwise covers of the input recipe, one cover for each class of
capabilities (nothing optional; one feature; two), so that a target with few features still
meets many cases.
"""
