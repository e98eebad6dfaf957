"""The commands on real terminals and machines: encodings, signals, full disks, proxies, and users without a home directory."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from server_clients import until
from small_models import VOCABULARY, needs_embedded, write_model

from llama import ROOT
from llama.cli.chat import Chat
from llama.errors import BadSettings
from llama.load import load_llama
from llama.serving.schema import input_defaults, write_schema
from llama.serving.server import free_port
from llama.settings import Settings
from llama.weights.embedded import embedded_folder
from predict import Predictor

COMMAND = [sys.executable, "-m", "llama"]
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux can end a child process when its parent is killed",
)


def environment(weights: Path | str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    small = {"LLAMA_CACHE_MEMORY": "64MB", "COG_MAX_CONCURRENCY": "2", "OMP_NUM_THREADS": "1"}
    return {**kept, **small, "LLAMA_WEIGHTS": str(weights), **more}


def run(
    *arguments: str, weights: Path | str, text: bytes = b"", **more: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(weights, **more),
        input=text,
        capture_output=True,
        timeout=120,
        check=False,
    )


def run_in_shell(arguments: str, weights: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose arguments may include redirections."""
    command = ["bash", "-c", f"exec {' '.join(COMMAND)} {arguments}"]
    return subprocess.run(command, cwd=ROOT, env=environment(weights), capture_output=True, check=False)


@pytest.fixture(scope="module")
def scripted_folder(
    llama_folder: Path, sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that answers with an emoji and a line separator, whatever it is asked."""
    folder = tmp_path_factory.mktemp("scripted")
    write_model(folder)
    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    answer = [processor.piece_to_id("▁a"), *(3 + byte for byte in "🦙\u2028b".encode()), 2]
    tensors = {
        name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
    # The embedding of each token of the answer makes the next one most likely. Every other token makes
    # the first one most likely.
    table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    table[:, 0] = 1
    for place, token in enumerate(answer):
        head[token, place] = 10
        table[token] = 0
        table[token, place + 1] = 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    assert len(table) == VOCABULARY
    return folder


GREEDY = ("-i", "temperature=0")
ENDLESS = ("-i", "min_new_tokens=1900", "-i", "max_new_tokens=1900")


# --- unusual characters, closed input and full disks


def test_an_answer_with_a_line_separator_passes_through_the_server_unchanged(scripted_folder: Path) -> None:
    result = run("predict", "--prompt", "x", *GREEDY, weights=scripted_folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == "a🦙\u2028b\n"
    # The log lines of setup are shown as plain text, not as the server's JSON.
    first, loaded, context, ready, last = result.stderr.decode().splitlines()
    assert first == "starting the server and loading the model ..."
    assert loaded == f"loaded {scripted_folder.name}: float32 on cpu"
    assert (context, ready[:11], last[:11]) == (
        "context 2048 tokens, room for 2 requests at once",
        "ready after",
        "first token",
    )


def test_characters_that_the_terminal_cannot_show_are_printed_as_question_marks(
    scripted_folder: Path,
) -> None:
    result = run("complete", "x", *GREEDY, weights=scripted_folder, PYTHONIOENCODING="latin-1")
    assert (result.returncode, result.stdout) == (0, b"a??b\n")


def test_chat_continues_after_characters_that_the_terminal_cannot_show(scripted_folder: Path) -> None:
    result = run("chat", *GREEDY, weights=scripted_folder, text=b"one\ntwo\n", PYTHONIOENCODING="latin-1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"a??b\n") == 2


def test_an_undecodable_line_fails_without_affecting_the_other_lines(llama_folder: Path) -> None:
    lines = b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n{"prompt": "b"}\n'
    result = run("tokenize", weights=llama_folder, text=lines, PYTHONIOENCODING="utf-8:strict")
    printed = result.stdout.splitlines()
    assert [b"token_ids" in line for line in printed] == [True, False, True]
    assert b"E1000 InvalidInput: line 2 is not valid utf-8" in printed[1]


def test_a_prompt_that_cannot_be_decoded_is_refused(llama_folder: Path) -> None:
    result = run("complete", weights=llama_folder, text=b"caf\xe9", PYTHONIOENCODING="utf-8:strict")
    assert result.returncode == 1
    assert result.stderr.startswith(b"E1000 InvalidInput: standard input is not valid utf-8")


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_a_closed_standard_input_is_reported_on_one_line(llama_folder: Path, command: str) -> None:
    result = run_in_shell(f"{command} <&-", llama_folder)
    assert result.returncode == 1
    assert result.stderr.startswith(b"E1001 PromptRequired: standard input is closed")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_reported_on_one_line(scripted_folder: Path) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        result = subprocess.run(
            [*COMMAND, "complete", "x", *GREEDY],
            cwd=ROOT,
            env=environment(scripted_folder),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        b"the output cannot be written (No space left on device)"
    )
    assert b"Traceback" not in result.stderr


# --- how a command ends


@contextmanager
def started(*arguments: str, weights: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(weights, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def server_and_worker(parent: int) -> list[psutil.Process]:
    """Cog's server and its worker, once both have started."""
    found: list[psutil.Process] = []

    def both() -> bool:
        found[:] = psutil.Process(parent).children(recursive=True)
        return len(found) >= 2

    until(both)
    return found


ENDS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_to_predict_ends_its_server_too(llama_folder: Path, number: int, code: int) -> None:
    with started("predict", "--prompt", "x", *ENDLESS, weights=llama_folder) as process:
        children = server_and_worker(process.pid)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert psutil.wait_procs(children, timeout=30)[1] == []


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_to_serve_ends_it_quietly(llama_folder: Path, number: int, code: int) -> None:
    port = free_port()
    with started("serve", "--port", str(port), weights=llama_folder) as process:
        assert process.stderr is not None
        lines = list[bytes]()
        while b"ready on http://localhost:" not in (line := process.stderr.readline()):
            assert line, lines
            lines.append(line)
        assert f":{port}; Ctrl-C stops the server".encode() in line
        children = server_and_worker(process.pid)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors + b"".join(lines)
    assert psutil.wait_procs(children, timeout=30)[1] == []


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (("--host", "localhost"), "http://localhost:"),
        (("--host", "::1"), "http://[::1]:"),
        (("--port", "0"), "http://localhost:"),
    ],
)
def test_serve_listens_on_the_address_that_it_prints(
    scripted_folder: Path, arguments: tuple[str, ...], url: str
) -> None:
    port = () if "--port" in arguments else ("--port", str(free_port()))
    with started("serve", *arguments, *port, weights=scripted_folder) as process:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith(b"ready on "):
            assert line
        address = line.decode().split()[2].rstrip(";")
        assert address.startswith(url)
        assert httpx2.get(f"{address}/health-check", trust_env=False).json()["status"] == "READY"
        process.terminate()
        process.communicate(timeout=60)


def test_predict_reports_a_server_that_dies_during_the_answer(llama_folder: Path) -> None:
    with started("predict", "--prompt", "x", *ENDLESS, weights=llama_folder) as process:
        server, _ = server_and_worker(process.pid)
        assert process.stdout is not None
        process.stdout.read(1)
        server.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"the server ended during the answer; run " in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize("command", ["complete x", "plan --gpus 85", "--version"])
def test_a_closed_standard_output_is_no_traceback(scripted_folder: Path, command: str) -> None:
    result = run_in_shell(f"{command} >&-", scripted_folder)
    assert result.returncode == 0
    assert b"Traceback" not in result.stderr


def test_a_closed_standard_error_sends_nothing_to_the_answer(scripted_folder: Path) -> None:
    result = run_in_shell(f"complete x {' '.join(GREEDY)} 2>&-", scripted_folder)
    assert (result.returncode, result.stdout.decode()) == (0, "a🦙\u2028b\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_output_that_cannot_be_written_is_a_failure(argument: str) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        result = subprocess.run(
            [*COMMAND, argument], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr


def test_metrics_are_printed_below_the_answer(scripted_folder: Path) -> None:
    more = ("-i", "log_performance_metrics=true")
    result = run("complete", "x", *GREEDY, *more, weights=scripted_folder)
    assert result.stdout.decode() == "a🦙\u2028b\n"
    assert b"\noutput_token_count: " in result.stderr
    result = run("chat", *GREEDY, *more, weights=scripted_folder, text=b"one\n")
    assert b"input_token_count: " in result.stderr


@LINUX
def test_killing_predict_ends_its_server(llama_folder: Path) -> None:
    with started("predict", "--prompt", "x", *ENDLESS, weights=llama_folder) as process:
        children = server_and_worker(process.pid)
        process.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_nohup_is_respected(llama_folder: Path) -> None:
    command = "trap '' HUP; exec " + " ".join([*COMMAND, "complete", "x", "-i", "max_new_tokens=3"])
    with subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=environment(llama_folder), stdout=subprocess.PIPE
    ) as process:
        time.sleep(1)
        os.kill(process.pid, signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_ctrl_c_while_the_model_is_being_loaded_ends_quietly(llama_folder: Path, delay: float) -> None:
    with started("complete", "x", *ENDLESS, weights=llama_folder) as process:
        assert process.stderr is not None
        while b"loaded" not in (line := process.stderr.readline()):
            assert line
        time.sleep(delay)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"terminate" not in errors
    assert b"Traceback" not in errors


def test_a_closed_output_pipe_ends_the_command_quietly(llama_folder: Path) -> None:
    with started("complete", "x", *ENDLESS, weights=llama_folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


# --- what is refused before anything starts


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("serve", "--port", "99999"),
            b"cannot listen on 127.0.0.1:99999 (a port is a number from 0 to 65535)",
        ),
        (("serve", "--port", "-1"), b"cannot listen on 127.0.0.1:-1 (a port is a number from 0 to 65535)"),
        (("complete", "x", "-i", "temperature=9"), b"E1000 InvalidInput: temperature is 9"),
        (("predict", "--prompt", "x", "-i", "temperature=9"), b"E1000 InvalidInput: temperature is 9"),
        (("predict", "--prompt", "x", "-i", "temperature=NaN"), b"E1000 InvalidInput: temperature is nan"),
        (("predict", "--prompt", ""), b"E1001 PromptRequired: "),
        (("predict", "--prompt", "caf\udce9"), b"E1000 InvalidInput: the prompt is not valid utf-8"),
        (("complete", "x", "-i", "system_prompt=caf\udce9"), b"E1000 InvalidInput: -i is not valid utf-8"),
        (("serve", "--host", "nowhere.invalid"), b"cannot listen on nowhere.invalid:5000 ("),
        (("complete", ""), b"E1001 PromptRequired: "),
        (("chat", "-i", "top_k=-5"), b"E1000 InvalidInput: top_k is -5"),
    ],
)
def test_invalid_arguments_are_reported_before_a_model_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], line: bytes
) -> None:
    result = run(*arguments, weights=tmp_path / "nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"COG_MAX_CONCURRENCY": "1000000000000"},
            b"E3000 BadSettings: COG_MAX_CONCURRENCY is '1000000000000'",
        ),
        (
            {"LLAMA_WEIGHTS": "", "LLAMA_PULL": "1"},
            b"E3000 BadSettings: LLAMA_PULL is 1, but LLAMA_WEIGHTS is not set",
        ),
        ({"LLAMA_WEIGHTS": "~/model", "HOME": ""}, b"E3001 WeightsNotFound: "),
    ],
)
def test_an_unusable_setting_is_reported_on_one_line(settings: dict[str, Any], line: bytes) -> None:
    for command in (("complete", "x"), ("serve", "--port", str(free_port())))[
        : 1 if "HOME" in settings else 2
    ]:
        result = run(*command, **{"weights": "", **settings})
        assert result.returncode == 1, result.stderr
        assert result.stderr.startswith(line)
        assert b"Traceback" not in result.stderr


def test_a_warning_about_an_unknown_setting_suggests_the_nearest_name(llama_folder: Path) -> None:
    more: dict[str, Any] = {"LLAMA_QUANTISATION": "nf4", "LLAMA_GATEWAY_KEY": "x", "LLAMA_ZZZ": "1"}
    result = run("tokenize", weights=llama_folder, **more)
    assert result.stderr.decode().splitlines() == [
        "LLAMA_QUANTISATION is not a known setting and is ignored; did you mean LLAMA_QUANTIZATION?",
        "LLAMA_ZZZ is not a known setting and is ignored",
    ]


# --- proxies

PROXIES = [
    {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    {"ALL_PROXY": "socks5://127.0.0.1:9"},
    {"NO_PROXY": "::1,localhost"},
    {"SSL_CERT_FILE": "/nowhere/ca.pem"},
]


@pytest.mark.parametrize("proxies", PROXIES, ids=lambda value: next(iter(value)))
def test_requests_to_our_own_server_ignore_proxies(scripted_folder: Path, proxies: dict[str, Any]) -> None:
    result = run("predict", "--prompt", "x", *GREEDY, weights=scripted_folder, **proxies)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"a")


@pytest.mark.parametrize(
    "proxies",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"HTTPS_PROXY": "gopher://127.0.0.1:9"},
        {"SSL_CERT_FILE": "/nowhere/ca.pem"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_the_variable_that_makes_downloads_impossible_is_named(
    tmp_path: Path, proxies: dict[str, Any]
) -> None:
    (tmp_path / "weights.txt").write_text("https://127.0.0.1:9/a.json a.json\n")
    manifest = str(tmp_path / "weights.txt")
    result = run(
        "weights", "pull", str(tmp_path / "w"), weights="", LLAMA_WEIGHTS_MANIFEST=manifest, **proxies
    )
    (name,) = proxies
    (line,) = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert line.startswith(
        f"E3000 BadSettings: the environment variable {name} cannot be used for downloads ("
    )
    assert line.endswith("; correct it or unset it")


# --- chat


class Screen:
    """A pseudo-terminal in which a command runs."""

    def __init__(self, *arguments: str, weights: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(COMMAND[0], [*COMMAND, *arguments], {**environment(weights), "TERM": "xterm"})
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, wanted: str, timeout: float = 60) -> str:
        """Return the output before `wanted`, and discard it together with `wanted`."""
        deadline = time.monotonic() + timeout
        while wanted not in self.text:
            assert time.monotonic() < deadline, f"{wanted!r} is not in {self.text!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
        seen, _, self.text = self.text.partition(wanted)
        return seen

    def close(self) -> int:
        self.type("\x04")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_in_a_terminal_supports_editing_and_pasting_and_shows_no_log_lines(
    scripted_folder: Path,
) -> None:
    screen = Screen("chat", *GREEDY, weights=scripted_folder)
    screen.wait_for("loading the model ...")
    screen.wait_for("Ctrl-C stops an answer; Ctrl-D or `exit` ends the chat.")
    screen.wait_for("> ")
    screen.type("helo\x1b[Dl\x1b[C!\r")  # one letter to the left, an l, and back
    seen = screen.wait_for("🦙")
    assert "^[[D" not in seen
    assert "..." in seen  # shown while the answer is awaited
    screen.wait_for("> ")
    screen.type("\x1b[A\r")  # recalls the previous line
    assert "hello!" in screen.wait_for("🦙")
    screen.wait_for("> ")
    screen.type("\x1b[200~one\ntwo\x1b[201~\r")
    screen.wait_for("🦙")
    rest = screen.wait_for("> ")
    assert "🦙" not in rest  # both lines get a single answer
    assert screen.close() == 0


def test_chat_reports_a_cut_answer_and_ends_at_exit(scripted_folder: Path) -> None:
    result = run("chat", *GREEDY, "-i", "max_new_tokens=3", weights=scripted_folder, text=b"one\nexit\ntwo\n")
    assert result.returncode == 0, result.stderr
    assert b"(the answer was cut after 3 tokens; raise the limit with `-i max_new_tokens=N`)" in result.stderr
    assert result.stdout.count(b"> ") == 2  # nothing was asked after exit


def test_an_answer_that_fills_the_context_says_so(llama_folder: Path) -> None:
    result = run("chat", *ENDLESS, weights=llama_folder, text=b"one\n", LLAMA_MAX_CONTEXT="128")
    assert result.returncode == 0, result.stderr
    assert re.search(rb"\(the answer was cut after \d+ tokens; the context is full\)", result.stderr)


def test_closing_the_terminal_during_an_answer_ends_the_chat_quietly(llama_folder: Path) -> None:
    screen = Screen("chat", *ENDLESS, weights=llama_folder)
    screen.wait_for("> ")
    screen.type("hello\r")
    screen.wait_for("...")
    os.close(screen.fd)
    assert os.waitstatus_to_exitcode(os.waitpid(screen.pid, 0)[1]) == 129


def test_keys_that_are_pressed_during_an_answer_are_neither_shown_nor_sent(llama_folder: Path) -> None:
    screen = Screen("chat", *ENDLESS, weights=llama_folder)
    screen.wait_for("> ")
    screen.type("hello\r")
    screen.wait_for("hello")
    screen.wait_for("...")  # the answer has been requested
    screen.type("zqzqzq\r")
    time.sleep(0.3)
    screen.type("\x03")
    assert "zqzqzq" not in screen.wait_for("> ")
    with pytest.raises(AssertionError, match="not in"):
        screen.wait_for("zqzqzq", timeout=0.5)
    assert screen.close() == 0


def test_a_dialogue_that_outgrows_the_context_loses_its_oldest_turns(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {**input_defaults(Predictor.run), "system_prompt": "", "temperature": 0, "max_new_tokens": 20}
    llama = load_llama(Settings(weights=llama_folder, max_context=128, cache_memory="8MB"))
    try:
        chat = Chat(llama, {**inputs, "messages": [{"role": "system", "content": "Be kind."}]})
        for question in range(12):
            chat._turn(f"question {question} of twelve")
        assert "the oldest message and its answer were dropped" in capsys.readouterr().err
        assert chat.messages[0]["role"] == "system"
        assert chat.messages[-2]["content"] == "question 11 of twelve"
        assert len(chat.messages) < 24
        before = list(chat.messages)
        chat._turn("far too long " * 200)
        assert "E1002 PromptTooLong" in capsys.readouterr().err
        assert chat.messages[:1] == before[:1]
    finally:
        llama.close()


# --- users and folders


def test_an_unchanged_schema_is_not_written_again() -> None:
    path = write_schema(Predictor.run, ROOT)
    before = path.stat().st_mtime_ns
    assert write_schema(Predictor.run, ROOT) == path
    assert path.stat().st_mtime_ns == before


def test_an_unknown_home_directory_is_reported_with_the_setting_to_change() -> None:
    for name, value in (("LLAMA_WEIGHTS", "~nobody-here/m"), ("LLAMA_CACHE_DIR", "~nobody-here/c")):
        settings: dict[str, Any] = {"weights": "", name: value}
        result = run("complete", "x", **settings)
        assert result.returncode == 1, result.stderr
        line = f"E3000 BadSettings: {name} is {value}, but that home directory is unknown"
        assert result.stderr.decode().startswith(line)


@LINUX
def test_an_unreadable_source_file_is_named_in_the_error(llama_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama_folder, tmp_path / "source")
    (source / "special_tokens_map.json").symlink_to("/proc/self/mem")  # reading it fails
    result = run("weights", "pack", str(tmp_path / "packed"), weights=source)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1].decode()
    assert line.startswith(f"E3003 BadCheckpoint: {source / 'special_tokens_map.json'} cannot be read (")


def test_an_unwritable_schema_is_reported_on_one_line(tmp_path: Path) -> None:
    (tmp_path / ".cog").write_text("a file in its place")
    with pytest.raises(BadSettings, match=r"^E3000 BadSettings: .*openapi_schema\.json cannot be written"):
        write_schema(Predictor.run, tmp_path)


@pytest.mark.slow
@needs_embedded
def test_a_conversion_that_was_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    code = "from pathlib import Path; from llama.weights.embedded import embedded_folder; embedded_folder(Path({!r}))"
    command = [sys.executable, "-c", code.format(str(tmp_path))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
        until(lambda: list(tmp_path.glob("*.part")))
        killed.kill()
    assert list(tmp_path.glob("*.part"))
    folder = embedded_folder(tmp_path)
    assert not list(tmp_path.glob("*.part*"))
    assert folder.stat().st_mode & 0o755 == 0o755
