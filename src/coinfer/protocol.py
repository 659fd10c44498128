"""The link's messages, without I/O and without a clock.

A connection begins with one JSON text message each way, then carries binary messages only:

    device -> edge   hello    {"protocol": 1, "bundle": sha256, "inputs": {plan: [specs]}}
    edge -> device   welcome  {"protocol": 1, "bundle": sha256, "limits": {...}}  or  refusal {"reason"}
    device -> edge   REQUEST  8-byte header + a codec's payload
    edge -> device   REPLY    8-byte header + the edge's durations + the answer
                     FAILURE  8-byte header + one line of UTF-8 text
    either           PING / PONG   8-byte header alone (the protocol's own heartbeat)

Header, little endian: type u8, flags u8 (0), plan u16, request u32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PROTOCOL_VERSION = 1
HEADER_BYTES = 8
DURATIONS_BYTES = 12
SEGMENT_BYTES = 1448
TCP_IP_BYTES = 40

Number = float | NDArray[np.float64]


def wire_bytes(body_bytes: Number, *, masked: bool, overhead: int | None = None) -> NDArray[np.float64]:
    """Bytes on the wire of one message whose body (behind the 8-byte header) has `body_bytes` bytes.

    Adds the header, the reply's durations (`masked` False, that is edge to device), the WebSocket
    frame's own header (RFC 6455, section 5.2; a client masks: 4 bytes more) and 40 B of TCP/IP for every segment of 1,448 B.

    >>> float(wire_bytes(100, masked=True))
    154.0
    """
    extra = HEADER_BYTES + (0 if masked else DURATIONS_BYTES) if overhead is None else overhead
    message = np.asarray(body_bytes, dtype=np.float64) + extra
    frame = message + np.where(message < 126, 2, np.where(message < 65536, 4, 10)) + (4 if masked else 0)
    return np.asarray(frame + TCP_IP_BYTES * np.ceil(frame / SEGMENT_BYTES))
