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


def whose(asker: str) -> dict[str, str]:
    """What a log line says of whoever asks: a device's name, or where it has none its connection, HOST:PORT.

    >>> whose("camera-1"), whose("127.0.0.1:41312"), whose("")
    ({'device': 'camera-1'}, {'peer': '127.0.0.1:41312'}, {})
    """
    # No name has a colon (`tokens.NAME`).
    return {"peer" if ":" in asker else "device": asker} if asker else {}


class OpenDoor:
    """Everybody is let in, and has no name: each connection is a device of its own."""

    def device_of(self, authorization: str | None) -> str | None:
        """Nobody in particular."""
        return ""

    def is_known(self, device: str) -> bool:
        """Everybody is."""
        return True
