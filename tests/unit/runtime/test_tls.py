"""TLS on the device's side against real TLS servers, and what certificates are made of."""

from __future__ import annotations

import socket
import ssl
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from websockets.sync.server import ServerConnection, serve

pytest.importorskip("cryptography", reason="certificates need the edge extra")
from cryptography import x509  # noqa: E402

from certificates import reissue  # noqa: E402
from coinfer.errors import LinkError, UsageError  # noqa: E402
from coinfer.runtime.certificates import FILES, LABEL, make_test_ca, revoke_certificate  # noqa: E402
from coinfer.runtime.link import Link  # noqa: E402
from coinfer.runtime.tls import DeviceTls, EdgeTls  # noqa: E402

PATIENCE_S = 30.0
Talk = Callable[[ServerConnection], None]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    make_test_ca(folder, ["localhost", "127.0.0.1"])
    return folder


def edge_tls(ca: Path, **more: Path) -> EdgeTls:
    return EdgeTls(certificate=ca / "server.pem", key=ca / "server.key", **more)


@contextmanager
def tls_server(talk: Talk, context: ssl.SSLContext, host: str = "127.0.0.1") -> Iterator[str]:
    with serve(talk, "127.0.0.1", 0, ssl=context, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"wss://{host}:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def connect(url: str, ca: Path | None, *, timeout_s: float = PATIENCE_S, **more: Path) -> Link:
    tls = DeviceTls(ca=None if ca is None else ca / "ca.pem", **more)
    return Link(url, max_message_bytes=1_000_000, timeout_s=timeout_s, tls=tls)


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_messages_of_every_size_go_there_and_back_over_tls(ca: Path, host: str) -> None:
    with tls_server(echo, edge_tls(ca).context(), host) as url:
        link = connect(url, ca)
        for size in (0, 1, 125, 126, 16_384, 65_536, 300_000):
            message = bytes(range(256)) * (size // 256) + bytes(size % 256)
            link.write(link.frame(message))
            assert link.read() == message
        assert link.is_open()
        link.close()
        assert not link.is_open()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_two_threads_share_one_tls_connection_under_load(ca: Path, version: ssl.TLSVersion) -> None:
    """Each direction carries tens of megabytes at the same time; every byte is as it was sent."""
    context = edge_tls(ca).context()
    context.maximum_version = version
    sizes = [(7919 * k) % 60_000 for k in range(1500)]
    messages = [struct.pack("<I", k) + bytes([k % 256]) * size for k, size in enumerate(sizes)]

    def talk(connection: ServerConnection) -> None:
        def pour() -> None:
            for message in messages:
                connection.send(message)

        pourer = threading.Thread(target=pour)
        pourer.start()
        received.extend(bytes(connection.recv()) for _ in messages)
        pourer.join()
        connection.send(b"all")
        connection.recv()

    received: list[bytes] = []
    with tls_server(talk, context) as url:
        link = connect(url, ca)

        def write() -> None:
            for message in messages:
                link.write(link.frame(message))

        writer = threading.Thread(target=write)
        writer.start()
        assert [link.read() for _ in messages] == messages
        writer.join()
        assert link.read() == b"all"
        link.close()
    assert received == messages


def test_is_open_counts_what_tls_holds_already(ca: Path) -> None:
    """A goodbye that was decrypted with what came before it; and tickets, which are no sign of anything."""
    said = threading.Event()

    def talk(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(b"last")
        connection.close(1001, "tired")
        said.set()

    with tls_server(talk, edge_tls(ca).context()) as url:
        link = connect(url, ca)
        assert link.is_open() and link.is_open()
        link.write(link.frame(b"go"))
        assert link.read() == b"last"
        deadline_s = time.monotonic() + PATIENCE_S
        while link.is_open():
            assert time.monotonic() < deadline_s
        with pytest.raises(LinkError, match="tired"):
            link.read()
        link.close()


def test_abort_from_another_thread_wakes_a_tls_reader(ca: Path) -> None:
    with tls_server(echo, edge_tls(ca).context()) as url:
        link = connect(url, ca)
        errors: list[LinkError] = []

        def read() -> None:
            with pytest.raises(LinkError) as caught:
                link.read()
            errors.append(caught.value)

        reader = threading.Thread(target=read)
        reader.start()
        link.abort()
        reader.join()
        assert len(errors) == 1
        link.close()


def test_silence_over_tls_ends_in_time(ca: Path) -> None:
    with tls_server(lambda connection: connection.recv(), edge_tls(ca).context()) as url:
        link = connect(url, ca, timeout_s=0.5)
        with pytest.raises(LinkError, match="silent for 0.5 s"):
            link.read()
        link.close()


@contextmanager
def scripted(context: ssl.SSLContext | None, act: Callable[[socket.socket], None]) -> Iterator[str]:
    """One connection that `act` gets, with TLS where there is a context."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            raw, _ = listener.accept()
            with raw, suppress(OSError):
                if context is None:
                    act(raw)
                else:
                    with context.wrap_socket(raw, server_side=True) as tls:
                        act(tls)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"wss://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join()


def test_an_end_without_tlss_goodbye_is_a_broken_link(ca: Path) -> None:
    def act(tls: socket.socket) -> None:
        tls.recv(65536)
        # The process of the other side is gone: its kernel ends the connection.
        tls.shutdown(socket.SHUT_RDWR)

    with scripted(edge_tls(ca).context(), act) as url, pytest.raises(LinkError):
        connect(url, ca)

    def talk(connection: ServerConnection) -> None:
        connection.recv()
        connection.socket.shutdown(socket.SHUT_RDWR)

    with tls_server(talk, edge_tls(ca).context()) as url:
        link = connect(url, ca)
        link.write(link.frame(b"go"))
        with pytest.raises(LinkError, match="broke: the edge is gone|broke: .*reset"):
            link.read()
        assert not link.is_open()
        link.close()


def test_a_server_that_does_not_shake_hands_ends_in_time(ca: Path) -> None:
    is_over = threading.Event()
    with scripted(None, lambda raw: is_over.wait() and None) as url:
        with pytest.raises(LinkError, match="no TLS at wss://127.0.0.1:.* within 0.2 s"):
            connect(url, ca, timeout_s=0.2)
        is_over.set()


def test_a_server_without_tls_is_one_line(ca: Path) -> None:
    def act(raw: socket.socket) -> None:
        raw.recv(65536)
        raw.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with scripted(None, act) as url, pytest.raises(LinkError, match="no TLS came of wss://127.0.0.1:.*wrong version"):
        connect(url, ca)


# --- whom a device does not trust ---------------------------------------------------------------------------------


def refused(context: ssl.SSLContext, ca: Path | None, host: str = "127.0.0.1") -> str:
    with tls_server(echo, context, host) as url:
        with pytest.raises(LinkError) as caught:
            connect(url, ca)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"no trust in the edge at {url}: ")
    return str(caught.value).partition(": ")[2]


def test_a_certificate_of_another_ca_is_not_trusted(ca: Path, tmp_path: Path) -> None:
    make_test_ca(tmp_path / "other", ["127.0.0.1"])
    line = "its certificate is of no CA that this device trusts: give it the edge's CA"
    assert refused(edge_tls(ca).context(), tmp_path / "other") == line
    # Nor by the system's.
    assert refused(edge_tls(ca).context(), None) == line


def test_a_certificate_of_another_host_is_not_trusted(tmp_path: Path) -> None:
    make_test_ca(tmp_path / "ca", ["edge.example", "10.0.0.1"])
    context = edge_tls(tmp_path / "ca").context()
    assert refused(context, tmp_path / "ca") == 'its certificate is of another host than "127.0.0.1"'
    assert refused(context, tmp_path / "ca", "localhost") == 'its certificate is of another host than "localhost"'


def test_an_expired_certificate_is_not_trusted(tmp_path: Path) -> None:
    make_test_ca(tmp_path / "ca", ["127.0.0.1"])
    reissue(tmp_path / "ca", "server", days_ago=1)
    assert refused(edge_tls(tmp_path / "ca").context(), tmp_path / "ca") == "its certificate has expired"


def test_a_client_certificate_is_no_server_certificate(ca: Path) -> None:
    context = EdgeTls(certificate=ca / "client.pem", key=ca / "client.key").context()
    assert refused(context, ca).startswith("its certificate is not accepted: unsuitable certificate purpose")


def test_tls_older_than_1_2_is_refused(ca: Path) -> None:
    context = edge_tls(ca).context()
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with tls_server(echo, context) as url, pytest.raises(LinkError, match="no TLS came of"):
        connect(url, ca)
    for made in (edge_tls(ca).context(), DeviceTls().context()):
        assert made.minimum_version is ssl.TLSVersion.TLSv1_2
    made = DeviceTls().context()
    assert made.verify_mode is ssl.CERT_REQUIRED and made.check_hostname


# --- client certificates ------------------------------------------------------------------------------------------


def test_a_client_certificate_is_asked_for_and_shown(ca: Path) -> None:
    context = edge_tls(ca, client_ca=ca / "ca.pem").context()
    with tls_server(echo, context) as url:
        link = connect(url, ca, certificate=ca / "client.pem", key=ca / "client.key")
        link.write(link.frame(b"x"))
        assert link.read() == b"x"
        link.close()
        with pytest.raises(LinkError, match="hung up behind TLS: it may want a client"):
            connect(url, ca)


def test_a_revoked_client_certificate_is_refused_by_a_new_context(tmp_path: Path) -> None:
    make_test_ca(tmp_path / "ca", ["127.0.0.1"])
    folder = tmp_path / "ca"
    tls = edge_tls(folder, client_ca=folder / "ca.pem", crl=folder / "crl.pem")
    own = {"certificate": folder / "client.pem", "key": folder / "client.key"}
    before = tls.admission()
    with tls_server(echo, tls.context()) as url:
        connect(url, folder, **own).close()
    revoke_certificate(folder, folder / "client.pem")
    assert tls.admission() != before
    line = "hung up behind TLS: .*or have revoked this one"
    with tls_server(echo, tls.context()) as url, pytest.raises(LinkError, match=line):
        connect(url, folder, **own)


# --- files --------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_one_line(ca: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    make_test_ca(tmp_path / "other", ["localhost"])
    with pytest.raises(UsageError, match="nothing cannot be read: no such file"):
        EdgeTls(certificate=tmp_path / "nothing", key=ca / "server.key").context()
    with pytest.raises(UsageError, match="certificate and key cannot be used: key values mismatch"):
        EdgeTls(certificate=ca / "server.pem", key=tmp_path / "other" / "server.key").context()
    with pytest.raises(UsageError, match="certificate and key cannot be used"):
        EdgeTls(certificate=tmp_path / "text", key=ca / "server.key").context()
    with pytest.raises(UsageError, match="the client CA cannot be used"):
        edge_tls(ca, client_ca=tmp_path / "text").context()
    with pytest.raises(UsageError, match="a CRL revokes certificates of a client CA, and none was given"):
        edge_tls(ca, crl=ca / "crl.pem").context()
    with pytest.raises(UsageError, match="the CA cannot be used"):
        DeviceTls(ca=tmp_path / "text").context()
    with pytest.raises(UsageError, match="a device's certificate needs its key"):
        DeviceTls(certificate=ca / "client.pem").context()


def test_a_ca_without_tls_is_a_usage_error(ca: Path) -> None:
    with pytest.raises(UsageError, match="is for an edge at wss://HOST:PORT, got .ws://127.0.0.1:1"):
        connect("ws://127.0.0.1:1", ca)


def test_a_test_ca_says_so_and_keeps_its_keys(tmp_path: Path) -> None:
    make_test_ca(tmp_path / "ca", ["edge.example", "10.0.0.1", "::1"])
    assert sorted(path.name for path in (tmp_path / "ca").iterdir()) == sorted(FILES)
    for path in (tmp_path / "ca").iterdir():
        if path.suffix == ".key":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server = x509.load_pem_x509_certificate((tmp_path / "ca" / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["edge.example"]
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    assert LABEL == "coinfer test CA, not for production" and server.issuer.rfc4514_string() == f"CN={LABEL}".replace(
        ",", "\\,"
    )
    before = (tmp_path / "ca" / "ca.key").read_bytes()
    with pytest.raises(UsageError, match="exists: a key is never overwritten"):
        make_test_ca(tmp_path / "ca", ["localhost"])
    assert (tmp_path / "ca" / "ca.key").read_bytes() == before


def test_a_certificate_needs_a_host_that_is_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a certificate needs a host"):
        make_test_ca(tmp_path / "ca", [])
    for host in ("", "a..b", "x" * 300):
        with pytest.raises(UsageError, match="is no host's name or address"):
            make_test_ca(tmp_path / "ca", [host])
    with pytest.raises(UsageError, match="valid for 1 to 3650 days, got 0"):
        make_test_ca(tmp_path / "ca", ["localhost"], days=0)
    assert not (tmp_path / "ca").exists()


def test_only_certificates_of_the_ca_are_revoked_by_it(tmp_path: Path) -> None:
    make_test_ca(tmp_path / "ca", ["localhost"])
    make_test_ca(tmp_path / "other", ["localhost"])
    with pytest.raises(UsageError, match="is no certificate of the CA in"):
        revoke_certificate(tmp_path / "ca", tmp_path / "other" / "client.pem")
    for stem in ("client", "server", "client"):
        revoke_certificate(tmp_path / "ca", tmp_path / "ca" / f"{stem}.pem")
    crl = x509.load_pem_x509_crl((tmp_path / "ca" / "crl.pem").read_bytes())
    assert len(crl) == 2
