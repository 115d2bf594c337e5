"""Access tokens: JSON Web Tokens that say who signed in, in which session, for a quarter of an hour."""

from __future__ import annotations

import jwt
import msgspec

from headrace.errors import InvalidToken

ISSUER, AUDIENCE = "headrace", "headrace-api"
ALGORITHM = "HS256"
"""The only one: what a token's own header says is not asked."""
LIFE_S = 900
_REQUIRED = ["exp", "iat", "iss", "aud", "sub", "sid"]
MIN_SECRET_BYTES = 32
"""As long as the hash (RFC 7518, 3.2)."""


class Claims(msgspec.Struct, frozen=True):
    """What a token says."""

    sub: str
    """Id of the user."""
    sid: str
    """Id of the session."""
    exp: int
    iat: int


def is_token(text: str) -> bool:
    """Whether a bearer's text is a token rather than a key: keys have no dots before the second one of a JWT."""
    return text.startswith("eyJ") and text.count(".") == 2


class SignIn:
    """Issues and reads tokens under one secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def issue(self, user_id: str, session_id: str, *, now_s: float) -> str:
        """A token for `LIFE_S` seconds."""
        issued = int(now_s)
        claims = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": user_id, "sid": session_id, "iat": issued, "exp": issued + LIFE_S,
        }  # fmt: skip
        return jwt.encode(claims, self._secret, algorithm=ALGORITHM)

    def read(self, token: str, *, now_s: float) -> Claims:
        """What a token of ours says. Raises `InvalidToken`."""
        try:
            # The expiry is compared with the time that is passed in.
            found = jwt.decode(
                token, self._secret, algorithms=[ALGORITHM], audience=AUDIENCE, issuer=ISSUER,
                options={"require": _REQUIRED, "verify_exp": False, "verify_iat": False},
            )  # fmt: skip
            claims = msgspec.convert(found, Claims)
        except (jwt.InvalidTokenError, msgspec.ValidationError):
            raise InvalidToken("The access token is not one of ours.") from None
        if claims.exp <= now_s:
            raise InvalidToken("The access token has expired; POST /auth/refresh gives another one.")
        return claims
