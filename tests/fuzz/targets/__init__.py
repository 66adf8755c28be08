"""The targets, one a file. A new one needs its file and a line here."""

from __future__ import annotations

from ..engine import Target
from .bootstrap_answers import BootstrapAnswers
from .bootstrap_requests import BootstrapRequests
from .byte_ranges import ByteRanges
from .config_text import ConfigText
from .content_digests import ContentDigests
from .control_messages import ControlMessages
from .control_stream import ControlStream
from .coordinates import Coordinates
from .digested_lines import DigestedLines
from .greeting import GreetingTarget
from .handles import Handles
from .http_heads import HttpHeads
from .http_publications import HttpPublications
from .leased import Leased
from .media_images import MediaImages
from .media_videos import MediaVideos
from .openai_chat import OpenaiChat
from .origin_chat import OriginChat
from .origin_frames import OriginFrames
from .receiver_machine import ReceiverMachine
from .request_proofs import RequestProofs
from .sender_machine import SenderMachine
from .sglang_parts import SglangParts
from .tcp import Tcp
from .tcp_verdicts import TcpVerdicts
from .vllm_answers import VllmAnswers
from .vllm_chat import VllmChat
from .vllm_entries import VllmEntries
from .vllm_workers import VllmWorkers
from .worker_events import WorkerEvents
from .worker_requests import WorkerRequests

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        ControlMessages(),
        GreetingTarget(),
        ControlStream(),
        ReceiverMachine(),
        SenderMachine(),
        Handles(),
        Tcp(),
        ByteRanges(),
        TcpVerdicts(),
        HttpHeads(),
        HttpPublications(),
        Leased(),
        BootstrapRequests(),
        BootstrapAnswers(),
        RequestProofs(),
        OpenaiChat(),
        WorkerRequests(),
        ContentDigests(),
        DigestedLines(),
        WorkerEvents(),
        VllmChat(),
        VllmEntries(),
        VllmAnswers(),
        VllmWorkers(),
        Coordinates(),
        OriginChat(),
        SglangParts(),
        OriginFrames(),
        MediaImages(),
        MediaVideos(),
        ConfigText(),
    )
}
"""Every target by its name."""
