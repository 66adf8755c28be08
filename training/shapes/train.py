"""Trains in the foreground, from the last checkpoint of the run if there is one.

    nice -n 19 python -m training.shapes.train training/runs/shapes

Ctrl-C saves and stops. ``checkpoint.pt`` contains all that is needed to resume, and the average that
``training.shapes.export`` writes as a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from training.shapes.architecture import build_model
from training.shapes.batches import Writer, draw_examples
from training.shapes.learner import Batch, Learner
from training.shapes.recipe import (
    AVERAGE,
    NUMBER_WEIGHT,
    OBJECT_WEIGHT,
    QUESTIONS,
    SEED,
    Stage,
    rate_at,
    stage_at,
)
from training.shapes.tokenizer import build_tokenizer

SAVE_SECONDS = 120.0
LOG_STEPS = 50
JUDGE_STEPS = 250
JUDGE_BATCHES = 14


def draw_batch(writer: Writer, stage: Stage, seed: str) -> Batch:
    """Returns the batch of a seed."""
    rng = Random(seed)
    layout = stage.layout(rng)
    count = QUESTIONS if stage.text else 1
    fps = 2.0 if rng.random() < 0.4 else rng.uniform(0.5, 5.0)
    return writer.write(draw_examples(rng, layout, stage.batch(layout), count), layout, fps)


class Batches(IterableDataset[Batch]):
    """Batches from a step on, drawn in a separate process."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[Batch]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        writer = Writer(build_tokenizer())
        step = self.first
        while (found := stage_at(step)) is not None:
            yield draw_batch(writer, found[0], f"{SEED}/{step}")
            step += 1


class Run:
    """The state of a training run, and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(SEED)
        self.writer = Writer(build_tokenizer())
        self.learner = Learner(build_model(build_tokenizer()))
        self.average = copy.deepcopy(self.learner).eval()
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        self.step = 0
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _load(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        self.learner.load_state_dict(saved["learner"])
        self.average.load_state_dict(saved["learner"] | {f"model.{k}": v for k, v in saved["average"].items()})
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def save(self) -> None:
        """Replaces the checkpoint atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        os.replace(self.checkpoint.with_suffix(".new"), self.checkpoint)

    def learn(self, batch: Batch, stage: Stage) -> dict[str, float]:
        """Trains one step and returns its losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step)
        visual = self.learner.model.model.visual
        for part in (visual.patch_embed, visual.pos_embed, visual.blocks):
            part.requires_grad_(not stage.frozen)
        losses, _ = self.learner(batch, stage.text)
        self.optimizer.zero_grad(set_to_none=True)
        auxiliary = OBJECT_WEIGHT * (losses.objects + losses.covered) + NUMBER_WEIGHT * losses.number
        (losses.answer + auxiliary).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(AVERAGE, 1 - 1 / (1 + self.step / 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.learner.parameters()), 1 - keep)
        return {name: getattr(losses, name).item() for name in ("answer", "objects", "covered", "number")}

    @torch.no_grad()
    def judge(self, stage: Stage) -> dict[str, float]:
        """Returns the averaged model's share of right answers by kind, on batches that training never draws."""
        right: dict[str, list[bool]] = defaultdict(list)
        for number in range(JUDGE_BATCHES):
            batch = draw_batch(self.writer, stage, f"held out/{number}")
            _, guessed = self.average(batch)
            lengths = [length for _, length in batch.kinds]
            for (kind, _), hit in zip(batch.kinds, (guessed == batch.targets).split(lengths), strict=True):
                right[kind].append(bool(hit.all()))
        return {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}

    def log(self, **values: object) -> None:
        line = json.dumps({"step": self.step, "clock": time.strftime("%H:%M:%S"), **values})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def train(run: Run) -> None:
    """Trains to the end of the recipe or until Ctrl-C."""
    stopped = False

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    run.folder.mkdir(parents=True, exist_ok=True)
    saved = logged = time.monotonic()
    sums: dict[str, float] = defaultdict(float)
    for batch in DataLoader(Batches(run.step), batch_size=None, num_workers=1, prefetch_factor=4):
        found = stage_at(run.step)
        if found is None or stopped:
            break
        stage = found[0]
        for name, value in run.learn(batch, stage).items():
            sums[name] += value
        if run.step % LOG_STEPS == 0:
            pace, logged = (time.monotonic() - logged) / LOG_STEPS, time.monotonic()
            run.log(stage=stage.name, pace=round(pace, 3), **{k: round(v / LOG_STEPS, 4) for k, v in sums.items()})
            sums.clear()
        if stage.text and run.step % JUDGE_STEPS == 0:
            run.log(stage=stage.name, right=run.judge(stage))
        if time.monotonic() - saved > SAVE_SECONDS:
            run.save()
            saved = time.monotonic()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the run's checkpoint and log")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Run(arguments.folder))


if __name__ == "__main__":
    main()
