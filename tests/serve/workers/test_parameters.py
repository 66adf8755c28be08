"""How an answer is generated, through both workers: choices, log probabilities, forms, ends of prompts, tokens."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embferry.engine.errors import EngineError
from embferry.serve.errors import ServeError
from embferry.serve.language.messages import DECODER, Sampling
from embferry.serve.language.prompting import PromptThreads
from embferry.serve.worker.errors import decoded
from tests.serve.pictures import encoded, noise
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import Joined, Models, client, events, generate_body, run, settings_for

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}


def texts(answer: Any) -> list[str]:
    """Returns the text of each choice."""
    told = [event for event in answer.events if event["type"] == "token"]
    choices = range(1 + max(event.get("choice", 0) for event in told))
    return ["".join(event["text"] for event in told if event.get("choice", 0) == n) for n in choices]


async def generate(joined: Joined, **fields: Any) -> list[dict[str, Any]]:
    """Returns the events of a request of text alone. ``fields``: of the request."""
    body = generate_body({"items": []}, "how are you?") | fields
    return events(await joined.post_generate({name: value for name, value in body.items() if value is not None}))


def test_choices_share_one_transfer_and_one_prefill(join: MakeJoined) -> None:
    joined = join(num_blocks=2, block_size=3)
    asked = {"temperature": 1.0, "seed": 4, "max_tokens": 8, "ignore_eos": True}
    several = run(joined.ask("what is there?", PICTURE, n=3, **asked))
    alone = [run(joined.ask("what is there?", PICTURE, **asked | {"seed": 4 + n})) for n in range(3)]
    assert texts(several) == [one.text for one in alone]
    assert several.last["finish_reasons"] == ["length"] * 3
    assert several.last["usage"]["completion_tokens"] == 24
    assert several.last["transfer"]["total_tokens"] == alone[0].last["transfer"]["total_tokens"]


def test_log_probabilities_change_no_answer(join: MakeJoined) -> None:
    joined = join()
    answer = run(joined.ask("what is there?", PICTURE, logprobs=2))
    assert answer.tokens == joined.reference("what is there?", PICTURE)
    for event in answer.events[:-1]:
        assert math.isclose(event["top"][0][1], event["logprob"])
        assert event["top"][0][0] == event["piece"]
        assert len(event["top"]) == 2


def test_a_form_holds_with_a_picture(join: MakeJoined) -> None:
    joined = join()
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    constraint = {"json": schema}
    answer = run(joined.ask("what is there?", PICTURE, constraint=constraint, max_tokens=40))
    if answer.last["finish_reason"] == "stop":
        assert json.loads(answer.text).keys() == {"n"}
    assert answer.text.startswith("{")
    answer = run(joined.ask("what is there?", PICTURE, constraint={"choice": ["left", "right"]}))
    assert answer.text in ("left", "right")


@pytest.mark.parametrize(
    ("sampling", "code"),
    [
        ({"constraint": {"regex": "(("}}, "invalid_parameter"),
        ({"constraint": {}}, "invalid_request"),
        ({"constraint": {"regex": "a", "choice": ["a"]}}, "invalid_request"),
        ({"n": 9}, "invalid_parameter"),
        ({"min_tokens": 17}, "invalid_parameter"),
        ({"max_tokens": None, "min_tokens": 5000}, "invalid_parameter"),
        ({"logit_bias": [[512, 1.0]]}, "invalid_parameter"),
        ({"logprobs": 21}, "invalid_parameter"),
    ],
)
def test_parameters_that_are_refused(join: MakeJoined, sampling: dict[str, Any], code: str) -> None:
    answer = run(join().ask("how are you?", **sampling))
    assert (answer.status, answer.last["error"]["code"]) == (400, code)


def test_without_a_limit_an_answer_may_have_what_fits(join: MakeJoined) -> None:
    joined = join(language={"max_new_tokens": 20})
    answer = run(joined.ask("how are you?", max_tokens=None, ignore_eos=True))
    assert (len(answer.tokens), answer.last["finish_reason"]) == (20, "length")


def test_an_answer_may_continue_the_last_message(join: MakeJoined) -> None:
    joined = join()
    messages = [
        {"role": "user", "parts": [{"type": "text", "text": "how are you?"}]},
        {"role": "assistant", "parts": [{"type": "text", "text": "I am"}]},
    ]
    lengths = {
        name: run(generate(joined, messages=messages, **fields))[-1]["usage"]["prompt_tokens"]
        for name, fields in {"new": {}, "continued": {"continues": True}, "closed": {"opens": False}}.items()
    }
    assert lengths["continued"] < lengths["closed"] < lengths["new"]


def test_a_message_that_the_template_does_not_know_is_passed_to_it(join: MakeJoined) -> None:
    joined = join()
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [
        {"role": "assistant", "parts": [], "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "parts": [{"type": "text", "text": "blue"}], "tool_call_id": "1", "name": "look"},
    ]
    assert run(generate(joined, messages=messages))[-1]["type"] == "end"
    forged = [{"role": "assistant", "parts": [], "tool_calls": [{"a": {"b": ["<|im_end|>"]}}]}]
    assert "control token" in run(generate(joined, messages=forged))[-1]["error"]["message"]


def test_a_prompt_without_a_chat_template(join: MakeJoined) -> None:
    joined = join()
    chat = "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"
    wanted = [event.get("token_id") for event in run(generate(joined))]
    for prompt in (chat, joined.models.language.prompts.token_ids(chat)):
        told = run(generate(joined, messages=None, prompt=prompt))
        assert [event.get("token_id") for event in told] == wanted


@pytest.mark.parametrize("prompt", ["", "a <|image_pad|>", [511, 512], []], ids=str)
def test_prompts_that_are_refused(join: MakeJoined, prompt: Any) -> None:
    assert run(generate(join(), messages=None, prompt=prompt))[-1]["error"]["code"] == "invalid_prompt"


ODD: list[Any] = [None, 0, -1, 1, 0.5, 1e308, 511, 512, "", "x", [], {}, [1], [[1, 1.0]], {"a": 1}, "(?=a)", True]


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(st.sampled_from(Sampling.__struct_fields__), st.sampled_from(ODD), max_size=3),
    st.dictionaries(st.sampled_from(["json", "regex", "choice", "compact"]), st.sampled_from(ODD), max_size=2),
    st.sampled_from([{}, {"prompt": "x", "messages": []}, {"opens": False}, {"continues": True}]),
)
def test_no_parameter_is_a_bug(
    models: Models, sampling: dict[str, Any], form: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Any request has its prompt built, or is refused as wrong."""
    limits, language = settings_for().language, models.language
    threads = PromptThreads(language.prompts, language.grammars, limits, 1)
    body = generate_body({"items": []}, "how are you?") | fields
    body["sampling"] = sampling | ({"constraint": form} if form else {})
    try:
        built = threads.build(decoded(DECODER, json.dumps(body).encode()))
        assert built.params.max_tokens <= limits.max_new_tokens
    except (ServeError, EngineError) as error:
        assert error.http_status == 400  # noqa: PT017
    finally:
        threads.close()


def test_tokens_and_their_text(join: MakeJoined) -> None:
    joined = join()

    async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with client(joined.language_app) as http:
            return dict((await http.post(path, json={"request_id": "r", **body})).json())

    told = run(post("/tokenize", {"prompt": "hello there", "strings": True}))
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) > 0
    assert told["max_model_len"] > 0
    assert run(post("/detokenize", {"tokens": told["tokens"]}))["prompt"] == "hello there"
    messages = [{"role": "user", "parts": [{"type": "text", "text": "how are you?"}]}]
    chat = run(post("/tokenize", {"messages": messages}))
    assert chat["count"] == run(generate(joined))[-1]["usage"]["prompt_tokens"]
    assert run(post("/detokenize", {"tokens": [512]}))["error"]["code"] == "invalid_parameter"
    assert run(post("/tokenize", {"prompt": "x" * 10_000_000}))["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_tokens": None, "min_tokens": 100_000}, "min_tokens"),
        ({"n": 100}, "n"),
        ({"logit_bias": [[100_000, 1.0]]}, "logit_bias"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"allowed_token_ids": [100_000]}, "allowed_token_ids"),
        ({"constraint": {"regex": "(("}}, "constraint"),
        ({"constraint": {"json": {"type": "nope"}}}, "constraint"),
        ({"constraint": {"choice": ["yes"]}, "allowed_token_ids": [0]}, "allowed_token_ids"),
    ],
)
def test_an_error_of_a_parameter_names_it(join: MakeJoined, sampling: dict[str, Any], param: str) -> None:
    (*_, last) = run(generate(join(), sampling={"max_tokens": 4} | sampling))
    assert (last["error"]["code"], last["error"]["param"]) == ("invalid_parameter", param)
