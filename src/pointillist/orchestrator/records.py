"""What is kept of a rollout after its batch is gone: one JSON object a line of `rollouts.jsonl`.

| key | meaning |
| --- | --- |
| `id`, `group`, `split`, `env`, `task` | which rollout; `<step>.<group>.<member>`, or `eval_<version>.<index>` |
| `answer` | the task's expected answer as a text, null if it has none |
| `reward`, `turns`, `versions` | what came of it; oldest and newest weights that sampled in it |
| `outcome` | what the orchestrator did with it, see `Outcome` |
| `advantage` | null unless it was sent to the trainer |
| `error` | `{"kind", "message", "traceback"}` of a rollout that failed for good, else null |
| `branches` | per branch: counts, `overlong`, `messages`, `images`, and `sampled_pieces` |

A sampled piece is a stretch that the policy sampled: `{"offset", "texts", "logprobs"}`, where in the branch's tokens it
begins, and each token's text and logprob. What was read is not kept as tokens: messages and image spans tell it.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pointillist.base.files import write_atomically
from pointillist.environments.executor import RolloutResult
from pointillist.environments.failures import RolloutFailure, failure_of
from pointillist.render import FolderTokenizer
from pointillist.sessions import Branch

Outcome = Literal["sent", "zero_variance", "alone", "failed", "evaluated"]
"""`sent` to the trainer (but for branches that were too long); in a group of `zero_variance`; `alone`, since all others
of its group failed; `failed` for good, and missing in its group; `evaluated` only. A rollout that failed by what the
policy did has an `error` and one of the first three: it counts."""

_DIGITS = 4


class RolloutRecorder:
    """Makes the records of one run."""

    def __init__(self, env_id: str, tokenizer: FolderTokenizer) -> None:
        self._env_id = env_id
        self._tokenizer = tokenizer

    def record(
        self,
        rollout: RolloutResult,
        *,
        group: str | None = None,
        outcome: Outcome = "evaluated",
        advantage: float | None = None,
        overlong: frozenset[int] = frozenset(),
    ) -> dict[str, Any]:
        """The record of a rollout.

        Args:
            rollout: It; one with a failure has the outcome `failed`, unless it counts in its group.
            group: Of an evaluation's rollout; that of a training rollout is in its id.
            outcome: What became of it.
            advantage: Over its group, if it was sent.
            overlong: Indices of the branches that were too long to be sent.
        """
        versions = [version for branch in rollout.branches for version in branch.weight_versions if version >= 0]
        failure = rollout.failure
        failed = failure is not None and (outcome == "evaluated" or not failure.by_policy)
        return {
            "id": rollout.id,
            "group": group or rollout.id.rpartition(".")[0],
            "split": "eval" if group else "train",
            "env": self._env_id,
            "task": rollout.task_id,
            "answer": rollout.answer,
            "reward": None if failed else rollout.reward,
            "advantage": advantage,
            "outcome": "failed" if failed else outcome,
            "error": None if failure is None else _error(failure),
            "turns": rollout.turns,
            "versions": [min(versions), max(versions)] if versions else None,
            "branches": [
                self._branch(branch, overlong=index in overlong) for index, branch in enumerate(rollout.branches)
            ],
        }

    def _branch(self, branch: Branch, *, overlong: bool) -> dict[str, Any]:
        return {
            "tokens": len(branch.token_ids),
            "sampled": sum(branch.loss_mask),
            "overlong": overlong,
            "sampled_pieces": self._pieces(branch),
            "messages": branch.messages,
            "images": [
                {"item": image.item, "hash": image.hash, "offset": image.offset, "length": image.length}
                for image in branch.images
            ],
        }

    def _pieces(self, branch: Branch) -> list[dict[str, Any]]:
        """The stretches of the branch that were sampled in it, and not in an earlier branch of the rollout."""
        pieces = []
        for sampled, run in groupby(range(len(branch.token_ids)), key=branch.loss_mask.__getitem__):
            if sampled:
                where = list(run)
                texts = self._tokenizer.pieces([branch.token_ids[index] for index in where])
                logprobs = [round(branch.logprobs_sampled[index], _DIGITS) for index in where]
                pieces.append({"offset": where[0], "texts": texts, "logprobs": logprobs})
        return pieces


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes records, one JSON object a line; pictures are URLs of the store."""
    write_atomically(path, b"".join(map(_line, records)))


def _error(failure: RolloutFailure) -> dict[str, str]:
    return {"kind": failure.kind, "message": failure.message, "traceback": failure.traceback}


def _line(record: dict[str, Any]) -> bytes:
    """A line of UTF-8; a conversation into which an environment has put what JSON can not hold is left out."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        damage = failure_of(error)
        text = json.dumps({**record, "branches": [], "error": record["error"] or _error(damage)}, ensure_ascii=False)
    return text.encode("utf-8", errors="replace") + b"\n"
