"""The whole algorithm on one page: a vision-language model learns to read digits from reward alone.

    python examples/digits/prepare.py --data outputs/digits/data --model outputs/digits/model
    python examples/one_file.py --data outputs/digits/data --model outputs/digits/model --steps 100

One process, one model, no server, no packing: what `pointillist rl` spreads over processes, in the order in which it
happens, on the same pieces (store, renderer, reader of references, sampler, advantages, loss). A test trains one step
here and one in the real trainer on the same samples, and compares loss, gradient norm and weights.

Shapes, here and in the comments:

    B   tasks of a step                     G   rollouts of a task (a group)
    T   tokens of a prompt, placeholders of images included; an image of 32x32 pixels has 4 of them
    C   tokens of a completion, at most `max_tokens`
    L   T + C, tokens of a sample           V   tokens of the vocabulary
    P   patches of a prompt's images        D   3 * 2 * 8 * 8, numbers of a patch (colours, time, height, width)

    ids          int64   (G, T..L)          logits       float32 (G, T..L, V)
    pixel_values float32 (G * P, D)         logprobs     float32 (C,) of one sample, at the sampling temperature
    image_grid_thw int64 (G * images, 3)    advantage    one number a rollout, the same for its C tokens
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pointillist.config.trainer import LossConfig
from pointillist.environments import Task
from pointillist.environments.digits import QUESTION
from pointillist.environments.tasks import read_tasks
from pointillist.images import ImageLimits, ImageStore, Sources, normalize_images
from pointillist.inference.embedded.sampling import draw_noise, sample
from pointillist.inference.protocol import SamplingParams
from pointillist.models import LoadedModel, load_model
from pointillist.orchestrator.advantages import group_advantages
from pointillist.pixels import RawImageMaterializer
from pointillist.pixels.on_device import PixelNormalizer, as_tensors
from pointillist.refs.wire import ImageRef
from pointillist.render import RawRenderer
from pointillist.render.raw import RenderedPrompt
from pointillist.trainer.loss import policy_gradient_loss


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout: what was read, what was sampled, and how much better it was than the others of its group."""

    prompt: RenderedPrompt
    """T tokens, and the references of its images."""
    completion: list[int]
    """C token ids."""
    logprobs: list[float]
    """The sampler's, C numbers."""
    advantage: float = 0.0


class OneFile:
    """Model, image store, renderer: everything that a step needs."""

    def __init__(self, model: str, store: Path) -> None:
        self.loaded: LoadedModel = load_model(model, device="cpu", dtype="float32")
        self.renderer = RawRenderer(self.loaded.family, self.loaded.tokenizer)
        self.normalize = PixelNormalizer(self.loaded.family)
        self.sources = Sources(ImageStore(store, ImageLimits()))
        self.reader = RawImageMaterializer(self.loaded.family, [store], ImageLimits())

    # ---- 1. A task becomes tokens: its picture is stored once, and from here on only a reference travels.

    def render(self, task: Task) -> RenderedPrompt:
        """The T tokens of a question: `<im_start> user <vision_start> pad pad pad pad <vision_end> What digit?` ..."""
        content = [{"type": "image", "image": task.data["image"]}, {"type": "text", "text": QUESTION}]
        images = []
        message = normalize_images({"role": "user", "content": content}, self.sources, images)
        return self.renderer.render([message], images)

    # ---- 2. References become pixels, and pixels and tokens become logits: the same way for sampling and training.

    def logits(self, prompt: RenderedPrompt, ids: torch.Tensor) -> torch.Tensor:
        """Logits of sequences that begin with one prompt.

        Args:
            prompt: With its images.
            ids: int64 `(sequences, T..L)`.

        Returns:
            float32 `(sequences, T..L, V)`.
        """
        refs = [ImageRef.of(image.descriptor, image.sha256) for image in prompt.images]
        arrays = as_tensors(self.reader.materialize(refs, [image.length for image in prompt.images], "uint8"))
        pixels = self.normalize(arrays.pop("pixel_values"))
        return self.loaded.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            # Each sequence brings the images of its prompt: (sequences * P, D).
            pixel_values=torch.cat([pixels] * len(ids)),
            mm_token_type_ids=(ids == self.loaded.family.image_token_id).int(),
            use_cache=False,
            **{name: torch.cat([tensor] * len(ids)) for name, tensor in arrays.items()},
        ).logits

    # ---- 3. Rollouts: G completions of one prompt, token by token.

    @torch.no_grad()
    def roll_out(self, prompt: RenderedPrompt, seeds: Sequence[int], params: SamplingParams) -> list[Sample]:
        """One completion a seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        ids = torch.tensor([prompt.token_ids] * len(seeds))  # (G, T)
        chosen: list[list[int]] = [[] for _ in seeds]
        logprobs: list[list[float]] = [[] for _ in seeds]
        for _ in range(params.max_tokens or 1):
            step = sample(
                self.logits(prompt, ids)[:, -1], self.loaded.unsampleable, [params] * len(seeds), draw_noise(generators)
            )
            for row, token in enumerate(step.token_ids.tolist()):
                if not chosen[row] or chosen[row][-1] not in self.renderer.stop_token_ids:
                    chosen[row].append(token)
                    logprobs[row].append(float(step.logprobs[row, token]))
            ids = torch.cat([ids, step.token_ids[:, None]], dim=1)
        return [Sample(prompt, tokens, values) for tokens, values in zip(chosen, logprobs, strict=True)]

    def reward(self, task: Task, rollout: Sample) -> float:
        """1 for the right digit and the end of the turn, else 0."""
        *answer, end = rollout.completion
        right = self.loaded.tokenizer.decode(answer) == task.data["answer"]
        return float(right and end in self.renderer.stop_token_ids)

    # ---- 4. Advantages: how much better than the other rollouts of the same task.

    def group(self, task: Task, seeds: Sequence[int], params: SamplingParams) -> tuple[list[Sample], list[float]]:
        """G rollouts with their advantages, and their rewards.

        Example: rewards `[1, 0, 0, 0]` give advantages `[1.5, -0.5, -0.5, -0.5]` (mean 0.25, standard deviation 0.5).
        A group whose rewards are all the same gives advantages of 0: it says nothing.
        """
        rollouts = self.roll_out(self.render(task), seeds, params)
        rewards = [self.reward(task, rollout) for rollout in rollouts]
        advantages = group_advantages(rewards, normalize_std=True) or [0.0] * len(rewards)
        return [
            Sample(each.prompt, each.completion, each.logprobs, advantage)
            for each, advantage in zip(rollouts, advantages, strict=True)
        ], rewards

    # ---- 5. Loss and step.

    def backward(self, samples: Sequence[Sample], num_tokens: int, loss: LossConfig, temperature: float) -> float:
        """Gradients of a step's samples, one after the other; returns the loss.

        Args:
            samples: With their advantages.
            num_tokens: Sampled tokens of the step, those of groups without a difference included.
            loss: Band of the importance ratio and the weights of the loss's terms.
            temperature: That the samples were drawn at.
        """
        total = 0.0
        for each in samples:
            ids = torch.tensor([each.prompt.token_ids + each.completion])  # (1, L)
            first, count = len(each.prompt.token_ids), len(each.completion)
            # The logits at a position are those of the next token: C rows from the prompt's last token on. (C, V)
            logits = self.logits(each.prompt, ids)[0, first - 1 : first - 1 + count] / temperature
            lowest = torch.finfo(logits.dtype).min
            everything = logits.index_fill(1, self.loaded.unsampleable, lowest).log_softmax(-1)
            terms = policy_gradient_loss(
                everything.gather(1, torch.tensor(each.completion)[:, None])[:, 0],
                -(everything.exp() * everything).sum(-1),
                torch.tensor(each.logprobs),
                torch.full((count,), each.advantage),
                num_tokens,
                loss,
            )
            terms.loss.backward()
            total += float(terms.loss.detach())
        return total

    def step(self, samples: Sequence[Sample], num_tokens: int, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        """One optimiser step on samples; returns loss and gradient norm."""
        optimizer.zero_grad()
        loss = self.backward(samples, num_tokens, LossConfig(), temperature=1.0)
        norm = torch.nn.utils.clip_grad_norm_(self.loaded.model.parameters(), 1.0)
        optimizer.step()
        return loss, float(norm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl, heldout.jsonl and pictures")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=32, help="B, tasks of a step")
    parser.add_argument("--group", type=int, default=16, help="G, rollouts of a task")
    parser.add_argument("--lr", type=float, default=7e-4)
    options = parser.parse_args()
    torch.set_num_threads(2)
    hint, chance = "run examples/digits/prepare.py", random.Random(0)
    train, heldout = (read_tasks(options.data / f"{split}.jsonl", hint) for split in ("train", "heldout"))
    params = SamplingParams(temperature=1.0, max_tokens=2)
    with tempfile.TemporaryDirectory() as store:
        run = OneFile(options.model, Path(store))
        optimizer = torch.optim.AdamW(run.loaded.model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(1, options.steps + 1):
            started = time.perf_counter()
            samples, rewards = [], []
            for task in chance.sample(list(train), options.tasks):
                of_group, reward = run.group(task, [chance.getrandbits(31) for _ in range(options.group)], params)
                samples += of_group
                rewards += reward
            num_tokens = sum(len(each.completion) for each in samples)
            loss, norm = run.step([each for each in samples if each.advantage], num_tokens, optimizer)
            mean, seconds = sum(rewards) / len(rewards), time.perf_counter() - started
            print(
                f"step {step}: reward {mean:.3f}, loss {loss:.4f}, gradient norm {norm:.2f}, {seconds:.1f} s",
                flush=True,
            )
        greedy = SamplingParams(temperature=0.0, max_tokens=2)
        right = [run.reward(task, run.roll_out(run.render(task), [0], greedy)[0]) for task in heldout]
        print(f"held-out accuracy {sum(right) / len(right):.3f} on {len(right)} digits")


if __name__ == "__main__":
    main()
