"""The rules of a producer's offers under random orders of events, and mutants that show that each rule is needed.

A mutant is the module with one piece of its text replaced. It must break what the program keeps.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from embferry import CapacityError, LeaseExpired, LocalProtocolError
from embferry.connectors.vllm import offers as program
from embferry.connectors.vllm.claims import claim_room, consumer_of, content_number, new_claim, new_consumer

BUDGET, MOST, CLAIM_S, LEASE_S = 10, 4, 10.0, 60.0
CACHED = 2
NUMBERS = 6
"""Few, because then several contents are offered under each number, one after another."""
STEPS, SEEDS = 400, 25


@dataclass(eq=False)
class Embedding:
    mm_hash: str
    digest: bytes
    nbytes: int


@dataclass
class World:
    """The offers with a clock and a cache, and a model of what must hold."""

    module: ModuleType
    chance: random.Random
    now: float = 0.0
    cached: OrderedDict[str, Embedding] = field(default_factory=OrderedDict)
    claims: list[tuple[Any, Embedding]] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    named: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    awaited: dict[int, float] = field(default_factory=dict)
    leases: dict[int, float] = field(default_factory=dict)
    kept: Counter[Embedding] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.offers = self.module.Offers(
            BUDGET, MOST, claim_timeout=CLAIM_S, lease_timeout=LEASE_S, on_end=self.on_end, clock=lambda: self.now
        )
        self.sources = ["a manager", "another manager"]

    def on_end(self, embedding: Embedding | None, outcome: str) -> None:
        if embedding is None:
            return
        self.kept[embedding] -= 1
        assert self.kept[embedding] == 0, "memory is given back once for each time that it was kept"
        content = (embedding.mm_hash, embedding.digest)
        held = [claim for claim, of in self.claims if (of.mm_hash, of.digest) == content]
        assert not held, "memory is given back while a consumer fetches it"
        kept = self.offers._kept.get(embedding.mm_hash, {}).get(embedding.digest)
        assert kept is not None, "until it is in the cache, memory is offered: otherwise a claim would find it nowhere"
        assert kept.embedding is embedding
        assert self.offers._lock.locked(), "no claim comes between"
        self.cached[embedding.mm_hash] = embedding
        while len(self.cached) > CACHED:
            self.cached.popitem(last=False)

    def step(self) -> None:
        kinds = (self.name, self.claim, self.end_claim, self.end_twice, self.wait, self.fail_manager)
        self.chance.choices(kinds, (6, 6, 4, 1, 2, 0.2))[0]()
        self.check()

    def name(self) -> None:
        mm_hash, digest = self.chance.choice("abcd"), self.chance.choice((b"1", b"2"))
        number = self.chance.randrange(NUMBERS)
        fresh = self.cached.get(mm_hash)
        if fresh is None or fresh.digest != digest:
            fresh = Embedding(mm_hash, digest, 1 + ord(mm_hash) % 4)
        is_open = self.open_numbers()
        try:
            embedding = self.offers.name(fresh, number, self.sources[0])
        except CapacityError:
            self.refused["offer"] += 1
            self.check_displaced(is_open, set())
            return
        except LocalProtocolError:
            assert number in is_open
            assert self.named[number] != (mm_hash, digest), "the same offer can be named again"
            return
        assert (embedding.mm_hash, embedding.digest) == (mm_hash, digest)
        if number in is_open:
            assert self.named[number] == (mm_hash, digest), "an open offer is of one content"
        self.check_displaced(is_open, {number})
        self.note_kept()
        self.named[number] = (mm_hash, digest)
        self.awaited.setdefault(number, self.now)
        self.leases[number] = self.now + LEASE_S

    def claim(self) -> None:
        number = self.chance.randrange(NUMBERS)
        room = 3 * number + self.chance.randrange(3)  # few, so that claims follow one another in a room
        is_open = self.open_numbers()
        try:
            claim = self.offers.claim(number, room, self.sources[0], self.cached.get)
        except (CapacityError, LeaseExpired) as error:
            self.refused[error.code] += 1
            self.check_displaced(is_open, set())
            return
        if claim is None:
            return
        self.check_displaced(is_open, {number})
        self.note_kept()
        found = (claim.embedding.mm_hash, claim.embedding.digest)
        assert found == self.named[number], "an offer is answered with its own content"
        assert claim.room not in [other.room for other, _ in self.claims if other.offer is claim.offer]
        self.claims.append((claim, claim.embedding))
        self.awaited.pop(number, None)

    def end_claim(self) -> None:
        if self.claims:
            claim, _ = self.claims.pop(self.chance.randrange(len(self.claims)))
            before = self.open_numbers()
            self.offers.end_claim(claim, fetched=self.chance.random() < 0.5)
            self.ended.append(claim)
            others = [one for one, _ in self.claims if one.offer is claim.offer]
            assert (claim.offer.number in self.open_numbers()) == bool(others or claim.offer.number in self.awaited)
            assert before - self.open_numbers() <= {claim.offer.number}

    def end_twice(self) -> None:
        """A report may come late, when the room has another claim."""
        if self.ended:
            before = self.offers._claims
            self.offers.end_claim(self.chance.choice(self.ended), fetched=True)
            assert self.offers._claims == before

    def wait(self) -> None:
        self.now += self.chance.choice((1.0, CLAIM_S / 2, CLAIM_S, LEASE_S / 2))
        before = self.open_numbers()
        self.offers.expire()
        for number in before - self.open_numbers():
            assert self.leases[number] <= self.now, "an offer ends with its lease"
            self.awaited.pop(number, None)
        for number in self.open_numbers():
            is_fetched = any(claim.offer.number == number for claim, _ in self.claims)
            assert is_fetched or self.leases[number] > self.now, "no offer outlives its lease"

    def fail_manager(self) -> None:
        gone = self.sources.pop(0)
        self.sources.append(f"{gone}, made again")
        self.ended += [claim for claim, _ in self.claims if claim.source == gone]
        self.claims = [(claim, embedding) for claim, embedding in self.claims if claim.source != gone]
        self.offers.end_all(gone)
        self.awaited = {number: since for number, since in self.awaited.items() if number in self.open_numbers()}
        assert gone not in self.offers.sources()

    def check(self) -> None:
        self.note_kept()
        contents = {self.named[number] for number in self.open_numbers()}
        size = sum(1 + ord(mm_hash) % 4 for mm_hash, _ in contents)
        assert self.offers.nbytes == size, "each content counts once"
        assert size <= BUDGET, "the bytes are bounded"
        assert len(self.offers._open) <= MOST, "the offers are bounded"
        assert self.offers._claims == len(self.claims) <= MOST, "the claims are bounded"
        assert len(self.offers._ended) <= MOST, "what is remembered is bounded"

    def finish(self) -> None:
        while self.claims:
            self.end_claim()
        self.now += LEASE_S
        self.offers.expire()
        assert self.offers.is_empty, "nothing is left over"
        assert self.offers.nbytes == self.offers._claims == 0
        assert not +self.kept, "all memory is given back"

    def open_numbers(self) -> set[int]:
        return set(self.offers._open)

    def note_kept(self) -> None:
        for by_digest in self.offers._kept.values():
            for kept in by_digest.values():
                self.kept[kept.embedding] = 1

    def check_displaced(self, before: set[int], but: set[int]) -> None:
        for number in before - self.open_numbers() - but:
            assert number in self.awaited, "an offer that a consumer fetches does not give way"
            assert self.awaited.pop(number) + CLAIM_S <= self.now, "an offer has time to be claimed"


def run(module: ModuleType) -> Counter[str]:
    """Runs random events, and returns how often something was refused."""
    refused: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = World(module, random.Random(seed))
        for _ in range(STEPS):
            world.step()
        world.finish()
        refused += world.refused
    return refused


@cache
def source() -> str:
    spec = importlib.util.find_spec(program.__name__)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin) as file:
        return file.read()


def mutant(old: str, new: str, name: str) -> ModuleType:
    """Returns the module with one place of its text changed."""
    assert source().count(old) == 1, f"{old!r} is there {source().count(old)} times"
    module = ModuleType(name)
    module.__package__ = program.__package__
    sys.modules[name] = module  # dataclasses look it up
    exec(compile(source().replace(old, new), name, "exec"), module.__dict__)
    return module


def test_the_rules_hold() -> None:
    refused = run(program)
    assert set(refused) == {"offer", "capacity_exhausted", "lease_expired"}, "every branch was taken"


END = "if not offer.claims and offer.awaited_since is None:\n                self"
GIVE_WAY = "return not offer.claims and offer.awaited_since is not None"
OVER = "if not offer.claims and offer.until <= now]"
FULL = "offer is None:\n                raise self._full(too_many)"
LEASE = "offer.source, offer.until = source, now + self._lease_timeout"
MUTANTS = {
    "an open offer takes another content": ("elif offer.content != content:", "elif False:"),
    "an ended offer takes any content of the hash": ("or embedding.digest != content.digest:", "or False:"),
    "a claim does not keep": (END, END.replace("not offer.claims and offer.awaited_since is None", "True")),
    "a naming during a claim is forgotten": (END, END.replace(" and offer.awaited_since is None", "")),
    "claims expire": (OVER, OVER.replace("not offer.claims and ", "")),
    "offers never expire": (OVER, "if False]"),
    "claimed offers give way": (GIVE_WAY, "return (offer.awaited_since or 0)"),
    "offers give way at once": ("offer.awaited_since + self._claim_timeout <= now", "True"),
    "offers never give way": (FULL, FULL.replace("offer is None", "True")),
    "bytes have no bound": ("self.nbytes - freed + nbytes > self._budget", "False"),
    "offers have no bound": ("len(self._open) - len(found) >= self._most", "False"),
    "claims have no bound": ("self._claims >= self._most", "False"),
    "the numbers of ended offers have no bound": ("len(self._ended) > self._most", "False"),
    "a late report ends another claim": ("offer.claims.get(claim.room) is not claim", "claim.room not in offer.claims"),
    "a repeated request begins a second claim": ("or room in offer.claims):", "):"),
    "memory is given back with the first of its offers": ("kept.numbers == {offer.number}", "True"),
    "memory is forgotten with the first of its offers": ("if kept.numbers:", "if False:"),
    "memory counts once for each offer": ("if kept is None:\n            kept =", "if True:\n            kept ="),
    "a failed manager keeps its claims": ("if claim.source is source]", "if False]"),
    "a lease is not renewed": (LEASE, "offer.source = source"),
}


@pytest.mark.parametrize("name", sorted(set(MUTANTS) - {"offers never give way"}))
def test_each_rule_is_needed(name: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run(mutant(*MUTANTS[name], f"{program.__name__}_mutant"))


def test_a_lost_answer_does_not_keep_others_out() -> None:
    """Coordinates that no consumer uses give way to new ones, although their lease is not over."""

    def fits(module: ModuleType) -> bool:
        world = World(module, random.Random(0))
        for at, mm_hash in enumerate("ab"):
            world.offers.name(Embedding(mm_hash, b"1", BUDGET // 2), at, world.sources[0])
        world.note_kept()
        world.now += CLAIM_S
        try:
            world.offers.name(Embedding("c", b"1", BUDGET), 7, world.sources[0])
        except CapacityError:
            return False
        return True

    assert fits(program)
    assert not fits(mutant(*MUTANTS["offers never give way"], f"{program.__name__}_mutant"))


def test_a_refusal_is_always_told_in_the_same_words() -> None:
    """A proxy compares two answers for one picture."""
    world, told = World(program, random.Random(0)), set()
    for at, nbytes in enumerate((3, 5)):
        world.offers.name(Embedding(str(at), b"1", nbytes), at, world.sources[0])
        with pytest.raises(CapacityError, match="offered_bytes") as refused:
            world.offers.name(Embedding("more", b"1", BUDGET), 7, world.sources[0])
        told.add(str(refused.value))
    assert len(told) == 1


def test_a_claim_leads_to_its_offer_and_to_no_other() -> None:
    chance = random.Random(0)
    numbers = [chance.getrandbits(63) for _ in range(200)]
    consumers = [new_consumer() for _ in range(5)]
    claims = {number: [new_claim(number, consumer) for consumer in 4 * consumers] for number in numbers}
    for number, made in claims.items():
        for room, name in made:
            assert 0 <= room < 1 << 63
            assert claim_room(room, name) == number
            assert consumer_of(name) in consumers
    rooms = [room for made in claims.values() for room, _ in made]
    assert len({*rooms, *numbers}) == len(rooms) + len(numbers), "no claim has the room of another, or of an offer"


def test_the_number_of_a_content_is_its_own_and_secret() -> None:
    contents = [(mm_hash, digest) for mm_hash in ("a", "b", "ab", "\ud800") for digest in (b"1" * 16, b"2" * 16)]
    numbers = [content_number(secret, *content) for secret in (b"s" * 32, b"t" * 32) for content in contents]
    assert len(set(numbers)) == len(numbers)
    assert numbers[: len(contents)] == [content_number(b"s" * 32, *content) for content in contents]
