"""The keys of entries in the shared cache, and the memory that a lookup holds."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image

from embferry.serve.encode import shared_cache as module
from embferry.serve.encode.shared_cache import Lookup, identity_of, item_key
from tests.serve.pictures import png
from tests.serve.workers.joined import Models


def test_all_that_decides_an_embedding_is_in_its_key(models: Models) -> None:
    identity = identity_of(models.encoder)
    shape = models.encoder.prepare([Image.open(io.BytesIO(png(96, 64, "red")))])[0].shape
    key = item_key(identity, shape, 6)
    others = [
        item_key(b"other", shape, 6),
        item_key(identity, shape, 7),
        *(item_key(identity, replace(shape, **change), 6) for change in (
            {"kind": "video"}, {"grid": (1, 6, 4)}, {"digest": b"other"},
        )),
    ]  # fmt: skip
    assert len({key, *others}) == 6


def test_the_identity_has_what_the_digest_of_an_item_lacks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest covers weights, dtype, configuration of the tower, threads and versions of torch and transformers."""
    mine = identity_of(models.encoder)
    assert identity_of(models.encoder) == mine
    for name, value in (("image_token_id", 1), ("video_token_id", 2), ("model_type", "other")):
        with monkeypatch.context() as changed:
            changed.setattr(models.encoder.config, name, value)
            assert identity_of(models.encoder) != mine
    for what, value in (("__version__", "0"), ("Layout", lambda fields: ())):
        with monkeypatch.context() as changed:
            changed.setattr(module, what, value)
            assert identity_of(models.encoder) != mine
    with monkeypatch.context() as changed:
        changed.setattr(module.torch.backends.cpu, "get_cpu_capability", lambda: "other")
        assert identity_of(models.encoder) != mine


def test_a_lookup_must_release_what_it_found_too_late(models: Models) -> None:
    class Pin:
        released = 0

        def release(self) -> None:
            self.released += 1

    for order in ("end first", "given up first"):
        lookup, pin = Lookup(0.0), Pin()
        if order == "end first":
            lookup.end(pin)  # type: ignore[arg-type]
            assert pin.released == 0
        lookup.give_up()
        if order == "given up first":
            lookup.end(pin)  # type: ignore[arg-type]
        lookup.give_up()
        assert pin.released == 1
