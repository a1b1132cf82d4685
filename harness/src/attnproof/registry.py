"""The registered backends: what packages list under the entry-point group."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

GROUP = "attnproof.backends"


def points_named(name: str) -> list[EntryPoint]:
    """The entry points of that name: more than one where two packages claim it."""
    return [point for point in entry_points(group=GROUP) if point.name == name]


def registered() -> dict[str, EntryPoint]:
    """The registered backends by name, sorted; nothing of them is imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}
