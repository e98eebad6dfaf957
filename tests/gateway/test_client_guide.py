"""The examples of `docs/clients.md`: each is run as it is printed, with the client versions that it names,
against a gateway, Cog's own server and the embedded model.

Only the address and the key are replaced. `make test-clients` installs the clients that `make install` leaves
out; without them, their examples are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from gateways import KEY, MODEL, Gateway
from node_clients import FOLDER as NODE_FOLDER
from node_clients import NodeClients

from llama import ROOT

ADDRESS, KEY_PLACEHOLDER = "http://localhost:8000", "YOUR_KEY"
ENVIRONMENTS = (Path(sys.prefix), ROOT / ".venv-clients", ROOT / ".venv-clients-2")
"""Some clients cannot be installed side by side."""
GUIDE = (ROOT / "docs" / "clients.md").read_text("utf-8")


class Example(NamedTuple):
    """A section of the guide with one program."""

    title: str
    language: str
    code: str
    versions: Mapping[str, str]
    """The packages that the text in front of the program names, and their versions."""


def examples() -> list[Example]:
    found = []
    for section in re.split(r"^###? ", GUIDE, flags=re.MULTILINE)[1:]:
        title, _, rest = section.partition("\n")
        parts = re.split(r"^```(\w+)\n(.*?)^```\n", rest, flags=re.MULTILINE | re.DOTALL)
        for text, language, code in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
            versions = dict(re.findall(r"`([@\w/.-]+)`\s(\d[\w.]*\w)", text))
            found.append(Example(title, language, code, versions))
    return found


EXAMPLES = examples()
EXPORTS = next(example.code for example in EXAMPLES if example.title == "Clients of Replicate's API")
CLIENTS = [e for e in EXAMPLES if e.title not in ("Clients of Replicate's API", "Webhooks")]
WEBHOOKS = [example for example in EXAMPLES if example.title == "Webhooks"]

# How often an example asks; llm-replicate has no temperature, so that its answer is random.
ANSWERS = {
    "Replicate Python 1.x": 2,
    "Replicate Python 2.x": 1,
    "Replicate JavaScript": 2,
    "LangChain with Replicate": 1,
    "LlamaIndex with Replicate": 1,
    "llm-replicate": 0,
    "curl with Replicate's API": 2,
    "OpenAI Python": 2,
    "OpenAI JavaScript": 2,
    "langchain-openai": 1,
    "LiteLLM": 1,
    "LlamaIndex with OpenAILike": 1,
    "llm": 1,
    "Vercel AI SDK": 2,
    "@langchain/openai": 1,
    "curl with OpenAI's API": 2,
}


@cache
def installed(environment: Path) -> Mapping[str, str]:
    """The distributions of a virtual environment; nothing if it does not exist."""
    python = environment / "bin" / "python"
    if not python.exists():
        return {}
    code = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], timeout=60))
    return found


def environment_for(example: Example) -> Path:
    """The environment with the versions that an example names. Skips the test if the clients are not
    installed."""
    for environment in ENVIRONMENTS:
        if example.versions.items() <= installed(environment).items():
            return environment
    if not all((environment / ".installed").exists() for environment in ENVIRONMENTS[1:]):
        pytest.skip(f"{', '.join(example.versions)}: not installed; `make test-clients` does it")
    pytest.fail(f"no environment has the versions that the guide names: {dict(example.versions)}")


class Runner:
    """Runs programs of the guide in an empty home directory."""

    def __init__(self, gateway: Gateway, home: Path) -> None:
        self._gateway, self._home = gateway, home

    def run(self, example: Example, *arguments: str, **variables: str) -> str:
        """Return what a program prints. `variables` are added to those that the guide exports."""
        environment = environment_for(example) if example.language != "js" else Path(sys.prefix)
        exports = dict(re.findall(r"^export (\w+)=(\S+)$", EXPORTS, re.MULTILINE)) | variables
        done = subprocess.run(
            [*self._command(example, environment), *arguments],
            cwd=self._home,
            env={
                **{name: self._filled_in(value) for name, value in exports.items()},
                "HOME": str(self._home),
                "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise litellm downloads a list of prices
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def _command(self, example: Example, environment: Path) -> list[str]:
        """Write the program into a file, and return the command that runs it."""
        file = self._home / f"example.{'mjs' if example.language == 'js' else example.language}"
        file.write_text(self._filled_in(example.code), "utf-8")
        if example.language == "js":
            self._link_clients(example)
            return ["node", str(file)]
        if example.language == "python":
            return [str(environment / "bin" / "python"), str(file)]
        return ["bash", "-eu", "-o", "pipefail", str(file)]

    def _filled_in(self, code: str) -> str:
        return code.replace(ADDRESS, self._gateway.url).replace(KEY_PLACEHOLDER, KEY)

    def _link_clients(self, example: Example) -> None:
        NodeClients()
        modules = NODE_FOLDER / "node_modules"
        for package, version in example.versions.items():
            assert json.loads((modules / package / "package.json").read_text("utf-8"))["version"] == version
        if not (self._home / "node_modules").exists():
            (self._home / "node_modules").symlink_to(modules)


@pytest.fixture
def runner(real_gateway: Gateway, tmp_path: Path) -> Runner:
    return Runner(real_gateway, tmp_path)


def by_title(title: str) -> Example:
    return next(example for example in CLIENTS if example.title == title)


def test_every_example_of_the_guide_is_expected() -> None:
    assert [example.title for example in CLIENTS] == list(ANSWERS)


@pytest.mark.parametrize("example", CLIENTS, ids=[example.title for example in CLIENTS])
def test_every_example_of_the_guide_answers(example: Example, runner: Runner) -> None:
    if example.title.startswith("curl") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    output = runner.run(example)
    assert output.strip()
    assert output.count("Paris") >= ANSWERS[example.title]


@pytest.mark.parametrize("title", ["Replicate Python 1.x", "Replicate Python 2.x"])
def test_replicates_python_clients_also_take_the_address_with_v1(title: str, runner: Runner) -> None:
    assert runner.run(by_title(title), REPLICATE_BASE_URL=f"{ADDRESS}/v1").count("Paris") == ANSWERS[title]


@pytest.mark.parametrize("title", ["OpenAI Python", "langchain-openai", "LiteLLM", "OpenAI JavaScript"])
def test_openais_clients_also_take_the_address_from_variables(title: str, runner: Runner) -> None:
    example = by_title(title)
    without = re.sub(r'"?(base_url|baseURL|api_base|api_key|apiKey)"?[=:] ?"[^"]+"(, )?', "", example.code)
    assert ADDRESS not in without
    assert KEY_PLACEHOLDER not in without
    variables = {"OPENAI_BASE_URL": f"{ADDRESS}/v1", "OPENAI_API_KEY": KEY_PLACEHOLDER}
    assert "Paris" in runner.run(example._replace(code=without), **variables)


# --- webhooks


class OneRequest(BaseHTTPRequestHandler):
    """Keeps the headers and the body of the request that came last."""

    received: tuple[dict[str, str], str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        OneRequest.received = ({name.lower(): value for name, value in self.headers.items()}, body)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def webhook(real_gateway: Gateway) -> tuple[dict[str, str], str]:
    """The headers and the body of a webhook of the gateway."""
    with HTTPServer(("127.0.0.1", 0), OneRequest) as server:
        server.timeout = 60
        response = real_gateway.client.post(
            f"/v1/models/{MODEL}/predictions",
            json={
                "input": {"prompt": "Name the capital of France.", "temperature": 0},
                "webhook": f"http://127.0.0.1:{server.server_port}/",
                "webhook_events_filter": ["completed"],
            },
        )
        assert response.status_code == 201, response.text
        server.handle_request()
    return OneRequest.received


CALLS = {
    "python": """
import json, sys
headers, body = json.loads(sys.argv[1])
try:
    print("".join(receive(headers, body)["output"]))
except Exception as error:
    print(type(error).__name__)
""",
    "js": """
const [headers, body] = JSON.parse(process.argv[2]);
try {
  console.log((await receive(headers, body)).output.join(""));
} catch (error) {
  console.log(error.message);
}
""",
}


@pytest.mark.parametrize("example", WEBHOOKS, ids=[example.language for example in WEBHOOKS])
def test_the_webhook_examples_accept_genuine_webhooks_only(
    example: Example, runner: Runner, webhook: tuple[dict[str, str], str]
) -> None:
    headers, body = webhook
    program = example._replace(code=example.code + CALLS[example.language])
    assert "Paris" in runner.run(program, json.dumps([headers, body]))
    refused = runner.run(program, json.dumps([headers, body.replace("Paris", "Rome")])).strip()
    assert refused in ("WebhookVerificationError", "wrong signature")


def test_the_guide_verifies_webhooks_in_both_languages() -> None:
    assert [example.language for example in WEBHOOKS] == ["python", "js"]
