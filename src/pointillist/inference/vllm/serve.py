"""`pointillist inference` with `backend = "vllm"`: becomes a vLLM server with the plugin, whatever else vLLM can do."""

import json
import os
import sys
from typing import Final

import torch

from pointillist.base.net import key_from_environment
from pointillist.config import InferenceConfig
from pointillist.inference.vllm.versions import check_vllm
from pointillist.runs.config_files import write_toml

CONFIG_VARIABLE: Final = "POINTILLIST_INFERENCE_CONFIG"
"""Environment variable by which the plugin finds the path of the server's config."""


def serve(config: InferenceConfig) -> None:
    """Replaces this process by the server.

    Raises:
        ConfigError: No vLLM that the plugin knows, or a missing API key.
    """
    check_vllm()
    environ = {**os.environ, "VLLM_PLUGINS": "pointillist"}
    if config.server.api_key_var is not None:
        environ["VLLM_API_KEY"] = key_from_environment(config.server.api_key_var, "the inference server's API key")
    if config.deterministic:
        environ["VLLM_BATCH_INVARIANT"] = "1"
    path = config.output_dir.absolute() / "configs" / f"inference.vllm.{config.server.port}.toml"
    write_toml(config, path)
    environ[CONFIG_VARIABLE] = str(path)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        # Threads are this run's business, not vLLM's: several processes share these cores.
        environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environ.setdefault("OMP_NUM_THREADS", str(config.engine.num_threads))
        environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *arguments(config, on_cpu=on_cpu)]
    sys.stdout.flush()
    os.execve(sys.executable, command, environ)  # noqa: S606 - no shell is wanted


def arguments(config: InferenceConfig, *, on_cpu: bool) -> list[str]:
    """Command-line arguments of the server.

    Args:
        config: `vllm.args` come last, so that they win.
        on_cpu: No CUDA graphs and no chunked prefill there.
    """
    extra = config.vllm.args
    images = config.multimodal.limits.max_images_per_request
    settings: dict[str, object] = {
        "model": config.model.name,
        "host": config.server.host,
        "port": config.server.port,
        "seed": config.seed,
        "dtype": config.engine.dtype,
        "max-model-len": config.seq_len,
        "max-num-seqs": config.engine.max_batch_size,
        "limit-mm-per-prompt": json.dumps({"image": images, "video": 0}),
        "enable-scale-out": True,
        "uvicorn-log-level": "warning",  # not a line a request
        # What the trainer compares with: after mask and temperature, as the embedded server has it.
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": 64,
        # Sampling is what the request says, not what the model folder recommends.
        "generation-config": "vllm",
        "worker-extension-cls": "pointillist.inference.vllm.worker.WeightsWorker",
        "logits-processors": "pointillist.inference.vllm.logits:SamplingMask",
        # On a CPU the engine dies of a request with a seed whose prompt is read in parts: it turns a generator back,
        # which a CPU's can not do.
        **({"enforce-eager": True, "enable-chunked-prefill": False} if on_cpu else {}),
        **{name.replace("_", "-"): value for name, value in extra.items()},
    }
    return [word for name, value in settings.items() for word in _flag(name, value)]


def _flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
