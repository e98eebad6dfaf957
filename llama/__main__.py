"""`python -m llama`."""

import signal
import sys
from importlib.util import find_spec

# Until `main` has set its handlers, Ctrl-C ends the process without a traceback from an import.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# The gateway can have an environment of its own (requirements-gateway.txt), without Cog.
needed = ["pydantic_settings", "typer"]
if sys.argv[1:2] not in (["gateway"], ["keys"], ["usage"], ["--help"], ["--version"]):
    needed.append("cog")
for package in needed:
    if find_spec(package) is None:
        sys.exit(
            f"{sys.executable} does not have the package {package}; run `make install`, and use "
            ".venv/bin/python -m llama"
        )

from llama.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
