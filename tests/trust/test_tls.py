"""Contexts from certificate files: what is refused at the start, by name, and what is read again."""

from __future__ import annotations

import logging
import os
import ssl
import stat
from pathlib import Path

import pytest

from embferry.protocol.errors import LocalProtocolError, TlsFailed
from embferry.trust.reread import REPORT_S

from .authority import Authority, Tls, make_ca, make_certificate

from embferry.trust.tls import begins_tls, dialling_with, reason_of, TLS_ALERT  # isort: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str = "127.0.0.1") -> ssl.SSLObject:
    """Returns the client's end after a handshake in memory and a byte in either direction."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(back, there, server_hostname=host),
        server.wrap_bio(there, back, server_side=True),
    )
    for end in ends * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    for end, other in (ends, ends[::-1]):
        end.write(b"x")
        assert other.read(1) == b"x"
    return ends[0]


def serial_of(tls: Tls) -> str:
    certificate = shake_hands(tls.dialling(), tls.accepting()).getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def test_two_certificates_of_one_ca_fit_in_either_role(authority: Authority) -> None:
    one, two = authority.tls("one"), authority.tls("two")
    for client, server in ((one, two), (two, one)):
        end = shake_hands(client.dialling(), server.accepting())
        assert end.version() == "TLSv1.3"
        for host in ("::1", "localhost"):
            shake_hands(client.dialling(), server.accepting(), host)


def test_a_client_without_a_certificate_enters_only_where_users_come(authority: Authority) -> None:
    server = authority.tls("server")
    client = dialling_with(authority.ca)
    shake_hands(client, server.accepting(clients=False))
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(client, server.accepting())
    assert caught.value.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"


def test_the_wrong_host_is_refused(authority: Authority) -> None:
    server = authority.tls("elsewhere", "10.0.0.7", "worker.example")
    client = authority.tls("dialler")
    for host in ("10.0.0.7", "worker.example"):
        shake_hands(client.dialling(), server.accepting(), host)
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        shake_hands(client.dialling(), server.accepting(), "10.0.0.8")
    assert "10.0.0.8" in reason_of(caught.value)
    server.check_host("10.0.0.7", "the control port")
    with pytest.raises(TlsFailed, match=r"the control port at 10\.0\.0\.8 by the certificate in .*elsewhere\.pem"):
        server.check_host("10.0.0.8", "the control port")


def test_a_certificate_of_another_ca_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.make(tmp_path / "other").tls("stranger")
    mine = authority.tls("mine")
    for client, server in ((mine, other), (other, mine)):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(client.dialling(), server.accepting())


@pytest.mark.parametrize("broken", ["ca", "cert", "key"])
def test_a_file_that_cannot_be_used_is_named_at_the_start(authority: Authority, tmp_path: Path, broken: str) -> None:
    files = dict(zip(("ca", "cert", "key"), authority.files(f"whole-{broken}"), strict=True))
    bad = tmp_path / f"bad-{broken}"
    with pytest.raises(TlsFailed, match=f"{bad} cannot be read: No such file"):
        Tls(**{**files, broken: bad})
    bad.mkdir()
    with pytest.raises(TlsFailed, match=f"{bad} (cannot be read|is no file)"):
        Tls(**{**files, broken: bad})
    bad.rmdir()
    bad.write_text("no PEM at all")
    bad.chmod(0o600)
    with pytest.raises(TlsFailed, match=f"{bad} holds no") as caught:
        Tls(**{**files, broken: bad})
    assert caught.value.code == "tls_failed"
    assert not caught.value.retryable


def test_files_that_do_not_belong_together_are_refused(authority: Authority, tmp_path: Path) -> None:
    ca, cert, key = authority.files("together")
    _, other_cert, other_key = authority.files("apart")
    with pytest.raises(TlsFailed, match=f"{other_key} does not belong to the certificate in {cert}"):
        Tls(ca, cert, other_key)
    with pytest.raises(TlsFailed, match=f"{other_cert} is not one of a CA"):
        Tls(other_cert, cert, key)
    foreign = Authority.make(tmp_path / "foreign").ca
    with pytest.raises(TlsFailed, match=f"{cert} cannot be used with the CA in {foreign}: .*not accepted"):
        Tls(foreign, cert, key)


def test_an_expired_certificate_is_refused_at_the_start(authority: Authority) -> None:
    ca, cert, key = authority.files("expired", expired=True)
    with pytest.raises(TlsFailed, match=f"{cert} cannot be used .*certificate has expired"):
        Tls(ca, cert, key)


def test_a_key_that_others_may_read_or_that_is_encrypted_is_refused(authority: Authority) -> None:
    from cryptography.hazmat.primitives import serialization

    ca, cert, key = authority.files("careless")
    key.chmod(0o640)
    with pytest.raises(TlsFailed, match=f"chmod 600 {key}"):
        Tls(ca, cert, key)
    key.chmod(0o600)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(TlsFailed, match=f"{key} is encrypted"):
        Tls(ca, cert, key)


def test_a_renewed_certificate_serves_new_connections(authority: Authority) -> None:
    tls = authority.tls("renewed")
    lasting = (tls.renewed(tls.dialling), tls.renewed(tls.accepting))
    before = serial_of(tls)
    _, cert, key = authority.files("renewed-next")
    for name, new in (("renewed.key", key), ("renewed.pem", cert)):
        os.replace(new, authority.path / name)
    after = serial_of(tls)
    assert after != before
    certificate = shake_hands(*lasting).getpeercert()
    assert certificate is not None
    assert certificate["serialNumber"] == after


def test_files_that_break_later_leave_the_last_ones_in_use(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    tls = authority.tls("breaks")
    now = 0.0
    tls._files.clock = lambda: now
    before = serial_of(tls)
    (authority.path / "breaks.pem").write_text("cut off")
    with caplog.at_level(logging.ERROR):
        assert [serial_of(tls) for _ in range(3)] == [before] * 3
        assert len(caplog.messages) == 1
        assert "breaks.pem" in caplog.messages[0]
        now = REPORT_S
        (authority.path / "breaks.key").unlink()
        assert serial_of(tls) == before
        assert len(caplog.messages) == 2


def test_bytes_that_begin_tls_are_known() -> None:
    assert begins_tls(b"\x16\x03\x01\x02")
    assert begins_tls(TLS_ALERT)
    assert not begins_tls(b"\x16")
    assert not begins_tls(b"EMBFERRY")


def test_certificates_are_written_once_and_keys_for_their_owner(tmp_path: Path) -> None:
    ca = tmp_path / "new" / "ca"
    written = [*make_ca(ca), *make_certificate("router", ["router.example"], ca)]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "router.pem": 0o644, "router.key": 0o600}
    before = [path.read_bytes() for path in written]
    with pytest.raises(LocalProtocolError, match="is there already"):
        make_ca(ca)
    with pytest.raises(LocalProtocolError, match="is there already"):
        make_certificate("router", ["router.example"], ca)
    assert [path.read_bytes() for path in written] == before


@pytest.mark.parametrize(
    ("name", "hosts", "days", "said"),
    [
        ("../up", ["h"], 1, "cannot be the name"),
        ("ca", ["h"], 1, "the CA's own files"),
        ("part", [], 1, "needs a host"),
        ("part", ["bücher.example"], 1, "neither an IP address nor a host name"),
        ("part", ["h"], 0, "1 to 36500 days"),
    ],
)
def test_a_certificate_with_impossible_values_is_refused(
    authority: Authority, name: str, hosts: list[str], days: int, said: str
) -> None:
    with pytest.raises(LocalProtocolError, match=said):
        make_certificate(name, hosts, authority.path, days=days)


def test_a_ca_that_is_absent_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalProtocolError, match=r"ca\.pem cannot be read: .*embferry keys ca"):
        make_certificate("part", ["h"], tmp_path / "absent")
    make_ca(tmp_path / "one")
    make_ca(tmp_path / "two")
    os.replace(tmp_path / "two" / "ca.key", tmp_path / "one" / "ca.key")
    with pytest.raises(LocalProtocolError, match="does not belong"):
        make_certificate("part", ["h"], tmp_path / "one")
    (tmp_path / "one" / "ca.key").write_text("no key")
    with pytest.raises(LocalProtocolError, match="holds no CA"):
        make_certificate("part", ["h"], tmp_path / "one")


def test_a_part_that_checks_no_hosts_takes_any_certificate_of_the_ca_and_no_other(
    authority: Authority, tmp_path: Path
) -> None:
    """For hosts whose addresses change; the other end need not know of it."""
    ca, cert, key = authority.files("pod")
    lenient, strict = Tls(ca, cert, key, checks_hosts=False), Tls(ca, cert, key)
    strict_context, context = strict.dialling(), lenient.dialling()
    assert (strict_context.check_hostname, context.check_hostname) == (True, False)
    assert context.verify_mode == ssl.CERT_REQUIRED
    lenient.check_host("10.244.1.7", "the control port")
    with pytest.raises(TlsFailed, match=r"10\.244\.1\.7"):
        strict.check_host("10.244.1.7", "the control port")
    foreign = Authority.make(tmp_path / "elsewhere")
    accepting = Tls(*foreign.files("pod")).accepting(clients=False)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake_hands(context, accepting, "10.244.1.7")
