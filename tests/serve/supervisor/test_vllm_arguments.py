"""Arguments for ``vllm serve`` that cannot be right are refused before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from embferry.serve.supervisor import vllm_arguments
from embferry.serve.supervisor.vllm_arguments import Known, known_options, parser_refusal, problems

SOURCE = """
class EngineArgs:
    enforce_eager: bool = ModelConfig.enforce_eager
    max_model_len: int = ModelConfig.max_model_len
    dtype: ModelDType = "auto"
    logprobs_mode: LogprobsMode | None = None
    runner: RunnerOption = "auto"
    tokenizer_mode: TokenizerMode | str = "auto"
    jit: Literal["warn", "error"] = "warn"
    served_model_name: str | list[str] | None = None
    limit_mm_per_prompt: dict[str, int] = {}

    def add(parser):
        group.add_argument("--tensor-parallel-size", "-tp", **kwargs["tensor_parallel_size"])
"""
FRONTEND = """
class FrontendArgs:
    port: int = 8000
    host: str | None = None
    uds: str | None = None
    ec_transfer_config: dict | None = None
"""
MODEL = """
ModelDType = Literal["auto", "float32"]
LogprobsMode: TypeAlias = Literal[
    "raw",
    "processed",
]
RunnerOption = Literal["auto", RunnerType]
"""


@pytest.fixture
def known(tmp_path: Path) -> Known:
    files = {"engine/arg_utils.py": SOURCE, "entrypoints/openai/cli_args.py": FRONTEND, "config/model.py": MODEL}
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    found = known_options(tmp_path)
    assert found is not None
    return found


def never(extra: Sequence[str]) -> str:
    pytest.fail("vLLM is asked")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--enforce-eager --max-model-len 4k -tp 2 --dtype float32",
        "--enforce_eager --max_model_len=-1 --no-enforce-eager",
        "--served-model-name a b --tensor-parallel-size 2",
        "--limit-mm-per-prompt.image 2 --enforce-eag",
        "--max-model-len -1 --enforce-eager",
        "--dtype float32 --logprobs-mode=processed --jit warn",
        "--logprobs-mode None --runner any --tokenizer-mode any",
        "--omni --pigeons 2",
    ],
)
def test_right_arguments_are_taken_without_loading_vllm(words: str, known: Known) -> None:
    assert problems(words.split(), known, never) == []
    assert problems(words.split(), None, never) == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--enforce-eagre", "--enforce-eagre: did you mean --enforce-eager?"),
        ("--enforce_eagre=1", "--enforce_eagre: did you mean --enforce-eager?"),
        ("--pigeons 2", ""),
        ("--enforce-eager Qwen/Q", "Qwen/Q: if it is the model, use --model Qwen/Q before --"),
        ("--dtype float32 Qwen/Q", "Qwen/Q: if it is the model"),
        ("--dtype=float32 Qwen/Q", "Qwen/Q: if it is the model"),
        ("--max-model-len long", ""),
        ("--max-model-len=long", ""),
        ("--dtype floaty", ""),
        ("--dtype=floaty", ""),
        ("--dt floaty", ""),
        ("--logprobs-mode row", ""),
        ("--jit error,", ""),
    ],
)
def test_doubtful_arguments_are_refused_if_vllm_refuses_them(words: str, hint: str, known: Known) -> None:
    found = problems(words.split(), known, lambda extra: f"unrecognized arguments: {extra[-1]}")
    assert found[0].startswith("vllm serve: unrecognized arguments: ")
    assert hint in " ".join(found[1:])
    assert bool(hint) == bool(found[1:])
    assert problems(words.split(), known, lambda extra: "") == []


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--port 9123", "--port before -- is that of the router"),
        ("--po=9123", "--po: embferry serve gives each instance a port of its own"),
        ("--host 0.0.0.0", "--host before --"),
        ("--model other", "name the model with --model before --"),
        ("--ec-transfer-config {}", "--transports before --"),
        ("--ec_transfer_config.ec_role x", "--ec_transfer_config.ec_role: embferry serve writes it"),
        ("--no-enable-mm-embeds", "need --enable-mm-embeds"),
        ("--api-key secret", "EMBFERRY_ROUTER_API_KEY"),
        ("--uds /tmp/socket", "the router asks each instance at a port"),
        ("--headless", "the router needs the HTTP server"),
        ("--ssl-certfile file", "without TLS"),
        ("--dtype float32 --port 9123", "--port: "),
    ],
)
def test_options_that_embferry_sets_itself_are_refused_with_what_to_use(words: str, advice: str, known: Known) -> None:
    (found,) = problems(words.split(), known, never)
    assert advice in found
    if "--po=" not in words:
        assert problems(words.split(), None, never) == [found]


def test_a_file_of_config_may_not_make_instances_unreachable(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("dtype: float32\nport: 9123\nssl_certfile: file\n")
    (found,) = problems(["--config", str(file)], None, never)
    assert found.startswith(f"ssl-certfile in {file}: ")
    file.write_text("- no\n- options\n")
    assert problems(["--config", str(file)], None, never) == []


def test_source_that_is_written_otherwise_tells_nothing(tmp_path: Path) -> None:
    assert known_options(tmp_path) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import sys; print('usage: \\nvllm serve: error: no such thing', file=sys.stderr); sys.exit(2)",
            "no such thing",
        ),
        ("raise ImportError('error: of another kind')", ""),
        ("pass", ""),
    ],
)
def test_only_a_refusal_of_the_parser_itself_counts(code: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_arguments, "_PARSE", code)
    assert parser_refusal(["--any"]) == reason
