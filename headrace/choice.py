"""Which model serves a request: the one that it names, a fallback of that, or the best of those that could. Pure.

Ingress and router ask the same function: the ingress refuses early what nobody could serve, the router decides. No
choice and no fallback leads a key to a model that it may not name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import NamedTuple

from headrace.asked import Needs
from headrace.errors import ContextLengthExceeded, HeadraceError, ModelNotFound, ProviderDown, Unavailable
from headrace.registry import Snapshot
from schemas.control import TASKS, Key, Model
from schemas.events import PoolStatus

WAIT_STEP_MS = 500
"""Waits that differ by less count as equal: then the price decides."""
UNKNOWN_LOAD_MS = 10_000
"""Taken for the load of a model that is not in memory and whose load time is not known."""
EXPECTED_COMPLETION = 512
"""Completion tokens for which a price is compared when the caller names no cap."""
MAX_REASONS = 8
"""Models that an explanation tells of."""
REASON_CHARS = 160
BROKEN_RETRY_S = 5


class Standing(NamedTuple):
    """How a model stands in its pool now."""

    wait_ms: int = 0
    """Until a request that comes now would have its slot; a load that it needs is part of it."""
    down: HeadraceError | None = None
    """Why it would not serve the request; None when it would."""
    may_try: bool = False
    """Whether a request that has no other model is let through all the same: it is what makes a load be tried again."""


class Choice(NamedTuple):
    """Which model serves, and why."""

    model: Model
    standing: Standing
    task: str = ""
    """`auto` or `auto:…` as the caller wrote it; empty when a model was named."""
    passed_over: tuple[tuple[str, str], ...] = ()
    """(model, why not) of others that the key may use: those that were nearest to being chosen first."""
    pools: int = 1
    """In how many pools the models are among which the choice was."""

    @property
    def explanation(self) -> str:
        """Why others were not chosen, for people: `big: no vision; slow: wait of about 12 s`."""
        told = [f"{model}: {why}" for model, why in self.passed_over[:MAX_REASONS]]
        left = len(self.passed_over) - len(told)
        return "; ".join([*told, f"and {left} more"] if left else told)


# --- how a model stands -------------------------------------------------------------------------------------------


def standing(model: Model, status: PoolStatus | None, patience_ms: float, priority: str = "standard") -> Standing:
    """How a model stands by its pool's status (None when that is stale); the request may wait for `patience_ms`.

    A request that has others of its own tenant before it may wait longer: the scheduler judges that.
    """
    if status is None:
        return Standing(down=Unavailable(f"The pool {model.pool!r} does not answer; try again shortly."))
    if model.id not in status.servable_models:
        why = f"No worker serves the model {model.id!r} now; try again shortly."
        return Standing(down=Unavailable(why, retry_after_s=5))
    if (reason := status.broken_models.get(model.id)) is not None:
        why = f"The provider of the model {model.id!r} fails, and is tried again in a moment: {reason}"
        return Standing(down=ProviderDown(why, retry_after_s=BROKEN_RETRY_S))
    if (reason := status.failed_models.get(model.id)) is not None:
        why = f"The model {model.id!r} could not be loaded: {reason}"
        return Standing(down=ProviderDown(why, retry_after_s=BROKEN_RETRY_S), may_try=True)
    waits_ms = status.interactive_waits_ms if priority == "interactive" else status.waits_ms
    wait_ms = waits_ms.get(model.id, 0)
    if wait_ms > patience_ms:
        wait_s = math.ceil(wait_ms / 1000)
        why = f"The wait for the model {model.id!r} is about {wait_s} s, longer than the request may wait."
        return Standing(wait_ms, Unavailable(why, retry_after_s=wait_s))
    if model.id not in status.ready_models and not model.load_ms:
        wait_ms += UNKNOWN_LOAD_MS
    return Standing(wait_ms)


StandingOf = Callable[[Model], Standing]


# --- choosing -----------------------------------------------------------------------------------------------------


def named(snapshot: Snapshot, name: str) -> Model | None:
    """The model with this id or alias: enabled, or disabled with fallbacks; None when there is none."""
    found = snapshot.resolve(name)
    if found is not None:
        return found
    disabled = (model for model in snapshot.models.values() if not model.enabled and model.fallbacks)
    return next((model for model in disabled if name in (model.id, *model.aliases)), None)


def may_lead_elsewhere(snapshot: Snapshot, name: str) -> bool:
    """Whether a request for this name could be served by another model than the one that it names."""
    if name in TASKS:
        return True
    found = named(snapshot, name)
    return found is not None and bool(found.fallbacks)


def choose(
    snapshot: Snapshot, key: Key | None, name: str, needs: Needs, standing_of: StandingOf, *, at_ms: int = 0
) -> Choice:
    """The model that serves a request for `name`. A key of None may use no model but the one that it names.

    `at_ms` is the moment (Unix ms) whose prices are compared; without it those that the records were written with.

    The model that is chosen may be down, when every other one is too: whoever asks decides whether to wait. Raises
    `ModelNotFound`, or `ContextLengthExceeded` where only the length is in the way.
    """
    if name in TASKS:
        return _auto(snapshot, key, name, needs, standing_of, at_ms)
    model = named(snapshot, name)
    if model is None:
        raise not_found(name)
    if not model.fallbacks:
        return Choice(model, standing_of(model))
    return _with_fallbacks(snapshot, key, model, name, needs, standing_of)


def not_found(name: str) -> ModelNotFound:
    """The error for a name that leads this key to no model, be there one or not."""
    return ModelNotFound(f"The model {name!r} does not exist; GET /v1/models lists those that do.", param="model")


def tasks(snapshot: Snapshot, key: Key) -> list[str]:
    """The names of choices for which there is a model that the key may use."""
    models = _usable(snapshot, key)
    return [task for task, capability in TASKS.items() if any(model.can(capability) for model in models)]


def _usable(snapshot: Snapshot, key: Key | None) -> list[Model]:
    return [model for model in snapshot.models.values() if key is not None and model.enabled and key.may_use(model)]


def _auto(snapshot: Snapshot, key: Key | None, task: str, needs: Needs, standing_of: StandingOf, at_ms: int) -> Choice:
    usable = _usable(snapshot, key)
    lacking = {model.id: why for model in usable if (why := lacks(model, needs))}
    options = sorted(
        ((model, standing_of(model)) for model in usable if model.id not in lacking),
        key=lambda option: _rank(option[0], option[1], needs, at_ms),
    )
    if not options:
        raise _nobody(task, needs, usable)
    best, found = options[0]
    others = [(model.id, _behind(model, stands, found, needs, at_ms)) for model, stands in options[1:]]
    return Choice(best, found, task, (*others, *lacking.items()), len({model.pool for model, _ in options}))


def _with_fallbacks(
    snapshot: Snapshot, key: Key | None, model: Model, name: str, needs: Needs, standing_of: StandingOf
) -> Choice:
    """The model itself, or the first of its fallbacks that can serve when it cannot; itself too when none can."""
    first = standing_of(model) if model.enabled else Standing(down=not_found(name))
    fallbacks = {found.id: found for found in _usable(snapshot, key)}
    pools = len({model.pool} | {fallbacks[other].pool for other in model.fallbacks if other in fallbacks})
    if first.down is None:
        return Choice(model, first, pools=pools)
    passed = [(model.id, _why(first.down) if model.enabled else "is disabled")]
    options: list[tuple[Model, Standing]] = []
    for other in (fallbacks[other] for other in model.fallbacks if other in fallbacks):
        if why := lacks(other, needs):
            passed.append((other.id, why))
            continue
        stands = standing_of(other)
        if stands.down is None:
            return Choice(other, stands, passed_over=tuple(passed), pools=pools)
        options.append((other, stands))
        passed.append((other.id, _why(stands.down)))
    if model.enabled:
        return Choice(model, first, passed_over=tuple(passed[1:]), pools=pools)
    if not options:
        raise not_found(name)
    last, stands = options[0]
    return Choice(last, stands, passed_over=tuple(one for one in passed if one[0] != last.id), pools=pools)


def lacks(model: Model, needs: Needs) -> str:
    """What a model has too little of for a request; empty when it has all."""
    missing = sorted(capability for capability in needs.capabilities if not model.can(capability))
    if missing:
        return f"no {', '.join(missing)}"
    wanted = needs.prompt_tokens + (needs.limit or model.default_max_tokens or 0)
    if wanted > model.context_length:
        return f"a context of {model.context_length} tokens, about {wanted} are needed"
    return ""


def _nobody(task: str, needs: Needs, usable: Iterable[Model]) -> HeadraceError:
    able = [model for model in usable if all(model.can(capability) for capability in needs.capabilities)]
    if able:
        longest = max(model.context_length for model in able)
        return ContextLengthExceeded(
            f"The request needs a context of about {needs.prompt_tokens + (needs.limit or 0)} tokens; the longest that"
            f" {task!r} finds has {longest}. Shorten it, or ask for fewer tokens.",
            param="messages",
        )
    wanted = ", ".join(sorted(needs.capabilities))
    return ModelNotFound(
        f"No model that your key may use has what {task!r} needs here: {wanted}; see GET /v1/models.",
        param="model",
    )


# --- comparing ----------------------------------------------------------------------------------------------------


def _rank(model: Model, stands: Standing, needs: Needs, at_ms: int) -> tuple[bool, int, Decimal, str]:
    return stands.down is not None, stands.wait_ms // WAIT_STEP_MS, cost(model, needs, at_ms), model.id


def cost(model: Model, needs: Needs, at_ms: int = 0) -> Decimal:
    """What a request would cost, about, in the currency of the model's price; amounts are compared as they stand."""
    return model.price_at(at_ms).cost(needs.prompt_tokens, 0, needs.limit or EXPECTED_COMPLETION)


def _behind(model: Model, stands: Standing, best: Standing, needs: Needs, at_ms: int) -> str:
    """Why a model that could take the request comes after the best."""
    if stands.down is not None:
        return _why(stands.down)
    if stands.wait_ms // WAIT_STEP_MS > best.wait_ms // WAIT_STEP_MS:
        return f"a wait of about {math.ceil(stands.wait_ms / 1000)} s"
    about = cost(model, needs, at_ms).normalize()
    return f"costs as much or more, about {about:f} {model.price_at(at_ms).currency}"


def _why(error: HeadraceError) -> str:
    return error.message if len(error.message) <= REASON_CHARS else error.message[: REASON_CHARS - 1] + "…"
