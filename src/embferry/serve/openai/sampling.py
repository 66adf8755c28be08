"""The fields of a request that say how an answer is generated. All paths that generate have them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 4000
"""Stop strings, and the characters of all of them: the text is compared with each after every token."""
MAX_TOKEN_IDS = 4096
"""Ids of tokens in one field."""
MAX_TOP_LOGPROBS = 20


def _number(value: Any) -> Any:
    """Returns a whole float as an integer, as 100.0. A number of hundreds of digits or a truth value is none."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63:
        return int(value)
    if isinstance(value, int) and not -(1 << 64) < value < 1 << 64:
        raise PydanticCustomError("number", "Input should be a number of at most 64 bits")
    return value


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _bounded(stops: tuple[str, ...]) -> tuple[str, ...]:
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        limit = {"most": MAX_STOP_CHARACTERS}
        raise PydanticCustomError("stops", "All stop strings together should have at most {most} characters", limit)
    return stops


def _biases(value: Any) -> Any:
    """Returns the object with its names, the ids of tokens, as integers."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 10 for name in value):
        raise PydanticCustomError("bias", "Names should be the ids of tokens")
    return {int(name): bias for name, bias in value.items()}


Whole = Annotated[int, BeforeValidator(_number), Field(strict=True)]
Count = Annotated[Whole, Field(ge=1, le=1 << 31)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Penalty = Annotated[Real, Field(ge=-2, le=2)]
TokenIds = Annotated[tuple[Annotated[Whole, Field(ge=0, lt=1 << 31)], ...], Field(max_length=MAX_TOKEN_IDS)]
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...],
    BeforeValidator(_as_list),
    Field(max_length=MAX_STOPS),
]
Biases = Annotated[
    dict[int, Annotated[Real, Field(ge=-100, le=100)]], BeforeValidator(_biases), Field(max_length=MAX_TOKEN_IDS)
]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class SamplingFields(BaseModel):
    """The fields that every path has which generates. Null stands for a field that is missing."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    temperature: Annotated[Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    repetition_penalty: Annotated[Real, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: TokenIds | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: Stops | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[Whole, Field(ge=0, lt=1 << 31)] | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _stops_are_bounded(cls, stops: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if stops is None else _bounded(stops)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; None: as many as fit."""
        return None

    @property
    def top_logprobs_wanted(self) -> int | None:
        """The number of likeliest tokens to name beside each; None: no log probabilities at all."""
        return None

    @property
    def includes_usage(self) -> bool:
        """Whether the last chunk of a stream has the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, default_max_tokens: int | None, constraint: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the field ``sampling`` for the language worker. Without a temperature, sampling is greedy.

        Args:
            default_max_tokens: the most tokens of an answer if the request does not say.
            constraint: what the answer must match.
        """
        always = {
            "max_tokens": self.most_tokens or default_max_tokens,
            "temperature": 0.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
            "stop": list(self.stop or ()),
        }
        biases = {"logit_bias": list((self.logit_bias or {}).items())} if self.logit_bias else {}
        others = {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        logprobs = {} if self.top_logprobs_wanted is None else {"logprobs": self.top_logprobs_wanted}
        return always | others | biases | logprobs | ({} if constraint is None else {"constraint": constraint})


_PASSED_ON = (
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "allowed_token_ids", "n",
    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
)  # fmt: skip
"""Fields that language workers know by the same name; see :class:`embferry.serve.language.messages.Sampling`."""
