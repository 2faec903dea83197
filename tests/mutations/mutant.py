"""What one mutation is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A plausible mistake in one place.

    name        for --only and the table of results
    file        from the root of the repository
    old, new    exact text, which must occur once in the file, and what takes its place
    why         what would go wrong for a user, unnoticed
    tests       files or node ids below tests/ that must notice; the smallest that do
    equivalent  why no test can notice, for a mutation that changes nothing that can be observed
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
    equivalent: str = ""
