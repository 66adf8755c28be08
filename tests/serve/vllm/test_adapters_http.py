"""A real adapter (LoRA), loaded at run time into real instances of ``vllm serve`` behind the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.serve.vllm.instance_proofs import AUTHORIZATION
from tests.serve.vllm.servers import API_KEY, CONDITION_S, GREEDY, MORE, Proved, Servers, picture, until
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
RANK, ALPHA = 8, 64
NAME, ONE_SIDED = "shouting", "whispering"
SIDES = ("encode-0", "language-0")
VLLM_DOES_NOT_KNOW_IT = (404, "404")
"""Status and code of vLLM's own answer, which the router passes on when no instance has a model."""
CONTENTS = {
    "a picture": [picture(1), text()],
    "two pictures": [picture(2), text("and"), picture(3, 448, 224), text()],
    "none": [text()],
}


def changes() -> dict[str, Any]:
    """Returns random changes of the queries and values of every layer of the tiny model's language model."""
    import torch

    from embferry.models.tiny_qwen import TEXT

    hidden, layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    values = hidden * TEXT["num_key_value_heads"] // TEXT["num_attention_heads"]
    random, tensors = torch.Generator().manual_seed(7), {}
    for layer in range(layers):
        for name, width in (("q_proj", hidden), ("v_proj", values)):
            at = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, hidden, generator=random) / 8
            tensors[f"{at}.lora_B.weight"] = torch.randn(width, RANK, generator=random) / 8
    return tensors


def no_changes() -> dict[str, Any]:
    """Returns a change of the vision encoder by 0. vLLM takes no adapter without tensors."""
    import torch

    from embferry.models.tiny_qwen import VISION

    hidden, at = VISION["hidden_size"], "base_model.model.model.visual.blocks.0.attn.qkv"
    shapes = {f"{at}.lora_A.weight": (RANK, hidden), f"{at}.lora_B.weight": (3 * hidden, RANK)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def write_adapter(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("adapters")
    started = Servers(folder, ("--encoders", "1"), OPTIONS, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    try:
        started.wait("ready:")
        started.wait("the undivided model", f"{started.undivided}/health")
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def adapters(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the folder of the adapter for each instance.

    An encode instance has no language model, and vLLM refuses an adapter there that changes one. It gets one of the
    same name that changes nothing.
    """
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "language", changes())
    write_adapter(folder / "encode", no_changes())
    folders = {servers.at("encode-0"): folder / "encode"}
    return folders | dict.fromkeys((servers.at("language-0"), servers.undivided), folder / "language")


def ordered(url: str, verb: str, **body: str) -> httpx.Response:
    """Returns an instance's answer to an order to load or unload an adapter, which has a proof of the cluster key."""
    headers = {AUTHORIZATION: f"Bearer {API_KEY}"}
    with httpx.Client(auth=Proved(url), headers=headers, trust_env=False, timeout=CONDITION_S) as client:
        return client.post(f"{url}/v1/{verb}_lora_adapter", json=body)


def order(url: str, verb: str, **body: str) -> None:
    response = ordered(url, verb, **body)
    assert response.status_code == 200, response.text


def models(servers: Servers) -> set[str]:
    """Returns the names of the models that the router serves."""
    with servers.client(servers.url) as client:
        return {model.id for model in client.models.list()}


def known_at(servers: Servers, side: str) -> list[str]:
    """Returns the models of this instance, as the router knows them."""
    workers = httpx.get(
        f"{servers.url}/workers", trust_env=False, headers={"authorization": f"Bearer {API_KEY}"}
    ).json()["workers"]
    return [model for worker in workers if worker["url"] == servers.at(side) for model in worker["models"]]


def tokens(servers: Servers, url: str, model: str, content: list[Any]) -> list[int]:
    with servers.client(url) as client:
        asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}], **GREEDY}
        (choice,) = client.chat.completions.create(**asked, extra_body=MORE).choices
        return list(choice.token_ids)


def refusal(servers: Servers, model: str, content: list[Any]) -> tuple[int, str]:
    """Returns status and code of the router's refusal."""
    import openai

    with pytest.raises(openai.APIStatusError) as refused:
        tokens(servers, servers.url, model, content)
    return refused.value.status_code, str(refused.value.code)


def test_an_adapter_is_served_from_when_it_is_loaded_until_it_is_unloaded(
    servers: Servers, adapters: dict[str, Path]
) -> None:
    assert NAME not in models(servers)
    assert refusal(servers, NAME, CONTENTS["a picture"]) == VLLM_DOES_NOT_KNOW_IT
    for url, folder in adapters.items():
        order(url, "load", lora_name=NAME, lora_path=str(folder))
    until(lambda: all(NAME in known_at(servers, side) for side in SIDES))
    assert NAME in models(servers)
    for content in CONTENTS.values():
        expected = tokens(servers, servers.undivided, NAME, content)
        assert expected != tokens(servers, servers.undivided, "tiny", content)
        before = servers.counted("encodes_total"), servers.received_by("language-0")
        assert tokens(servers, servers.url, NAME, content) == expected
        pictures = sum(part["type"] == "image_url" for part in content)
        assert servers.counted("encodes_total") == before[0] + pictures
        until(lambda: servers.received_by("language-0") == before[1] + pictures)  # noqa: B023
        assert tokens(servers, servers.url, "tiny", content) == tokens(servers, servers.undivided, "tiny", content)
    for url in adapters:
        order(url, "unload", lora_name=NAME)
    until(lambda: not any(NAME in known_at(servers, side) for side in SIDES))
    assert NAME not in models(servers)
    encodes = servers.counted("encodes_total")
    assert refusal(servers, NAME, CONTENTS["a picture"]) == VLLM_DOES_NOT_KNOW_IT
    assert servers.counted("encodes_total") == encodes


@pytest.mark.parametrize("side", SIDES)
def test_an_adapter_of_one_side_alone_is_refused_before_anything_is_encoded(
    servers: Servers, adapters: dict[str, Path], side: str
) -> None:
    name, url = f"{ONE_SIDED}-{side}", servers.at(side)
    order(url, "load", lora_name=name, lora_path=str(adapters[url]))
    try:
        if side == "language-0":
            until(lambda: name in models(servers))  # it serves texts
            assert len(tokens(servers, servers.url, name, CONTENTS["none"])) == GREEDY["max_tokens"]
        else:
            until(lambda: name in known_at(servers, side))
        encoded = servers.counted("encodes_total"), servers.encoded_by("encode-0")
        assert refusal(servers, name, CONTENTS["two pictures"]) == (404, "model_not_found")
        assert (servers.counted("encodes_total"), servers.encoded_by("encode-0")) == encoded
    finally:
        order(url, "unload", lora_name=name)


def test_an_encode_instance_refuses_an_adapter_of_the_language_model(
    servers: Servers, adapters: dict[str, Path]
) -> None:
    """When this fails, vLLM takes one, and the documents need not tell of adapters that change nothing."""
    url, folder = servers.at("encode-0"), adapters[servers.at("language-0")]
    response = ordered(url, "load", lora_name=NAME, lora_path=str(folder))
    assert response.status_code == 500
    assert "expected target modules" in response.text
