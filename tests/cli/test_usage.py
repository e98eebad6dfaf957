"""The command `usage` and the budgets of `keys`, on a real database. test_keys.py runs processes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llama.cli.main import app
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.storage.storage import Storage
from llama.gateway.storage.store import Store


def run(database: Path, *arguments: str, **environment: str) -> Result:
    """Run a command in this process, which is faster than a process of its own."""
    return CliRunner().invoke(app, arguments, env={"LLAMA_GATEWAY_DATABASE": str(database), **environment})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    """A database with the usage of two keys on two days, while a gateway uses it."""
    path = tmp_path / "gateway.sqlite3"
    storage = Storage(path)
    store = Store(path)
    for name, day, input_tokens, output_tokens in (
        ("ann", "2026-10-31", 1_000_000, 2_000_000),
        ("ann", "2026-11-01", 10, 1),
        ("bob", "2026-11-01", 20, 2),
    ):
        key = store.keys.find(name) or store.keys.add(name, name)
        prediction = Prediction(PredictionRequest(key.id, {"prompt": "Hi"}, "meta/llama-2-70b-chat"))
        created = datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
        prediction.set_created_at(created)
        prediction.started_at = created + 1
        prediction.metrics = {"input_token_count": input_tokens, "output_token_count": output_tokens}
        store.insert([prediction])
        store.finish(prediction, Outcome(Status.SUCCEEDED, ended_at=created + 3.5))
    yield path
    store.close()
    storage.close()


def table(*arguments: str, database: Path) -> list[list[str]]:
    shown = run(database, "usage", *arguments)
    assert shown.exit_code == 0, shown.stderr
    return [line.split() for line in shown.stdout.splitlines()]


def test_usage_shows_a_line_per_key_and_a_total(database: Path) -> None:
    head, *lines = table(database=database)
    assert " ".join(head) == "KEY PREDICTIONS INPUT TOKENS OUTPUT TOKENS SECONDS DOLLARS"
    assert lines == [
        ["ann", "2", "1,000,010", "2,000,001", "5.0", "6.150009"],
        ["bob", "1", "20", "2", "2.5", "0.000018"],
        ["total", "3", "1,000,030", "2,000,003", "7.5", "6.150028"],
    ]


def test_usage_can_begin_at_a_day_and_be_split_by_day(database: Path) -> None:
    _, *lines = table("--by", "day", database=database)
    assert [line[0] for line in lines] == ["2026-10-31", "2026-11-01", "total"]
    _, *lines = table("--by", "day", "--by", "key", "--since", "2026-11-01", database=database)
    assert [line[:3] for line in lines[:-1]] == [["2026-11-01", "ann", "1"], ["2026-11-01", "bob", "1"]]


def test_csv_has_exact_prices_and_no_total(database: Path) -> None:
    shown = run(database, "usage", "--csv", "--by", "key", "--by", "model", LLAMA_GATEWAY_INPUT_PRICE="1.5")
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    assert rows[1] == {
        "key": "bob",
        "model": "meta/llama-2-70b-chat",
        "predictions": "1",
        "input_tokens": "20",
        "output_tokens": "2",
        "seconds": "2.500",
        "dollars": "0.0000355",
    }
    assert [row["dollars"] for row in rows] == ["7.00001775", "0.0000355"]


def test_without_usage_it_says_so(database: Path) -> None:
    shown = run(database, "usage", "--since", "2026-11-02")
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert shown.stderr == "nothing has been used since 2026-11-02\n"
    empty = run(database, "usage", "--csv", "--since", "2026-11-02")
    assert empty.stdout == "key,predictions,input_tokens,output_tokens,seconds,dollars\n"


def test_usage_of_a_missing_database_is_an_error_and_creates_none(tmp_path: Path) -> None:
    missing = tmp_path / "missing.sqlite3"
    refused = run(missing, "usage")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "there is no database" in refused.stderr
    assert not missing.exists()


@pytest.mark.parametrize("arguments", [("--since", "yesterday"), ("--since", "2026-02-30"), ("--by", "hour")])
def test_a_wrong_option_is_refused(database: Path, arguments: tuple[str, ...]) -> None:
    refused = run(database, "usage", *arguments)
    assert refused.exit_code == 2
    assert "Invalid value" in refused.stderr


def test_a_budget_is_set_changed_removed_and_listed(database: Path) -> None:
    def limits() -> list[str]:
        (line,) = (line for line in run(database, "keys", "list").stdout.splitlines() if "eve" in line)
        return line.replace("no limit", "-").split()[1:5]

    run(database, "keys", "add", "eve", "--monthly-dollars", "2.50", "--at-once", "4")
    assert limits() == ["-", "4", "-", "2.50"]
    run(database, "keys", "limit", "eve", "--monthly-tokens", "1000", "--monthly-dollars", "none")
    assert limits() == ["-", "4", "1000", "-"]
    run(database, "keys", "limit", "eve", "--at-once", "none", "--requests-per-minute", "60")
    assert limits() == ["60", "-", "1000", "-"]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much", "1e40", ""])
def test_a_budget_must_be_a_positive_number(database: Path, value: str) -> None:
    for option in ("--monthly-dollars", "--monthly-tokens"):
        refused = run(database, "keys", "limit", "ann", f"{option}={value}")
        assert refused.exit_code == 2
        assert "neither a positive number" in " ".join(refused.stderr.replace("│", " ").split())


def test_limit_needs_a_key_and_a_limit(database: Path) -> None:
    nothing = run(database, "keys", "limit", "ann")
    assert nothing.stderr.startswith("E3000 BadSettings: no limit is given; ")
    unknown = run(database, "keys", "limit", "nobody", "--at-once", "2")
    assert unknown.stderr.startswith("E3000 BadSettings: no key named nobody is in use; ")
    assert (nothing.exit_code, unknown.exit_code) == (1, 1)
