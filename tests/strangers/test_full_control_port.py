"""A control port that peers without a transfer have filled: a worker with one gets in, and stays."""

from __future__ import annotations

import os
import secrets
import signal

import httpx
import numpy as np
import pytest

from embferry import ReceiveManager, SendManager, TcpTransport, as_fields, wait
from embferry.protocol.states import KVPoll
from embferry.serve.supervisor import LocalCluster
from embferry.testing.pair import eventually
from embferry.transfer.control.limits import ControlLimits
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.runtime import ThreadRuntime
from embferry.transports.net.loop import Loop
from tests.serve.workers import test_processes as processes
from tests.serve.workers.joined import DEADLINE
from tests.strangers.busy import GEOMETRY, BusyPeers
from tests.strangers.raw_http import SECONDS
from tests.trust.greetings import KEYLESS

pytestmark = pytest.mark.integration

PLACES = 8


def test_busy_peers_keep_no_transfer_out() -> None:
    """Twice as many as there are places: those that had to make room come again, during the transfers too."""

    def listen(loop: Loop) -> SocketControl:
        return SocketControl(loop, "127.0.0.1", limits=ControlLimits(connections=PLACES), trust=KEYLESS)

    encode = SendManager(
        GEOMETRY.layout, [TcpTransport(trust=KEYLESS)], runtime=ThreadRuntime("embferry-send", listen), trust=KEYLESS
    )
    embedding = np.random.default_rng(0).standard_normal((1000, 64), np.float32)
    with BusyPeers(encode.endpoint, 2 * PLACES) as busy:
        eventually(lambda: encode.control.connections == PLACES and busy.closed > PLACES)  # type: ignore[attr-defined]
        for _ in range(3):
            language = ReceiveManager(GEOMETRY, [TcpTransport(trust=KEYLESS)], trust=KEYLESS)
            room = secrets.randbits(62)
            sender = encode.open(room)
            sender.init(total_tokens=1000, content_digest=b"digest")
            receiver = language.open(room, encode.endpoint)
            receiver.init()
            eventually(lambda: receiver.poll() >= KVPoll.WaitingForInput)  # noqa: B023
            dialled = language._runtime.control._dialled[encode.endpoint]  # type: ignore[attr-defined]
            connection, closed = dialled.connection, busy.closed
            eventually(lambda: busy.closed > closed + 2 * PLACES)  # noqa: B023
            assert dialled.connection is connection, "the connection of a transfer has made room"
            sender.send_embedding(as_fields({"input_embeddings": embedding}))
            wait(receiver, timeout=SECONDS)
            assert np.array_equal(receiver.arrays()["input_embeddings"].view(np.float32), embedding)
            language.close()
    encode.close()


@pytest.mark.sweeps
@pytest.mark.timeout(900)
def test_a_new_language_worker_gets_into_the_full_port_of_an_encode_worker() -> None:
    """Without a key, on the loopback address: with one, the peers would not get that far."""
    with LocalCluster(processes.SETTINGS) as cluster:
        cluster.wait_ready()
        with httpx.Client(trust_env=False, timeout=processes.START) as http:
            workers = http.get(f"{cluster.bootstrap_url}/workers").json()["workers"]
            encode = next(one for one in workers if one["role"] == "encode")
            limit = cluster.settings.transfer.control_connections_per_address
            with BusyPeers(encode["endpoint"], limit + 50) as busy:

                def connections() -> int:
                    text = http.get(f"{encode['url']}/metrics").text
                    return int(float(text.split("\nembferry_worker_control_connections ")[1].split("\n")[0]))

                processes.wait(lambda: connections() >= min(limit, 239) and busy.rounds > 2, "a full port")
                answer = processes.ask(cluster, processes.image())
                assert answer.status_code == 200, answer.text
                old = processes.worker(cluster, "language").pid
                os.kill(old, signal.SIGKILL)
                processes.wait(
                    lambda: (
                        bool(processes.worker(cluster, "language").url)
                        and processes.worker(cluster, "language").pid not in (None, old)
                    ),
                    "a new language worker",
                    processes.START,
                )
                cluster.wait_ready(DEADLINE)
                processes.wait(
                    lambda: processes.ask(cluster, processes.image()).status_code == 200,
                    "an answer of the new language worker",
                )
                assert busy.closed > 0
