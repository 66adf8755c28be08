"""The input, the target, the way from a seed to an input, and the definition of a finding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from . import measure, raw, tree
from .raw import Nesting, Pieces
from .tree import Tree

VALID = 0.1
"""The share of inputs that are left as the generator made them: they must be accepted."""
EVERY = 40
"""One input in so many is run with its calls counted, and one with its memory traced."""


class Target(ABC):
    """A parser under test.

    Attributes:
        documented: What the parser may raise.
        nesting: How the format opens and closes a level, where it has levels.
        texts: Bytes that mean something in the format, to be inserted.
        inputs: Inputs in the set of the tests. The others are drawn by ``make fuzz``.
        bounds: The work and memory that an input may take.
    """

    documented: ClassVar[tuple[type[Exception], ...]] = ()
    nesting: ClassVar[Nesting | None] = None
    texts: ClassVar[tuple[bytes, ...]] = raw.TEXTS
    inputs: ClassVar[int] = 5000
    bounds: ClassVar[measure.Bounds] = measure.Bounds()

    @property
    def name(self) -> str:
        """The name on the command line: that of the file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def tree(self, chance: Random) -> Tree:
        """Returns a new valid message: a list or a dict that may be changed."""

    @abstractmethod
    def encode(self, tree: Tree, chance: Random) -> Pieces:
        """Returns the bytes of a tree, which may have been changed in any way."""

    @abstractmethod
    def run(self, pieces: Pieces) -> object:
        """Parses an input from nothing, and checks all that must hold, such as round trips.

        Raises:
            AssertionError: Something does not hold.
        """


@dataclass(frozen=True, slots=True)
class Input:
    """An input. ``valid``: nothing has been changed."""

    pieces: Pieces
    valid: bool = False


class RefusedError(AssertionError):
    """A valid input was not accepted."""


def draw(target: Target, seed: int) -> Input:
    """Returns the input that belongs to a seed: valid, changed in its structure, in its bytes, or in both."""
    chance = Random(seed)
    made = target.tree(chance)
    if chance.random() < VALID:
        return Input(target.encode(made, chance), valid=True)
    how = chance.random()
    if how < 0.75:
        for _ in range(_few(chance)):
            tree.mutate(made, chance, lambda: target.tree(chance))
    pieces = target.encode(made, chance)
    if how > 0.5:
        for _ in range(_few(chance)):
            pieces = raw.mutate(pieces, chance, lambda: target.encode(target.tree(chance), chance), target)
    return Input(pieces)


def _few(chance: Random) -> int:
    """Returns 1, or seldom more: an input that is damaged everywhere gets no further than the first check."""
    count = 1
    while count < 8 and chance.random() < 0.4:
        count += 1
    return count


def failure(target: Target, given: Input) -> BaseException | None:
    """Runs an input. Returns what was wrong: an exception that is not documented, or a valid input refused."""
    try:
        target.run(given.pieces)
    except target.documented as error:
        return RefusedError(f"a valid input is refused: {error!r}") if given.valid else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (any other one is a finding)
        return error
    return None


def failure_of_seed(target: Target, seed: int) -> BaseException | None:
    """Runs the input of a seed; some inputs also with their work and their memory measured."""
    given = draw(target, seed)
    error = failure(target, given)
    if error is None and seed % EVERY == 0:
        error = measure.excess_of_calls(lambda: failure(target, given), given.pieces, target.bounds)
    if error is None and seed % EVERY == EVERY // 2:
        error = measure.excess_of_memory(lambda: failure(target, given), given.pieces, target.bounds)
    return error


def failure_of_pieces(target: Target, pieces: Pieces) -> BaseException | None:
    """Runs an input with every check, for replay and for shrinking."""
    given = Input(pieces)
    return (
        failure(target, given)
        or measure.excess_of_calls(lambda: failure(target, given), pieces, target.bounds)
        or measure.excess_of_memory(lambda: failure(target, given), pieces, target.bounds)
    )
