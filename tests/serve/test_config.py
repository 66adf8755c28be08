"""Settings: the precedence of their sources, and the message of each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.serve.config import Settings
from embferry.serve.config_load import ENV_KEYS, FIELDS, SGLANG_ALIASES, ConfigError, env_name, flag_name, load

BLOCKS = ("transfer", "num_blocks")


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def problems(flags: dict[tuple[str, ...], str], environ: dict[str, str], config: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(flags, environ, config)
    return caught.value.problems


def test_without_sources_all_settings_have_their_defaults() -> None:
    assert load({}, {}).settings == Settings()


def test_flags_override_environment_overrides_file_overrides_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "threads: 2\ntransfer:\n  num_blocks: 3\n  block_size: 4\nrouter:\n  port: 5\n")
    environ = {"EMBFERRY_TRANSFER_NUM_BLOCKS": "30", "EMBFERRY_TRANSFER_BLOCK_SIZE": "40"}
    settings = load({BLOCKS: "300"}, environ, file).settings
    assert settings.transfer.num_blocks == 300
    assert settings.transfer.block_size == 40
    assert (settings.router.port, settings.threads) == (5, 2)
    assert settings.transfer.default_allocate_tokens == 8192


def test_the_environment_may_name_the_file_and_the_flag_overrides_it(tmp_path: Path) -> None:
    file = written(tmp_path, "model: mine\n")
    assert load({}, {"EMBFERRY_CONFIG": file}).settings.model == "mine"
    other = tmp_path / "other.yaml"
    other.write_text("model: other\n")
    assert load({}, {"EMBFERRY_CONFIG": file}, str(other)).settings.model == "other"


@pytest.mark.parametrize("text", ["", "# nothing\n", "transfer:\n", "media: {}\n"])
def test_a_file_without_settings_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load({}, {}, written(tmp_path, text)).settings == Settings()


def test_a_list_is_a_yaml_list_or_comma_separated_text(tmp_path: Path) -> None:
    file = written(tmp_path, "transfer:\n  transports: [tcp]\nmedia:\n  allowed_folders: [/a, /b]\n")
    settings = load({("media", "allowed_hosts"): "a.com, b.com:80,"}, {}, file).settings
    assert settings.transfer.transports == ("tcp",)
    assert settings.media.allowed_folders == (Path("/a"), Path("/b"))
    assert settings.media.allowed_hosts == ("a.com", "b.com:80")


@pytest.mark.parametrize(("value", "reason"), [("tcp,shm,tcp", "twice"), ("auto,tcp", "auto must stand alone")])
def test_invalid_combinations_of_transports_are_refused(value: str, reason: str) -> None:
    (problem,) = problems({("transfer", "transports"): value}, {})
    assert problem.startswith("--transfer-transports: ")
    assert reason in problem


def test_nixl_backends_may_have_parameters_in_the_file(tmp_path: Path) -> None:
    key = ("transfer", "nixl_backends")
    assert load({}, {}).settings.transfer.nixl_backends == {"UCX": {}}
    assert load({key: "UCX, POSIX"}, {}).settings.transfer.nixl_backends == {"UCX": {}, "POSIX": {}}
    file = written(tmp_path, "transfer:\n  nixl_backends:\n    UCX: {num_workers: 2}\n")
    assert load({}, {}, file).settings.transfer.nixl_backends == {"UCX": {"num_workers": "2"}}
    (problem,) = problems({key: ","}, {})
    assert "at least 1" in problem


def test_an_empty_variable_counts_as_unset() -> None:
    assert load({}, {"EMBFERRY_THREADS": ""}).settings == Settings()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("EMBFERRY_TRANSFER_NUM_BLOCKS", "many", "valid integer"),
        ("EMBFERRY_TRANSFER_NUM_BLOCKS", "0", "greater than or equal to 1"),
        ("EMBFERRY_TRANSFER_WAITING_TIMEOUT", "inf", "finite"),
        ("EMBFERRY_TRANSFER_WAITING_TIMEOUT", "-1", "greater than 0"),
        ("EMBFERRY_TRANSFER_TRANSPORTS", "shm,pigeon", "choose from auto, shm, nixl, mooncake, tcp, http"),
        ("EMBFERRY_TRANSFER_TRANSPORTS", ",", "at least 1"),
        ("EMBFERRY_TRANSFER_MOONCAKE_METADATA_SERVER", "p2p", "P2PHANDSHAKE"),
        ("EMBFERRY_DTYPE", "fp8", "'fp32' or 'bf16'"),
        ("EMBFERRY_ROUTER_PORT", "70000", "less than or equal to 65535"),
        ("EMBFERRY_TRANSFER_NUM_BLOCK", "1", "did you mean EMBFERRY_TRANSFER_NUM_BLOCKS?"),
        ("EMBFERRY_PORT", "1", "no such setting; did you mean EMBFERRY_ROUTER_PORT?"),
        ("EMBFERRY_API_KEY", "x", "no such setting; did you mean EMBFERRY_ROUTER_API_KEY?"),
        ("EMBFERRY_NUM_BLOCKS", "1", "no such setting; did you mean EMBFERRY_TRANSFER_NUM_BLOCKS?"),
        ("EMBFERRY_NONSENSE_ALTOGETHER", "1", "no such setting"),
    ],
)
def test_a_bad_variable_is_reported_with_name_value_and_reason(name: str, value: str, reason: str) -> None:
    (problem,) = problems({}, {name: value})
    assert problem.startswith(f"{name}: ")
    assert reason in problem
    if "no such" not in problem:
        assert repr(value.rpartition("shm,")[2]) in problem or value == ","


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("threads: 1\nmodle: x\n", ":2: modle", "did you mean model?"),
        ("port: 18200\n", ":1: port", "did you mean router.port?"),
        ("transfer:\n  num_blocks: 1\n  blocks: 2\n", ":3: transfer.blocks", "no such setting"),
        ("transfer:\n  num_blocks: many\n", ":2: transfer.num_blocks", "valid integer"),
        ("transfer: 5\n", ":1", "section transfer must hold"),
        ("- a\n", ":1", "the file must hold"),
        ("threads: 1\nthreads: 2\n", ":2: threads", "twice"),
        ("threads: [\n", ":2", "not valid YAML: while parsing a flow node, expected the node content"),
        ("model: x\n- y\n", ":2", "not valid YAML: while parsing a block mapping, expected <block end>"),
        ("model: x\nthreads: 1: 2\n", ":2", "not valid YAML: mapping values are not allowed here"),
        ("model: x\nhost: a\0b\n", ":2", "not valid YAML: the character #x0000 is not allowed"),
        ("model: x\nhost: 2001-99-99\n", ":2", "not valid YAML: month must be in 1..12"),
        ("model: !!python/object:os.system x\n", ":1", "not valid YAML: could not determine a constructor"),
        (
            "threads: 1\ntransfer.num_blocks: 3\n",
            ":2: transfer.num_blocks",
            "write num_blocks: below transfer:, indented",
        ),
        ("router.prot: 3\n", ":1: router.prot", "did you mean port?"),
        ("router:\n  router.port: 3\n", ":2: router.router.port", "here it is port"),
        ("transfer:\n  transports: 5\n", ":2: transfer.transports", "Input should be a list"),
        ("transfer:\n  transports: []\n", ":2: transfer.transports", "should have at least 1 item"),
    ],
)
def test_a_bad_file_is_reported_with_place_and_reason(tmp_path: Path, text: str, place: str, reason: str) -> None:
    file = written(tmp_path, text)
    (problem,) = problems({}, {}, file)
    assert problem.startswith(f"{file}{place}: ")
    assert reason in problem
    assert [odd for odd in ("<unicode string>", "^", "uple", "ictionary") if odd in problem] == []


def test_an_unreadable_file_is_reported_in_one_plain_sentence(tmp_path: Path) -> None:
    none, folder, latin = tmp_path / "none.yaml", tmp_path / "folder", tmp_path / "latin.yaml"
    folder.mkdir()
    latin.write_bytes(b"model: \xe9\n")
    assert problems({}, {}, str(none)) == [f"{none}: cannot be read: there is no such file"]
    assert problems({}, {"EMBFERRY_CONFIG": str(none)}) == [f"{none}: cannot be read: there is no such file"]
    assert problems({}, {}, str(folder)) == [f"{folder}: cannot be read: Is a directory"]
    assert problems({}, {}, str(latin)) == [f"{latin}: cannot be read: it is no text in UTF-8"]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "threads: none\nmodle: x\n")
    found = problems({BLOCKS: "x"}, {"EMBFERRY_DTYPE": "fp8", "EMBFERRY_X": "1"}, file)
    assert len(found) == 5
    assert any(problem.startswith("--transfer-num-blocks: ") for problem in found)


def test_the_api_key_is_not_printed() -> None:
    (problem,) = problems({}, {"EMBFERRY_ROUTER_PORT": "x"})
    assert "'x'" in problem
    secret = load({("router", "api_key"): "very secret"}, {}).settings
    assert "very secret" not in repr(secret)


@pytest.mark.parametrize("key", ["s3cret-\u00fc", "s3c\nret", " ", "\n"])
def test_an_api_key_that_no_client_can_send_is_refused_and_not_shown(key: str) -> None:
    (problem,) = problems({}, {"EMBFERRY_ROUTER_API_KEY": key})
    assert problem.startswith("EMBFERRY_ROUTER_API_KEY: an API key ")
    assert "s3c" not in problem


def test_the_api_key_goes_without_the_line_break_of_its_file(tmp_path: Path) -> None:
    for settings in (
        load({}, {"EMBFERRY_ROUTER_API_KEY": " k 1\r\n"}).settings,
        load({}, {}, written(tmp_path, "router:\n  api_key: |\n    k 1\n")).settings,
    ):
        assert settings.router.api_key is not None
        assert settings.router.api_key.get_secret_value() == "k 1"


def test_a_variable_of_sglang_is_read_with_a_notice() -> None:
    loaded = load({}, {"SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "7", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "9"})
    assert loaded.settings.transfer.num_blocks == 7
    assert loaded.settings.transfer.waiting_timeout == 9
    assert loaded.notices == (
        "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE is read as EMBFERRY_TRANSFER_NUM_BLOCKS=7",
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT is read as EMBFERRY_TRANSFER_WAITING_TIMEOUT=9",
    )


def test_every_variable_of_sglang_is_validated() -> None:
    for name, key in SGLANG_ALIASES.items():
        loaded = load({}, {name: "3"})
        assert len(loaded.notices) == 1
        assert name in loaded.notices[0]
        if key is not None:
            assert getattr(getattr(loaded.settings, key[0]), key[1]) == 3
        (problem,) = problems({}, {name: "-3"})
        assert problem.startswith(f"{name}: ")


def test_our_variable_overrides_that_of_sglang_which_overrides_the_file(tmp_path: Path) -> None:
    alias = {"SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "7"}
    loaded = load({}, {**alias, "EMBFERRY_TRANSFER_NUM_BLOCKS": "8"})
    assert loaded.settings.transfer.num_blocks == 8
    assert "is ignored" in loaded.notices[0]
    file = written(tmp_path, "transfer:\n  num_blocks: 9\n")
    assert load({}, alias, file).settings.transfer.num_blocks == 7


def test_every_setting_has_unique_names_and_a_description() -> None:
    assert len(ENV_KEYS) == len(FIELDS) == len({flag_name(key) for key in FIELDS})
    for key, field in FIELDS.items():
        assert field.description, key
        assert load({}, {env_name(key): str(_valid_value(key))})


def _valid_value(key: tuple[str, ...]) -> object:
    default = FIELDS[key].default
    addresses = {
        "encode_urls": "http://x,https://y:1/z",
        "language_urls": "http://x,https://y:1/z",
        "prefill_urls": "http://x",
        "decode_urls": "http://x",
        "connector_metrics_urls": "http://x:9101",
        "cors_origins": "http://x",
        "consumer_zmq": "tcp://x:1",
        "http_proxy": "http://127.0.0.1:1",
        "http_advertise": "127.0.0.1",
        "advertise_host": "x",
        "url": "file:///x",
        "endpoint": "http://x",
        "router_resources": "x:1",
        "encoder_resources": "x:1",
        "language_resources": "x:1",
    }
    if key[-1] in addresses:
        return addresses[key[-1]]
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "x"
    return "1" if default is None else default


def test_the_models_name_is_the_last_part_of_its_path() -> None:
    settings = Settings(model="/data/models/Qwen2-VL/")
    assert settings.public_model_name == settings.model_name == "Qwen2-VL"


def test_a_folder_without_a_name_of_its_own_has_that_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert [Settings(model=name).model_name for name in (".", "./", "..", "../../outer")] == [
        "inner", "inner", "outer", "outer",
    ]  # fmt: skip
