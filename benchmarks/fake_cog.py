"""A fake of Cog's server: real HTTP on loopback, with answers from a script instead of a model.

Runs in a thread of this process (`FakeCog`) or as a process of its own (`python -m benchmarks.fake_cog`).
Knows nothing about the gateway.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from benchmarks.fake_cog_app import CogApp, real_schema
from benchmarks.fake_cog_script import Body, Counts, Received, Rules, Script, Served
from benchmarks.web_thread import WebThread

__all__ = ["Body", "Counts", "FakeCog", "Received", "Rules", "Script", "Served", "real_schema"]


class FakeCog:
    """A context manager that runs the fake server in a thread.

    `script` and the other arguments are fields of `Rules`; the attribute `rules` has them.
    """

    def __init__(self, script: Script | Callable[[Body], Script] | None = None, **rules: Any) -> None:
        self.rules = Rules(script or Script(), **rules)
        self._app = CogApp(self.rules, self.die)
        self._web = WebThread(self._app)
        self.url = self._web.url

    def __enter__(self) -> Self:
        self._web.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._web.__exit__(kind, error, trace)

    @property
    def received(self) -> list[Received]:
        """All requests, in the order of their arrival."""
        return list(self._app.received)

    @property
    def predictions(self) -> list[Body]:
        """The inputs of all predictions that were requested, also of those that were refused."""
        return [r.inputs for r in self.received if (r.method, r.path) == ("POST", "/predictions")]

    @property
    def served(self) -> list[Served]:
        """All predictions that were accepted, in the order of their start."""
        return list(self._app.served)

    @property
    def counts(self) -> Counts:
        return self._app.counts

    def release(self) -> None:
        """Let all predictions go on that wait because of `Script.hold_after`."""
        self._web.call(self._app.release)

    def die(self) -> None:
        """Drop all connections and refuse new ones, as if the process had been killed."""
        self._app.dead = True
        self._web.drop_connections()

    def drain(self) -> None:
        """Refuse new connections and let the running predictions end, as Cog's server does at SIGTERM."""
        self._web.refuse_connections()

    def start_again(self) -> None:
        """Listen on the same port after `die` or `drain`."""
        self._web.__exit__(None, None, None)
        self._app.dead = False
        self._web = WebThread(self._app, port=self._web.port)
        self._web.__enter__()


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m benchmarks.fake_cog", description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--pieces", type=int, default=64, help="pieces of every answer")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds before every piece")
    arguments = parser.parse_args()
    script = Script([f" word{number}" for number in range(arguments.pieces)], gap=arguments.gap)
    app = CogApp(Rules(script, places=arguments.places))
    real_schema()
    uvicorn.run(app, port=arguments.port, lifespan="off", log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
