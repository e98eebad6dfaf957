"""The documents compared with the code: inputs, errors, settings, commands, examples, speeds and links."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from gateways import Gateway
from pydantic.fields import FieldInfo
from small_models import needs_embedded

from benchmarks.gateway.report import markdown as gateway_markdown
from benchmarks.report import markdown, summary_table, targets_table
from llama import ROOT, __version__
from llama.errors import LlamaError
from llama.gateway.settings import PUBLISHED_VERSIONS, GatewaySettings
from llama.serving.schema import input_properties, write_schema
from llama.serving.server import CogServer, server_environment
from llama.settings import Settings
from predict import Predictor

DOCUMENTS = ["README.md", "CHANGELOG.md", "SECURITY.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def section(title: str, level: int = 2) -> str:
    """The text of a section of the reference, with its subsections."""
    mark = "#" * level
    _, _, rest = read("docs/reference.md").partition(f"\n{mark} {title}\n")
    assert rest, title
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table_rows(markdown_text: str) -> list[list[str]]:
    """The cells of all rows of Markdown tables whose first cell is code."""
    lines = markdown_text.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def code(value: object) -> str:
    return f"`{value}`"


# --- inputs, errors and settings of docs/reference.md


def bounds(schema: dict[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is None:
        assert most is None
        return ""
    return f"at least {least:g}" if most is None else f"{least:g} to {most:g}"


def test_the_reference_has_every_input_with_its_type_default_and_bounds() -> None:
    expected = [
        [
            code(name),
            p["type"],
            "unset" if p["default"] is None else code(json.dumps(p["default"])),
            bounds(p),
        ]
        for name, p in input_properties(Predictor.run).items()
    ]
    inputs, _, _ = section("Inputs").partition("\n### ")
    rows = table_rows(inputs)
    assert [row[:4] for row in rows] == expected
    deprecated = {name for name, p in input_properties(Predictor.run).items() if p.get("deprecated")}
    assert {row[0] for row in rows if row[4].startswith("Deprecated.")} == set(map(code, deprecated))


def error_classes(base: type[LlamaError] = LlamaError) -> Iterator[type[LlamaError]]:
    for error in base.__subclasses__():
        if "code" in vars(error):
            yield error
        yield from error_classes(error)


def test_the_reference_has_every_error_code_with_its_name() -> None:
    rows = table_rows(section("Errors"))
    assert [row[:2] for row in rows] == [[code(e.code), code(e.__name__)] for e in error_classes()]
    assert all(cell for row in rows for cell in row), "a cell is empty"


def variable(name: str, field: FieldInfo) -> str:
    return str(field.validation_alias or f"LLAMA_{name.upper()}")


def shown(default: object) -> str:
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return code(int(default))
    if default == PUBLISHED_VERSIONS:
        return "four versions of Llama 2 70B Chat on Replicate"
    if default == ():
        return "none"
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return code(default.relative_to(ROOT) if isinstance(default, Path) and default.is_absolute() else default)


def test_the_reference_has_every_setting_with_its_default() -> None:
    settings, _, others = section("Settings").partition("\n### Variables of other programs\n")
    rows = {row[0]: row for row in table_rows(settings)}
    assert len(rows) == len(table_rows(settings)), "a setting is listed twice"
    expected = {code(variable(name, f)): shown(f.default) for name, f in Settings.model_fields.items()}
    for name, f in GatewaySettings.model_fields.items():
        expected[code(f"LLAMA_GATEWAY_{name.upper()}")] = shown(f.default)
    assert {name: row[1] for name, row in rows.items()} == expected
    capacity = server_environment(5000)["COG_STREAM_HISTORY_CAPACITY"]
    assert f"sets it to {capacity}." in others


@pytest.mark.parametrize("name", ["engine", "dtype", "quantization", "distributed"])
def test_the_reference_has_every_value_of_a_setting(name: str) -> None:
    field = Settings.model_fields[name]
    (row,) = (r for r in table_rows(section("Settings")) if r[0] == code(variable(name, field)))
    values = get_args(field.annotation)
    assert values
    assert [value for value in values if code(value) not in " ".join(row[1:])] == []


# --- commands


def test_the_make_commands_of_the_documents_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    commands = {c for name in DOCUMENTS for c in re.findall(r"(?:`|\$ |=\S+ )make ([a-z-]+)", read(name))}
    assert commands >= {"predict", "serve", "test", "check"}
    assert commands <= targets


def documented_commands() -> set[str]:
    """`chat`, `weights pull`, ... of the documents."""
    pattern = r"python -m llama ((?:weights |keys )?[a-z]+)"
    found = {command for name in DOCUMENTS for command in re.findall(pattern, read(name))}
    return found | {row[0].strip("`") for row in table_rows(section("Commands"))}


def test_the_commands_of_the_documents_exist() -> None:
    commands = documented_commands()
    assert commands >= {"chat", "weights pull"}
    for command in sorted(commands):
        arguments = [sys.executable, "-m", "llama", *command.split(), "--help"]
        result = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False)
        assert result.returncode == 0, command


def test_the_plan_in_the_reference_is_what_the_command_prints() -> None:
    command = [sys.executable, "-m", "llama", "plan", "--gpus", "85"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"$ python -m llama plan --gpus 85\n{result.stdout}```" in section("Commands")


# --- calling the server, as the README says


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)


@needs_embedded
@pytest.mark.slow
def test_the_examples_of_the_readme_get_the_answers_that_it_shows(
    embedded_folder: Path, tmp_path: Path
) -> None:
    write_schema(Predictor.run, ROOT)
    with CogServer({"LLAMA_WEIGHTS": str(embedded_folder), "LLAMA_ENGINE": "torch"}) as server:
        server.wait_until_ready()
        open_gateway = Gateway([str(server.client.base_url)], tmp_path / "gateway.sqlite3", key=None)

        def run(command: list[str], text: str) -> str:
            text = text.replace("localhost:5000", f"127.0.0.1:{server.port}")
            if "localhost:8000" in text:
                text = text.replace("http://localhost:8000", open_gateway.url)
            bin_folder = str(Path(sys.executable).parent)
            path = os.pathsep.join([bin_folder, os.environ["PATH"]])
            environment = {**os.environ, "NO_PROXY": "127.0.0.1", "PATH": path}
            return subprocess.run(
                [*command, text], env=environment, capture_output=True, text=True, check=True
            ).stdout

        plain, streamed = (
            run(["bash", "-c"], match[1])
            for block in blocks("console")
            for match in re.finditer(r"^\$ (curl .*?\}\}')$", block, re.MULTILINE | re.DOTALL)
        )
        with open_gateway:
            openai, httpx2 = blocks("python")
            for python in (openai, httpx2):
                assert run([sys.executable, "-c"], python) == "The capital of France is Paris.\n"
            (replicate,) = (block for block in blocks("console") if "REPLICATE_BASE_URL" in block)
            assert run(["bash", "-c"], replicate.replace("$ ", "")).strip()
    body = json.loads(plain)
    assert "".join(body["output"]) == "The capital of France is Paris."
    assert f'"input_token_count":{body["metrics"]["input_token_count"]}, ...' in read("README.md")
    assert re.search(r'^event: output\ndata: \{"chunk":" ?\w+', streamed, re.MULTILINE)
    assert streamed.rpartition("event: ")[2].startswith("completed\n")


# --- speeds


def test_the_speeds_in_the_readme_are_the_measured_ones_and_no_missed_target_is_left_out() -> None:
    results = json.loads(read("benchmarks/results/cpu.json"))
    readme = read("README.md")
    assert summary_table(results) in readme
    missed = [target for target in results["targets"] if target["met"] is False]
    assert targets_table({"targets": missed}) in readme
    assert f"{len(missed)} of the {len(results['targets'])} targets were missed" in readme
    assert read("benchmarks/results/cpu.md") == markdown(results, "cpu")


def test_the_gateways_results_are_rendered_from_their_numbers() -> None:
    results = json.loads(read("benchmarks/results/gateway.json"))
    assert read("benchmarks/results/gateway.md") == gateway_markdown(results)
    missed = sum(not target["met"] for target in results["targets"])
    words = {3: "Three"}
    assert f"{words[missed]} of {len(results['targets'])} targets were missed" in read("docs/gateway.md")


def test_the_calculated_figures_in_the_architecture_are_those_of_the_report() -> None:
    report = json.loads(read("benchmarks/results/gpu_calculated.json"))["cases"]
    architecture = read("docs/architecture.md")
    for name, quantization in (("bfloat16", "none"), ("FP8", "fp8"), ("int8", "int8"), ("NF4", "nf4")):
        case = report[f"H100-{quantization}-bfloat16"]
        launches, total = case["decode_launches"]["32"], sum(case["traffic"]["mixed lengths"].values())
        row = f"| {name} | {launches:,} | {total / 1e9:.1f} GB | {total / case['bandwidth'] * 1e3:.1f} ms |"
        assert f"\n{row}\n" in architecture


def test_the_readme_names_the_cpu_that_was_measured() -> None:
    machine = json.loads(read("benchmarks/results/cpu.json"))["machine"]
    assert machine["cores"] == 2
    assert f"two cores of an {machine['processor']} with AVX512-BF16 and without AMX" in read("README.md")
    assert "avx512_bf16" in machine["instructions"]
    assert not any("amx" in name for name in machine["instructions"])


# --- links, versions and modules


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_of_a_document_has_a_target(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_the_newest_version_of_the_changelog_is_that_of_the_package() -> None:
    newest = re.search(r"^## \[([\d.]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert newest[1] == __version__


def test_the_architecture_names_every_module() -> None:
    text = read("docs/architecture.md")
    modules = {path.name for path in ROOT.glob("llama/**/*.py")} - {"__init__.py"}
    assert sorted(name for name in modules if name not in text) == []
