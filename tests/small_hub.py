"""A small Hugging Face hub on loopback, that offers what `hf_hub_download` and hf-xet need.

The hub is one origin. Its CDN and its Xet storage are another one, which must never receive the hub's token.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import Self

from weights_server import Handler, Server

REPOSITORY = "meta-llama/Llama-2-70b-chat-hf"
COMMIT = "e9149a12809580e8602995856f8098ce973d1080"
XET_TOKEN = "token-of-the-xet-storage"
_CHUNK = 64 * 1024  # bytes in a chunk of a xorb; Xet allows up to 128 KiB


class SmallHub(Server):
    """`repository` has the files by name; `refused` maps a name to a status and an X-Error-Code. The inherited
    `steps` are also by name, and answer HEAD requests as well. The steps of `storage` are by path."""

    def __init__(self) -> None:
        super().__init__(handler=_HubHandler)
        self.storage = Server(handler=_StorageHandler)
        self.repository: dict[str, bytes] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self._large, self._xet = set[str](), set[str]()

    def __enter__(self) -> Self:
        super().__enter__()
        self.storage.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.storage.__exit__()

    def add(self, name: str, data: bytes, *, large: bool = False, xet: bool = False) -> None:
        """Add a file. A large one is redirected to the CDN; one in Xet is offered both ways."""
        self.repository[name] = data
        if large or xet:
            self._large.add(name)
            self.storage.files[f"/lfs/{name}"] = data
        if xet:
            self._xet.add(name)
            self.storage.files[f"/v1/reconstructions/{_xet_hash(name)}"] = self._reconstruction(name)
            self.storage.files[f"/xorb/{name}"] = xorb(data)

    def _reconstruction(self, name: str) -> bytes:
        """Xet's answer to how a file is put together: from all chunks of one xorb."""
        data, xorb_hash = self.repository[name], _xet_hash(f"xorb of {name}")
        chunks = {"start": 0, "end": -(-len(data) // _CHUNK)}
        fetch = {
            "range": chunks,
            "url": f"{self.storage.url}/xorb/{name}?Signature=s3cret",
            "url_range": {"start": 0, "end": len(xorb(data)) - 1},
        }
        terms = [{"hash": xorb_hash, "unpacked_length": len(data), "range": chunks}]
        answer = {"offset_into_first_range": 0, "terms": terms, "fetch_info": {xorb_hash: [fetch]}}
        return json.dumps(answer).encode()

    def respond(self, handler: Handler) -> None:
        path = handler.path.partition("?")[0]
        self.requests.append((path, {name.lower(): value for name, value in handler.headers.items()}))
        if "/xet-read-token/" in path:
            return handler.answer(200, self._xet_access(), b"")
        match = re.fullmatch(f"/{REPOSITORY}/resolve/[^/]+/(.+)", path)
        name = match[1] if match else ""
        if name in self.refused:
            code, error = self.refused[name]
            return handler.answer(code, {"X-Error-Code": error, "Content-Length": "0"}, b"")
        if name not in self.repository:
            return handler.answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"}, b"")
        if steps := self.steps[name]:
            return steps.pop(0)(handler, self.repository[name])
        return self._resolve(handler, name)

    def _xet_access(self) -> dict[str, str]:
        return {
            "X-Xet-Cas-Url": self.storage.url,
            "X-Xet-Access-Token": XET_TOKEN,
            "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
            "Content-Length": "0",
        }

    def _resolve(self, handler: Handler, name: str) -> None:
        data, headers = self.repository[name], {"X-Repo-Commit": COMMIT}
        if name in self._xet:
            route = f"{self.url}/api/models/{REPOSITORY}/xet-read-token/{COMMIT}"
            headers |= {"X-Xet-Hash": _xet_hash(name), "X-Xet-Refresh-Route": route}
        if name in self._large:
            headers |= {
                "Location": f"{self.storage.url}/lfs/{name}?Signature=s3cret",
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
                "Content-Length": "0",
            }
            return handler.answer(302, headers, b"")
        git_hash = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        headers |= {"ETag": f'"{git_hash}"', "Content-Length": str(len(data))}
        return handler.answer(200, headers, b"" if handler.command == "HEAD" else data)


class _HubHandler(Handler):
    def do_HEAD(self) -> None:  # noqa: N802
        self.server.server.respond(self)

    def do_GET(self) -> None:  # noqa: N802
        self.server.server.respond(self)


class _StorageHandler(Handler):
    def do_GET(self) -> None:  # noqa: N802
        if self.path.startswith("/v1/reconstructions/"):
            del self.headers["Range"]  # a range of the file, not of the response
        super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        """hf-xet's telemetry."""
        self.rfile.read(int(self.headers["Content-Length"]))
        super().do_GET()


def _xet_hash(name: str) -> str:
    """Any 64 digits: hf-xet does not compare them with the contents."""
    return hashlib.sha256(name.encode()).hexdigest()


def xorb(data: bytes) -> bytes:
    """Uncompressed chunks, each after its header: version, stored length, compression scheme, length."""
    chunks = bytearray()
    for begin in range(0, len(data), _CHUNK):
        chunk = data[begin : begin + _CHUNK]
        length = len(chunk).to_bytes(3, "little")
        chunks += b"\0" + length + b"\0" + length + chunk
    return bytes(chunks)
