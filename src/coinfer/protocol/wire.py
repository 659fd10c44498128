"""Bytes on the wire of one message: header, WebSocket frame and TCP/IP counted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 8
DURATIONS_BYTES = 12
SEGMENT_BYTES = 1448
TCP_IP_BYTES = 40

Number = float | NDArray[np.float64]


def wire_bytes(body_bytes: Number, *, masked: bool, overhead: int | None = None) -> NDArray[np.float64]:
    """Bytes on the wire of one message whose body (behind the 8-byte header) has `body_bytes` bytes.

    Adds the header, the reply's durations (`masked` False, that is edge to device), the WebSocket
    frame's own header (RFC 6455, section 5.2; a client masks: 4 bytes more) and 40 B of TCP/IP for every
    segment of 1,448 B.  `overhead` replaces header and durations.

    >>> float(wire_bytes(100, masked=True))
    154.0
    """
    extra = HEADER_BYTES + (0 if masked else DURATIONS_BYTES) if overhead is None else overhead
    message = np.asarray(body_bytes, dtype=np.float64) + extra
    frame = message + np.where(message < 126, 2, np.where(message < 65536, 4, 10)) + (4 if masked else 0)
    return np.asarray(frame + TCP_IP_BYTES * np.ceil(frame / SEGMENT_BYTES))


def message_wire_bytes(message_bytes: int, *, masked: bool) -> int:
    """`wire_bytes` of one whole message (header included), in integers.

    >>> message_wire_bytes(108, masked=True)
    154
    """
    header = 2 if message_bytes < 126 else 4 if message_bytes < 65536 else 10
    frame = message_bytes + header + (4 if masked else 0)
    return frame + TCP_IP_BYTES * -(-frame // SEGMENT_BYTES)
