"""Runs JavaScript clients: installs what `tests/gateway/node` pins, and calls functions of its scripts.

Knows npm and processes. Knows nothing about the clients.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

FOLDER = Path(__file__).parent / "gateway" / "node"
_TIMEOUT = 240.0  # seconds


class NodeClients:
    """The installed clients. Skips the test if Node.js is not installed."""

    def __init__(self) -> None:
        if shutil.which("node") is None or shutil.which("npm") is None:
            pytest.skip("Node.js is not installed, so the JavaScript clients cannot run")
        with FileLock(FOLDER / ".lock"):  # the processes of one test run share the folder
            self._install()

    def _install(self) -> None:
        installed = FOLDER / "node_modules" / ".package-lock.json"
        if installed.exists() and installed.stat().st_mtime >= (FOLDER / "package-lock.json").stat().st_mtime:
            return
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        _run(command)

    def call(self, script: str, function: str, *arguments: str) -> Any:
        """Call a function that a script exports, and return its result. If it throws an error, the result
        has the members `error` (its class) and `message`."""
        source = f"""
            import {{ {function} }} from "./{script}";
            const result = await {function}(...process.argv.slice(1)).catch(
              (error) => ({{ error: error.constructor.name, message: String(error.message) }}),
            );
            console.log(JSON.stringify(result));
            process.exit(0);
        """
        command = ["node", "--input-type=module", "--eval", source, *arguments]
        return json.loads(_run(command))


def _run(command: list[str]) -> str:
    """Run a command in the folder and return what it prints."""
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
