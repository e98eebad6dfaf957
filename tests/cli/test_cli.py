"""`python -m llama` as a person runs it: real processes, a real small model."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import LLAMA_2_TOKENIZER, SHARED, needs_embedded, needs_llama_2_tokenizer
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

import llama
from llama import ROOT
from llama.cli.main import app
from llama.serving.schema import input_properties, openapi_schema
from predict import Predictor

COMMAND = [sys.executable, "-m", "llama"]
INSTALLED = Path(sys.executable).with_name("llama-cog")


def environment(weights: Path | None, **more: str) -> dict[str, str]:
    return {**os.environ, "LLAMA_WEIGHTS": str(weights or ""), **more}


def run(*arguments: str, weights: Path | None, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(weights),
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_llama_2_tokenizer
def test_tokenize_gives_the_golden_ids_with_the_tokenizer_alone() -> None:
    lines = (SHARED / "golden_dialogs.jsonl").read_text("utf-8").splitlines()
    result = run("tokenize", weights=LLAMA_2_TOKENIZER, text="\n".join(lines))
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [p["token_ids"] for p in printed] == [json.loads(line)["ids"] for line in lines]
    assert all(p["text"].startswith("<s>[INST] ") for p in printed)


def test_tokenize_prints_ids_or_an_error_for_every_line(llama_folder: Path) -> None:
    lines = [
        '{"prompt": "Hi!", "system_prompt": ""}',
        "",
        '{"prompt": ""}',
        "no json",
        "[1]",
        '{"prompt": 5}',
        '{"prompt": "a", "temperature": 9}',
        '{"prompt": "a", "min_new_tokens": 9, "max_new_tokens": 8}',
        '{"prompt": "\\ud800 half a pair", "unknown": true}',
        json.dumps({"prompt": "word " * 100_000}),
    ]
    result = run("tokenize", weights=llama_folder, text="\n".join(lines))
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    codes = [p["error"].split()[0] if "error" in p else "ids" for p in printed]
    assert result.returncode == 1  # some lines have errors
    assert codes == ["ids", "E1001", "E1000", "E1000", "E1000", "E1000", "E1101", "ids", "E1002"]
    assert result.stderr == "line 9: the unknown input unknown is ignored\n"
    assert printed[0]["text"] == "<s>[INST] Hi! [/INST]"
    assert printed[0]["token_ids"][0] == 1


@needs_embedded
def test_tokenize_reports_a_prompt_without_tokens_and_continues() -> None:
    lines = ['{"prompt": "<s>", "prompt_template": "{prompt}"}', '\ufeff{"prompt": "Hi!"}']
    result = run("tokenize", weights=None, text="\n".join(lines))
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["error"].startswith("E1001 PromptRequired: the formatted prompt has no tokens")
    assert second["token_ids"]


def test_tokenize_names_a_config_json_that_it_cannot_read(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "damaged")
    for written in ('{"max_position_embeddings": "many"}', "{"):
        (folder / "config.json").write_text(written)
        result = run("tokenize", weights=folder, text='{"prompt": "Hi!"}')
        assert (result.returncode, result.stdout) == (1, "")
        assert re.match(
            r"E3002 BadConfig: .*config\.json .*; (copy .* again|use a model .*)$", result.stderr.strip()
        )


def test_complete_prints_the_answer_and_nothing_else(llama_folder: Path) -> None:
    options = ["-i", "temperature=0", "-i", "max_new_tokens=12", "-i", "stop_sequences="]
    first = run("complete", "Hi!", *options, weights=llama_folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    again = run("complete", *options, weights=llama_folder, text="Hi!")
    assert again.stdout == first.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["complete", "Hi!", "-i", "prompt=Ho!"],
            "E1000 InvalidInput: -i cannot set prompt; pass it to `complete` as the argument",
        ),
        (
            ["complete", "Hi!", "-i", "temprature=0"],
            "E1000 InvalidInput: -i takes NAME=VALUE, where NAME is one of system_prompt, ",
        ),
        (
            ["complete", "Hi!", "-i", "temperature=warm"],
            "E1000 InvalidInput: -i temperature: the value is not JSON; write a number, such as 0.7",
        ),
        (
            ["complete", "Hi!", "-i", f"seed={'9' * 5000}"],
            "E1000 InvalidInput: -i seed: the value is not JSON",
        ),
        (
            ["complete", "Hi!", "-i", f"messages={'[' * 100_000}"],
            "E1000 InvalidInput: -i messages: the value is not JSON",
        ),
    ],
)
def test_a_wrong_option_is_one_line_on_stderr(llama_folder: Path, arguments: list[str], line: str) -> None:
    result = run(*arguments, weights=llama_folder)
    assert result.returncode == 1
    assert result.stderr.startswith(line)
    assert result.stdout == ""


def test_a_missing_weights_folder_is_one_line_on_stderr(tmp_path: Path) -> None:
    result = run("complete", "Hi!", weights=tmp_path / "nowhere")
    assert result.returncode == 1
    assert "E3001 WeightsNotFound: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_one_line_on_stderr() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port), weights=None)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another address or port "
        "with --host and --port (make serve PORT=...)\n"
    )


def test_schema_writes_what_the_server_loads(llama_folder: Path) -> None:
    result = run("schema", weights=llama_folder)
    written = Path(result.stdout.strip())
    assert written == ROOT / ".cog" / "openapi_schema.json"
    assert json.loads(written.read_text("utf-8")) == json.loads(json.dumps(openapi_schema(Predictor.run)))


def read_until(stream: object, wanted: bytes) -> bytes:
    seen = b""
    while not seen.endswith(wanted):
        byte = os.read(stream.fileno(), 1)  # type: ignore[attr-defined]
        assert byte, f"the output ended before {wanted!r}: {seen!r}"
        seen += byte
    return seen


def test_chat_keeps_the_conversation_when_an_answer_is_interrupted(llama_folder: Path) -> None:
    options = [
        "-i",
        "temperature=0",
        "-i",
        "min_new_tokens=1500",
        "-i",
        "max_new_tokens=1500",
        "-i",
        "debug=true",
    ]
    with subprocess.Popen(
        [*COMMAND, "chat", *options],
        cwd=ROOT,
        env=environment(llama_folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal sends Ctrl-C to all of a group
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        try:
            read_until(chat.stdout, b"> ")
            chat.stdin.write(b"first question\n")
            chat.stdin.flush()
            os.read(chat.stdout.fileno(), 1)  # the answer has begun
            os.killpg(chat.pid, signal.SIGINT)
            read_until(chat.stdout, b"> ")
            chat.stdin.write(b"second question\n")
            chat.stdin.flush()
            os.read(chat.stdout.fileno(), 1)
            os.killpg(chat.pid, signal.SIGINT)
            read_until(chat.stdout, b"> ")
            _, errors = chat.communicate(timeout=60)  # the end of input
        finally:
            chat.kill()
    assert chat.returncode == 0
    formatted = [line for line in errors.decode().splitlines() if line.startswith("formatted prompt: ")]
    assert len(formatted) == 2
    assert "second question" in formatted[1]
    # The second prompt contains the first turn and the part of its answer that was printed.
    assert formatted[1].index("first question") < formatted[1].index("second question")
    assert "</s><s>[INST] second question [/INST]" in formatted[1]


@pytest.mark.slow
def test_pack_writes_a_folder_that_serves(llama_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    result = run("weights", "pack", str(target), "--quantization", "int8", weights=llama_folder)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        0,
        "packed model.safetensors (1 of 1 files)",
    )
    assert result.stdout == f"{target} is complete; serve it with LLAMA_WEIGHTS={target}\n"
    answer = run("complete", "Hi!", "-i", "max_new_tokens=5", "-i", "min_new_tokens=5", weights=target)
    assert answer.returncode == 0
    assert "int8 on cpu" in answer.stderr
    again = run("weights", "pack", str(target), weights=llama_folder)
    assert again.returncode == 1
    assert again.stderr.startswith("E3000 BadSettings: ")


def test_pack_without_weights_says_what_to_set(tmp_path: Path) -> None:
    result = run("weights", "pack", str(tmp_path / "packed"), weights=None)
    assert (result.returncode, result.stderr.split(":")[0]) == (1, "E3000 BadSettings")


# --- help, version, the installed command


def plain(**more: str) -> dict[str, str]:
    """The environment without the variables that force or forbid colour."""
    colours = ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR")
    return {**{name: value for name, value in os.environ.items() if name not in colours}, **more}


def commands() -> list[list[str]]:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    weights = group.commands["weights"]
    assert isinstance(weights, TyperGroup)
    return [[], *([name] for name in group.commands), *(["weights", name] for name in weights.commands)]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_has_help_and_every_option_of_it_too(arguments: list[str]) -> None:
    command = get_command(app)
    for name in arguments:
        assert isinstance(command, TyperGroup)
        command = command.commands[name]
    assert command.help
    assert all(getattr(parameter, "help", None) for parameter in command.params), arguments
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


@pytest.mark.parametrize("command", ["chat", "complete", "predict"])
def test_the_help_lists_the_inputs_that_i_takes(command: str) -> None:
    result = CliRunner(env={"TERMINAL_WIDTH": "80"}).invoke(app, [command, "--help"])
    for name, schema in input_properties(Predictor.run).items():
        assert re.search(rf"^\W+{name}  +\w", result.stdout, re.MULTILINE) or name == "prompt"
        assert schema["description"].split()[0] in result.stdout


@pytest.mark.skipif(not INSTALLED.is_file(), reason="the project is not installed here (pip install -e .)")
def test_a_shell_completes_commands_and_the_names_of_inputs() -> None:
    for words, word, wanted in (
        ("llama-cog we", 1, "weights"),
        ("llama-cog chat -i temp", 3, "temperature="),
    ):
        result = subprocess.run(
            [INSTALLED],
            env=plain(_LLAMA_COG_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(word)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert wanted in result.stdout.splitlines(), result


@pytest.mark.skipif(not INSTALLED.is_file(), reason="the project is not installed here (pip install -e .)")
def test_the_installed_command_works_from_any_folder(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    version = subprocess.run(
        [INSTALLED, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert version.stdout == f"llama-2-70b-chat {llama.__version__}\n"
    # The server runs in the repository's folder; the weights are named relative to this one.
    options = ("-i", "max_new_tokens=3", "-i", "min_new_tokens=3", "--prompt", "Hi!")
    result = subprocess.run(
        [INSTALLED, "predict", *options],
        cwd=tmp_path,
        env=environment(Path("model"), LLAMA_CACHE_MEMORY="64MB", COG_MAX_CONCURRENCY="2"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "loaded model: " in result.stderr


def test_a_wrong_command_or_option_is_a_usage_error() -> None:
    for arguments, text in (
        (["nope"], "No such command 'nope'"),
        (["serve", "--port", "http"], "Input should be a valid integer"),
        (["plan", "--gpus", "8x5"], "'8x5' is not a list of sizes in GB"),
        (["plan", "--capability", "new"], "'new' is not a compute capability"),
        (["weights", "pack"], "Missing argument"),
        (["weights", "pack", "x", "--quantization", "int3"], "'int3' is not one of"),
    ):
        result = run(*arguments, weights=Path("/nowhere"))
        assert result.returncode == 2, arguments
        assert text in result.stderr
        assert "Traceback" not in result.stderr


def test_colour_is_for_terminals_that_want_it(tmp_path: Path) -> None:
    arguments = ["complete", "Hi!"]
    piped = run(*arguments, weights=tmp_path / "nowhere")
    assert "\x1b" not in piped.stderr
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        leader, follower = pty.openpty()
        with subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=plain(LLAMA_WEIGHTS=str(tmp_path / "nowhere"), TERM="xterm-256color", **more),
            stderr=follower,
        ) as process:
            os.close(follower)
            printed = read_terminal(leader)
        assert process.returncode == 1
        assert "E3001 WeightsNotFound:" in printed
        assert ("\x1b[1;31m" in printed) == coloured


def read_terminal(leader: int) -> str:
    printed = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an I/O error
        while more := os.read(leader, 4096):
            printed += more
    os.close(leader)
    return printed.decode()
