"""Endpoints that can be dialled, and those that cannot be any."""

from __future__ import annotations

import pytest

from embferry.protocol.errors import LocalProtocolError
from embferry.transfer.control.endpoint import check_endpoint, host_and_port, tcp_endpoint


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("10.0.0.7", 5555),
        ("encode-0.encode.default.svc.cluster.local.", 1),
        ("under_score", 65535),
        ("::1", 5),
        ("fe80::1%eth0", 5),
        ("h", 80),
    ],
)
def test_a_well_formed_endpoint_is_split(host: str, port: int) -> None:
    endpoint = tcp_endpoint(host, port)
    assert check_endpoint(endpoint) == endpoint
    assert host_and_port(endpoint) == (host, port)


@pytest.mark.parametrize(
    "endpoint",
    [
        "", "tcp://", "tcp://h", "tcp://h:", "tcp://:5", "h:5", "udp://h:5", "tcp://h:²", "tcp://h:٣", "tcp://h:+5",
        "tcp://h:0", "tcp://h:65536", "tcp://h:-1", "tcp://h:1_0", "tcp://a b:55", "tcp://*:5555", "tcp://h\udce9:5",
        "tcp://é:5", "tcp://h\n:5", "tcp://h:5\n", "tcp://" + "a" * 254 + ":5", "tcp://" + "a" * 64 + ".b:5",
        "tcp://h:" + "9" * 5000, "tcp://a..b:5", "tcp://-a:5", "tcp://::1:5", "tcp://[::1:5", "tcp://[h]:5",
        "tcp://[fe80::1%e\x00]:5", "tcp://h/x:5", "tcp://u@h:5", 5, None, b"tcp://h:5",
    ],
)  # fmt: skip
def test_an_impossible_endpoint_is_refused(endpoint: object) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check_endpoint(endpoint)  # type: ignore[arg-type]
    str(caught.value).encode()
    assert len(str(caught.value)) < 300
