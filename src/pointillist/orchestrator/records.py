"""A rollout's record, made while its tokens and its failure are at hand; see `pointillist.runs.records`."""

from itertools import groupby

from pointillist.environments.executor import RolloutResult
from pointillist.render import FolderTokenizer
from pointillist.runs.records import BranchRecord, ErrorRecord, ImageSpan, Outcome, RolloutRecord, SampledPiece
from pointillist.sessions import Branch

_DIGITS = 4
"""Of a logprob, behind the point."""


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
    ) -> RolloutRecord:
        """The record of a rollout.

        Args:
            rollout: The rollout; one with a failure has the outcome `failed`, unless it counts in its group.
            group: Group of an evaluation's rollout; that of a training rollout is in its id.
            outcome: What became of it.
            advantage: Advantage over its group, if it was sent.
            overlong: Indices of the branches that were too long to be sent.
        """
        versions = [version for branch in rollout.branches for version in branch.weight_versions if version >= 0]
        failure = rollout.failure
        failed = failure is not None and (outcome == "evaluated" or not failure.by_policy)
        return RolloutRecord(
            id=rollout.id,
            group=group or rollout.id.rpartition(".")[0],
            split="eval" if group else "train",
            env=self._env_id,
            task=rollout.task_id,
            answer=rollout.answer,
            reward=None if failed else rollout.reward,
            advantage=advantage,
            outcome="failed" if failed else outcome,
            error=None if failure is None else ErrorRecord(failure.kind, failure.message, failure.traceback),
            turns=rollout.turns,
            versions=(min(versions), max(versions)) if versions else None,
            branches=[
                self._branch(branch, overlong=index in overlong) for index, branch in enumerate(rollout.branches)
            ],
        )

    def _branch(self, branch: Branch, *, overlong: bool) -> BranchRecord:
        return BranchRecord(
            tokens=len(branch.token_ids),
            sampled=sum(branch.loss_mask),
            overlong=overlong,
            sampled_pieces=self._pieces(branch),
            messages=branch.messages,
            images=[ImageSpan(image.hash, image.offset, image.length, image.item) for image in branch.images],
        )

    def _pieces(self, branch: Branch) -> list[SampledPiece]:
        """The stretches of the branch that were sampled in it, and not in an earlier branch of the rollout."""
        pieces = []
        for sampled, run in groupby(range(len(branch.token_ids)), key=branch.loss_mask.__getitem__):
            if sampled:
                where = list(run)
                texts = self._tokenizer.pieces([branch.token_ids[index] for index in where])
                logprobs = [round(branch.logprobs_sampled[index], _DIGITS) for index in where]
                pieces.append(SampledPiece(where[0], texts, logprobs))
        return pieces
