"""Reports that are made together instead of one by one."""

from __future__ import annotations

from .commands import Send, SenderCommand
from .messages import MAX_CHUNKS, Written


def with_earlier_reports(
    commands: list[SenderCommand], report: Written, target: int
) -> tuple[list[SenderCommand], Written]:
    """The commands without a report on the same epoch that has not been sent yet, and one report for both.

    Nothing that was said in between depends on it: an epoch that is reported on is not being drained."""
    for at, command in enumerate(commands):
        match command:
            case Send(Written(epoch=epoch, chunks=chunks), to) if (to, epoch) == (target, report.epoch):
                if len(chunks) + len(report.chunks) <= MAX_CHUNKS:
                    return commands[:at] + commands[at + 1 :], Written(report.room, epoch, (*chunks, *report.chunks))
    return commands, report
