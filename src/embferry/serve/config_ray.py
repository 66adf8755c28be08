"""The settings of a deployment on Ray."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from embferry.serve.config_base import Seconds, Section
from embferry.serve.config_values import Amount, Gpus, Resources, Words

MOST = 1000
"""The most routers, encode workers and language workers that may be asked for."""

Work = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST)]


class RaySettings(Section):
    """With `--on ray`, and for the application `embferry.deploy.ray:app`: what Ray Serve starts, and where."""

    address: str | None = None
    """`embferry serve --on ray`: the Ray cluster, such as `auto`, the one that this machine belongs to. If unset, one
    is started on this machine alone, and ends with the command."""
    routers: Count = 1
    """Routers. Ray's proxies share requests out among them."""
    min_encoders: Count = 1
    """Encode workers that there are always."""
    max_encoders: Count = 4
    """Encode workers that there may be."""
    work_per_encoder: Work = 4
    """Requests that are being decoded and encoded, or wait for that, for each encode worker: with more, another one is
    started, with fewer, one is taken away. With vLLM: requests that run or wait in its instance."""
    min_languages: Count = 1
    """Language workers that there are always."""
    max_languages: Count = 4
    """Language workers that there may be."""
    work_per_language: Work = 8
    """The same as `work_per_encoder`: requests that are being answered, or wait for that, for each language worker."""
    upscale_delay: Seconds = 5
    """Seconds for which there must be too much work before a worker is started."""
    downscale_delay: Seconds = 60
    """Seconds for which there must be too little work before a worker is taken away."""
    drain_timeout: Seconds = 60
    """Seconds that a worker has to finish what it has begun when it is taken away. It gets no new requests by then."""
    router_cpus: Amount = 1
    """Processors that a router reserves on its node; Ray does not limit it to them."""
    router_resources: Resources = {}
    """Further resources of Ray that a router reserves, to choose its nodes: `front:1`, or `{front: 1}` in the file."""
    encoder_cpus: Amount = 1
    """Processors that an encode worker reserves."""
    encoder_gpus: Gpus = 0
    """GPUs that an encode worker reserves: a whole number, or a part of one."""
    encoder_resources: Resources = {}
    """Further resources of Ray that an encode worker reserves."""
    language_cpus: Amount = 1
    """Processors that a language worker reserves."""
    language_gpus: Gpus = 0
    """GPUs that a language worker reserves, as above."""
    language_resources: Resources = {}
    """Further resources of Ray that a language worker reserves."""
    vllm_arguments: Words = ()
    """With `--engine vllm`: arguments for each `vllm serve`, the same as after `--` of `embferry serve`. Ray's
    dashboard shows them, so those with a secret are refused."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        for role in ("encoders", "languages"):
            least, most = getattr(self, f"min_{role}"), getattr(self, f"max_{role}")
            if least > most:
                why = f"min_{role} {least} is more than max_{role} {most}"
                raise PydanticCustomError("bounds", "{why}", {"why": why})
        return self
