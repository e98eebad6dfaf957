from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama import ROOT
from llama.errors import BadSettings
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status, Webhook
from llama.gateway.storage.migrations import MIGRATIONS
from llama.gateway.storage.storage import Storage
from llama.gateway.storage.store import Store
from llama.gateway.storage.usage_table import Column


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "gateway.sqlite3"


@pytest.fixture
def store(path: Path) -> Store:
    store = Store(path)
    store.keys.add("one", "hash of one")
    store.keys.add("two", "hash of two")
    return store


def created(store: Store, key_id: int = 1, **request: object) -> Prediction:
    prediction = Prediction(PredictionRequest(key_id, {"prompt": "Hi"}, "owner/name", **request))  # type: ignore[arg-type]
    store.insert([prediction])
    return prediction


def ended(store: Store, key_id: int = 1, status: Status = Status.SUCCEEDED) -> Prediction:
    prediction = created(store, key_id)
    prediction.start()
    prediction.metrics = {"input_token_count": 5, "output_token_count": 7}
    store.finish(prediction, Outcome(status))
    return prediction


def test_a_prediction_is_read_as_it_was_stored(store: Store) -> None:
    webhook = Webhook("https://example.com/hook", frozenset({"start", "completed"}))
    prediction = created(
        store, deployment="a/b", version="v" * 64, webhook=webhook, base_url="http://gateway", seconds=30.0
    )
    prediction.start()
    for piece in (
        "\x00",
        "é\u2028",
        "https://example.com",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ):
        prediction.add_piece(piece)
    prediction.add_logs("a line\n")
    prediction.metrics = {"input_token_count": 3, "finish_reason": "stop"}
    store.finish(prediction, Outcome(Status.FAILED, "E2001 GenerationFailed: no"))
    found = store.prediction(prediction.id)
    assert found is not None
    assert found.request == prediction.request
    assert found.pieces == ["\x00", "é\u2028", "h", "ttps://example.com", "😀"]
    assert (found.status, found.error) == (Status.FAILED, "E2001 GenerationFailed: no")
    assert (found.logs, found.metrics) == ("a line\n", prediction.metrics)
    assert (found.created_at, found.started_at) == (prediction.created_at, prediction.started_at)
    by_stream = store.prediction_of_stream(prediction.stream_token)
    assert by_stream is not None
    assert by_stream.id == prediction.id


def test_a_prediction_that_ends_twice_is_counted_once_and_keeps_its_first_end(store: Store) -> None:
    prediction = ended(store)
    store.finish(prediction, Outcome(Status.CANCELED))
    found = store.prediction(prediction.id)
    assert found is not None
    assert found.status is Status.SUCCEEDED
    (usage,) = store.usage.sums([Column.KEY])
    assert (usage.predictions, usage.input_tokens, usage.output_tokens) == (1, 5, 7)


def test_usage_is_counted_by_key_also_for_cancelled_and_failed_predictions(store: Store) -> None:
    for key_id, status in ((1, Status.SUCCEEDED), (1, Status.CANCELED), (2, Status.FAILED)):
        ended(store, key_id, status)
    counts = {usage.of: (usage.predictions, usage.output_tokens) for usage in store.usage.sums([Column.KEY])}
    assert counts == {("one",): (2, 14), ("two",): (1, 7)}


def test_the_saved_counts_of_a_running_prediction_survive_a_killed_process(store: Store, path: Path) -> None:
    prediction = created(store)
    prediction.metrics = {"input_token_count": 5, "output_token_count": 3}
    store.set_status(prediction.id, Status.PROCESSING)
    store.save_progress([prediction])
    ((found, progress_at),) = Store(path).unfinished()  # another connection, and the first is never closed
    assert found.status is Status.PROCESSING
    assert found.metrics == prediction.metrics
    assert progress_at is not None
    assert progress_at >= prediction.created_at


def test_data_is_removed_after_the_retention_time_but_not_the_counts(store: Store, path: Path) -> None:
    old, running = ended(store), created(store)
    assert store.remove_data(time.time() + 1) == 1
    found = store.prediction(old.id)
    assert found is not None
    assert found.data_removed
    assert (found.request.inputs, found.pieces, found.logs) == ({}, [], "")
    assert store.usage.sums([Column.KEY])[0].output_tokens == 7
    kept = store.prediction(running.id)
    assert kept is not None
    assert kept.request.inputs == {"prompt": "Hi"}
    assert store.remove_data(time.time() + 1) == 0


def test_removed_texts_are_no_longer_in_the_files(path: Path) -> None:
    store = Store(path)
    store.keys.add("one", "hash")
    prediction = Prediction(PredictionRequest(1, {"prompt": "a secret prompt"}, "owner/name"))
    store.insert([prediction])
    prediction.add_piece("a secret answer")
    store.finish(prediction, Outcome(Status.SUCCEEDED))

    def files() -> bytes:
        return b"".join(file.read_bytes() for file in path.parent.iterdir())

    assert b"a secret prompt" in files()
    assert b"a secret answer" in files()
    store.remove_data(time.time() + 1)
    assert b"a secret prompt" not in files()
    assert b"a secret answer" not in files()


def test_pages_go_through_a_keys_predictions_in_both_directions(store: Store) -> None:
    mine = [created(store, 1) for _ in range(5)]
    created(store, 2)
    first, more = store.page(1, limit=2)
    assert ([p.id for _, p in first], more) == ([mine[4].id, mine[3].id], True)
    second, more = store.page(1, before=first[-1][0], limit=2)
    assert ([p.id for _, p in second], more) == ([mine[2].id, mine[1].id], True)
    last, more = store.page(1, before=second[-1][0], limit=2)
    assert ([p.id for _, p in last], more) == ([mine[0].id], False)
    back, more = store.page(1, after=second[0][0], limit=2)
    assert ([p.id for _, p in back], more) == ([p.id for _, p in first], False)


def test_a_page_of_long_texts_has_fewer_predictions(store: Store) -> None:
    for _ in range(8):
        store.insert([Prediction(PredictionRequest(1, {"prompt": "long " * 200_000}, "owner/name"))])
    found, more = store.page(1, limit=100)
    assert 1 < len(found) < 8
    assert more


def test_pages_can_be_limited_by_time(store: Store) -> None:
    older, newer = created(store), created(store)
    newest, _ = store.page(1, created_after=newer.created_at, limit=5)
    oldest, _ = store.page(1, created_before=newer.created_at, limit=5)
    assert ([p.id for _, p in newest], [p.id for _, p in oldest]) == ([newer.id], [older.id])


def test_only_undelivered_webhooks_of_ended_predictions_are_due(store: Store) -> None:
    webhook = Webhook("https://example.com", frozenset({"completed"}))
    running, delivered, due = (created(store, webhook=webhook) for _ in range(3))
    created(store, webhook=Webhook("https://example.com", frozenset({"start"})))
    for prediction in (delivered, due):
        store.finish(prediction, Outcome(Status.SUCCEEDED))
    store.webhook_delivered(delivered.id)
    assert [p.id for p in store.undelivered()] == [due.id]
    assert running.id in [p.id for p, _ in store.unfinished()]


def test_the_name_of_a_revoked_key_can_be_used_again(store: Store) -> None:
    with pytest.raises(ValueError, match="exists"):
        store.keys.add("one", "another hash")
    assert store.keys.revoke("one")
    assert not store.keys.revoke("one")
    again = store.keys.add("one", "another hash")
    assert again.id == 3
    assert [bool(stored.revoked_at) for stored in store.keys.all()] == [True, False, False]


def test_only_the_owner_can_read_the_file(store: Store, path: Path) -> None:
    for file in path.parent.glob("gateway.sqlite3*"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0


def test_a_database_of_a_newer_gateway_is_refused(path: Path) -> None:
    Store(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(BadSettings, match="upgrade the gateway"):
        Store(path)


def test_a_file_that_is_no_database_is_refused_and_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(BadSettings, match=r"cannot be opened \(file is not a database\)"):
        Store(path)
    assert path.read_bytes() == b"not a database" * 100


def test_many_processes_can_make_the_file_at_the_same_time(path: Path) -> None:
    code = (
        "import sys, pathlib; from llama.gateway.storage.store import Store; Store(pathlib.Path(sys.argv[1]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, errors


def test_a_second_gateway_on_the_same_file_is_refused(path: Path) -> None:
    first = Storage(path)
    link = path.with_name("link.sqlite3")
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(BadSettings, match="another gateway uses the database"):
            Storage(name)
    first.close()
    Storage(path).close()


def test_a_call_whose_caller_is_cancelled_is_still_carried_out(path: Path) -> None:
    storage = Storage(path)

    async def cancelled_call() -> None:
        def slowly(store: Store) -> None:
            time.sleep(0.2)
            store.set_fact("done", "yes")

        task = asyncio.create_task(storage.run(slowly))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await storage.run(lambda store: store.fact("done")) == "yes"

    asyncio.run(cancelled_call())
    storage.close()
