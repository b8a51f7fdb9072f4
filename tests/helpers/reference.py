"""What every server is compared with: a Hugging Face model and its own processor."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from pointillist.models import load_model
from tests.helpers.processes import RunningServer


class Reference:
    """Logprobs by Hugging Face model and processor alone, pictures read from the store."""

    def __init__(self, server: RunningServer, model_dir: Path) -> None:
        self.server = server
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir).eval()
        self.processor = AutoImageProcessor.from_pretrained(model_dir)
        self.masked = load_model(str(model_dir), device="cpu", dtype="float32").unsampleable

    def logprobs(self, body: dict[str, Any], tokens: list[int], *, blank: bool = False) -> torch.Tensor:
        root = self.server.store.root
        paths = [root / sha[:2] / f"{sha}.png" for sha in body["features"]["mm_hashes"]["image"]]
        pictures = [Image.open(path).convert("RGB") for path in paths]
        if blank:
            pictures = [Image.new("RGB", each.size) for each in pictures]
        inputs = dict(self.processor(images=pictures, return_tensors="pt"))
        ids = torch.tensor([[*body["token_ids"], *tokens]])
        types = (ids == self.server.family.image_token_id).int()
        with torch.no_grad():
            logits = self.model(input_ids=ids, mm_token_type_ids=types, **inputs).logits[0, -len(tokens) - 1 : -1]
        logits[:, self.masked] = float("-inf")
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
