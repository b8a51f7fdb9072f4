"""Runs all benchmarks and writes `benchmarks/results/latest.json` and `latest.md`.

make bench
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ("pixels", "wire", "carriers", "training_run", "gateway")
# key -> claim, bound, whether more is better
TARGETS: dict[str, tuple[str, float, bool]] = {
    "layout_speedup": ("layout from the header vs HF processor (PIL), 1024x1024 JPEG", 500, True),
    "materialize_f32_speedup_1024": ("float32 vs HF processor (PIL), 1024x1024 JPEG", 3.5, True),
    "materialize_u8_speedup_1024": ("uint8 vs HF processor (PIL), 1024x1024 JPEG", 5, True),
    "materialize_u8_over_decode_1024": ("uint8 vs Pillow's decoding alone, 1024x1024 JPEG", 1.35, False),
    "resize_speedup_1080p": ("float32 with resize vs HF processor (PIL), 1920x1080 JPEG", 2.5, True),
    "threads_speedup": ("two threads vs one, 64 images", 1.8, True),
    "group_time_ratio": ("group of 16 sharing an image, time", 12, True),
    "group_memory_ratio": ("group of 16 sharing an image, peak memory", 12, True),
    "wire_vs_tensors": ("bytes on the wire, processed tensors vs references", 10_000, True),
    "wire_vs_base64": ("bytes on the wire, base64 vs references", 200, True),
    "transport_speedup": ("encode and decode of 128 samples, tensors vs references", 100, True),
    "mm_wait_fraction": ("trainer's wait for pixels, part of a step", 0.02, False),
    "orchestrator_memory_growth": ("orchestrator's resident memory, step 20 to 200", 0.05, False),
    "gateway_overhead_ms": ("gateway over a direct request, ms, median at 32 sessions", 3, False),
    "gateway_load_errors": ("500 sessions x 8 turns x 1 MB image: errors", 0, False),
    "gateway_load_peak_mb": ("500 sessions x 8 turns x 1 MB image: gateway's peak memory in MB", 1000, False),
    "trainer_growth_mb": ("trainer's growth in MB, step 20 to 200: at most its cache of 256 MiB", 269, False),
}


def main() -> None:
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
    }
    for name in BENCHMARKS:
        print(f"running benchmarks.{name}", file=sys.stderr)
        # Only the pixels are compared with torchvision; a broken one must not be seen by the runs.
        extra = {"PYTHONPATH": sys.argv[1]} if name == "pixels" and len(sys.argv) > 1 else {}
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **extra})
        results |= json.loads(output.stdout)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(results, indent=2) + "\n")
    table = _table(results)
    (RESULTS / "latest.md").write_text(table)
    Console().print(Markdown(table))


def _table(results: dict[str, Any]) -> str:
    lines = [f"# Benchmarks, {results['date']}", "", f"{results['machine']}; made by `make bench`.", ""]
    lines += ["| claim | asked for | measured |", "| --- | --- | --- |"]
    for key, (claim, bound, more) in TARGETS.items():
        met = results[key] >= bound if more else results[key] <= bound
        sign = ">=" if more else "<="
        lines.append(f"| {claim} (`{key}`) | {sign} {bound:,} | {results[key]:,.4g}{'' if met else ' (missed)'} |")
    pictures = results["pictures"]
    columns = ["layout", "decode", "uint8", "bfloat16", "float32", "hf_pil", "hf_torchvision"]
    lines += ["", "Milliseconds a picture, one thread, from the file:", ""]
    lines += ["| picture | KB | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name, row in pictures.items():
        cells = [f"{row[column]:.2f}" if column in row else "-" for column in columns]
        lines.append(f"| {name} | {row['file_kb']:.0f} | " + " | ".join(cells) + " |")
    lines += ["", "32 rollouts x 10 turns x one 1024x768 image a turn, by three carriers:", ""]
    lines += ["| carrier | holder grows by | bytes sent | holder | trainer grows by | trainer |", "| --- " * 6 + "|"]
    for name, row in results["carriers"].items():
        hold, train = row["hold"], row["train"]
        lines.append(
            f"| {name} | {hold['resident_growth_mb']:,.1f} MB | {hold['bytes'] / 1e6:,.2f} MB | "
            f"{hold['seconds']:.1f} s | {train['resident_growth_mb']:,.1f} MB | {train['seconds']:.1f} s |"
        )
    lines += ["", _gateway(results)]
    lines += ["", "![resident memory over 200 steps](memory.png)", ""]
    return "\n".join(lines)


def _gateway(results: dict[str, Any]) -> str:
    direct, chat = results["gateway_direct_ms"], results["gateway_chat_ms"]
    requests, gigabytes = results["gateway_load_requests"], results["gateway_load_gigabytes_sent"]
    return (
        f"Gateway, beyond the server's fixed time: {direct:.1f} ms a direct request, {chat:.1f} ms a chat request with "
        f"a 512x512 JPEG as base64. Load: {requests:,} requests with {gigabytes:.0f} GB of base64 in "
        f"{results['gateway_load_seconds']:.0f} s."
    )


if __name__ == "__main__":
    main()
