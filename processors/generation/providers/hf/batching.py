"""What a step of the engine computes: every running answer's next token, and as much of the prompts as fits. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar


class Waiting(Protocol):
    """A sequence of tokens, of which the first `computed` have been through the model."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache."""


Sequence = TypeVar("Sequence", bound=Waiting)


class Span(NamedTuple):
    """`size` tokens from position `start` of the sequence in a slot."""

    slot: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.size


def plan(sequences: Iterable[tuple[int, Sequence]], budget: int) -> list[tuple[Sequence, Span]]:
    """Spans of one step, given (slot, sequence) in order of arrival: at most one a sequence.

    Answers come first and are never held up by prompts, which share what is left of `budget` tokens; at least one
    token of a prompt is always computed, so that none waits for ever.
    """
    answers: list[tuple[Sequence, Span]] = []
    prompts: list[tuple[int, Sequence]] = []
    for slot, sequence in sequences:
        if sequence.length - sequence.computed == 1:
            answers.append((sequence, Span(slot, sequence.computed, 1)))
        else:
            prompts.append((slot, sequence))
    left = max(1, budget - len(answers))
    spans = answers
    for slot, sequence in prompts:
        if left <= 0:
            break
        size = min(left, sequence.length - sequence.computed)
        spans.append((sequence, Span(slot, sequence.computed, size)))
        left -= size
    return spans
