"""A random secret in a file beside the database, so that a copy of the database does not contain it."""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

_SECRET = re.compile(rb"[A-Za-z0-9_-]{43}")  # 256 bits


def secret_beside(database: Path) -> str:
    """Return the secret of a database. If its file is missing or damaged, a new secret is created.

    Call it while no other process creates the secret. Afterwards, only the owner of the file can read it.
    Raises OSError if that fails.
    """
    path = Path(f"{os.path.realpath(database)}.session-secret")
    with suppress(FileNotFoundError):
        if _SECRET.fullmatch(found := path.read_bytes()):
            if stat.S_IMODE(path.stat().st_mode) & 0o077:  # a copy that was put back, for example
                path.chmod(0o600)
            return found.decode()
    secret, new = secrets.token_urlsafe(32), path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret)
    new.replace(path)
    return secret
