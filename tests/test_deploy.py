"""The gateway's image and compose.yaml, without Docker: hadolint, Compose's own check, and their content.

The gateway runs here from exactly the files that the image gets.
"""

from __future__ import annotations

import configparser
import copy
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from server_clients import PATIENCE, events, exactly, tiny_server, until
from typer.main import get_command

from benchmarks.fake_cog import FakeCog
from llama import ROOT, __version__
from llama.cli.main import app as command_line
from llama.gateway.settings import GatewaySettings
from llama.gateway.start import GatewayServer
from llama.gateway.webhooks.webhooks import Webhooks
from llama.serving.schema import write_schema
from llama.serving.server import free_port
from llama.settings import Settings
from predict import Predictor

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "gateway.Dockerfile").read_text("utf-8")
IGNORE_FILE = DEPLOY / "gateway.Dockerfile.dockerignore"
EXAMPLE = (DEPLOY / ".env.example").read_text("utf-8")
GUIDE = (ROOT / "docs" / "deploy.md").read_text("utf-8")


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


# --- the image


def instructions(name: str) -> list[str]:
    """The arguments of all instructions of the Dockerfile with this name."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


@cache
def patterns(ignore_file: Path) -> list[str]:
    lines = ignore_file.read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_ignored(path: str, ignore_file: Path) -> bool:
    """Whether Docker leaves a file out of the build context: the last pattern that matches it, or one of its
    folders, decides."""
    parents = ["/".join(path.split("/")[:count]) for count in range(1, path.count("/") + 2)]
    for pattern in reversed(patterns(ignore_file)):
        if any(matches(parent, pattern.removeprefix("!")) for parent in parents):
            return not pattern.startswith("!")
    return False


def matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(path.rpartition("/")[2], pattern.removeprefix("**/"))
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)


@cache
def context() -> list[str]:
    """The files that the image can get."""
    files = (path for path in (*ROOT.iterdir(), *(ROOT / "llama").rglob("*")) if path.is_file())
    names = (path.relative_to(ROOT).as_posix() for path in files)
    return [name for name in names if not is_ignored(name, IGNORE_FILE)]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder /app of the image."""
    folder = tmp_path_factory.mktemp("app")
    for arguments in instructions("COPY"):
        *sources, target = (word for word in arguments.split() if not word.startswith("--"))
        if "--from" in arguments or target.startswith("/"):
            continue
        for source in sources:
            found = [name for name in context() if name == source or name.startswith(f"{source}/")]
            assert found, f"{source} does not exist or is ignored"
            for name in found:
                inside = name.removeprefix(source).strip("/") if (ROOT / source).is_dir() else Path(name).name
                path = folder / target / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, path)
    return folder


def in_image(database: Path) -> dict[str, str]:
    """The environment of a container, with another database."""
    image = dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())
    image["PATH"] = os.environ["PATH"]
    return {**image, "HOME": str(database.parent), "LLAMA_GATEWAY_DATABASE": str(database)}


@contextmanager
def container(app: Path, arguments: list[str], environment: dict[str, str]) -> Iterator[Any]:
    """Run the entry point with these arguments."""
    entry = [sys.executable, *json.loads(instructions("ENTRYPOINT")[0])[1:]]
    process = subprocess.Popen([*entry, *arguments], cwd=app, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = [tool("hadolint"), str(DEPLOY / "gateway.Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_gateway_runs_from_the_files_of_the_image(app: Path, tmp_path: Path) -> None:
    environment = in_image(tmp_path / "gateway.sqlite3")
    with container(app, ["keys", "add", "alice"], environment) as process:
        assert process.wait(PATIENCE) == 0
    port = free_port()
    command = compose()["services"]["gateway"]["command"]  # it listens on all addresses, so it needs the key
    arguments = ["http://127.0.0.1:1" if word.startswith("http:") else word for word in command]
    check = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])
    check = [sys.executable, *(word.replace("8000", str(port)) for word in check[1:])]
    with container(app, [*arguments, "--port", str(port)], environment) as process:
        until(lambda: subprocess.run(check, capture_output=True, check=False).returncode == 0)
        page = httpx2.get(f"http://127.0.0.1:{port}/", trust_env=False)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 503
        process.terminate()
        assert process.wait(PATIENCE) == 143
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("command", ["gateway", "keys", "usage"])
def test_the_commands_of_the_image_need_no_cog(app: Path, command: str) -> None:
    code = f"""
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cog", "torch", "transformers"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
sys.argv = ["llama", {command!r}, "--help"]
runpy.run_module("llama", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=app, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_image_gets_no_file_that_it_does_not_need() -> None:
    found = context()
    assert {name.split("/")[0] for name in found} == {
        "LICENSE",
        "NOTICE",
        "requirements-gateway.txt",
        "llama",
    }
    for name in ("model", "torch_engine", "vllm_engine", "text", "prompt"):
        assert not any(file.startswith(f"llama/{name}/") for file in found)
    for name in (
        ".env",
        "deploy/.env",
        "weights/a.safetensors",
        "llama/cli/.env",
        "llama/gateway/x.sqlite3-wal",
    ):
        assert is_ignored(name, IGNORE_FILE), name
    assert is_ignored("llama/cli/__pycache__/x.pyc", IGNORE_FILE)


def test_keys_and_passwords_get_neither_into_the_models_image_nor_into_git() -> None:
    for name in (".env", "deploy/.env"):
        assert is_ignored(name, ROOT / ".dockerignore"), name
    assert "/deploy/.env" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_the_image_has_the_python_and_the_version_of_the_project() -> None:
    python = yaml.safe_load((ROOT / "cog.yaml").read_text("utf-8"))["build"]["python_version"]
    assert {base.split()[0] for base in instructions("FROM")} == {f"python:{python}-slim-trixie"}
    assert f'image.version="{__version__}"' in DOCKERFILE


def test_the_image_runs_as_a_numeric_user_that_is_not_root_and_without_a_shell() -> None:
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--owner {user.split(':')[0]} " in DOCKERFILE
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["python", "-m", "llama"]


# --- compose.yaml


def compose(
    *, environment: dict[str, str] | None = None, profiles: str = "*", folder: Path | None = None
) -> dict[str, Any]:
    """compose.yaml as Compose reads it, with the settings of .env.example. With a folder, the files that Compose
    finds there by itself."""
    command = [tool("docker-compose"), "--env-file", str(DEPLOY / ".env.example"), "--profile", profiles]
    command += [] if folder else ["--file", str(DEPLOY / "compose.yaml")]
    command += ["config", "--format", "json"]
    variables = environment or {}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def published(services: dict[str, Any]) -> set[str]:
    ports = ((name, port) for name, service in services.items() for port in service.get("ports", ()))
    return {f"{name} {port.get('host_ip', '')}:{port['published']}" for name, port in ports}


def test_only_the_gateway_is_published_and_only_on_loopback() -> None:
    assert published(compose(profiles="")["services"]) == {"gateway 127.0.0.1:8000"}
    everything = {"gateway 127.0.0.1:8000", "grafana 127.0.0.1:3000", "caddy :80", "caddy :443"}
    assert published(compose()["services"]) == everything
    moved = {"GATEWAY_ADDRESS": "0.0.0.0", "GATEWAY_PORT": "80"}
    assert published(compose(environment=moved, profiles="")["services"]) == {"gateway 0.0.0.0:80"}


def test_the_model_has_no_way_out_and_only_the_gateway_reaches_it() -> None:
    read = compose()
    (network,) = read["services"]["model"]["networks"]
    assert read["networks"][network]["internal"] is True
    assert [name for name, service in read["services"].items() if network in service["networks"]] == [
        "gateway",
        "model",
    ]


def test_the_gateway_trusts_a_network_in_which_only_caddy_is() -> None:
    read = compose()
    subnet = read["networks"]["proxy"]["ipam"]["config"][0]["subnet"]
    assert read["services"]["gateway"]["environment"]["LLAMA_GATEWAY_TRUSTED_PROXIES"] == subnet
    others = {
        name: set(service["networks"]) for name, service in read["services"].items() if name != "gateway"
    }
    assert [name for name, networks in others.items() if "proxy" in networks] == ["caddy"]
    # Their only common network, so that the gateway's name has one address.
    assert others["caddy"] & set(read["services"]["gateway"]["networks"]) == {"proxy"}
    assert "reverse_proxy gateway:8000\n" in (DEPLOY / "Caddyfile").read_text("utf-8")


def test_every_service_is_confined() -> None:
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert ":" in service["image"] or name in ("model", "gateway"), name
    gateway = compose()["services"]["gateway"]
    assert gateway["read_only"] is True
    assert instructions("USER") == [gateway["user"]]


def test_every_variable_of_compose_is_in_the_example_and_the_other_way_round() -> None:
    text = (DEPLOY / "compose.yaml").read_text("utf-8")
    used = set(re.findall(r"\$\{(\w+)", text))
    used |= set(re.findall(r"^      ([A-Z_]+):$", text, re.MULTILINE))  # passed on if it is set
    used |= set(re.findall(r"^    environment: ([A-Z_]+)$", text, re.MULTILINE))
    described = set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    assert used == described


def test_the_gateway_gets_every_setting_and_the_model_only_settings_that_exist() -> None:
    services = compose()["services"]
    settings = {f"LLAMA_GATEWAY_{name.upper()}" for name in GatewaySettings.model_fields}
    image = {pair.partition("=")[0] for line in instructions("ENV") for pair in line.split()}
    assert services["gateway"]["environment"].keys() | {"LLAMA_GATEWAY_DATABASE"} == settings
    assert {name for name in image if name.startswith("LLAMA_")} <= settings
    variables = {f.validation_alias or f"LLAMA_{n.upper()}" for n, f in Settings.model_fields.items()}
    assert services["model"]["environment"].keys() - {"HOME"} <= variables


def test_the_example_shows_the_defaults() -> None:
    shown = re.findall(r"^(#.*)\n#LLAMA_GATEWAY_(\w+)=(.+)$", EXAMPLE, re.MULTILINE)
    shown = [(name, value) for above, name, value in shown if "xample" not in above]
    assert len(shown) >= 5
    for name, value in shown:
        default = GatewaySettings.model_fields[name.lower()].default
        if name != "LOG_FORMAT":
            assert type(default)(value) == default, name
    assert f"#COG_MAX_CONCURRENCY={Settings.model_fields['max_concurrency'].default}\n" in EXAMPLE


def test_the_settings_of_the_example_are_accepted() -> None:
    lines = [
        line.lstrip("#").split("=")
        for line in EXAMPLE.splitlines()
        if re.match(r"#LLAMA_GATEWAY_\w+=.", line)
    ]
    values = {name.removeprefix("LLAMA_GATEWAY_").lower(): value for name, value in lines}
    assert GatewaySettings.model_validate(values).webhook_networks


def test_the_file_and_its_result_have_no_secret() -> None:
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|TOKEN", name):
                assert value is None or value.startswith("/run/secrets/"), name
    assert all(set(secret) <= {"name", "environment"} for secret in compose()["secrets"].values())


def test_the_files_that_are_mounted_exist() -> None:
    volumes = [v for service in compose()["services"].values() for v in service.get("volumes", ())]
    sources = [Path(volume["source"]) for volume in volumes if volume["type"] == "bind"]
    inside = [source for source in sources if source.is_relative_to(ROOT)]
    assert DEPLOY / "Caddyfile" in inside
    assert [source for source in inside if not source.exists()] == []


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / "monitoring" / path).read_text("utf-8"))


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where the files and folders of deploy/ are in the container, by their own names."""
    return {Path(v["source"]).name: v["target"] for v in service["volumes"] if v["type"] == "bind"}


def test_prometheus_and_grafana_find_their_files_and_each_other() -> None:
    services = compose()["services"]
    prometheus, grafana = services["prometheus"], services["grafana"]
    scraping = read_yaml("prometheus.yml")
    (scrape,) = scraping["scrape_configs"]
    assert scraping["rule_files"] == [mounts(prometheus)["alerts.yml"]]
    key = {"type": "Bearer", "credentials_file": prometheus["secrets"][0]["target"]}
    assert scrape["authorization"] == key
    assert scrape["static_configs"] == [{"targets": ["gateway:8000"]}]
    assert scrape.get("metrics_path", "/metrics") == "/metrics"
    assert prometheus["networks"].keys() <= services["gateway"]["networks"].keys()
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert prometheus["networks"].keys() <= grafana["networks"].keys()
    (provider,) = read_yaml("grafana/provisioning/dashboards/llama.yml")["providers"]
    for folder in ("datasources", "dashboards"):
        assert mounts(grafana)[folder] == f"/etc/grafana/provisioning/{folder}"
    assert mounts(grafana)["grafana-dashboard.json"].startswith(f"{provider['options']['path']}/")
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == grafana["secrets"][0]["target"]


def guides_override(service: str, folder: Path) -> dict[str, Any]:
    """compose.yaml with the guide's compose.override.yaml that adds this service, as Compose reads both."""
    blocks = re.findall(r"`deploy/compose.override.yaml`.*?```yaml\n(.*?)```", GUIDE, re.DOTALL)
    (block,) = (block for block in blocks if service in yaml.safe_load(as_plain_yaml(block))["services"])
    shutil.copy(DEPLOY / "compose.yaml", folder)
    (folder / "compose.override.yaml").write_text(block)
    return compose(folder=folder)


def as_plain_yaml(block: str) -> str:
    """Remove the tag that only Compose knows."""
    return block.replace("!override", "")


def test_the_guides_alertmanager_is_reached_by_prometheus_and_reaches_the_internet(tmp_path: Path) -> None:
    read = guides_override("alertmanager", tmp_path)
    alertmanager, prometheus = (read["services"][name] for name in ("alertmanager", "prometheus"))
    assert alertmanager["profiles"] == prometheus["profiles"]
    assert alertmanager["networks"].keys() & prometheus["networks"].keys() == {"monitoring"}
    assert [name for name in alertmanager["networks"] if not read["networks"][name].get("internal")]
    for name in ("restart", "cap_drop", "security_opt"):
        assert alertmanager[name] == prometheus[name]
    (lines,) = re.findall(r"```yaml\n(alerting:.*?)```", GUIDE, re.DOTALL)
    (target,) = yaml.safe_load(lines)["alerting"]["alertmanagers"]
    assert target == {"static_configs": [{"targets": ["alertmanager:9093"]}]}


def test_the_guides_file_for_two_servers_gives_each_its_gpu(tmp_path: Path) -> None:
    services = guides_override("model-2", tmp_path)["services"]
    one, two = (copy.deepcopy(services[name]) for name in ("model", "model-2"))
    ids = []
    for service in (one, two):
        (device,) = service["deploy"]["resources"]["reservations"].pop("devices")
        assert "count" not in device
        ids.append(device["device_ids"])
    assert ids == [["0"], ["1"]]
    assert one == two
    usual = compose()["services"]["gateway"]["command"]
    assert services["gateway"]["command"] == [*usual, "--server", "http://model-2:5000"]
    assert services["gateway"]["depends_on"].keys() == {"model", "model-2"}


CODES = {"READY": 0, "BUSY": 0, "STARTING": 1, "SETUP_FAILED": 1, "UNHEALTHY": 1, "DEFUNCT": 1}
"""The exit codes of a health check of the model, by the status of the server."""

PRELUDE = """
import os, time
os.kill = lambda number, signal: print(number, signal.name)
time.sleep = lambda seconds: None
"""
"""Signals are printed and not sent, because process 1 is another program here."""


def run_check(command: list[str], url: str) -> tuple[int, str, str]:
    """Run a health check of the model with the server at `url`. Returns its exit code and what it prints."""
    python, option, code = command
    assert (python, option) == ("python", "-c")
    assert code.count("5000") == 1
    code = PRELUDE + code.replace("5000", url.rpartition(":")[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"http_proxy": "http://127.0.0.1:1"},  # which it must not use
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def models_check() -> list[str]:
    command: list[str] = compose()["services"]["model"]["healthcheck"]["test"]
    assert command[0] == "CMD"
    return command[1:]


@pytest.mark.parametrize(("status", "code"), CODES.items())
def test_the_models_health_check_reads_the_status_and_ends_a_container_that_cannot_recover(
    status: str, code: int
) -> None:
    signals = "1 SIGTERM\n" if status in ("UNHEALTHY", "DEFUNCT") else ""
    with FakeCog(health=status) as cog:
        assert run_check(models_check(), cog.url) == (code, signals, "")


def test_a_model_that_recovers_gets_no_signal() -> None:
    *python, code = models_check()
    statuses = ["UNHEALTHY", "UNHEALTHY", "READY"]
    fake = f"import json; found = iter({statuses}); json.load = lambda _: {{'status': next(found)}}\n"
    with FakeCog() as cog:
        assert run_check([*python, fake + code], cog.url) == (0, "", "")


def test_a_model_that_does_not_respond_gets_no_signal() -> None:
    code, signals, error = run_check(models_check(), f"http://127.0.0.1:{free_port()}")
    assert (code, signals) == (1, "")
    assert "ConnectionRefusedError" in error


def test_a_server_whose_worker_was_killed_ends_after_the_signal_of_the_health_check(
    llama_folder: Path,
) -> None:
    write_schema(Predictor.run, ROOT)
    with tiny_server(llama_folder) as server:
        server.wait_until_ready()
        with closing(events(server, exactly(1900, prompt="Hello"))) as stream:
            assert any(name == "output" for name, _ in stream)
            (worker,) = children(server.process.pid)
            os.kill(worker, signal.SIGKILL)
            until(lambda: server.health()["status"] == "UNHEALTHY")
            code, signals, _ = run_check(models_check(), str(server.client.base_url).rstrip("/"))
            assert (code, signals) == (1, "1 SIGTERM\n")
            server.process.terminate()  # as tini does when it gets the signal
            assert server.process.wait(PATIENCE) == 0


def children(process: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def test_weights_that_are_not_set_are_an_error_that_says_what_to_do() -> None:
    command = [
        tool("docker-compose"),
        "--env-file",
        os.devnull,
        "--file",
        str(DEPLOY / "compose.yaml"),
        "config",
    ]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set it in deploy/.env to the folder with the weights" in done.stderr


def default_of(function: Any, name: str) -> float:
    return float(inspect.signature(function).parameters[name].default)


GRACE = default_of(GatewayServer.__init__, "grace") + default_of(Webhooks.close, "grace")
"""Seconds that a gateway needs to stop, at most."""


def test_the_service_of_systemd_starts_a_gateway_and_gives_it_time_to_stop() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "llama-gateway.service")
    service = unit["Service"]
    assert float(service["TimeoutStopSec"]) >= GRACE + 10
    python, *module, name, option, _ = service["ExecStart"].split()
    assert python.endswith(".venv-gateway/bin/python")
    assert (module, name) == (["-m", "llama"], "gateway")
    parameters = get_command(command_line).commands["gateway"].params  # type: ignore[attr-defined]
    assert option in {opt for parameter in parameters for opt in parameter.opts}
    database = service["Environment"].removeprefix("LLAMA_GATEWAY_DATABASE=")
    assert Path(database).parent == Path("/var/lib") / service["StateDirectory"]


def test_a_container_has_more_time_to_stop_than_the_gateway_takes() -> None:
    services = compose()["services"]
    assert services["gateway"]["stop_grace_period"] == "45s"
    assert GRACE + 10 <= 45
    assert services["caddy"]["stop_grace_period"] == "45s"
    assert "model" in services["gateway"]["depends_on"], "the gateway must stop first"
