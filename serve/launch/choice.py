"""One choice of a launch plan with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One setting with its value and the reason for it."""

    name: str
    """Name of an argument or an environment variable."""
    value: str
    """Value; empty for an argument that takes none."""
    reason: str

    def argument(self) -> list[str]:
        """Return the parts of the command line."""
        return [self.name, self.value] if self.value else [self.name]
