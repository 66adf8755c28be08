"""Compares ``embferry plan`` with ``embferry bench serve`` at several workloads, and writes docs/planning.md's table.

    .venv/bin/python scripts/validate_plan.py --python .venv-vllm/bin/python [--into docs/planning.md] [--results FILE]

Starts vLLM undivided and divided over shm (two encoders, a language instance, a router), measures the speeds as
``embferry plan --measure`` does, then each workload by turns, and compares. The speeds come from other requests than
those that are predicted. Needs 8 GB of memory, and a quarter of an hour of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from embferry.bench import machine  # noqa: E402
from embferry.bench.report import facts  # noqa: E402
from embferry.bench.results import Results, load  # noqa: E402
from embferry.bench.serving.client import send_all  # noqa: E402
from embferry.bench.serving.configurations import (  # noqa: E402
    BLOCK_TOKENS,
    POOL_BYTES,
    SMALL_POOL_BYTES,
    TOKEN_BYTES,
    Damage,
)
from embferry.bench.serving.results import Run  # noqa: E402
from embferry.bench.serving.stack import Stack  # noqa: E402
from embferry.bench.serving.vllm import CONFIGURATIONS, UNDIVIDED, VllmStack  # noqa: E402
from embferry.bench.serving.workload import LARGEST, Plan, requests  # noqa: E402
from embferry.cli.main import app  # noqa: E402
from embferry.plan import comparison, probes  # noqa: E402
from embferry.plan.advice import Row, carried, verdict  # noqa: E402
from embferry.plan.capacity import Demands  # noqa: E402
from embferry.plan.comparison import Point  # noqa: E402
from embferry.plan.deployment import Deployment  # noqa: E402
from embferry.plan.files import read_model  # noqa: E402
from embferry.plan.measuring import Target  # noqa: E402
from embferry.plan.outcome import pooled  # noqa: E402
from embferry.plan.pool import Pool  # noqa: E402
from embferry.plan.probes import Times  # noqa: E402
from embferry.plan.simulation import play  # noqa: E402
from embferry.plan.speeds import Speeds, encoded  # noqa: E402

SPLIT = next(one for one in CONFIGURATIONS if one.name == "ours-shm")
BEGIN, END = "<!-- results: written by scripts/validate_plan.py; do not edit -->", "<!-- end of results -->"
ROUNDS = 5
PLANNED = ("--image-tokens", "400", "--rate", "5", "--output-tokens", "32", "--prompt-tokens", "34")
"""The workload that is drawn."""
DIVIDED, SMALL, WHOLE = Deployment(2, 1), Deployment(1, 1), Deployment(0, 1)


class Workload(NamedTuple):
    """One workload: its plan, the tokens of an answer, and whether the pool is to be the small one."""

    title: str
    plan: Plan
    max_tokens: int = 32
    small_pool: bool = False


WORKLOADS = (
    Workload("a mix of pictures, 1/s", Plan(requests=30, rate=1.0, seed=21)),
    Workload("a small picture, 5/s", Plan(requests=60, rate=5.0, max_images=1, max_image_tokens=256, seed=22)),
    Workload("bursts, 2/s", Plan(requests=30, rate=2.0, burstiness_cv=3.0, max_images=2, seed=23)),
    Workload("long answers, 3/s", Plan(requests=40, rate=3.0, max_images=1, max_image_tokens=600, seed=24), 96),
    Workload("a pool of 64 tokens, 1/s", Plan(requests=15, rate=1.0, max_images=1, seed=25), small_pool=True),
)
"""The workloads of ``embferry bench serve``; the last is sent to the split deployment only."""


class Measured(Results, tag="plan", kw_only=True):
    """All that was measured: the times of the probes and the runs, each by the name of its deployment."""

    probes: dict[str, list[Times]] = msgspec.field(default_factory=dict)
    runs: dict[str, list[Run]] = msgspec.field(default_factory=dict)


@contextmanager
def stacks(python: str, folder: Path) -> Iterator[dict[str, Stack]]:
    """Starts both deployments, side by side."""
    from embferry.models.tiny_qwen import make

    make(folder / "model", max_image_tokens=LARGEST, max_positions=16384)
    both: dict[str, Stack] = {}
    for configuration in (UNDIVIDED, SPLIT):
        damages: list[Damage] = ["small pool"] if configuration is SPLIT else []
        name = configuration.name
        both[name] = VllmStack(
            configuration, python, folder / "model", folder / name, folder / "logs" / name, _tell, damages=damages
        )
    with both[UNDIVIDED.name], both[SPLIT.name]:
        yield both


def probed(running: Mapping[str, Stack], folder: Path) -> dict[str, Times]:
    """Measures the speeds of both, as ``embferry plan --measure`` and ``--measure-split`` do."""
    model = read_model(str(folder / "model"))
    return {
        name: Target(stack.endpoint(1, 60.0, 0).url, model, "", dict(stack.extra), "", _tell).times()
        for name, stack in running.items()
    }


def measured(running: Mapping[str, Stack], turn: int) -> dict[str, list[Run]]:
    """Sends every workload to both deployments, with the requests of ``embferry bench serve``, drawn anew each turn."""
    found: dict[str, list[Run]] = {name: [] for name in running}
    for workload in WORKLOADS:
        plan = msgspec.structs.replace(workload.plan, seed=workload.plan.seed + 1000 * turn)
        for name, stack in running.items():
            if workload.small_pool and name != SPLIT.name:
                continue
            stack.prepare("small pool" if workload.small_pool else "")
            _tell(f"{workload.title}: {name}")
            run = Run(name, stack.configuration.title, workload.title, turn, plan=plan)
            send_all(stack.endpoint(workload.max_tokens, 90.0, 0), requests(plan), run)
            found[name].append(run)
        running[SPLIT.name].prepare("")
    return found


def points(taken: Measured, speeds: Speeds) -> list[Point]:
    """Returns prediction and measured figure of each workload at each deployment."""
    found = []
    for workload in WORKLOADS:
        for name, runs in taken.runs.items():
            mine = [run for run in runs if run.scenario == workload.title]
            if not mine:
                continue
            deployment = SMALL if workload.small_pool else DIVIDED if name == SPLIT.name else WHOLE
            size = SMALL_POOL_BYTES if workload.small_pool else POOL_BYTES
            pool = Pool(size // TOKEN_BYTES // BLOCK_TOKENS, BLOCK_TOKENS) if deployment.is_split else None
            found.append(comparison.compared(mine, deployment, speeds, TOKEN_BYTES, pool))
    return found


def fit(taken: Measured) -> Speeds:
    cores = float(taken.machine.cores)
    source = f"measured at vLLM, undivided and split, on {taken.started[:10]}"
    undivided, split = (probes.merged(taken.probes[name]) for name in (UNDIVIDED.name, SPLIT.name))
    return probes.speeds(undivided, split, cores=cores, source=source)


def verdicts(taken: Measured, found: list[Point], speeds: Speeds) -> list[tuple[str, ...]]:
    """Returns for each workload that both deployments had: split over undivided, by plan and clock, and the verdict."""
    rows: list[tuple[str, ...]] = [("workload", "split / undivided, predicted", "measured", "the plan says")]
    for title in dict.fromkeys(point.title for point in found):
        both = {point.deployment.is_split: point for point in found if point.title == title}
        if len(both) == 2:
            split, whole = both[True], both[False]
            ratios = (split.predicted_ttft / whole.predicted_ttft, split.measured_ttft / whole.measured_ttft)
            runs = [run for run in taken.runs[UNDIVIDED.name] if run.scenario == title]
            is_worth, _ = verdict(_row(runs, WHOLE, speeds), _row(runs, DIVIDED, speeds), is_shared=True)
            said = "worth it" if is_worth else "not worth it"
            rows.append((title, *(f"{ratio:.2f}: {_words(ratio)}" for ratio in ratios), said))
    return rows


def _row(runs: Sequence[Run], deployment: Deployment, speeds: Speeds) -> Row:
    """Returns the row of a plan for the requests of all rounds."""
    asked = [comparison.asked_in(run) for run in runs]
    together = pooled([play(one, deployment, speeds) for one in asked])
    rate = runs[0].plan.rate if runs[0].plan is not None else None
    demands = Demands.of(asked[0], speeds, is_split=deployment.is_split)
    return Row(deployment, carried(asked[0], deployment, speeds, demands), together, rate or 0.0)


def planned(speeds: Path, plot: Path) -> list[str]:
    """Returns a command that plans with the speeds and draws the plot, and what it prints."""
    words = ["plan", "--speeds", str(speeds), *PLANNED, "--plot", str(plot)]
    printed = io.StringIO()
    with redirect_stdout(printed):
        app(words, standalone_mode=False)
    return ["```text", f"$ {shlex.join(['embferry', *words])}", *printed.getvalue().splitlines(), "```"]


def document(taken: Measured, found: list[Point], said: list[tuple[str, ...]], example: list[str], plot: str) -> str:
    """Returns the tables in Markdown."""
    rounds = len({run.round for runs in taken.runs.values() for run in runs})
    held = sum(point.holds for point in found)
    return "\n".join([
        BEGIN, "", *_markdown(comparison.table(found)), "",
        f"{held} of {len(found)} points are within {comparison.TOLERANCE:.0%}.", "",
        *_markdown(said), "",
        f"- rounds: {rounds}; medians of rounds", *(f"- {name}: {fact}" for name, fact in facts(taken)), "",
        "With these speeds, for pictures of 400 tokens:", "", *example, "",
        f"![Time to first token by rate, undivided and split, on two cores that all share]({plot})", "", END,
    ])  # fmt: skip


def write(page: Path, tables: str) -> None:
    """Puts the tables between their marks."""
    text = page.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    page.write_text(text[:begin] + tables + text[end:])


def _words(ratio: float) -> str:
    return "faster" if ratio < 0.9 else "slower" if ratio > 1.1 else "the same"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = rows
    return [
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rest),
    ]


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def take(
    taken: Measured, python: str, folder: Path, alone: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """Starts everything and measures it.

    Args:
        taken: Gets what was measured.
        python: The Python that has vLLM.
        folder: For the files of the servers.
        alone: Each stretch of measuring, of at most four minutes, is inside of it.
    """
    with stacks(python, folder) as running:
        taken.runs = {name: [] for name in running}
        taken.probes = {name: [] for name in running}
        for turn in range(1, ROUNDS + 1):
            with alone():
                for name, times in probed(running, folder).items():
                    taken.probes[name].append(times)
                for name, runs in measured(running, turn).items():
                    taken.runs[name] += runs


def main() -> int:
    """Measures, or reads what was measured, and writes the tables. Returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--python", default=sys.executable, help="the Python that has vLLM")
    arguments.add_argument("--into", type=Path, default=Path("docs/planning.md"))
    arguments.add_argument("--results", type=Path, default=Path("bench-results/plan.json"), help="read if it is there")
    arguments.add_argument("--speeds", type=Path, default=Path("bench-results/speeds.json"), help="written")
    given = arguments.parse_args()
    if given.results.is_file():
        taken = load(given.results, Measured)
    else:
        taken = Measured.begin(machine.describe(machine.SERVING_PACKAGES, given.python))
        taken.command = shlex.join(["python", "scripts/validate_plan.py", *sys.argv[1:]])
        with tempfile.TemporaryDirectory(prefix="embferry-plan-") as folder, taken.recording(given.results):
            take(taken, given.python, Path(folder))
        if not taken.complete:
            return 130
    speeds = fit(taken)
    given.speeds.parent.mkdir(parents=True, exist_ok=True)
    given.speeds.write_bytes(encoded(speeds))
    found = points(taken, speeds)
    for row in comparison.table(found):
        print("  ".join(row))
    said = verdicts(taken, found, speeds)
    for row in said:
        print("  ".join(row))
    plot = given.into.with_suffix(".svg")
    write(given.into, document(taken, found, said, planned(given.speeds, plot), plot.name))
    return 0 if sum(point.holds for point in found) >= 5 else 1


if __name__ == "__main__":
    sys.exit(main())
