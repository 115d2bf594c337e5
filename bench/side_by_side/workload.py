"""The workload of the side-by-side run: who asks which model for what, when, and for how long they stay. Pure.

The loop is open: requests come when they come, whether earlier ones were answered or not, as those of callers do who
know nothing of each other.
"""

from __future__ import annotations

import random

import msgspec

MODELS = ("ash", "birch", "cedar")
POPULARITY = (4, 2, 1)
"""Of the models: the first is asked for most, as in life; all three are asked for all the time."""
CONTEXT, SLOTS = 1024, 2
"""Tokens of a request, and requests at once, of each model."""
GREEDY, MODEST, QUIET = "greedy", "modest", "quiet"
TENANTS = (GREEDY, MODEST, QUIET)
BURST, BURST_EVERY_S = 4, 12.0
"""The greedy tenant asks so many things at once, so often."""
RATES = {MODEST: 0.15, QUIET: 0.08}
"""Requests a second of the others, at random (Poisson)."""
PROMPTS = ((30, 50), (150, 25), (500, 10), (1500, 15))
"""Words of a prompt, and how often it has them; the last kind is longer than the context."""
SPREAD = 0.2
"""Share by which the words vary."""
ANSWERS = (12, 48)
"""Least and most tokens that are asked for."""
LEAVING, STAYS_S = 0.15, (0.3, 4.0)
"""Share of callers who leave before the end, and how long they stay."""
SYSTEM = "You answer briefly."
WORDS = "river mill wheel water stone bridge field barn grain flour sack cart road hill wind rain summer winter morning"


class Ask(msgspec.Struct, kw_only=True, frozen=True):
    """One request."""

    number: int
    at_s: float
    """When it comes, in seconds from the start."""
    tenant: str
    model: str
    prompt: str
    max_tokens: int
    leaves_s: float | None = None
    """Seconds after which its caller has left, whatever came until then; None for one who stays."""

    def messages(self) -> list[dict[str, str]]:
        """The chat. The system's part is always there, since templates differ in what they put in its place."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.prompt}]


def text(chance: random.Random, words: int) -> str:
    """A prompt of so many words, each a token or little more; no two prompts begin alike, so that no cache helps."""
    return " ".join(chance.choices(WORDS.split(), k=words)) + ". Tell a story with these words."


def generate(seed: int, seconds: float) -> list[Ask]:
    """The requests of `seconds`, in the order of their coming; the same seed gives the same ones."""
    chance = random.Random(seed)
    times = [
        (burst * BURST_EVERY_S + 0.02 * place, GREEDY)
        for burst in range(int(-(-seconds // BURST_EVERY_S)))
        for place in range(BURST)
    ]
    for tenant, rate in RATES.items():
        at = chance.expovariate(rate)
        while at < seconds:
            times.append((at, tenant))
            at += chance.expovariate(rate)
    return [_ask(chance, number, at, tenant) for number, (at, tenant) in enumerate(sorted(times))]


def _ask(chance: random.Random, number: int, at_s: float, tenant: str) -> Ask:
    [words] = chance.choices([words for words, _ in PROMPTS], [often for _, often in PROMPTS])
    return Ask(
        number=number,
        at_s=round(at_s, 3),
        tenant=tenant,
        model=chance.choices(MODELS, POPULARITY)[0],
        prompt=text(chance, int(words * chance.uniform(1 - SPREAD, 1 + SPREAD))),
        max_tokens=chance.randint(*ANSWERS),
        leaves_s=round(chance.uniform(*STAYS_S), 2) if chance.random() < LEAVING else None,
    )


def leaver(number: int, model: str, tenant: str, *, words: int, tokens: int, stays_s: float | None = None) -> Ask:
    """A request of a quiet machine, whose prompt no other had; its caller leaves after `stays_s`."""
    prompt = text(random.Random(f"leaver {number} {words} {stays_s}"), words)
    return Ask(number=number, at_s=0.0, tenant=tenant, model=model, prompt=prompt, max_tokens=tokens, leaves_s=stays_s)


def body_of(ask: Ask) -> dict[str, object]:
    """What is sent."""
    return {
        "model": ask.model,
        "messages": ask.messages(),
        "max_tokens": ask.max_tokens,
        "temperature": 0.0,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
