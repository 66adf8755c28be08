"""Strangers that register a worker, list the workers or end a lease."""

from __future__ import annotations

import pytest

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.leases import Worker
from embferry.protocol.errors import WrongKey
from tests.strangers.running import Running
from tests.strangers.stranger import FOREIGN, Stranger

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

BODY = b'{"id":"evil","role":"encode","url":"http://evil:1","endpoint":"tcp://evil:2"}'
RANK = b'{"role":"Encode","tp_size":1,"dp_size":1,"rank_ip":"e","rank_port":1,"engine_rank":0}'


def test_strangers_neither_see_nor_change_the_list_of_workers(running: Running, stranger: Stranger) -> None:
    honest = running.worker("encode").id
    with running.untouched():
        stranger.request("bootstrap", "PUT", "/workers/evil", BODY)
        stranger.request("bootstrap", "PUT", f"/workers/{honest}", BODY.replace(b"evil", honest.encode()))
        stranger.request("bootstrap", "DELETE", f"/workers/{honest}")
        stranger.request("bootstrap", "GET", "/workers")
        stranger.request("bootstrap", "PUT", "/route", RANK)
        stranger.request("bootstrap", "GET", "/route?engine_rank=-1&target_dp_group=-1")


def test_a_part_of_another_cluster_does_not_either(running: Running) -> None:
    client = BootstrapClient(running.cluster.bootstrap_url, trust=FOREIGN)
    with running.untouched():
        for call in (
            lambda: client.register(Worker(id="evil", role="encode", url="http://evil:1", endpoint="tcp://evil:2")),
            client.workers,
            lambda: client.remove(running.worker("encode").id),
        ):
            with pytest.raises(WrongKey):
                call()
