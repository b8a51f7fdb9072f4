"""What a session remembers: a tree of turns, token for token.

A turn hangs below the turn whose tokens it extends. A conversation that goes on makes a path; one that is continued in
two ways, an edited history, or a sub-conversation makes a fork or a further root. Each path from a root to a leaf is a
`Branch`, and every branch becomes a training sample. What a policy sampled is trained once: a turn that several
branches share is context in all but the first.

A turn keeps only what it adds to the turn before, so a long conversation costs memory once, not once a turn.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pointillist.refs.mm_refs import MMImageRef
from pointillist.render.raw import Message, RenderedPrompt
from pointillist.sessions.answers import Completion


class Branch(msgspec.Struct, kw_only=True, rename={"loss_mask": "sampled", "logprobs_sampled": "logprobs"}):
    """A token stream that was read and sampled from left to right. Lists run along `token_ids`."""

    token_ids: list[int]
    loss_mask: list[bool]
    """Sampled by the policy, and not part of an earlier branch; `sampled` in JSON."""
    logprobs_sampled: list[float]
    """The sampler's; 0 for tokens that were not sampled; `logprobs` in JSON."""
    weight_versions: list[int]
    """-1 for tokens that were not sampled."""
    temperatures: list[float]
    """What the logits were divided by; 1 for tokens that were not sampled."""
    images: list[MMImageRef]
    messages: list[Message]
    """The conversation; images are `file://` URLs of the store."""


@dataclass(slots=True)
class Node:
    """One turn in the tree."""

    parent: "Node | None"
    """The turn whose tokens this one extends."""
    logical: "array[int]"
    """What was read since the parent's last token, one placeholder an image."""
    effective: "array[int]"
    """The same, expanded."""
    images: tuple[MMImageRef, ...]
    """The images in it; offsets are those of the whole prompt."""
    completion: Completion
    temperature: float
    messages: list[Message] = field(default_factory=list)
    """The whole conversation, the answer included; only a leaf keeps it."""
    children: int = 0

    def path(self) -> "list[Node]":
        """From the root to here."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def logical_prompt(self) -> list[int]:
        """All logical tokens that were read before this turn's completion was sampled."""
        *before, last = self.path()
        tokens: list[int] = []
        for node in before:
            tokens += [*node.logical, *node.completion.token_ids]
        return [*tokens, *last.logical]

    def effective_tokens(self) -> list[int]:
        """All tokens up to the end of this turn's completion."""
        tokens: list[int] = []
        for node in self.path():
            tokens += [*node.effective, *node.completion.token_ids]
        return tokens


class Trace:
    """The turns of one session."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._by_history: dict[bytes, Node] = {}

    def find(self, keys: Sequence[bytes]) -> tuple[Node | None, int]:
        """The latest turn that a conversation continues.

        Args:
            keys: Of every prefix of the conversation (`History.add`), shortest first.

        Returns:
            The turn and the number of messages up to its answer; None and 0 for a conversation that begins.
        """
        for count in range(len(keys), 0, -1):
            if node := self._by_history.get(keys[count - 1]):
                return node, count
        return None, 0

    def record(
        self,
        parent: Node | None,
        prompt: RenderedPrompt,
        completion: Completion,
        *,
        temperature: float,
        key: bytes,
        messages: list[Message],
    ) -> None:
        """Adds a turn.

        Args:
            parent: The turn that the conversation continues, or None.
            prompt: What was read. If it does not begin with all of the parent's tokens a new root begins.
            completion: What was sampled.
            temperature: It was sampled at.
            key: Of the conversation, the answer included.
            messages: The conversation, the answer included.

        Example: the parent read `[1, 2]` and sampled `[3]`; a prompt `[1, 2, 3, 4]` hangs below it and keeps `[4]`, a
        prompt `[1, 2, 9, 4]` begins a root of its own.
        """
        before = parent.effective_tokens() if parent is not None else []
        if prompt.token_ids[: len(before)] != before:
            parent, before = None, []  # the past was rewritten: what was read then and what is read now differ
        logical = len(parent.logical_prompt()) + len(parent.completion.token_ids) if parent is not None else 0
        node = Node(
            parent=parent,
            logical=array("I", prompt.logical_ids[logical:]),
            effective=array("I", prompt.token_ids[len(before) :]),
            images=tuple(image for image in prompt.images if image.offset >= len(before)),
            completion=completion,
            temperature=temperature,
            messages=messages,
        )
        if parent is not None:
            parent.children += 1
            parent.messages = []
        self.nodes.append(node)
        self._by_history[key] = node

    def branches(self) -> list[Branch]:
        """A branch for every leaf, in the order in which the leaves were sampled."""
        trained: set[int] = set()
        branches = []
        for leaf in self.nodes:
            if leaf.children == 0:
                path = leaf.path()
                branches.append(_branch(path, trained))
                trained |= {id(node) for node in path}
        return branches


def _branch(path: Sequence[Node], trained: set[int]) -> Branch:
    branch = Branch(
        token_ids=[],
        loss_mask=[],
        logprobs_sampled=[],
        weight_versions=[],
        temperatures=[],
        images=[],
        messages=path[-1].messages,
    )
    for node in path:
        read, completion = len(node.effective), node.completion
        count = len(completion.token_ids)
        fresh = id(node) not in trained
        branch.token_ids += [*node.effective, *completion.token_ids]
        branch.loss_mask += [False] * read + [fresh] * count
        branch.logprobs_sampled += [0.0] * read + (completion.logprobs if fresh else [0.0] * count)
        branch.weight_versions += [-1] * read + (completion.weight_versions if fresh else [-1] * count)
        branch.temperatures += [1.0] * read + [node.temperature if fresh else 1.0] * count
        branch.images += node.images
    return branch
