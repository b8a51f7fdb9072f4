"""The embedded engine against plain Hugging Face forwards."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from pointillist.config.inference import EngineConfig
from pointillist.errors import InferenceError
from pointillist.inference.embedded.batch import Prompt
from pointillist.inference.embedded.engine import Engine, EngineRequest
from pointillist.inference.embedded.metrics import EngineMetrics
from pointillist.inference.embedded.sampling import draw_noise, sample
from pointillist.inference.protocol import Choice, SamplingParams
from pointillist.models import LoadedModel, load_model
from pointillist.pixels.on_device import PixelNormalizer
from pointillist.refs import mm_token_type_ids
from pointillist.weights.publish import write_weights
from tests.helpers.pictures import joined, picture

END = 2


def _engine(model_dir: Path, *, alone: bool) -> Engine:
    loaded = load_model(str(model_dir), device="cpu", dtype="float32")
    return Engine(
        loaded,
        EngineConfig(max_batch_size=32),
        alone=alone,
        eos_token_ids=frozenset({END}),
        seed=0,
        metrics=EngineMetrics(),
        on_failure=lambda: None,
    )


@pytest.fixture
def engine(model_dir: Path) -> Iterator[Engine]:
    engine = _engine(model_dir, alone=False)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def lonely_engine(model_dir: Path) -> Iterator[Engine]:
    engine = _engine(model_dir, alone=True)
    engine.start()
    yield engine
    engine.stop()


def _prompt(loaded: LoadedModel, text: int, sizes: list[tuple[int, int]], seed: int) -> Prompt:
    family, random = loaded.family, np.random.default_rng(seed)
    ids = random.integers(8, 280, text).tolist()
    layouts = [family.layout(*size) for size in sizes]
    for layout in layouts:
        ids += [3, *[family.image_token_id] * layout.num_tokens, 4, 20]
    pictures = [picture(*size, seed + index) for index, size in enumerate(sizes)]
    tensors = joined(family, pictures, "uint8") if sizes else {}
    return Prompt(
        torch.tensor(ids),
        torch.tensor(mm_token_type_ids(ids, family.image_token_id)),
        {name: torch.from_numpy(array) for name, array in tensors.items()},
    )


def _submit(
    engine: Engine, prompt: Prompt, key: object = None, max_tokens: int = 6, **params: object
) -> Future[list[Choice]]:
    sampling = SamplingParams(**{"logprobs": 0, "ignore_eos": True, **params})
    return engine.submit(EngineRequest(prompt, (id(prompt), key), sampling, max_tokens))


def _expected_logprobs(loaded: LoadedModel, prompt: Prompt, choice: Choice, temperature: float = 1.0) -> torch.Tensor:
    """One forward over prompt and completion, without a cache."""
    ids = torch.cat([prompt.token_ids, torch.tensor(choice.token_ids)])[None]
    kwargs = dict(prompt.tensors)
    if kwargs:
        kwargs["pixel_values"] = PixelNormalizer(loaded.family)(kwargs["pixel_values"])
        kwargs["mm_token_type_ids"] = (ids == loaded.family.image_token_id).int()
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False, **kwargs).logits[0]
    logits[:, loaded.unsampleable] = float("-inf")
    start = len(prompt.token_ids)
    logprobs = (logits[start - 1 : -1] / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]


def _logprobs(choice: Choice) -> torch.Tensor:
    assert choice.logprobs is not None
    return torch.tensor([entry.logprob for entry in choice.logprobs.content])


def test_mixed_batches_equal_plain_forwards(engine: Engine) -> None:
    loaded = engine._loaded
    prompts = [
        _prompt(loaded, 4, [(64, 64)], 1),
        _prompt(loaded, 19, [], 2),
        _prompt(loaded, 7, [(100, 70), (64, 96)], 3),
        _prompt(loaded, 2, [(64, 64)], 4),
    ]
    engine.pause()  # so that all are admitted together
    futures = [_submit(engine, prompt, max_tokens=2 + 3 * i, n=2, seed=i) for i, prompt in enumerate(prompts)]
    engine.resume()
    late = _submit(engine, _prompt(loaded, 30, [(64, 64)], 5), max_tokens=9)
    for prompt, future in zip(prompts, futures, strict=True):
        for choice in future.result(900):
            assert (_logprobs(choice) - _expected_logprobs(loaded, prompt, choice)).abs().max() < 1e-5
            blank = Prompt(
                prompt.token_ids,
                prompt.mm_token_type_ids,
                {k: v * 0 if k == "pixel_values" else v for k, v in prompt.tensors.items()},
            )
            if prompt.tensors:  # the control: a blank picture must give other numbers
                assert (_logprobs(choice) - _expected_logprobs(loaded, blank, choice)).abs().max() > 1e-3
    assert len(late.result(900)[0].token_ids) == 9


def _bits(futures: list[Future[list[Choice]]]) -> list[tuple[list[int], list[float]]]:
    return [
        (c.token_ids, [e.logprob for e in c.logprobs.content]) for f in futures for c in f.result(900) if c.logprobs
    ]


def test_decoded_alone_every_bit_is_the_same_in_a_crowd(lonely_engine: Engine, engine: Engine) -> None:
    """And as a group of four or as four requests; in a shared batch, the control, bits differ."""

    def ask(engine: Engine, *, crowd: bool, grouped: bool) -> list[tuple[list[int], list[float]]]:
        prompt = _prompt(engine._loaded, 11, [(64, 96)], 3)
        engine.pause()
        if crowd:
            for number in range(3):
                _submit(engine, _prompt(engine._loaded, 5 + 9 * number, [(64, 64)], number), max_tokens=9, seed=1, n=2)
        if grouped:
            futures = [_submit(engine, prompt, n=4, seed=50, max_tokens=8)]
        else:
            futures = [_submit(engine, prompt, key=seed, seed=seed, max_tokens=8) for seed in range(50, 54)]
        engine.resume()
        return _bits(futures)

    alone = ask(lonely_engine, crowd=False, grouped=True)
    assert len(alone) == 4
    assert ask(lonely_engine, crowd=True, grouped=True) == alone
    assert ask(lonely_engine, crowd=True, grouped=False) == alone
    assert ask(engine, crowd=True, grouped=True) != alone


def test_a_lonely_engine_forgets_what_is_given_up(lonely_engine: Engine) -> None:
    lonely_engine.pause()
    given_up = EngineRequest(
        _prompt(lonely_engine._loaded, 5, [], 1), ("x",), SamplingParams(n=4, ignore_eos=True), 400
    )
    lonely_engine.submit(given_up)
    other = _submit(lonely_engine, _prompt(lonely_engine._loaded, 5, [], 2), max_tokens=3)
    lonely_engine.resume()
    lonely_engine.abort(given_up)
    assert len(other.result(900)[0].token_ids) == 3


def test_what_shares_a_batch_changes_nothing(engine: Engine) -> None:
    prompt = _prompt(engine._loaded, 5, [(64, 64)], 1)
    alone = _submit(engine, prompt, seed=11, temperature=0.8).result(900)[0].token_ids
    engine.pause()
    others = [_submit(engine, _prompt(engine._loaded, 3 + i, [], i), n=3, seed=i) for i in range(3)]
    together = _submit(engine, prompt, seed=11, temperature=0.8)
    engine.resume()
    assert together.result(900)[0].token_ids == alone
    for other in others:
        other.result(900)


def test_choice_i_is_sampled_with_seed_plus_i(engine: Engine) -> None:
    prompt = _prompt(engine._loaded, 5, [], 1)
    group = [choice.token_ids for choice in _submit(engine, prompt, n=4, seed=40).result(900)]
    singles = [_submit(engine, prompt, seed=40 + i).result(900)[0].token_ids for i in range(4)]
    assert group == singles
    assert len({tuple(tokens) for tokens in group}) > 1


def test_equal_prompts_are_read_once(engine: Engine) -> None:
    prompt = _prompt(engine._loaded, 5, [(64, 64)], 1)
    engine.pause()
    futures = [_submit(engine, prompt, n=4, seed=i) for i in range(3)]
    engine.resume()
    for future in futures:
        future.result(900)
    text = engine._metrics.exposition().decode()
    assert "pointillist_prompts_prefilled_total 1.0" in text
    assert "pointillist_completions_started_total 12.0" in text


def test_vision_tokens_and_padding_are_never_sampled(engine: Engine) -> None:
    loaded = engine._loaded
    with torch.no_grad():  # make them by far the likeliest
        loaded.model.get_output_embeddings().weight[loaded.unsampleable] *= 100
    choices = _submit(engine, _prompt(loaded, 5, [], 1), n=16, max_tokens=10).result(900)
    forbidden = set(loaded.unsampleable.tolist())
    assert not forbidden & {token for choice in choices for token in choice.token_ids}


def test_endings(engine: Engine) -> None:
    prompt = _prompt(engine._loaded, 5, [], 1)
    tokens = _submit(engine, prompt, temperature=0.0).result(900)[0].token_ids
    stopped = _submit(engine, prompt, temperature=0.0, stop_token_ids=[tokens[2]]).result(900)[0]
    first = tokens.index(tokens[2])
    assert stopped.token_ids == tokens[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[2])
    full = _submit(engine, prompt, temperature=0.0).result(900)[0]
    assert (full.finish_reason, full.stop_reason, len(full.token_ids)) == ("length", None, 6)


def test_top_logprobs(engine: Engine) -> None:
    choice = _submit(engine, _prompt(engine._loaded, 5, [], 1), temperature=0.0, logprobs=3).result(900)[0]
    for entry in choice.logprobs.content:
        assert entry.rank == 1
        assert entry.top_logprobs[0].token_id == entry.token_id
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3


def test_new_weights_between_two_steps(engine: Engine, tmp_path: Path) -> None:
    loaded = engine._loaded
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    write_weights({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "step_3")
    running = _submit(engine, _prompt(loaded, 5, [], 1), max_tokens=400)
    engine.update_weights(tmp_path / "step_3", 3)
    (choice,) = running.result(900)
    versions = [(span.version, span.end - span.start) for span in choice.weight_versions]
    assert sum(length for _, length in versions) == 400
    assert versions[-1][0] == "3"
    assert engine.weight_version == 3
    with pytest.raises(InferenceError):
        engine.update_weights(tmp_path / "step_4", 4)
    assert engine.weight_version == 3


def test_a_token_belongs_to_the_weights_that_computed_its_logits(engine: Engine, tmp_path: Path) -> None:
    loaded = engine._loaded
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    write_weights({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "step_1")
    running = _submit(engine, _prompt(loaded, 5, [], 1), max_tokens=300)
    while not (engine._rows and engine._rows[0].token_ids):
        time.sleep(0.001)
    engine.pause()
    sampled = len(engine._rows[0].token_ids)
    assert sampled < 299
    engine.update_weights(tmp_path / "step_1", 1)
    engine.resume()
    old, new = running.result(900)[0].weight_versions
    # The next token's logits were there before the new weights were.
    assert (old.version, old.end, new.version) == ("0", sampled + 1, "1")


def test_aborted_requests_leave_the_batch(engine: Engine) -> None:
    loaded = engine._loaded
    request = EngineRequest(_prompt(loaded, 5, [], 1), ("x",), SamplingParams(ignore_eos=True, n=8), 1500)
    engine.submit(request)
    other = _submit(engine, _prompt(loaded, 5, [], 2), max_tokens=20)
    engine.abort(request)
    assert len(other.result(900)[0].token_ids) == 20
    assert request.future.cancelled()


def test_a_dead_engine_answers_everyone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes nothing any more is what an engine dies of."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pointillist.inference.embedded.engine.prefill", broken)
    monkeypatch.setattr(engine, "_check_device", broken)
    with pytest.raises(RuntimeError, match="engine died"):
        _submit(engine, _prompt(engine._loaded, 5, [], 1)).result(900)
    with pytest.raises(RuntimeError, match="engine died"):
        _submit(engine, _prompt(engine._loaded, 5, [], 1)).result(900)
    assert isinstance(engine.failure, ZeroDivisionError)


BAD = 7
"""A token that makes whatever reads or samples it raise; see `_breaking`."""


def _breaking(engine: Engine, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Makes one stage raise for requests whose prompt begins with `BAD`, alone or among others."""
    from pointillist.inference.embedded import engine as module

    def is_bad(sequence: object) -> bool:
        return int(sequence.request.prompt.token_ids[0]) == BAD  # type: ignore[attr-defined]

    real_prefill, real_sample, real_decode = module.prefill, module.sample, module.decode
    if stage == "prefill":

        def prefill(loaded: object, normalize: object, prompts: list[Prompt]) -> object:
            if any(int(prompt.token_ids[0]) == BAD for prompt in prompts):
                raise RuntimeError("prefill")
            return real_prefill(loaded, normalize, prompts)

        monkeypatch.setattr(module, "prefill", prefill)
    elif stage == "logits":  # what weights or numbers out of range do: NaN instead of an exception

        def spoiled(loaded: object, normalize: object, prompts: list[Prompt]) -> object:
            batch = real_prefill(loaded, normalize, prompts)
            for row, prompt in enumerate(prompts):
                if int(prompt.token_ids[0]) == BAD:
                    batch.logits[row] = float("nan")
            return batch

        monkeypatch.setattr(module, "prefill", spoiled)
    elif stage == "sample":

        def sample(logits: torch.Tensor, masked: object, params: list[SamplingParams], noise: object) -> object:
            if any(each.seed == BAD for each in params):
                raise RuntimeError("sample")
            return real_sample(logits, masked, params, noise)

        monkeypatch.setattr(module, "sample", sample)
    elif stage == "decode":

        def decode(loaded: object, batch: object, tokens: object) -> object:
            if len(engine._rows) == len(tokens):
                bad = any(is_bad(sequence) for sequence in engine._rows)
            else:  # one row, after all of them have raised
                row = next(
                    i for i, t in enumerate(engine._rows) if torch.equal(batch.logits, engine._batch.logits[i : i + 1])
                )
                bad = is_bad(engine._rows[row])
            if bad:
                raise RuntimeError("decode")
            return real_decode(loaded, batch, tokens)

        monkeypatch.setattr(module, "decode", decode)
    else:
        real_finish = engine._finish

        def finish(sequence: object, *why: object) -> None:
            if is_bad(sequence):
                raise RuntimeError("finish")
            real_finish(sequence, *why)

        monkeypatch.setattr(engine, "_finish", finish)


@pytest.mark.parametrize("stage", ["prefill", "logits", "sample", "decode", "finish"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_request_that_raises_fails_alone(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, stage: str, alone: bool
) -> None:
    engine = _engine(model_dir, alone=alone)
    engine.start()
    good = [_prompt(engine._loaded, 5 + i, [(64, 64)], i + 1) for i in range(3)]
    before = [_submit(engine, prompt, seed=100 + i, max_tokens=4 + i).result(900) for i, prompt in enumerate(good)]
    _breaking(engine, monkeypatch, stage)
    bad = _prompt(engine._loaded, 9, [(64, 64)], 99)
    bad.token_ids[0] = BAD
    engine.pause()
    futures = [_submit(engine, prompt, key=1, seed=100 + i, max_tokens=4 + i) for i, prompt in enumerate(good)]
    failing = _submit(engine, bad, key=1, n=2, seed=BAD)
    late = [_submit(engine, prompt, key=2, seed=100 + i, max_tokens=4 + i) for i, prompt in enumerate(good)]
    engine.resume()
    with pytest.raises(InferenceError, match="could not compute"):
        failing.result(900)
    for old, *new in zip(before, futures, late, strict=True):
        assert all([c.token_ids for c in future.result(900)] == [c.token_ids for c in old] for future in new)
    engine.stop()
    assert engine.failure is None and not engine._rows and not engine._next


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.01},
        {"temperature": 100.0},
        {"top_p": 1e-46},
        {"top_k": 10_000_000},
        {"seed": 2**63 - 1, "n": 3},
    ],
)
def test_numbers_at_their_bounds_are_sampled(engine: Engine, params: dict[str, float]) -> None:
    for choice in _submit(engine, _prompt(engine._loaded, 5, [], 1), **params).result(900):
        assert len(choice.token_ids) == 6 and bool(torch.isfinite(_logprobs(choice)).all())


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]]).repeat(4000, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    masked = torch.tensor([4])

    def frequencies(**params: object) -> torch.Tensor:
        sampled = sample(logits, masked, [SamplingParams(**params)] * 4000, draw_noise(generators))
        return torch.bincount(sampled.token_ids, minlength=5) / 4000

    expected = torch.tensor([0.0, 1.0, 2.0, 3.0]).softmax(-1)
    assert (frequencies()[:4] - expected).abs().max() < 0.03
    assert frequencies()[4] == 0
    assert frequencies(temperature=0.0)[3] == 1
    top2 = frequencies(top_k=2)
    assert top2[:2].sum() == 0
    assert (top2[2:4] - expected[2:] / expected[2:].sum()).abs().max() < 0.03
    assert frequencies(top_p=0.5)[3] == 1
    assert frequencies(top_p=0.7)[:2].sum() == 0
    hot = (torch.tensor([0.0, 1.0, 2.0, 3.0]) / 2).softmax(-1)
    assert (frequencies(temperature=2.0)[:4] - hot).abs().max() < 0.03
