"""``--engine`` and the options of each engine."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.serve.config import Settings

ROUTER = ("router", "--engine", "vllm", "--encode-urls", "http://a:1,http://b:1", "--language-urls", "http://c:1")
STAGES = (*ROUTER[:5], "--prefill-urls", "http://c:1", "--decode-urls", "http://d:1")
SERVE = ("serve", "--engine", "vllm", "--model", "some/model")


def called(*words: str) -> tuple[int, str, str]:
    """Returns exit status, stdout and stderr."""
    outcome = CliRunner().invoke(app, list(words))
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("router", "--engine", "vllm"), "--engine vllm needs --encode-urls"),
        (("router", "--engine", "vllm", "--encode-urls", "http://a"), "--engine vllm needs --language-urls"),
        (("router", "--engine", "other"), "Input should be 'embferry' or 'vllm'"),
        (("router", "--encode-urls", "http://a"), "--encode-urls needs --engine vllm"),
        (("router", "--language-encodes"), "--language-encodes needs --engine vllm"),
        ((*ROUTER, "--served-model-name", "x"), "--served-model-name has no effect here"),
        ((*ROUTER, "--bootstrap-url", "http://x"), "--bootstrap-url has no effect here"),
        ((*ROUTER, "--media-max-pixels", "5"), "--media-max-pixels has no effect here"),
        ((*ROUTER, "--encoders", "2"), "--encoders has no effect here"),
        ((*ROUTER, "--connector", "mooncake"), "--connector mooncake needs --consumer-zmq"),
        ((*ROUTER, "--consumer-zmq", "tcp://c:2"), "--consumer-zmq needs --connector mooncake"),
        (
            (*ROUTER, "--connector-metrics-urls", "http://a:2,http://b:2"),
            "--connector-metrics-urls has 2: give one for each of the 3 instances, in the order of --encode-urls, "
            "--language-urls",
        ),
        (
            (*STAGES, "--connector-metrics-urls", "http://a:2"),
            "in the order of --encode-urls, --prefill-urls, --decode",
        ),
        (
            (*ROUTER, "--connector", "example", "--connector-metrics-urls", "http://a:2"),
            "--connector-metrics-urls needs --connector embferry",
        ),
        ((*SERVE, "--connector-metrics-urls", "http://a:2"), "--connector-metrics-urls has no effect here"),
        ((*ROUTER[:4], "ftp://a", *ROUTER[5:]), "embferry: --encode-urls: "),
        ((*ROUTER[:3], "--vllm-encode-urls", "ftp://a", *ROUTER[5:]), "embferry: --vllm-encode-urls: "),
        ((*STAGES[:-2],), "--engine vllm needs --decode-urls, such as"),
        ((*STAGES[:-4], *STAGES[-2:]), "--engine vllm needs --prefill-urls, such as"),
        ((*STAGES, "--language-urls", "http://e:1"), "--language-urls and --prefill-urls: give the URLs of"),
        ((*ROUTER, "--vllm-decode-urls", "http://d:1"), "--language-urls and --vllm-decode-urls: give the URLs of"),
        ((*STAGES, "--connector", "mooncake"), "--connector mooncake needs --language-urls"),
        ((*STAGES, "--connector", "example"), "--connector example needs --language-urls"),
        ((*STAGES, "--prefills", "2"), "--prefills has no effect here"),
        (("serve", "--encoders", "2"), "--encoders needs --engine vllm"),
        (("serve", "--", "--dtype", "float32"), "arguments for vllm serve need --engine vllm"),
        ((*SERVE, "--encode-workers", "2"), "embferry: --encode-workers has no effect here"),
        ((*SERVE, "--serve-encode-workers=2"), "embferry: --serve-encode-workers has no effect here"),
        ((*SERVE, "--transfer-num-blocks", "2"), "--transfer-num-blocks has no effect here"),
        ((*SERVE, "--language-max-concurrent", "2"), "--language-max-concurrent has no effect here"),
        ((*SERVE, "--encode-urls", "http://a"), "--encode-urls has no effect here"),
        ((*SERVE, "--prefill-urls", "http://a"), "--prefill-urls has no effect here"),
        ((*SERVE, "--prefills", "1"), "--prefills needs --decodes"),
        ((*SERVE, "--decodes", "1"), "--decodes needs --prefills"),
        ((*SERVE, "--prefills", "1", "--decodes", "1", "--languages", "1"), "--languages and --prefills: start"),
        (("serve", "--prefills", "1"), "--prefills needs --engine vllm"),
        ((*SERVE, "--connector", "example"), "--connector needs embferry router"),
        ((*SERVE, "--transports", "pigeon"), "pigeon"),
        (
            (*SERVE, "--dtype", "bf16"),
            "--dtype has no effect here with --engine vllm; leave it out, or give it to vllm",
        ),
        ((*SERVE, "--dtype", "float32"), "embferry: with --engine vllm, --dtype goes after --: -- --dtype"),
        ((*SERVE, "--served-model-name", "x"), "after --: -- --served-model-name"),
        ((*SERVE[:3], "Qwen/Q"), "Qwen/Q is no option: name a model with --model Qwen/Q"),
        ((*SERVE[:3], "Qwen/Q", "--", "--enforce-eager"), "name a model with --model Qwen/Q"),
        (
            (*SERVE, "--prefills", "1", "--decodes", "1", "--", "--kv_transfer_config={}"),
            "--kv-transfer-config: embferry serve writes it",
        ),
        (("serve", "Qwen/Q"), "name a model with --model Qwen/Q"),
        (
            (*SERVE, "--enforce-eager"),
            "No such option: --enforce-eager. Options of vllm serve go after --: -- --enforce",
        ),
        (("serve", "--engine=vllm", "--enforce-eager"), "go after --: -- --enforce-eager"),
    ],
)
def test_options_of_the_other_engine_are_refused(words: tuple[str, ...], why: str) -> None:
    status, _, err = called(*words)
    assert status == 2
    assert why in err
    assert "Traceback" not in err


def test_the_limit_on_texts_has_an_effect_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("embferry.serve.supervisor.vllm.run", lambda settings, extra: seen.append(settings))
    status, _, err = called(*SERVE, "--language-max-prompt-characters", "5")
    assert (status, err) == (0, "")
    assert seen[0].language.max_prompt_characters == 5


def test_help_names_the_settings_of_vllm() -> None:
    _, out, _ = called("router", "--help")
    for name in (
        "--engine",
        "--encode-urls",
        "--language-urls",
        "--prefill-urls",
        "--decode-urls",
        "--language-encodes",
    ):
        assert name in out
    _, out, _ = called("serve", "--help")
    assert "VLLM_ARGUMENTS" in out


def test_the_router_loads_no_model_and_no_decoder() -> None:
    code = (
        "import sys, embferry.serve.router.process, embferry.serve.vllm.app, embferry.serve.supervisor.vllm\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'av', 'PIL', 'jinja2', 'numpy', 'vllm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
