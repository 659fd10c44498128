"""Which addresses are of this machine alone."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Whether a resolved address is of this machine alone: 127.0.0.0/8 or ::1.

    >>> is_loopback("127.8.9.10"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("::")
    (True, True, False, False)
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
