"""The scripts that admit, bind, settle and restore: each one atomic step in Redis, timed by its clock alone.

Their text is in `scripts/`. A script reads each scope once, whatever it comes to, and writes it once: most of what a
call costs Redis is the number of commands in it.

Keys, all below `hr:lim:`. A `ref` is `tenant:request_id`, a scope `key:…`, `app:…` or `model:…`.

| key | holds |
|---|---|
| `r:<ref>` | a reservation, packed: state, microsecond, month, tokens, whole, pico, completion, model, scopes (lines), and for each whether it has a window |
| `pending` | ref -> microsecond at which a reservation that is not bound yet is gone |
| `bound` | ref -> microsecond at which it was bound; only its terminal ends it |
| `s:<scope>` | `open`: requests without a terminal; `held:<month>`: money reserved, `whole pico`; of its window: `requests`, `tokens`, `oldest` (no request in it is older), `newest`, `ends` (nothing in it counts after this, in microseconds) |
| `w:<scope>` | the requests of the last 60 s: `ref:tokens` -> microsecond of admission |
| `spent:<month>` | scope -> money settled: `whole pico` |
| `log` | partition of `inference.log` -> next offset to settle |
| `whole` | layout of these keys, and `run_id` of the server on which all of them are known to be complete |

States of a reservation: `p`ending, `a`ccepted by the brokers, `r`outed, `d`one; `x` is refused by the router, and then
holds the answer in place of the rest. `s:` and `w:` of a scope with nothing open go two minutes after its last admission.
"""  # noqa: E501 - a table

from __future__ import annotations

from pathlib import Path

PREFIX = "hr:lim:"
PENDING_US = 10_000_000
"""A reservation whose request the brokers have not taken within this time is gone."""

_SCRIPTS = Path(__file__).parent / "scripts"
_COMMON = (_SCRIPTS / "common.lua").read_text()


def _script(name: str) -> str:
    return _COMMON + (_SCRIPTS / f"{name}.lua").read_text()


ADMIT = _script("admit")
"""Admit a request against all its scopes, or none.

ARGV: ref, mode (`reserve` by an ingress, `route` by the router, `restore` by a rebuild, of what was routed, and
`restore accepted`, of what was not: without checks), month or ''
for that of now, tokens, whole, pico, completion, model, how long it stays pending (µs), when it was accepted (µs; of
`restore`), how long a refusal is remembered (ms), then of each scope: name, rpm, tpm, concurrency, whole, pico.
Returns verdict, now, month, state, model, completion, the refusal's limit, scope, most, left and retry (µs; -1 never,
-2 next month), then, but for `route`, of each scope: requests and tokens in its window, and µs until it is empty.
"""

BIND = _script("bind")
"""The brokers have the request: its reservation has no expiry any more. ARGV: ref."""

CANCEL = _script("cancel")
"""Nothing was published: a pending reservation is gone as if it had not been. ARGV: ref."""

SETTLE = _script("settle")
"""Charge what deciding terminals came to and give back what was reserved; each offset of the log counts once.

ARGV: partition, the offset from which on everything was read, the next one to read, then of each terminal: offset,
ref, tokens, whole, pico, month, scopes that pay (lines), how long it is remembered (ms).
"""

REAP = _script("reap")
"""Give back a reservation whose terminal was settled before it was made. ARGV: ref, how long it is remembered (ms)."""

OPEN = _script("open")
"""Reservations: how many are pending and bound, and those bound for longest. ARGV: µs at least, how many at most."""

STANDING = _script("standing")
"""What is used now. ARGV: scopes. Returns now, month, then of each: requests, tokens, open, spent, held."""

STATE = _script("state")
"""Whether it is whole, the server's time (µs), and the offsets of the log."""

CLEAR = _script("clear")
"""Forget keys that are not known to be complete. ARGV: keys, at most some thousands."""

REFILL = _script("refill")
"""Put a request into windows. ARGV: ref, microsecond, tokens, scopes."""

FLIP = _script("flip")
"""Put a month's spend and the offsets that it was counted to into force, together, and say that all is complete.

ARGV: key of the spend, month, count of partitions, then `partition offset` of each.
"""

INVALIDATE = (_SCRIPTS / "invalidate.lua").read_text()
"""Let it all be made anew."""
