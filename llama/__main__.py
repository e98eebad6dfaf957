"""`python -m llama`."""

import sys
from importlib.util import find_spec

for package in ("cog", "pydantic_settings", "typer"):
    if find_spec(package) is None:
        sys.exit(
            f"{sys.executable} does not have the package {package}; run `make install`, and use "
            ".venv/bin/python -m llama"
        )

from llama.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
