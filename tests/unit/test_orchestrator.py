import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.config import EnvConfig, ModelConfig, OrchestratorConfig
from pointillist.environments import load_environment
from pointillist.environments.executor import RolloutRequest, RolloutResult
from pointillist.environments.failures import RolloutFailure
from pointillist.errors import EnvironmentLoadError, RefError
from pointillist.images import Sources, normalize_images
from pointillist.launch.progress import _status
from pointillist.launch.summary import build_summary
from pointillist.orchestrator.advantages import group_advantages
from pointillist.orchestrator.orchestrator import _Batch
from pointillist.orchestrator.packing import OverlongMultimodalSample
from pointillist.orchestrator.records import RolloutRecorder
from pointillist.orchestrator.runner import RolloutRunner
from pointillist.orchestrator.samples import make_sample
from pointillist.orchestrator.tasks import TaskOrder
from pointillist.render import FolderTokenizer, RawRenderer
from pointillist.runs.records import ErrorRecord
from pointillist.sessions import Branch, Completion
from pointillist.sessions.trace import Trace
from tests.helpers.pictures import picture
from tests.helpers.transported import sample


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16))
def test_advantages_compare_within_the_group(rewards: list[float]) -> None:
    plain = group_advantages(rewards, normalize_std=False)
    if plain is None:
        assert max(rewards) - min(rewards) < 1e-6
        return
    assert sum(plain) == pytest.approx(0, abs=1e-6)
    assert plain == pytest.approx([reward - statistics.fmean(rewards) for reward in rewards], abs=1e-9)
    scaled = group_advantages(rewards, normalize_std=True)
    std = statistics.stdev(rewards)
    assert scaled == pytest.approx([value / (std + 1e-3) for value in plain], rel=1e-6, abs=1e-9)


def test_groups_without_variance_say_nothing() -> None:
    assert group_advantages([1.0, 1.0, 1.0], normalize_std=True) is None


class _Host:
    """Gives rollouts that were sampled with the weight versions that it is told."""

    def __init__(self, versions: list[int]) -> None:
        self.versions = versions
        self.seeds: list[int] = []

    async def run(self, request: RolloutRequest) -> RolloutResult:
        self.seeds.append(request.seed)
        version = self.versions.pop(0)
        branch = Branch(
            token_ids=[1, 2, 3], loss_mask=[False, True, True], logprobs_sampled=[0, 0, 0],
            weight_versions=[-1, 9, version], temperatures=[1, 1, 1], images=[], messages=[],
        )  # fmt: skip
        return RolloutResult(id=request.id, task_id="t", branches=[branch])


@pytest.mark.parametrize(("bound", "versions", "tries"), [(0, [8, 7, 9], 3), (2, [7], 1), (1, [7, 8], 2)])
async def test_no_token_is_older_than_the_bound(bound: int, versions: list[int], tries: int) -> None:
    """Step 10 wants version 9, and with a bound of k 9 - k; what is older is sampled again."""
    config = OrchestratorConfig(
        model=ModelConfig(name="m"), env=EnvConfig(id="e"), max_off_policy_steps=bound, max_retries=2
    )
    host = _Host(list(versions))
    runner = RolloutRunner(config, host)  # type: ignore[arg-type]
    (result,) = await runner.run_group(0, step=10, index=0, size=1)
    assert result.branches[0].weight_versions[-1] == versions[-1] >= 9 - bound
    assert len(set(host.seeds)) == tries
    assert runner.retried == tries - 1


async def test_a_rollout_that_stays_stale_is_dropped() -> None:
    config = OrchestratorConfig(model=ModelConfig(name="m"), env=EnvConfig(id="e"), max_retries=1)
    runner = RolloutRunner(config, _Host([3, 3]))  # type: ignore[arg-type]
    (result,) = await runner.run_group(0, step=10, index=0, size=1)
    assert result.failure is not None
    assert result.failure.kind == "StaleRollout"


def test_task_order_is_a_function_of_seed_and_position() -> None:
    order = TaskOrder(7, seed=3)
    epochs = [order.take(7) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    resumed = TaskOrder(7, seed=3, position=10)
    assert resumed.take(11) == epochs[1][3:] + epochs[2]
    assert TaskOrder(7, seed=4).take(7) != epochs[0]


def test_samples_train_what_was_sampled(renderer: RawRenderer, sources: Sources) -> None:
    images = []
    messages = normalize_images(
        [{"role": "user", "content": [{"type": "image", "image": picture(64, 64)}]}], sources, images
    )
    prompt = renderer.render(messages, images)
    completion = Completion([300, 2], [-0.1, -0.2], [5, 5], "stop")
    read = len(prompt.token_ids)
    trace = Trace()
    trace.record(None, prompt, completion, temperature=0.7, key=b"", messages=[])
    (branch,) = trace.branches()
    made = make_sample(branch, 1.5, image_token_id=renderer.family.image_token_id, sample_id="x")
    assert made.advantages == [0.0] * read + [1.5, 1.5]
    assert made.temperatures == [1.0] * read + [0.7, 0.7]
    assert made.weight_versions == [-1] * read + [5, 5]
    assert made.mm_refs is not None
    assert made.mm_refs.images[0].length == 4
    branch.images = []
    with pytest.raises(RefError, match="no image token without an image"):
        make_sample(branch, 1.5, image_token_id=renderer.family.image_token_id, sample_id="x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_environment", "no environment 'no_such_environment'"),
        ("no_such_module:Class", "can not be imported: ModuleNotFoundError"),
        ("pointillist.environments.digits:Nope", "can not be imported: AttributeError"),
        ("digits", "could not be built .* TypeError"),
        ("builtins:dict", "has no method 'train_tasks'"),
    ],
)
def test_environments_that_can_not_be_had(name: str, message: str) -> None:
    with pytest.raises(EnvironmentLoadError, match=message):
        load_environment(name, {})


def _rollouts(rewards: list[float]) -> list[RolloutResult]:
    """Of one branch of nine tokens, three of them sampled."""
    made = sample()
    assert made.mm_refs is not None
    branch = Branch(
        token_ids=[7, 7, 1, 1, 1, 1, 1, 1, 1],
        loss_mask=made.loss_mask,
        logprobs_sampled=made.logprobs_sampled,
        weight_versions=made.weight_versions,
        temperatures=made.temperatures,
        images=made.mm_refs.images,
        messages=[],
    )
    return [
        RolloutResult(id=str(i), task_id="t", reward=reward, turns=1, branches=[branch])
        for i, reward in enumerate(rewards)
    ]


@pytest.fixture
def recorder(model_dir: Path) -> RolloutRecorder:
    return RolloutRecorder("oranges", FolderTokenizer(model_dir))


def _batch(recorder: RolloutRecorder, seq_len: int = 64, policy: str = "drop", failed_reward: float = 0.0) -> _Batch:
    return _Batch(
        recorder=recorder, image_token_id=7, seq_len=seq_len, overlong_policy=policy, normalize_std=True,  # type: ignore[arg-type]
        failed_reward=failed_reward,
    )  # fmt: skip


@pytest.mark.parametrize("seq_len", [8, 9])
def test_overlong_samples_are_dropped_and_counted_or_stop_the_run(recorder: RolloutRecorder, seq_len: int) -> None:
    batch = _batch(recorder, seq_len, "drop")  # a sample of nine tokens
    batch.add_group(_rollouts([0.0, 1.0]))
    assert batch.metrics()["mm/samples_overlong"] == (2 if seq_len == 8 else 0)
    assert len(batch.samples) == (0 if seq_len == 8 else 2)
    assert [record.branches[0].overlong for record in batch.records] == [seq_len == 8] * 2
    if seq_len == 8:
        with pytest.raises(OverlongMultimodalSample, match="9 tokens and 1 images, seq_len is 8"):
            _batch(recorder, seq_len, "error").add_group(_rollouts([0.0, 1.0]))


def test_groups_that_agree_train_nothing_but_count_in_the_denominator(recorder: RolloutRecorder) -> None:
    batch = _batch(recorder, 64, "drop")
    batch.add_group(_rollouts([1.0, 1.0]))
    batch.add_group(_rollouts([1.0]))
    batch.add_group(_rollouts([0.0, 1.0]))
    assert batch.metrics()["groups/dropped_zero_variance"] == 2
    assert len(batch.samples) == 2
    assert batch.num_tokens == 5 * 3
    outcomes = [record.outcome for record in batch.records]
    assert outcomes == ["zero_variance", "zero_variance", "alone", "sent", "sent"]


def test_a_record_tells_what_was_sampled_and_what_failed(recorder: RolloutRecorder, model_dir: Path) -> None:
    """Texts and logprobs stand at their place in the token stream; what failed for good is there with its error."""
    said = FolderTokenizer(model_dir).encode("up 7")
    rollout = _rollouts([0.0])[0]
    rollout.branches[0].token_ids = [7, 7, *said, 1]
    rollout.branches[0].loss_mask = [False, False] + [True] * len(said) + [False]
    rollout.branches[0].logprobs_sampled = [0.0, 0.0] + [-0.123456] * len(said) + [0.0]
    failure = RolloutFailure(kind="ValueError", message="<b>", permanent=True)
    failed = RolloutResult(id="1.0.1", task_id="t", failure=failure)
    batch = _batch(recorder, 64, "drop")
    batch.add_group([failed])
    (record,) = batch.records
    assert (record.outcome, record.error, record.reward) == ("failed", ErrorRecord("ValueError", "<b>"), None)
    record = recorder.record(rollout, group="eval.t")
    assert (record.split, record.env, record.outcome) == ("eval", "oranges", "evaluated")
    (piece,) = record.branches[0].sampled_pieces
    assert piece.offset == 2
    assert "".join(piece.texts) == "up 7"
    assert piece.logprobs == [-0.1235] * len(said)


def test_token_texts_add_up_even_inside_a_character(model_dir: Path) -> None:
    tokenizer = FolderTokenizer(model_dir)
    token_ids = tokenizer.encode("é😀 a")
    assert "".join(tokenizer.pieces(token_ids)) == "é😀 a"
    assert len(tokenizer.pieces(token_ids)) == len(token_ids)
    assert tokenizer.pieces(token_ids[:1]) in (["é"], ["\N{REPLACEMENT CHARACTER}"])


def _failed(result: RolloutResult, kind: str, *, by_policy: bool = False) -> RolloutResult:
    failure = RolloutFailure(kind=kind, message="", permanent=True, by_policy=by_policy, traceback="trace")
    return msgspec.structs.replace(result, failure=failure)


def test_a_rollout_that_fails_by_the_policys_doing_counts_and_is_trained(recorder: RolloutRecorder) -> None:
    """Silence is no absence: the group compares with it. What fails by itself is absent, and counted."""
    one, two, three = _rollouts([1.0, 5.0, 7.0])
    batch = _batch(recorder, failed_reward=-1.0)
    batch.add_group([one, _failed(two, "ContextLengthError", by_policy=True), _failed(three, "WorkerDied")])
    assert [sample.sample_id for sample in batch.samples] == ["0.0", "1.0"]
    assert batch.samples[0].advantages[-1] == -batch.samples[1].advantages[-1] > 0.5
    metrics = batch.metrics()
    assert (metrics["reward/mean"], metrics["rollouts/total"]) == (0.0, 2)
    assert (metrics["errors/dropped"], metrics["errors/by_policy"]) == (1, 1)
    assert (metrics["errors/ContextLengthError"], metrics["errors/WorkerDied"]) == (1, 1)
    records = {record.id: record for record in batch.records}
    assert [records[name].outcome for name in "012"] == ["sent", "sent", "failed"]
    assert [records[name].reward for name in "012"] == [1.0, -1.0, None]
    assert records["1"].error == ErrorRecord("ContextLengthError", "", "trace")
    assert all(len(records[name].branches) == 1 for name in "012")
    # In an evaluation nothing is compared: it is a failure.
    record = recorder.record(_failed(two, "ContextLengthError", by_policy=True), group="eval.t")
    assert (record.outcome, record.reward) == ("failed", None)


def test_kinds_of_failures_are_bounded_and_hide_no_total(recorder: RolloutRecorder) -> None:
    """An environment names its errors as it likes: as one of our numbers, or anew each time."""
    results = _rollouts([0.0] * 30)
    kinds = ["dropped", "dropped", "by_policy", "by_policy", *(f"Kind{number}" for number in range(25))]
    batch = _batch(recorder)
    batch.add_group([_failed(result, kind) for result, kind in zip(results, kinds, strict=False)] + results[-1:])
    metrics = batch.metrics()
    assert (metrics["errors/dropped"], metrics["errors/by_policy"], metrics["errors/other_kinds"]) == (29, 0, 7)
    assert sum(name.startswith("errors/") for name in metrics) == 21


def test_a_record_that_can_not_be_trained_fails_its_rollout(recorder: RolloutRecorder) -> None:
    damaged, *others = _rollouts([1.0, 0.0, 1.0])
    (branch,) = damaged.branches
    damaged = msgspec.structs.replace(damaged, branches=[msgspec.structs.replace(branch, images=[])])
    batch = _batch(recorder)
    batch.add_group([damaged, *others])
    assert batch.metrics()["errors/RefError"] == batch.metrics()["errors/dropped"] == 1
    assert len(batch.samples) == 2


@pytest.mark.parametrize(
    ("rewards", "dropped", "solved"),
    [([1.0] * 8, 0, True), ([1.0, 2.0] * 4, 0, True), ([0.9] * 8, 0, False), ([1.0] * 7 + [0.9], 0, False),
     ([1.0] * 99, 1, True), ([1.0] * 8, 2, False)],
)  # fmt: skip
def test_solved_is_every_reward_at_its_best_and_hardly_any_missing(
    recorder: RolloutRecorder, rewards: list[float], dropped: int, solved: bool
) -> None:
    batch = _batch(recorder)
    for number, result in enumerate(_rollouts(rewards + [0.0] * dropped)):
        batch.add_group([result if number < len(rewards) else _failed(result, "OSError")])
    assert batch.is_solved(1.0) == solved


def test_failed_rollouts_are_in_summary_and_progress() -> None:
    evals = [{"step": 3, "eval/accuracy": 0.5, "eval/tasks": 4, "eval/failed": 2, "eval/failed/OSError": 2,
              "torch_imported": False}]  # fmt: skip
    steps = [
        {"step": step, "mm/images": 0, "rollouts/total": 8, "errors/dropped": 1, "errors/by_policy": 1,
         "errors/retried": 9, "errors/OSError": 1, "errors/ContextLengthError": 1, "reward/mean": 1.0,
         "rollouts/per_second": 2.0, "groups/total": 4, "groups/dropped_zero_variance": 3, "solved": int(step == 2)}
        for step in (1, 2)
    ]  # fmt: skip
    summary = build_summary([], steps, evals)
    assert summary["rollouts_failed"] == {"OSError": 2, "ContextLengthError": 2}
    assert (summary["final_eval_tasks"], summary["final_eval_failed"]) == (4, {"OSError": 2})
    assert (summary["solved_at_step"], summary["rollouts_dropped"]) == (2, 2)
    _, status = _status([], steps[-1:], evals)
    assert "held-out 0.500 (step 3, 2 of 4 failed)" in status
    assert "1 rollouts dropped" in status
    assert "3 of 4 groups taught nothing" in status
