"""Which model serves: never one that the key may not use, never one that lacks what is needed, always the same one."""

from __future__ import annotations

import json
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.asked import IMAGE_TOKENS, Needs, needs, read
from headrace.choice import (
    UNKNOWN_LOAD_MS,
    WAIT_STEP_MS,
    Choice,
    Standing,
    choose,
    cost,
    lacks,
    may_lead_elsewhere,
    standing,
    tasks,
)
from headrace.errors import ContextLengthExceeded, HeadraceError, ModelNotFound, ProviderDown, Unavailable
from headrace.registry import Snapshot, snapshot_of
from schemas.control import CAPABILITIES, LONG_CONTEXT, LONG_CONTEXT_TOKENS, TASKS, Key, Model, Price
from schemas.events import PoolStatus

NAMES = ("a", "b", "c", "d", "e")
DOWN = Unavailable("away")


def price(amount: int) -> Price:
    return Price(1, input=Decimal(amount), output=Decimal(amount), cached=Decimal(0))


def model(name: str, *capabilities: str, **fields: object) -> Model:
    return Model(name, "p", "t", capabilities=capabilities or ("chat",), **fields)  # type: ignore[arg-type]


def snapshot(*models: Model) -> Snapshot:
    return snapshot_of([msgspec.json.encode(one) for one in models], [], [], 1)


def key(*allowed: str) -> Key:
    return Key("k", "0" * 64, "k", "t", allowed_models=allowed or ("*",))


def asks(*capabilities: str, prompt: int = 10, limit: int | None = None) -> Needs:
    return Needs(frozenset(capabilities), prompt, limit)


def up(_: Model) -> Standing:
    return Standing()


def down(*names: str):  # type: ignore[no-untyped-def]
    return lambda one: Standing(down=DOWN) if one.id in names else Standing()


def body(**fields: object) -> bytes:
    return json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


# --- what always holds --------------------------------------------------------------------------------------------

_models = st.lists(
    st.builds(
        Model,
        id=st.sampled_from(NAMES),
        provider=st.just("p"),
        backend_tag=st.just("t"),
        enabled=st.sampled_from([True, True, True, False]),
        capabilities=st.sets(st.sampled_from(CAPABILITIES)).map(lambda found: tuple(sorted(found))),
        fallbacks=st.lists(st.sampled_from([*NAMES, "gone"]), unique=True, max_size=3).map(tuple),
        context_length=st.sampled_from([16, 512, 4096, LONG_CONTEXT_TOKENS]),
        pool=st.sampled_from(["default", "other"]),
        price=st.integers(0, 2).map(price),
    ),
    unique_by=lambda one: one.id,
    max_size=5,
)
_keys = st.one_of(
    st.none(),
    st.just(key()),
    st.sets(st.sampled_from(NAMES)).map(lambda allowed: key(*sorted(allowed)) if allowed else key("none")),
)
_needs = st.builds(
    Needs,
    capabilities=st.frozensets(st.sampled_from(["vision", "json", "tools"])),
    prompt_tokens=st.sampled_from([1, 100, 5_000]),
    limit=st.sampled_from([None, 50, 4_000]),
)
_standings = st.dictionaries(
    st.sampled_from(NAMES),
    st.builds(Standing, wait_ms=st.sampled_from([0, 100, 700, 9_000]), down=st.sampled_from([None, None, DOWN])),
)
_names = st.sampled_from([*TASKS, *NAMES])


def chosen(models: list[Model], who: Key | None, name: str, what: Needs, stands: dict[str, Standing]) -> Choice | str:
    try:
        return choose(snapshot(*models), who, name, what, lambda one: stands.get(one.id, Standing()))
    except HeadraceError as error:
        return error.message


def task_needs(name: str, what: Needs) -> Needs:
    return Needs(what.capabilities | {TASKS[name]}, what.prompt_tokens, what.limit) if name in TASKS else what


@settings(deadline=None)
@given(_models, _keys, _names, _needs, _standings)
def test_no_key_reaches_a_model_that_it_may_not_name(
    models: list[Model], who: Key | None, name: str, what: Needs, stands: dict[str, Standing]
) -> None:
    found = chosen(models, who, name, task_needs(name, what), stands)
    if isinstance(found, str):
        return  # refused: nobody was reached
    assert found.model.id == name or (who is not None and who.may_use(found.model))
    told = {one for one, _ in found.passed_over}
    assert all(one == name or (who is not None and who.may_use(model(one))) for one in told), "it tells of others"


@settings(deadline=None)
@given(_models, _keys, _names, _needs, _standings)
def test_no_model_is_chosen_that_lacks_what_is_needed_or_is_disabled(
    models: list[Model], who: Key | None, name: str, what: Needs, stands: dict[str, Standing]
) -> None:
    wanted = task_needs(name, what)
    found = chosen(models, who, name, wanted, stands)
    if isinstance(found, Choice):
        assert found.model.enabled
        if found.model.id != name:
            assert all(found.model.can(capability) for capability in wanted.capabilities)
            assert wanted.prompt_tokens + (wanted.limit or 0) <= found.model.context_length


@settings(deadline=None)
@given(_models, _keys, _names, _needs, _standings, st.randoms(use_true_random=False))
def test_the_choice_is_a_function_of_what_is_known(
    models: list[Model], who: Key | None, name: str, what: Needs, stands: dict[str, Standing], chance: object
) -> None:
    wanted = task_needs(name, what)
    first = chosen(models, who, name, wanted, stands)
    shuffled = list(models)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(shuffled, who, name, wanted, stands) == first


@settings(deadline=None)
@given(_models, _keys, st.sampled_from(sorted(TASKS)), _needs, _standings)
def test_nobody_better_is_passed_over(
    models: list[Model], who: Key | None, name: str, what: Needs, stands: dict[str, Standing]
) -> None:
    wanted = task_needs(name, what)
    found = chosen(models, who, name, wanted, stands)
    able = [one for one in models if one.enabled and who is not None and who.may_use(one) and not lacks(one, wanted)]
    assert isinstance(found, Choice) == bool(able)
    if isinstance(found, Choice):
        if found.standing.down is not None:
            assert all(stands.get(one.id, Standing()).down is not None for one in able)
        for one in able:
            other = stands.get(one.id, Standing())
            if other.down is None:
                assert found.standing.wait_ms // WAIT_STEP_MS <= other.wait_ms // WAIT_STEP_MS
                if other.wait_ms // WAIT_STEP_MS == found.standing.wait_ms // WAIT_STEP_MS:
                    assert cost(found.model, wanted) <= cost(one, wanted)
        assert {one for one, _ in found.passed_over} >= {one.id for one in able} - {found.model.id}


@settings(deadline=None)
@given(_models.filter(bool), _keys, _needs, _standings)
def test_a_model_that_can_serve_is_never_left_for_a_fallback(
    models: list[Model], who: Key | None, what: Needs, stands: dict[str, Standing]
) -> None:
    named = msgspec.structs.replace(models[0], enabled=True)
    stands[named.id] = Standing()
    found = chosen([named, *models[1:]], who, named.id, what, stands)
    assert isinstance(found, Choice) and found.model == named and not found.passed_over


# --- in detail ----------------------------------------------------------------------------------------------------


def test_plain_auto_takes_the_cheapest_chat_model_that_is_soon() -> None:
    shot = snapshot(model("a", price=price(3)), model("b", price=price(1)), model("c", "code", price=price(0)))
    found = choose(shot, key(), "auto", asks("chat"), up)
    assert found.model.id == "b"
    assert dict(found.passed_over) == {"a": "costs as much or more, about 0.001566 USD", "c": "no chat"}
    waits = {"b": Standing(8_000)}
    slower = choose(shot, key(), "auto", asks("chat"), lambda one: waits.get(one.id, Standing()))
    assert (slower.model.id, dict(slower.passed_over)["b"]) == ("a", "a wait of about 8 s")


def test_each_task_finds_its_model() -> None:
    shot = snapshot(
        model("a"), model("b", "code"), model("c", "vision"), model("d", "json"), model("e", context_length=65_536)
    )
    found = {task: choose(shot, key(), task, asks(TASKS[task]), up).model.id for task in TASKS}
    assert found == {
        "auto": "a", "auto:chat": "a", "auto:code": "b", "auto:vision": "c", "auto:json": "d", "auto:long-context": "e",
    }  # fmt: skip
    assert tasks(shot, key()) == list(TASKS)
    assert tasks(shot, key("b")) == ["auto:code"]


def test_nobody_can_says_whether_it_is_the_length() -> None:
    shot = snapshot(model("a", context_length=512), model("b", "code", context_length=128))
    with pytest.raises(ContextLengthExceeded, match="has 512"):
        choose(shot, key(), "auto", asks("chat", prompt=500, limit=50), up)
    with pytest.raises(ModelNotFound, match="chat, tools"):
        choose(shot, key(), "auto", asks("chat", "tools"), up)
    with pytest.raises(ModelNotFound):
        choose(shot, None, "auto", asks("chat"), up)


def test_fallbacks_are_taken_in_their_order_and_say_why() -> None:
    shot = snapshot(model("a", fallbacks=("b", "c", "d")), model("b"), model("c"), model("d"))
    assert choose(shot, key(), "a", asks(), down()).model.id == "a"
    found = choose(shot, key(), "a", asks(), down("a", "b"))
    assert (found.model.id, found.passed_over) == ("c", (("a", "away"), ("b", "away")))
    assert choose(shot, key("a", "d"), "a", asks(), down("a")).model.id == "d"
    for nobody in (key("a"), None):
        alone = choose(shot, nobody, "a", asks(), down("a"))
        assert (alone.model.id, alone.standing.down) == ("a", DOWN)
    assert choose(shot, key(), "a", asks(), down(*NAMES)).model.id == "a"


def test_a_disabled_model_lives_on_in_its_fallbacks() -> None:
    shot = snapshot(model("a", enabled=False, aliases=("old",), fallbacks=("b",)), model("b"))
    for name in ("a", "old"):
        assert choose(shot, key(), name, asks(), up).model.id == "b"
        assert may_lead_elsewhere(shot, name)
    with pytest.raises(ModelNotFound):
        choose(shot, key("a"), "a", asks(), up)
    with pytest.raises(ModelNotFound):
        choose(snapshot(model("a", enabled=False), model("b")), key(), "a", asks(), up)


def test_the_pools_of_a_choice_are_counted() -> None:
    shot = snapshot(model("a", fallbacks=("b",)), model("b", pool="gpu"), model("c"))
    assert choose(shot, key(), "a", asks(), up).pools == 2
    assert choose(shot, key(), "auto", asks("chat"), up).pools == 2
    assert choose(shot, key("a", "c"), "auto", asks("chat"), up).pools == 1


def test_an_explanation_is_short() -> None:
    shot = snapshot(*(model(f"m{number:02}") for number in range(30)))
    told = choose(shot, key(), "auto", asks("chat"), down(*(f"m{number:02}" for number in range(1, 30)))).explanation
    assert told.startswith("m01: away; m02: away; ") and told.endswith("; and 21 more")


# --- how a model stands -------------------------------------------------------------------------------------------

STATUS = PoolStatus(
    "default", 1, 0, ready_models=["m"], servable_models=["m", "cold"],
    waits_ms={"m": 4_001}, interactive_waits_ms={"m": 2_001},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "may_try"),
    [
        ({"servable_models": []}, Unavailable, False),
        ({"broken_models": {"m": "refused"}}, ProviderDown, False),
        ({"failed_models": {"m": "too large"}}, ProviderDown, True),
        ({"waits_ms": {"m": 10_001}}, Unavailable, False),
    ],
)
def test_why_a_model_is_down(changes: dict[str, object], error: type[HeadraceError], may_try: bool) -> None:
    found = standing(model("m"), msgspec.structs.replace(STATUS, **changes), 10_000)
    assert type(found.down) is error and found.may_try is may_try
    assert found.down is not None and found.down.status == 503 and found.down.retry_after_s


def test_a_stale_pool_is_down_and_the_wait_is_the_models_own() -> None:
    assert isinstance(standing(model("m"), None, 10_000).down, Unavailable)
    busy = msgspec.structs.replace(STATUS, estimated_wait_ms=99_000)
    assert standing(model("m"), busy, 10_000) == Standing(4_001)
    late = standing(model("m"), busy, 4_000).down
    assert late is not None and (late.retry_after_s, "about 5 s" in late.message) == (5, True)
    assert standing(model("m"), busy, 4_000, "interactive") == Standing(2_001)
    late = standing(model("m"), busy, 2_000, "interactive").down
    assert late is not None and (late.retry_after_s, "about 3 s" in late.message) == (3, True)


def test_a_model_that_is_not_loaded_is_taken_to_need_a_load() -> None:
    assert standing(model("cold"), STATUS, 60_000).wait_ms == UNKNOWN_LOAD_MS
    assert standing(model("cold", load_ms=300), STATUS, 60_000).wait_ms == 0


# --- what a body asks for -----------------------------------------------------------------------------------------


def test_needs_of_a_body() -> None:
    assert needs(read(body())) == Needs(frozenset({"chat"}), 8, None)
    assert needs(read(body(model="m"))).capabilities == frozenset()
    tool = {"type": "function", "function": {"name": "f"}}
    assert needs(read(body(tools=[tool], max_tokens=7))) == Needs(frozenset({"chat", "tools"}), 8, 7)
    assert needs(read(body(tools=[]))).capabilities == {"chat"}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    assert needs(read(body(model="auto:code", response_format=schema))).capabilities == {"code", "json"}
    assert needs(read(body(response_format={"type": "text"}))).capabilities == {"chat"}


def test_a_picture_needs_vision_and_is_not_counted_by_its_bytes() -> None:
    parts = [
        {"type": "text", "text": "x" * 400},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}},
    ]
    found = needs(read(body(messages=[{"role": "user", "content": parts}])))
    assert found == Needs(frozenset({"chat", "vision"}), IMAGE_TOKENS + 100, None)
    spoken = needs(read(body(messages=[{"role": "user", "content": 'write "image_url" into the file'}])))
    assert "vision" not in spoken.capabilities


def test_long_context_is_declared_or_seen() -> None:
    assert model("m", context_length=LONG_CONTEXT_TOKENS).can(LONG_CONTEXT)
    assert model("m", "long-context").can(LONG_CONTEXT)
    assert not model("m", context_length=LONG_CONTEXT_TOKENS - 1).can(LONG_CONTEXT)
