"""Runs measurements that may fail, so that one failed engine does not end a run of half an hour.

Knows names and reasons; knows nothing about what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from benchmarks.process import CannotDo

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

LeftOut = dict[str, dict[str, str]]
"""For each engine or other part of the run that was left out: the `scenario` and the `reason`."""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Attempts:
    """Measures named engines. An engine that has failed is not measured again."""

    def __init__(self, excluded: Mapping[str, str] | None = None) -> None:
        """`excluded` has the names of engines that are not measured at all, and the reasons."""
        self.left_out: LeftOut = {}
        for name, reason in (excluded or {}).items():
            self._leave_out(name, "start", reason)

    def attempt(
        self,
        name: str,
        scenario: str,
        measure: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Result | None:
        """Return what `measure` returns, or None if it fails, cannot be done, or has failed before.

        After CannotDo, only this measurement is left out. After any other error, the engine is left out of
        the rest of the run.
        """
        if name in self.left_out:
            return None
        try:
            return measure(*arguments, **options)
        except CannotDo as reason:
            log(f"{scenario}: {name} skipped ({reason})")
        except Exception as error:
            self._leave_out(name, scenario, str(error) or type(error).__name__)
        return None

    def _leave_out(self, name: str, scenario: str, reason: str) -> None:
        self.left_out[name] = {"scenario": scenario, "reason": reason}
        log(f"{scenario}: {name} is left out from now on ({reason})")
