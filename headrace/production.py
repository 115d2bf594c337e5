"""What a production start is refused for: secrets that are missing, short, or known from examples. Pure."""

from __future__ import annotations

from headrace.settings import Settings

MIN_SECRET, MIN_KEY, MIN_PASSWORD = 32, 20, 12
_KNOWN = ("change", "example", "secret", "default", "password", "admin", "test", "your", "headrace", "12345678")
"""What examples and defaults are made of; a secret that is little else is known to everybody."""


def faults(settings: Settings, role: str) -> list[str]:
    """Why `role` (or `up`) does not start with these settings: a sentence each, which says what to set."""
    if settings.env != "production":
        return []
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret is not None else None
    key = settings.admin_key.get_secret_value().strip() if settings.admin_key is not None else None
    password = settings.admin_password.get_secret_value() if settings.admin_password is not None else None
    seals = settings.ingress_secret.get_secret_value() if settings.ingress_secret is not None else ""
    made = "python3 -c 'import secrets; print(secrets.token_urlsafe(48))' makes one"
    found: list[str] = []
    if role == "ingress" and not secret:
        found.append(f"HEADRACE_JWT_SECRET is not set: production needs one of its own; {made}")
    elif secret and _weak(secret, MIN_SECRET):
        found.append(f"HEADRACE_JWT_SECRET must be random, {MIN_SECRET} characters or more; {made}")
    if any(_weak(one.strip(), MIN_SECRET) for one in seals.split(",") if one.strip()):
        found.append(f"HEADRACE_INGRESS_SECRET must be random, {MIN_SECRET} characters or more; {made}")
    if key and _weak(key.removeprefix("hr-"), MIN_KEY):
        found.append(f"HEADRACE_ADMIN_KEY must be random, {MIN_KEY} characters or more; {made}")
    if password and _weak(password, MIN_PASSWORD):
        found.append(f"HEADRACE_ADMIN_PASSWORD must be {MIN_PASSWORD} characters or more, and none from an example")
    if settings.admin_email and not password:
        found.append("HEADRACE_ADMIN_PASSWORD is not set: HEADRACE_ADMIN_EMAIL needs it")
    return found


def _weak(secret: str, length: int) -> bool:
    """Whether a secret is short, has hardly any different characters, or is made of words that examples have."""
    rest = secret.lower()
    for word in _KNOWN:
        rest = rest.replace(word, "")
    told = "".join(letter for letter in rest if letter.isalnum())
    return len(secret) < length or len(set(secret)) < 8 or len(told) < length // 2
