"""Who wrote a request: golden vectors, hostile headers, and that no bit of what is signed can be changed."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.senders import NotAuthentic, sender
from processors.router.admit import SKEW_MS, not_acceptable
from processors.router.route import MAX_AGE_MS
from processors.scheduler.role import REMEMBER_MS
from schemas.control import App
from schemas.ids import is_published_id, new_published_id, new_request_id, tenant_tag
from tests.support.publishing import KEY, PUBLIC, SEALS, Headers, Sample, publisher_headers, sealed, signed
from topics.catalogue import REQUESTS, is_published
from topics.envelope import CANCEL_TYPE, Envelope, EnvelopeError
from topics.signing import SEAL, SIGNATURE, Seals, canonical, is_signed, sign

VECTORS = json.loads((Path(__file__).parents[2] / "docs/examples/publishing/vectors.json").read_text())
APPS = {"shop": App("shop", "Shop", publishers={"orders-1": PUBLIC, "p1": PUBLIC})}
BODY = b'{"model":"m","messages":[]}'
ENVELOPE = Envelope("a" * 32, "/i", 0, "shop", "k", 3, "d", 60.0)


def pairs(headers: dict[str, str]) -> Headers:
    return [(name, value.encode()) for name, value in headers.items()]


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["name"])
def test_golden_vectors(vector: dict[str, object]) -> None:
    headers, body = pairs(vector["headers"]), str(vector["body"]).encode()  # type: ignore[arg-type]
    digest = hashlib.sha256(body).hexdigest()
    form = canonical(VECTORS["topic"], headers, digest)
    assert (digest, form.decode(), VECTORS["topic"]) == (vector["body_sha256"], vector["canonical"], REQUESTS.name)
    assert sign(KEY, form) == dict(headers)[SIGNATURE]
    assert is_signed(VECTORS["public_key"], form, dict(headers)[SIGNATURE])
    sent = sender(Sample(list(reversed(headers)), body), SEALS, APPS)
    assert sent.published is not None and (sent.refusal, sent.foreign) == ("", False)
    assert sent.published.cancels == (dict(headers)["ce_type"] == CANCEL_TYPE.encode())
    assert is_published(sent.envelope.reply_partition) and sent.envelope.digest == digest
    assert {name: tenant_tag(name) for name in VECTORS["tenant_tag"]} == VECTORS["tenant_tag"]


def record(kind: str) -> Sample:
    if kind == "sealed":
        return Sample(sealed(ENVELOPE, BODY), BODY)
    return Sample(signed(publisher_headers("shop", hr_stream="true"), BODY), BODY)


@settings(max_examples=300)
@given(st.sampled_from(["sealed", "signed"]), st.data())
def test_any_bit_flipped_in_headers_or_body_is_refused(kind: str, data: st.DataObject) -> None:
    sample = record(kind)
    covered = [at for at, (name, _) in enumerate(sample.headers) if name.startswith(("ce_", "hr-"))]
    where = data.draw(st.sampled_from([*covered, "body"]))
    form = canonical(REQUESTS.name, sample.headers, hashlib.sha256(sample.value or b"").hexdigest())
    old = sample.value if where == "body" else sample.headers[where][1]
    bit = data.draw(st.integers(0, len(old) * 8 - 1))
    new = bytearray(old)
    new[bit // 8] ^= 1 << bit % 8
    if where == "body":
        sample.value = bytes(new)
    else:
        sample.headers[where] = (sample.headers[where][0], bytes(new))
    if where != "body" and sample.headers[where][0] == SIGNATURE and is_signed(PUBLIC, form, bytes(new)):
        return  # The last character of base64 has bits that say nothing: it is the same signature.
    with pytest.raises(EnvelopeError):
        sender(sample, SEALS, APPS)


@given(st.sampled_from(["sealed", "signed"]), st.data())
def test_a_header_that_is_added_taken_away_or_renamed_is_refused(kind: str, data: st.DataObject) -> None:
    sample = record(kind)
    at = data.draw(st.sampled_from([at for at, (name, _) in enumerate(sample.headers) if name[:3] in ("ce_", "hr-")]))
    name, value = sample.headers[at]
    change = data.draw(st.sampled_from(["add", "twice", "empty", "drop", "rename"]))
    match change:
        case "add":
            sample.headers.append(("hr-new", b"x"))
        case "twice":
            sample.headers.append((name, value))
        case "empty":
            sample.headers[at] = (name, None)  # type: ignore[assignment]
        case "drop":
            del sample.headers[at]
        case "rename":
            sample.headers[at] = (name + "x", value)
    with pytest.raises(NotAuthentic):
        sender(sample, SEALS, APPS)


def test_lengths_keep_neighbours_apart() -> None:
    one = canonical("t", [("hr-a", b"b,1:c"), ("hr-d", b"")], "")
    assert one == b"20:headrace-signature-1,1:t,4:hr-a,5:b,1:c,4:hr-d,0:,0:,"
    assert one != canonical("t", [("hr-a", b"b"), ("hr-d", b"")], "")
    assert canonical("t", [("other", b"x"), ("hr-d", b""), ("hr-a", b"b,1:c"), ("hr-dl-at", b"1")], "") == one


@pytest.mark.parametrize(
    "headers",
    [
        publisher_headers("rival"),
        publisher_headers("shop", "nobody"),
        publisher_headers("shop", ce_type="headrace.inference.request.v2"),
        publisher_headers("shop", ce_id="A" * 32),
        publisher_headers("shop", ce_id=None),
        publisher_headers("shop", hr_tenant=None),
        publisher_headers("shop", hr_key_id=None),
        publisher_headers("shop", "k" * 201),
    ],
)
def test_who_cannot_be_told_is_not_authentic(headers: dict[str, str]) -> None:
    apps = APPS | {"rival": App("rival", "R", publishers={"q": PUBLIC})}
    with pytest.raises(NotAuthentic):
        sender(Sample(signed(headers, BODY), BODY), SEALS, apps)


def test_only_the_private_key_of_the_app_signs_and_only_a_shared_secret_seals() -> None:
    headers = publisher_headers("shop")
    with pytest.raises(NotAuthentic):
        sender(Sample(signed(headers, BODY, Ed25519PrivateKey.generate()), BODY), SEALS, APPS)
    with pytest.raises(NotAuthentic, match="key is not"):
        sender(Sample(signed(headers, BODY), BODY, key=b"other"), SEALS, APPS)
    other = Seals(["of another deployment, as long as it must be"])
    with pytest.raises(NotAuthentic):
        sender(Sample(sealed(ENVELOPE, BODY, other), BODY), SEALS, APPS)
    turned = Seals(["of another deployment, as long as it must be", "the secret of the tests' ingresses"])
    assert sender(Sample(sealed(ENVELOPE, BODY), BODY), turned, {}).published is None
    for reader in (other, turned):
        assert sender(Sample(sealed(ENVELOPE, BODY, turned), BODY), reader, {}).envelope.tenant == "shop"
    both = [*signed(headers, BODY), (SEAL, dict(sealed(ENVELOPE, BODY))[SEAL])]
    for proofs in (both, pairs(headers)):
        with pytest.raises(NotAuthentic, match="bears one of"):
            sender(Sample(proofs, BODY), SEALS, APPS)
    for secrets in ([], ["short"]):
        with pytest.raises(ValueError, match="at least 32"):
            Seals(secrets)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hr_reply_partition": "0"}, "may not write the header hr-reply-partition"),
        ({"hr_digest": "x"}, "hr-digest"),
        ({"hr_resume": "1"}, "hr-resume"),
        ({"hr_replay_of": "1"}, "hr-replay-of"),
        ({"ce_specversion": "0.3"}, "ce_specversion"),
        ({"ce_source": None}, "ce_source"),
        ({"ce_time": "2026-11-28T05:00:00"}, "ce_time"),
        ({"hr_deadline": "0"}, "hr-deadline"),
        ({"hr_deadline": "1801"}, "hr-deadline"),
        ({"hr_deadline": "inf"}, "hr-deadline"),
        ({"hr_priority": "first"}, "hr-priority"),
        ({"hr_stream": "yes"}, "hr-stream"),
    ],
)
def test_a_wrong_wish_of_a_known_publisher_can_be_answered(changes: dict[str, str | None], says: str) -> None:
    sent = sender(Sample(signed(publisher_headers("shop", **changes), BODY), BODY), SEALS, APPS)
    assert says in sent.refusal and not sent.foreign
    assert (sent.envelope.tenant, sent.envelope.key_id) == ("shop", "publisher:p1")


def test_ids_are_their_tenants_own_and_of_now() -> None:
    mine = new_published_id("shop")
    assert is_published_id(mine, "shop") and not is_published_id(mine, "rival")
    assert not is_published_id(new_request_id(), "shop")
    made = [new_published_id("shop") for _ in range(300)]
    assert len(set(made)) == len(made), "though many are of one millisecond"
    assert all(is_published_id(one, "shop") for one in made)
    assert not is_published_id(mine[:12] + "8" + mine[13:], "shop"), "a hash of an Idempotency-Key"
    now = int(time.time() * 1000)

    def error(request_id: str, at_ms: int = now) -> str | None:
        headers = signed(publisher_headers("shop", ce_id=request_id), BODY)
        found = not_acceptable(sender(Sample(headers, BODY), SEALS, APPS), at_ms)
        return found.param if found is not None else None

    assert error(mine) is None
    assert error(new_published_id("rival")) == error(new_request_id()) == "ce_id"
    made = int(mine[:12], 16)
    assert error(mine, made + SKEW_MS) is error(mine, made - SKEW_MS) is None
    assert error(mine, made + SKEW_MS + 1) == error(mine, made - SKEW_MS - 1) == "ce_id"


def test_a_recording_is_too_old_before_it_is_forgotten() -> None:
    assert 2 * SKEW_MS + MAX_AGE_MS < REMEMBER_MS


def test_an_envelope_reads_back_with_the_digest_of_the_body() -> None:
    sent = sender(Sample(sealed(ENVELOPE, BODY), BODY), SEALS, {})
    assert sent.envelope == msgspec.structs.replace(ENVELOPE, digest=hashlib.sha256(BODY).hexdigest())
