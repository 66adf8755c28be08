"""The table of leases and ranks."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.discovery.leases import LeaseTable, Rank, Worker, WorkerList, check_url
from embferry.protocol.errors import CapacityError, LocalProtocolError


def worker(name: str, role: str = "encode", **more: object) -> Worker:
    return msgspec.convert({"id": name, "role": role, **more}, Worker)


def rank(number: int, tp: int = 4, dp: int = 2, port: int = 9000) -> Rank:
    return Rank(tp_size=tp, dp_size=dp, rank_ip="10.0.0.1", rank_port=port + number, engine_rank=number)


def names(workers: tuple[Worker, ...]) -> list[str]:
    return [w.id for w in workers]


def test_a_lease_ends_when_it_is_not_renewed_in_time():
    table = LeaseTable(lease_seconds=5)
    assert table.put(worker("a"), now=0)
    assert table.put(worker("b"), now=1)
    assert not table.put(worker("a"), now=4)  # renewed until 9
    assert names(table.workers(5.9)) == ["a", "b"]
    assert names(table.workers(6)) == ["a"]
    assert names(table.expire(6)) == ["b"]
    assert names(table.expire(9)) == ["a"]


def test_a_table_is_complete_a_lease_after_its_server_was_started_or_stood_still():
    table = LeaseTable(lease_seconds=5)
    for now in (10, 11, 12, 13, 14):
        table.tick(now)
        assert not table.is_complete(now)
    for now in (15, 17):
        table.tick(now)
        assert table.is_complete(now)
    table.tick(19.5)
    assert not table.is_complete(24)
    assert table.is_complete(24.5)


def test_workers_are_listed_by_role_with_their_latest_description():
    table = LeaseTable()
    table.put(worker("a", load=1), 0)
    table.put(worker("l", "language"), 0)
    table.put(worker("a", load=7), 0)
    assert names(table.workers(0, "language")) == ["l"]
    assert [w.load for w in table.workers(0, "encode")] == [7]


def test_removal_is_immediate_and_reports_whether_the_worker_was_registered():
    table = LeaseTable()
    table.put(worker("a"), 0)
    assert table.remove("a")
    assert not table.remove("a")
    assert table.workers(0) == ()


def test_a_full_table_accepts_renewals_and_rejects_new_workers():
    table = LeaseTable(lease_seconds=5, max_workers=2)
    table.put(worker("a"), 0)
    table.put(worker("b"), 3)
    with pytest.raises(CapacityError, match="2 workers"):
        table.put(worker("c"), 4)
    assert not table.put(worker("b"), 4)
    assert table.put(worker("c"), 5)  # a's lease has ended


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_lease_without_a_positive_length_is_rejected(seconds):
    with pytest.raises(LocalProtocolError):
        LeaseTable(lease_seconds=seconds)


def test_ranks_are_found_by_group_and_rank_within_it():
    table = LeaseTable()
    assert table.shape(0) is None
    for number in range(4):
        table.put_rank(rank(number))
    assert table.shape(0) == (4, 2)
    found = {(g, r): table.route(r, g, 0) for g in range(2) for r in range(2)}
    assert [f.rank_port for f in found.values() if f] == [9000, 9001, 9002, 9003]
    assert table.route(2, 0, 0) is None
    assert table.route(0, 2, 0) is None


def test_a_rank_of_another_shape_replaces_all_ranks():
    table = LeaseTable()
    for number in range(4):
        table.put_rank(rank(number))
    table.put_rank(rank(0, tp=1, dp=1, port=7000))
    assert table.shape(0) == (1, 1)
    assert table.route(1, 1, 0) is None


def test_the_rank_of_a_worker_ends_with_its_lease():
    table = LeaseTable(lease_seconds=5)
    table.put(worker("a", rank=msgspec.to_builtins(rank(0, tp=1, dp=1))), 0)
    assert table.route(0, 0, 4.9) == rank(0, tp=1, dp=1)
    assert table.route(0, 0, 5) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine_rank": 4},
        {"dp_size": 3},
        {"tp_size": 0},
        {"rank_port": 0},
        {"rank_ip": ""},
        {"engine_rank": -1},
    ],
)
def test_invalid_ranks_are_rejected(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(msgspec.to_builtins(rank(0)) | wrong, Rank)


@pytest.mark.parametrize("wrong", [{"id": "a/b"}, {"id": ""}, {"role": "router"}, {"load": -1}, {"url": "x" * 513}])
def test_invalid_workers_are_rejected(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"id": "a", "role": "encode"} | wrong, Worker)


# URLs of workers

GOOD_URLS = ["http://h", "https://h:1/", "http://10.0.0.5:8001", "http://[::1]:80/a/b", "http://a_b.c-d.example.:65535"]
BAD_URLS = ["h:1", "10.0.0.5:8001", "ftp://h", "http:", "http://", "http:///a", "//h", "http://h:0", "http://h:65536"]
BAD_URLS += [
    "http://h:x",
    "http://[::1",
    "http://[::g]",
    "http://::1",
    "http://[10.0.0.5]",
    "http://10.0.0.256",
    "http://1",
]
BAD_URLS += [
    "http://u@h",
    "http://h?a",
    "http://h#a",
    "http://h/%41",
    "http://h\n",
    " http://h",
    "http://ü",
    "http://a..b",
]


@pytest.mark.parametrize("url", GOOD_URLS)
def test_a_url_of_a_worker_is_accepted(url: str) -> None:
    assert Worker(id="w", role="encode", url=url).url == url


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_clients_cannot_use_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Worker(id="w", role="encode", url=url)


@given(st.from_regex(r"\A(https?|HTTP)://[\[\]A-Za-z0-9:.@_%-]{0,20}(:[0-9]{0,6})?[/?#]?[a-z]{0,3}\Z"))
def test_every_url_that_is_accepted_means_the_same_to_every_client(url: str) -> None:
    try:
        check_url(url)
    except ValueError:
        return
    split, parsed = urlsplit(url), httpx.URL(url)
    assert split.scheme in ("http", "https")
    assert split.hostname == parsed.host
    assert split.port in (parsed.port, 80, 443)
    assert [parsed.userinfo, parsed.query, parsed.fragment] == [b"", b"", ""]


def test_bad_leases_are_left_out_of_a_list() -> None:
    worker = Worker(id="w", role="encode", url="http://h")
    raw = [
        msgspec.json.encode(worker),
        b'{"id":"x","role":"encode","url":"h:1"}',
        b"5",
        b"null",
        b'{"id":"y","role":"z"}',
    ]
    workers, dropped = msgspec.json.decode(b'{"workers":[' + b",".join(raw) + b"]}", type=WorkerList).read()
    assert workers == (worker,)
    assert list(dropped) == [one.decode() for one in raw[1:]]
    assert all(dropped.values())
