"""An engine for tests of the benchmark. Its argument is MODE@N: it fails in run N, where 0 is loading.

`benchmarks.process` runs this module as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.protocol import Request, Times, serve


class FakePeer:
    def __init__(self, model: str) -> None:
        self.versions = {"fake": "1.0"}
        self._mode, _, at = model.partition("@")
        self._runs_left = int(at)
        self._misbehave()

    def run(self, requests: Sequence[Request]) -> Times:
        self._runs_left -= 1
        self._misbehave()
        if self._runs_left == 0 and self._mode == "garbage":
            return [[float(index)] for index in range(len(requests) + 1)]
        return [[0.5 * (index + 1) for index in range(request.new_tokens)] for request in requests]

    def _misbehave(self) -> None:
        if self._runs_left != 0:
            return
        if self._mode == "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            print(f"child {child.pid}", file=sys.stderr, flush=True)
            time.sleep(600)
        elif self._mode == "dies":
            os._exit(3)
        elif self._mode == "raises":
            raise ValueError("no such tensor\nand more")
        elif self._mode == "cannot":
            raise NotImplementedError("too many requests")

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(FakePeer)
