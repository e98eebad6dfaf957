"""Sessions of the page: the token that a browser keeps in a cookie instead of the key.

A session is a signed token that names a key. It ends with the key, because the token depends on the key's
hash, or after 30 days. Nothing is stored for a session, so a copied token stays valid after the browser has
deleted its own. Knows tokens; knows nothing about the attributes of cookies, or about requests.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from itsdangerous import BadData, URLSafeTimedSerializer

from llama.gateway.access.auth import Keys, unauthenticated
from llama.gateway.storage.key_table import StoredKey
from llama.gateway.storage.keys import Key, same

SECONDS = 30 * 24 * 3600
"""How long a session lasts."""

_SALT = "session-1"
"""Change it if the format of tokens changes, so that old ones are refused."""


class Sessions:
    """Makes and checks tokens. All of them are signed with one secret; another secret ends all sessions."""

    def __init__(self, secret: str, keys: Keys) -> None:
        self._secret, self._keys = secret, keys

    @property
    def cookie(self) -> str:
        """The name of the cookie. It differs between gateways, because browsers send a cookie to all ports of
        a host: with one name, two gateways on a host would end each other's sessions."""
        return f"llama_session_{hashlib.sha256(self._secret.encode()).hexdigest()[:8]}"

    async def log_in(self, secret: str) -> str | None:
        """Return the token of a new session, or None if the gateway needs no key.

        Raises Problem 401 if no key in use has this secret. Failed attempts are not limited, because those of
        the API are not limited either, and a key that `keys add` made has 256 random bits.
        """
        if await self._keys.is_open():
            return None
        stored = self._keys.find(secret)
        if stored is None:
            raise unauthenticated("This key is wrong, or it was revoked.")
        return self._serializer().dumps([stored.key.id, self._fingerprint(stored)])

    def identify(self, cookies: Mapping[str, str]) -> Key | None:
        """Return the key of a request's session, or None if its cookies contain none.

        Call `Keys.is_open` just before: it reads the keys again. Raises Problem 401 if the session has ended
        or is not one of this gateway.
        """
        token = cookies.get(self.cookie)
        if token is None:
            return None
        try:
            key_id, fingerprint = self._serializer().loads(token, max_age=SECONDS)
        except BadData:
            key_id, fingerprint = None, ""
        for stored in self._keys.in_use():
            if stored.key.id == key_id and same(self._fingerprint(stored), fingerprint):
                return stored.key
        raise unauthenticated("The session has ended. Log in again.")

    def _serializer(self) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(
            self._secret, _SALT, signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"}
        )

    def _fingerprint(self, stored: StoredKey) -> str:
        """A value that changes with the key's hash. The hash itself would help to guess a key that a person
        chose."""
        value = hmac.digest(self._secret.encode(), (stored.hash or "").encode(), "sha256")
        return value.hex()[:16]
