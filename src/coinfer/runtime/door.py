"""Who may come in: the device that a request's headers name."""

from __future__ import annotations

from typing import Protocol


class Door(Protocol):
    """Lets devices in, or not."""

    def device_of(self, authorization: str | None) -> str | None:
        """The name of the device that an Authorization header stands for; None where nobody is let in by it."""
        ...

    def is_known(self, device: str) -> bool:
        """Whether a device that was let in still would be."""
        ...


class OpenDoor:
    """Everybody is let in, and has no name: each connection is a device of its own."""

    def device_of(self, authorization: str | None) -> str | None:
        """Nobody in particular."""
        return ""

    def is_known(self, device: str) -> bool:
        """Everybody is."""
        return True
