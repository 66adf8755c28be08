"""Managers of the origin's wire, from the settings of a worker."""

from __future__ import annotations

from dataclasses import replace

from embferry.disaggregation.mooncake.conn_multimodal import EncodeManager, LanguageManager, OriginSettings
from embferry.disaggregation.mooncake.session_engines import OpenEngine
from embferry.protocol.layout import Geometry, Layout
from embferry.serve.config import Settings
from embferry.serve.http.address import address_of
from embferry.serve.worker.transfer_settings import encode_timeouts, language_timeouts


def encode_manager(
    layout: Layout, settings: Settings, bootstrap_url: str, open_engine: OpenEngine | None = None
) -> EncodeManager:
    """Returns the manager of an encode worker, which registers at ``bootstrap_url``."""
    own = settings.transfer
    transfer = replace(
        encode_timeouts(settings), waiting_timeout=own.waiting_timeout, transfer_timeout=own.transfer_timeout
    )
    return EncodeManager(
        _geometry(layout, settings),
        bootstrap_url=bootstrap_url,
        settings=_origin_settings(settings),
        transfer=transfer,
        open_engine=open_engine,
    )


def language_manager(layout: Layout, settings: Settings, open_engine: OpenEngine | None = None) -> LanguageManager:
    """Returns the manager of a language worker, which owns the pool of the settings."""
    return LanguageManager(
        _geometry(layout, settings),
        settings=_origin_settings(settings),
        transfer=language_timeouts(settings),
        open_engine=open_engine,
    )


def _geometry(layout: Layout, settings: Settings) -> Geometry:
    return Geometry(layout, settings.transfer.num_blocks, settings.transfer.block_size)


def _origin_settings(settings: Settings) -> OriginSettings:
    own = settings.transfer
    return OriginSettings(
        host=address_of(settings.host),
        advertise=address_of(settings.reachable_host),
        protocol=own.mooncake_protocol,
        device=own.mooncake_device,
        heartbeat_interval=own.heartbeat_interval,
        max_misses=own.heartbeat_max_failures,
        max_total_tokens=settings.language.max_prompt_tokens,
    )
