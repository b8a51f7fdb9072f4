"""From pip's installation report to a requirements file with hashes; `make lock-vllm`."""

import json
import sys
from pathlib import Path

LEFT_OUT = ("pointillist", "torchaudio", "torchcodec")


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    print("# Exact files that the vLLM tests run with; made by 'make lock-vllm'.")
    rows = []
    for entry in report["install"]:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if name not in LEFT_OUT:
            rows.append(f"{name}=={version} --hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}")
    print("\n".join(sorted(rows, key=str.lower)))


if __name__ == "__main__":
    main()
