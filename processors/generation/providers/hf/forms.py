"""Answers of a given form: which tokens a JSON schema allows next, by llguidance."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

ANY_OBJECT = '{"type": "object"}'


class FormError(Exception):
    """The form is none that can be kept; the text says why."""


class Form:
    """Where in its form an answer stands."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> torch.Tensor:
        """Mask over the vocabulary of the tokens that may come next. Raises `FormError` in a dead end."""
        if self._matcher.is_error():
            raise FormError(self._matcher.get_error())
        given = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        mask = torch.zeros(self._vocabulary, dtype=torch.bool)  # scores are often padded beyond the tokenizer's tokens
        size = min(len(given), self._vocabulary)
        mask[:size] = given[:size]
        if not bool(mask.any()):
            raise FormError("no token can follow")
        return mask

    def take(self, token: int) -> None:
        """The answer goes on with this token. Raises `FormError` when it cannot; the matcher then looks complete."""
        if not self._matcher.consume_token(token):
            raise FormError(self._matcher.get_error())

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())


class Forms:
    """Makes forms for one model; what that needs of the tokenizer (about a second) is made with the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    def of(self, response_format: Mapping[str, object] | None) -> Form | None:
        """The form that a `response_format` asks for; None for free text. Raises `FormError`."""
        match response_format:
            case None | {"type": "text"}:
                return None
            case {"type": "json_object"}:
                schema: object = ANY_OBJECT
            case {"type": "json_schema", "json_schema": {"schema": Mapping() as given}}:
                schema = dict(given)
            case {"type": "json_schema"}:
                schema = ANY_OBJECT
            case _:
                raise FormError("its type must be one of text, json_object, json_schema")
        with self._lock:
            if self._made is None:
                self._made = from_tokenizer(self._tokenizer, n_vocab=None, eos_token=self._ends)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        except ValueError as problem:
            raise FormError(str(problem)) from problem
        matcher = LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise FormError(matcher.get_error())
        return Form(matcher, self._vocabulary)
