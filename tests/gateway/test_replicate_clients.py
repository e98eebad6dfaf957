"""Replicate's own clients against the gateway, Cog's server and the embedded model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from gateways import KEY, MODEL, Gateway
from node_clients import NodeClients
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError
from server_clients import PATIENCE, until

from llama.gateway.settings import PUBLISHED_VERSIONS

# The embedded model is too small to answer well with the default system prompt.
ASK = {
    "prompt": "What is the capital of France?",
    "system_prompt": "",
    "temperature": 0,
    "max_new_tokens": 16,
}
LONG = {"prompt": "Count to a thousand.", "max_new_tokens": 150, "min_new_tokens": 150}
BLANK = {"prompt": ""}


@pytest.fixture(scope="module")
def client(real_gateway: Gateway) -> Client:
    return client_of(real_gateway)


def client_of(gateway: Gateway, key: str = KEY) -> Client:
    return Client(api_token=key, base_url=gateway.url)


def joined(output: Any) -> str:
    return "".join(map(str, output))


@pytest.fixture(scope="module")
def answer(client: Client) -> str:
    """The greedy answer to ASK."""
    return joined(client.run(MODEL, input=ASK))


# Python, version 1.x


def test_python_runs_the_model_by_name_and_by_version(client: Client, answer: str) -> None:
    assert "Paris" in answer
    latest = client.models.get(MODEL).latest_version
    assert latest is not None
    references: list[Any] = [f"{MODEL}:{latest.id}", latest, f"{MODEL}:{PUBLISHED_VERSIONS[0]}"]
    for reference in references:
        assert joined(client.run(reference, input=ASK)) == answer
        assert joined(client.run(reference, input=ASK, wait=False)) == answer
    assert joined(client.run(MODEL, input=ASK, wait=False)) == answer


def test_python_gets_the_whole_answer_if_it_takes_longer_than_the_wait(client: Client) -> None:
    output = joined(client.run(MODEL, input=LONG, wait=1))
    assert output == joined(client.predictions.list().results[0].output)


def test_python_takes_the_base_url_with_v1_too(real_gateway: Gateway, answer: str) -> None:
    client = Client(api_token=KEY, base_url=f"{real_gateway.url}/v1")
    assert joined(client.run(MODEL, input=ASK)) == answer


def test_python_streams_by_name_and_by_version(client: Client, answer: str) -> None:
    events = list(client.stream(MODEL, input=ASK))
    assert joined(events) == answer
    assert len(events) > 3
    assert events[-1].event.value == "done"
    assert joined(client.stream(f"{MODEL}:{PUBLISHED_VERSIONS[0]}", input=ASK)) == answer


def test_python_streams_a_prediction_that_has_ended(client: Client, answer: str) -> None:
    prediction = client.predictions.create(model=MODEL, input=ASK, stream=True)
    prediction.wait()
    assert joined(prediction.stream()) == answer
    assert joined(prediction.stream()) == answer


def test_python_iterates_over_the_growing_output(client: Client, answer: str) -> None:
    assert joined(client.predictions.create(model=MODEL, input=ASK).output_iterator()) == answer


def test_python_runs_and_streams_asynchronously(real_gateway: Gateway, answer: str) -> None:
    async def ask() -> list[str]:
        client = client_of(real_gateway)
        ran = joined(await client.async_run(MODEL, input=ASK))
        streamed = joined([event async for event in await client.async_stream(MODEL, input=ASK)])
        create = client.models.predictions.async_create
        predictions = await asyncio.gather(*[create(MODEL, input=ASK) for _ in range(4)])
        await asyncio.gather(*[prediction.async_wait() for prediction in predictions])
        return [ran, streamed, *[joined(prediction.output) for prediction in predictions]]

    assert asyncio.run(ask()) == [answer] * 6


def test_python_cancels_a_prediction(client: Client) -> None:
    prediction = client.predictions.create(model=MODEL, input=LONG)
    prediction.cancel()
    prediction.reload()
    assert prediction.status == "canceled"
    assert prediction.error is None
    prediction.cancel()
    assert prediction.status == "canceled"


def test_python_lists_predictions(client: Client) -> None:
    created = client.predictions.create(model=MODEL, input=ASK)
    page = client.predictions.list()
    assert page.results[0].id == created.id
    assert client.predictions.get(created.id).input == ASK


def test_python_raises_the_error_of_a_failed_prediction(client: Client) -> None:
    with pytest.raises(ModelError, match="E1001 PromptRequired"):
        client.run(MODEL, input=BLANK)
    with pytest.raises(RuntimeError, match="E1001 PromptRequired"):
        list(client.stream(MODEL, input=BLANK))


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (lambda client: client_with_a_wrong_key(client).run(MODEL, input=ASK), 401),
        (lambda client: client.run("meta/none", input=ASK), 404),
        (lambda client: client.predictions.get("a" * 26), 404),
        (lambda client: client.predictions.create(version="0" * 64, input=ASK), 422),
        (lambda client: client.predictions.create(model=MODEL, input={"temperature": 9}), 422),
    ],
    ids=["key", "model", "prediction", "version", "input"],
)
def test_python_raises_replicates_error_for_what_is_wrong(
    client: Client, ask: Callable[[Client], Any], status: int
) -> None:
    with pytest.raises(ReplicateError) as caught:
        ask(client)
    assert caught.value.status == status
    assert caught.value.detail


def client_with_a_wrong_key(client: Client) -> Client:
    return Client(api_token="wrong", base_url=str(client._client.base_url))


def test_python_finds_models_versions_deployments_and_the_account(client: Client) -> None:
    model = client.models.get(MODEL)
    (version,) = model.versions.list().results
    assert model.versions.get(version.id).openapi_schema["components"]["schemas"]["Input"]
    assert client.models.list().results[0].run_count >= 0
    deployment = client.deployments.get("acme/llama")
    assert deployment.current_release is not None
    assert deployment.current_release.model == MODEL
    prediction = deployment.predictions.create(input=ASK)
    prediction.wait()
    assert prediction.status == "succeeded"
    assert client.accounts.current().type == "user"
    assert client.hardware.list()[0].sku
    assert client.collections.get("language-models").models


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


class Receiver(ThreadingHTTPServer):
    """Keeps the headers and the bodies of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/hook"
        self.received = list[tuple[dict[str, str], str]]()

    def __enter__(self) -> Receiver:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.received.append((dict(self.headers), body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_python_verifies_the_signatures_of_webhooks(client: Client, receiver: Receiver) -> None:
    prediction = client.predictions.create(
        model=MODEL, input=ASK, webhook=receiver.url, webhook_events_filter=["start", "completed"]
    )
    until(lambda: len(receiver.received) == 2)
    secret = client.webhooks.default.secret()
    bodies = []
    for headers, body in receiver.received:
        client.webhooks.validate(headers=headers, body=body, secret=secret, tolerance=int(PATIENCE))
        bodies.append(json.loads(body))
    assert [body["id"] for body in bodies] == [prediction.id] * 2
    assert bodies[1]["status"] == "succeeded"
    prediction.reload()
    assert bodies[1]["output"] == prediction.output


# JavaScript


@pytest.fixture(scope="module")
def javascript(node_clients: NodeClients, real_gateway: Gateway) -> Callable[..., Any]:
    """Call a function of `node/replicate.mjs`."""

    def call(function: str, key: str = KEY) -> Any:
        return node_clients.call("replicate.mjs", function, real_gateway.url, key)

    return call


def test_javascript_runs_the_model_by_name_by_version_and_by_polling(
    javascript: Callable[..., Any], answer: str
) -> None:
    assert javascript("run") == [answer] * 3


def test_javascript_gets_the_whole_answer_if_it_takes_longer_than_the_wait(
    javascript: Callable[..., Any],
) -> None:
    output, whole = javascript("runLongerThanItsWait")
    assert output == whole
    assert output


def test_javascript_streams(javascript: Callable[..., Any], answer: str) -> None:
    assert javascript("stream") == {"text": answer, "last": "done"}


def test_javascript_throws_the_error_of_a_failed_prediction(javascript: Callable[..., Any]) -> None:
    assert "E1001 PromptRequired" in javascript("runThatFails")["message"]
    assert "E1001 PromptRequired" in javascript("streamThatFails")["message"]


def test_javascript_cancels_and_lists_predictions(javascript: Callable[..., Any]) -> None:
    assert javascript("cancel") == "canceled"
    assert javascript("list") is True


def test_javascript_finds_versions_models_deployments_and_the_account(
    javascript: Callable[..., Any],
) -> None:
    assert javascript("catalog") == ["array", "llama-2-70b-chat", MODEL, "succeeded", "user"]


def test_javascript_verifies_the_signature_of_a_webhook(javascript: Callable[..., Any]) -> None:
    assert javascript("webhook") == {"valid": True, "own": True, "status": "succeeded"}


def test_javascript_throws_an_error_for_a_wrong_key(javascript: Callable[..., Any]) -> None:
    result = javascript("stream", "wrong")
    assert result["error"] == "ApiError"
    assert "401" in result["message"]
