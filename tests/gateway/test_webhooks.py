"""Webhooks as real receivers on loopback get them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from typing import Any

import pytest
from standardwebhooks import Webhook as Verifier

from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status, Webhook
from llama.gateway.replicate.view import prediction_body
from llama.gateway.storage.keys import Key, new_webhook_secret
from llama.gateway.webhooks.delivery import Delivery
from llama.gateway.webhooks.outgoing import Outgoing
from llama.gateway.webhooks.webhooks import Webhooks

SECRETS = {1: new_webhook_secret(), 2: new_webhook_secret()}
ALL = frozenset({"start", "output", "logs", "completed"})
PATIENCE = 30.0


def key_of(key_id: int) -> Key:
    return Key(key_id, f"key {key_id}", webhook_secret=SECRETS[key_id])


@dataclass
class Received:
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.raw))

    def verify(self, key_id: int = 1) -> None:
        Verifier(SECRETS[key_id]).verify(self.raw, self.headers)


class Receiver(ThreadingHTTPServer):
    """Answers with each of `statuses` once, then with 200. While `held`, it does not answer at all."""

    daemon_threads = True

    def __init__(self, address: str) -> None:
        super().__init__((address, 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook?token=s3cret"
        self.statuses: list[int] = []
        self.received: list[Received] = []
        self.free = threading.Event()
        self.free.set()
        self.running = self.most_running = 0
        self.count = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with server.count:
            server.received.append(Received(headers, body))
            status = server.statuses.pop(0) if server.statuses else 200
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        server.free.wait(PATIENCE)
        with server.count:
            server.running -= 1
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiving(address: str = "127.0.0.1") -> Iterator[Receiver]:
    receiver = Receiver(address)
    threading.Thread(target=receiver.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield receiver
    finally:
        receiver.free.set()
        receiver.shutdown()
        receiver.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@dataclass
class Scene:
    webhooks: Webhooks
    settled: list[str] = field(default_factory=list)
    """The ids of predictions whose last webhook was accepted or given up."""

    def prediction(
        self, receiver: Receiver, events: frozenset[str] = ALL, key_id: int = 1, url: str | None = None
    ) -> Prediction:
        request = PredictionRequest(
            key_id,
            {"prompt": "Hi"},
            "meta/llama-2-70b-chat",
            webhook=Webhook(url or receiver.url, events),
            base_url="https://gateway.example",
        )
        return Prediction(request)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)

    async def until_settled(self, *predictions: Prediction) -> None:
        await self.until(lambda: {p.id for p in predictions} <= set(self.settled))


def play(
    scene: Callable[[Scene], Awaitable[None]],
    *,
    networks: str = "127.0.0.0/8",
    timeout: float = 10.0,
    at_once: int = 64,
    at_once_per_key: int = 16,
    at_once_per_host: int = 8,
    **timing: Any,
) -> list[str]:
    """Run an async scene with webhooks that may reach loopback. Returns the ids that were settled."""

    async def run() -> list[str]:
        sender = Outgoing([ip_network(networks)], timeout=timeout)
        settled: list[str] = []

        async def delivered(prediction_id: str) -> None:
            settled.append(prediction_id)

        timing.setdefault("interval", 0.02)
        timing.setdefault("retry_delays", (0.01, 0.01, 0.01))
        delivery = Delivery(sender, key_of, at_once, at_once_per_key, at_once_per_host)
        webhooks = Webhooks(delivery, prediction_body, delivered, **timing)
        try:
            await scene(Scene(webhooks, settled))
        finally:
            await webhooks.close(grace=0)
        return settled

    return asyncio.run(run())


def succeed(prediction: Prediction) -> None:
    prediction.end(Outcome(Status.SUCCEEDED))


def seen(receiver: Receiver) -> list[tuple[str, str, str]]:
    """Status, text and logs of all webhooks, in the order of their arrival."""
    bodies = [received.body for received in receiver.received]
    return [(body["status"], "".join(body["output"] or []), body["logs"]) for body in bodies]


def test_all_events_of_a_prediction_arrive_in_order_and_signed(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        p = s.prediction(receiver)
        s.webhooks.follow(p)
        await asyncio.sleep(0.05)
        assert receiver.received == []  # it waits in the queue
        p.start()
        await s.until(lambda: len(receiver.received) == 1)
        p.add_piece("Hello")
        await s.until(lambda: len(receiver.received) == 2)
        p.add_logs("a line\n")
        await s.until(lambda: len(receiver.received) == 3)
        p.add_piece(" world")
        await s.until(lambda: len(receiver.received) == 4)
        succeed(p)
        await s.until_settled(p)

    play(scene)
    assert seen(receiver) == [
        ("processing", "", ""),
        ("processing", "Hello", ""),
        ("processing", "Hello", "a line\n"),
        ("processing", "Hello world", "a line\n"),
        ("succeeded", "Hello world", "a line\n"),
    ]
    for received in receiver.received:
        received.verify()
        assert received.headers["content-type"] == "application/json"
        assert received.headers["user-agent"] == "llama-2-70b-chat"
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 5
    body = receiver.received[-1].body
    assert body["urls"]["get"] == f"https://gateway.example/v1/predictions/{body['id']}"


def test_a_body_is_signed_as_it_is_sent_whatever_it_contains(receiver: Receiver) -> None:
    text = 'é€😀 \u2028 \x00 "\\ \ud800'

    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"completed"}), key_id=2)
        p.start()
        p.add_piece(text)
        succeed(p)
        s.webhooks.follow(p)
        await s.until_settled(p)

    play(scene)
    (received,) = receiver.received
    received.verify(key_id=2)
    assert received.body["output"] == [text]
    with pytest.raises(Exception, match="signature"):
        received.verify(key_id=1)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ({"start"}, [("processing", "")]),
        ({"completed"}, [("succeeded", "abc")]),
        ({"start", "completed"}, [("processing", ""), ("succeeded", "abc")]),
        ({"output"}, [("processing", "a"), ("succeeded", "abc")]),
        ({"logs"}, [("processing", "a")]),
    ],
)
def test_only_the_events_that_were_asked_for_are_sent(
    receiver: Receiver, events: set[str], expected: list[tuple[str, str]]
) -> None:
    before_the_end = sum(status == "processing" for status, _ in expected)

    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset(events))
        s.webhooks.follow(p)
        p.start()
        await asyncio.sleep(0.05)
        p.add_piece("a")
        p.add_logs("x")
        await asyncio.sleep(0.05)
        await s.until(lambda: len(receiver.received) >= before_the_end)
        p.add_piece("b")
        p.add_piece("c")
        succeed(p)
        await s.until(lambda: len(receiver.received) >= len(expected))
        await asyncio.sleep(0.05)

    play(scene)
    assert [(status, text) for status, text, _ in seen(receiver)] == expected


def test_output_and_logs_are_sent_at_most_once_in_an_interval(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"output", "logs"}))
        s.webhooks.follow(p)
        p.start()
        for number in range(200):
            p.add_piece(f"{number} ")
            p.add_logs(".")
            await asyncio.sleep(0.001)
        await s.until(lambda: len(receiver.received) == 1)
        succeed(p)
        await s.until(lambda: len(receiver.received) == 2)

    play(scene, interval=3600)
    first, last = receiver.received
    assert first.body["output"][0] == "0 "
    assert len(first.body["output"]) < 200
    assert len(last.body["output"]) == 200


def test_completed_is_retried_until_it_is_accepted_with_the_same_id_and_body(receiver: Receiver) -> None:
    receiver.statuses = [500, 404, 307]

    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"completed"}))
        succeed(p)
        s.webhooks.follow(p)
        await s.until_settled(p)

    play(scene)
    assert len(receiver.received) == 4  # a redirect is no acceptance, and nothing is sent where it leads
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 1
    assert len({received.raw for received in receiver.received}) == 1
    for received in receiver.received:
        received.verify()


def test_other_events_are_not_retried(receiver: Receiver) -> None:
    receiver.statuses = [500, 500]

    async def scene(s: Scene) -> None:
        p = s.prediction(receiver)
        s.webhooks.follow(p)
        p.start()
        await s.until(lambda: len(receiver.received) == 1)
        p.add_piece("a")
        await s.until(lambda: len(receiver.received) == 2)
        succeed(p)
        await s.until_settled(p)

    play(scene)
    assert [text for _, text, _ in seen(receiver)] == ["", "a", "a"]


def test_completed_is_given_up_after_the_last_delay(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500] * 10

    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"completed"}))
        succeed(p)
        s.webhooks.follow(p)
        await s.until_settled(p)

    with caplog.at_level(logging.DEBUG):  # of all libraries
        play(scene, retry_delays=(0.01, 0.01))
    assert len(receiver.received) == 3
    assert "given up" in caplog.text
    assert "status 500" in caplog.text
    for secret in ("s3cret", "/hook", "whsec", "prompt"):
        assert secret not in caplog.text


def test_a_receiver_that_is_gone_is_not_asked_again(receiver: Receiver) -> None:
    receiver.statuses = [410]

    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"completed"}))
        succeed(p)
        s.webhooks.follow(p)
        await s.until_settled(p)

    play(scene)
    assert len(receiver.received) == 1


def test_a_private_address_is_given_up_at_once(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"completed"}))
        succeed(p)
        s.webhooks.follow(p)
        await s.until_settled(p)

    play(scene, networks="10.0.0.0/8", retry_delays=(3600,))
    assert receiver.received == []


def test_a_receiver_that_is_down_is_given_up_and_stops_no_other(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        with receiving() as down:
            pass
        p = s.prediction(down)
        q = s.prediction(receiver)
        for prediction in (p, q):
            s.webhooks.follow(prediction)
            prediction.start()
            prediction.add_piece("a")
            succeed(prediction)
        await s.until_settled(q, p)

    assert len(play(scene)) == 2
    assert seen(receiver)[-1][0] == "succeeded"


def test_a_slow_receiver_holds_up_neither_its_prediction_nor_other_receivers(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        with receiving() as slow:
            slow.free.clear()
            slow_url = slow.url.replace("127.0.0.1", "localhost")
            blocked = [s.prediction(slow, url=slow_url) for _ in range(20)]
            for p in blocked:
                s.webhooks.follow(p)
                p.start()
                p.add_piece("a")
                succeed(p)
            await s.until(lambda: slow.running == 2)
            quick = [s.prediction(receiver, frozenset({"completed"})) for _ in range(20)]
            for p in quick:
                succeed(p)
                s.webhooks.follow(p)
            await s.until_settled(*quick)
            assert slow.most_running == 2
            assert not {p.id for p in blocked} & set(s.settled)
            slow.free.set()
            await s.until_settled(*blocked)

    play(scene, at_once=4, at_once_per_host=2)


def test_the_number_of_simultaneous_requests_is_bounded(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        receiver.free.clear()
        predictions = [s.prediction(receiver, frozenset({"completed"})) for _ in range(10)]
        for p in predictions:
            succeed(p)
            s.webhooks.follow(p)
        await s.until(lambda: receiver.running == 3)
        await asyncio.sleep(0.1)
        receiver.free.set()
        await s.until_settled(*predictions)

    play(scene, at_once=3)
    assert receiver.most_running == 3


def names_of(receiver: Receiver, count: int) -> list[str]:
    """Different host names that all lead to the receiver, as those of a wildcard do."""
    port = receiver.server_address[1]
    return [f"http://127.0.0.{number}:{port}/hook" for number in range(1, count + 1)]


def test_many_names_of_a_slow_receiver_delay_no_other_key() -> None:
    async def scene(s: Scene) -> None:
        slow.free.clear()
        waiting = [s.prediction(slow, url=url) for url in names_of(slow, 20)]
        other = s.prediction(quick, key_id=2)
        for prediction in (*waiting, other):
            succeed(prediction)
            s.webhooks.follow(prediction)
        await s.until_settled(other)
        await s.until(lambda: slow.most_running == 3)
        slow.free.set()
        await s.until_settled(*waiting)
        assert slow.most_running == 3

    with receiving("0.0.0.0") as slow, receiving() as quick:
        play(scene, at_once=4, at_once_per_key=3)


def test_a_slow_receiver_delays_no_other_receiver_of_its_key() -> None:
    async def scene(s: Scene) -> None:
        slow.free.clear()
        waiting = [s.prediction(slow) for _ in range(20)]
        other = s.prediction(quick, url=quick.url.replace("127.0.0.1", "127.0.0.2"))
        for prediction in (*waiting, other):
            succeed(prediction)
            s.webhooks.follow(prediction)
        await s.until_settled(other)
        slow.free.set()
        await s.until_settled(*waiting)

    with receiving() as slow, receiving("0.0.0.0") as quick:
        play(scene, at_once=8, at_once_per_key=4, at_once_per_host=2)


def test_completed_is_given_up_when_it_has_waited_too_long(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(s: Scene) -> None:
        receiver.free.clear()
        waiting = [s.prediction(receiver) for _ in range(3)]
        for prediction in waiting:
            succeed(prediction)
            s.webhooks.follow(prediction)
        await s.until_settled(*waiting)
        receiver.free.set()

    play(scene, at_once_per_host=1, give_up_after=0.5)
    assert caplog.text.count("was given up") == 3


def test_only_so_many_ended_predictions_of_a_key_wait_for_a_receiver(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(s: Scene) -> None:
        receiver.free.clear()
        first, second, third = [s.prediction(receiver) for _ in range(3)]
        other = s.prediction(receiver, key_id=2)
        for prediction in (first, second, third, other):
            succeed(prediction)
            s.webhooks.follow(prediction)
        await s.until_settled(third)
        assert s.settled == [third.id]
        receiver.free.set()
        await s.until_settled(first, second, other)

    play(scene, at_once_per_host=1, most_waiting=2)
    assert caplog.text.count("was given up") == 1


def test_completed_can_be_delivered_after_a_restart_under_the_same_id(receiver: Receiver) -> None:
    async def before(s: Scene) -> None:
        p = s.prediction(receiver, frozenset({"completed"}))
        receiver.statuses = [503]
        succeed(p)
        s.webhooks.follow(p)
        await s.until(lambda: len(receiver.received) == 1)
        await s.webhooks.close(grace=PATIENCE)
        stored.append(p)

    async def after(s: Scene) -> None:
        s.webhooks.deliver_completed(stored[0])
        await s.until_settled(stored[0])

    stored: list[Prediction] = []
    began = time.monotonic()
    assert play(before, retry_delays=(3600,)) == []  # not settled, so that it is due after the restart
    assert time.monotonic() - began < PATIENCE
    assert play(after) == [stored[0].id]
    ids = [received.headers["webhook-id"] for received in receiver.received]
    assert ids == [f"msg_{stored[0].id}_completed"] * 2


def test_closing_waits_for_the_request_that_is_on_its_way(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        receiver.free.clear()
        p, waiting = s.prediction(receiver, frozenset({"completed"})), s.prediction(receiver)
        s.webhooks.follow(waiting)
        succeed(p)
        s.webhooks.follow(p)
        await s.until(lambda: receiver.running == 1)
        closing = asyncio.create_task(s.webhooks.close(grace=PATIENCE))
        await asyncio.sleep(0.05)
        assert not closing.done()
        receiver.free.set()
        await closing
        assert s.settled == [p.id]

    play(scene)


def test_closing_does_not_wait_longer_than_the_grace(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        receiver.free.clear()
        p = s.prediction(receiver, frozenset({"completed"}))
        succeed(p)
        s.webhooks.follow(p)
        await s.until(lambda: receiver.running == 1)
        await s.webhooks.close(grace=0.05)
        assert s.settled == []

    play(scene)


def test_a_prediction_without_a_webhook_is_left_alone(receiver: Receiver) -> None:
    async def scene(s: Scene) -> None:
        p = Prediction(PredictionRequest(1, {}, "meta/llama-2-70b-chat"))
        s.webhooks.follow(p)
        s.webhooks.deliver_completed(p)
        succeed(p)
        await asyncio.sleep(0.02)
        assert s.settled == []

    play(scene)
