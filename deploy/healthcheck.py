"""Whether an edge on this machine lives, for a container's health check: exit code 0 or 1.

    python healthcheck.py [PORT]

It asks GET /healthz, by TLS first.  The certificate is not checked: it is made out to another name than this machine's
own address, and nothing is told.  An edge that lets in only devices with certificates closes the connection, and lives.
"""

import http.client
import ssl
import sys

TIMEOUT_S = 3.0


def lives(port: int) -> bool:
    """Whether what listens on this port of loopback answers 200, or turns away who has no certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    secure = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)
    try:
        secure.connect()
    except ssl.SSLError:
        return answers(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S))
    except OSError:
        return False
    try:
        return answers(secure)
    except (ssl.SSLError, ConnectionError):
        return True


def answers(connection: http.client.HTTPConnection) -> bool:
    """Whether the answer is 200."""
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    finally:
        connection.close()


if __name__ == "__main__":
    try:
        is_alive = lives(int(sys.argv[1]) if len(sys.argv) > 1 else 8300)
    except (OSError, http.client.HTTPException):
        is_alive = False
    sys.exit(0 if is_alive else 1)
