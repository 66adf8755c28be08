"""What is said once instead of many times, when it is said before anybody has listened."""

from __future__ import annotations

from .commands import ReceiverCommand, Send, SenderCommand
from .messages import MAX_CHUNKS, Progress, Written


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


def without_progress(commands: list[ReceiverCommand]) -> list[ReceiverCommand]:
    """The commands without earlier progress: the latest says all that earlier ones say."""
    return [command for command in commands if not (isinstance(command, Send) and isinstance(command.body, Progress))]
