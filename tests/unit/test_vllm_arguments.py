"""What can be known of the vLLM backend where no vLLM is installed."""

import importlib.metadata
import json

import pytest

from pointillist.config import InferenceConfig
from pointillist.errors import ConfigError
from pointillist.inference.vllm import versions
from pointillist.inference.vllm.serve import arguments


def _config(**vllm: object) -> InferenceConfig:
    return InferenceConfig.model_validate({"model": {"name": "m"}, "seq_len": 77, "vllm": {"args": vllm}})


def _value(words: list[str], name: str) -> str:
    return words[words.index(f"--{name}") + 1]


def test_settings_become_vllms_arguments() -> None:
    words = arguments(_config(), on_cpu=True)
    assert _value(words, "max-model-len") == "77"
    assert _value(words, "logprobs-mode") == "processed_logprobs"
    assert json.loads(_value(words, "limit-mm-per-prompt")) == {"image": 256, "video": 0}
    assert "--enforce-eager" in words
    assert "--enforce-eager" not in arguments(_config(), on_cpu=False)


def test_the_users_arguments_win() -> None:
    words = arguments(_config(max_model_len=9, enable_prefix_caching=False, served_model_name=["a", "b"]), on_cpu=True)
    assert words.count("--max-model-len") == 1
    assert _value(words, "max-model-len") == "9"
    assert "--no-enable-prefix-caching" in words
    place = words.index("--served-model-name")
    assert words[place + 1 : place + 3] == ["a", "b"]


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", None])
def test_other_versions_are_refused(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ConfigError, match=r"0\.32"):
        versions.check_vllm()


def test_a_supported_version_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.32.0")
    assert versions.check_vllm() == "0.32.0"
