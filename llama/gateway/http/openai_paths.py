"""The first parts of the paths that only OpenAI's API has, without the leading `/v1`.

The routes refuse those that this gateway does not have, and problems below all of them have OpenAI's shape.
"""

from __future__ import annotations

_CHAT = "use POST /v1/chat/completions"
_NOTHING = "this gateway serves a chat model only"

OFFERED = ("chat", "completions")
NOT_OFFERED = {
    "assistants": _CHAT,
    "audio": _NOTHING,
    "batches": f"send the requests one by one: {_CHAT}",
    "containers": _NOTHING,
    "conversations": _CHAT,
    "embeddings": _NOTHING,
    "engines": _CHAT,
    "evals": _NOTHING,
    "fine_tuning": _NOTHING,
    "images": _NOTHING,
    "moderations": _NOTHING,
    "realtime": _CHAT,
    "responses": _CHAT,
    "threads": _CHAT,
    "uploads": _NOTHING,
    "vector_stores": _NOTHING,
    "videos": _NOTHING,
}
"""The values say what to do instead."""
