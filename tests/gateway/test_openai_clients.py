"""Real clients of OpenAI's API, against a gateway in front of Cog's own server with the embedded model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import openai
import pytest
from gateways import KEY, MODEL, Gateway
from node_clients import NodeClients
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
FRUIT: Any = [{"role": "user", "content": "Write a sentence about apples, pears and plums."}]
TOO_LONG: Any = [{"role": "user", "content": "word " * 20_000}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


def greedy(**members: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 16, **members}


def read(stream: Any, texts: list[str]) -> None:
    """Append the text of every chunk."""
    for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")


def client_of(gateway: Gateway, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0)


@pytest.fixture(scope="module")
def client(real_gateway: Gateway) -> openai.OpenAI:
    return client_of(real_gateway)


# --- openai for Python


def test_openai_gets_an_answer_with_its_usage(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**greedy())

    assert "Paris" in completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens > 20
    assert 5 <= completion.usage.completion_tokens <= 16


def test_openai_streams_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**greedy())

    *chunks, last = client.chat.completions.create(
        **greedy(stream=True, stream_options={"include_usage": True})
    )

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage) == ([], whole.usage)


def test_openais_stream_helper_puts_the_answer_together(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**greedy())

    with client.chat.completions.stream(**greedy()) as stream:
        stream.until_done()

    assert stream.get_final_completion().choices[0].message.content == whole.choices[0].message.content


def test_openais_async_client_asks_several_at_once(real_gateway: Gateway) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{real_gateway.url}/v1") as client:
            return await asyncio.gather(*(client.chat.completions.create(**greedy()) for _ in range(3)))

    answers = {completion.choices[0].message.content for completion in asyncio.run(ask())}

    assert len(answers) == 1


def test_openai_stops_at_a_sequence_with_a_comma(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**greedy(messages=FRUIT, max_tokens=32)).choices[0].message.content
    begin = whole.index(",")
    stop = whole[begin : begin + 3]

    stopped = client.chat.completions.create(**greedy(messages=FRUIT, max_tokens=32, stop=["\n\n\n", stop]))

    assert stopped.choices[0].message.content == whole[:begin]
    assert stopped.choices[0].finish_reason == "stop"


def test_openai_gets_two_choices_with_seeds_of_their_own(client: openai.OpenAI) -> None:
    def answers(**members: Any) -> list[str]:
        completion = client.chat.completions.create(**greedy(temperature=1.5, max_tokens=12, **members))
        return [choice.message.content for choice in completion.choices]

    first, second = answers(n=2, seed=7)

    assert first != second
    assert answers(n=1, seed=7) == [first]
    assert answers(n=1, seed=8) == [second]


def test_openai_completes_a_text(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 3}

    one = client.completions.create(prompt="The capital of France is", **request)
    two = client.completions.create(prompt=["The capital of France is", "One, two,"], **request)
    streamed = client.completions.create(prompt="The capital of France is", stream=True, **request)

    assert "Paris" in one.choices[0].text
    assert two.choices[0].text == one.choices[0].text != two.choices[1].text
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_openai_lists_the_model(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("members", "error", "code"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
        ({"tools": [TOOL]}, openai.BadRequestError, "unsupported_parameter"),
        ({"messages": TOO_LONG}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
    ],
)
def test_openai_raises_the_error_with_its_code(
    client: openai.OpenAI, members: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**greedy(**members))

    assert caught.value.code == code
    assert caught.value.request_id


def test_openai_recognizes_a_wrong_key(real_gateway: Gateway) -> None:
    with pytest.raises(openai.AuthenticationError):
        client_of(real_gateway, "wrong").chat.completions.create(**greedy())


def test_closing_openais_stream_frees_its_place(real_gateway: Gateway, client: openai.OpenAI) -> None:
    (server,) = real_gateway.inside.servers.all
    stream = client.chat.completions.create(**greedy(max_tokens=4000, stream=True, top_p=1))
    next(iter(stream))
    assert server.in_flight == 1

    stream.close()

    until(lambda: server.in_flight == 0)
    newest = real_gateway.client.get("/v1/predictions").json()["results"][0]
    assert newest["status"] == "canceled"


@pytest.mark.parametrize("script", [Script(die_after=2), Script(["The", " end"], error="it broke")])
def test_a_failure_during_a_stream_raises_an_error_in_openai(
    cog: FakeCog, gateway: Gateway, script: Script
) -> None:
    cog.rules.script = script
    stream = client_of(gateway).chat.completions.create(**greedy(stream=True))
    received = list[str]()

    with pytest.raises(openai.APIError):
        read(stream, received)

    assert "".join(received) in ("The capital", "The end")


def test_comments_in_a_silent_stream_do_not_disturb_openai(
    cog: FakeCog, gateways: Callable[..., Gateway]
) -> None:
    gateway = gateways(cog.url, wiring={"ping_interval": 0.02})
    cog.rules.script = Script(gap=0.1)

    chunks = client_of(gateway).chat.completions.create(**greedy(stream=True))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The capital of France is Paris."


# --- langchain-openai


@pytest.fixture(scope="module")
def chat_openai(real_gateway: Gateway) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=MODEL,
        base_url=f"{real_gateway.url}/v1",
        api_key=KEY,
        max_tokens=16,
        temperature=0,
        max_retries=0,
    )


def test_langchain_gets_and_streams_an_answer(chat_openai: Any) -> None:
    message = chat_openai.invoke("What is the capital of France?")

    assert "Paris" in message.content
    assert message.usage_metadata["output_tokens"] > 0
    assert "".join(c.content for c in chat_openai.stream("What is the capital of France?")) == message.content


def test_langchain_recognizes_a_prompt_that_is_too_long(chat_openai: Any) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat_openai.invoke(TOO_LONG[0]["content"])


def test_langchain_is_refused_tools(chat_openai: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        chat_openai.bind_tools([TOOL]).invoke("Hi")


# --- litellm


@pytest.fixture(scope="module")
def complete(real_gateway: Gateway) -> Callable[..., Any]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = (
        "True"  # read at the import: it would be downloaded otherwise
    )
    import litellm

    litellm.suppress_debug_info = True
    litellm.disable_hf_tokenizer_download = True

    def call(**members: Any) -> Any:
        request = greedy(**{"model": f"openai/{MODEL}", **members})
        return litellm.completion(api_base=f"{real_gateway.url}/v1", api_key=KEY, max_retries=0, **request)

    return call


def test_litellm_gets_and_streams_an_answer(complete: Callable[..., Any]) -> None:
    completion = complete()

    assert "Paris" in completion.choices[0].message.content
    assert completion.usage.completion_tokens > 0
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in complete(stream=True))
    assert streamed == completion.choices[0].message.content


def test_litellm_recognizes_a_prompt_that_is_too_long(complete: Callable[..., Any]) -> None:
    from litellm.exceptions import ContextWindowExceededError

    with pytest.raises(ContextWindowExceededError):
        complete(messages=TOO_LONG)


def test_litellm_recognizes_an_unknown_model(complete: Callable[..., Any]) -> None:
    with pytest.raises(openai.NotFoundError):
        complete(model="openai/gpt-4o")


# --- openai for JavaScript


@pytest.fixture(scope="module")
def javascript(node_clients: NodeClients, real_gateway: Gateway) -> Callable[[str], Any]:
    """Call a function of `node/openai.mjs`."""
    return lambda function: node_clients.call("openai.mjs", function, real_gateway.url, KEY)


def test_javascript_gets_and_streams_an_answer(javascript: Callable[[str], Any]) -> None:
    whole = javascript("whole")

    assert "Paris" in whole["text"]
    assert whole["reason"] == "stop"
    assert javascript("stream") == whole
    assert javascript("helper") == whole["text"]


def test_javascript_completes_a_text(javascript: Callable[[str], Any]) -> None:
    assert "Paris" in javascript("text")


def test_javascript_lists_the_model(javascript: Callable[[str], Any]) -> None:
    assert javascript("models") == [MODEL, MODEL]


def test_javascript_raises_errors_with_their_codes(javascript: Callable[[str], Any]) -> None:
    assert javascript("errors") == [
        "AuthenticationError invalid_api_key",
        "NotFoundError model_not_found",
        "BadRequestError unsupported_parameter",
        "BadRequestError context_length_exceeded",
    ]


def test_aborting_javascripts_stream_frees_its_place(
    javascript: Callable[[str], Any], real_gateway: Gateway
) -> None:
    assert javascript("abort") == 3

    (server,) = real_gateway.inside.servers.all
    until(lambda: server.in_flight == 0)
    newest = real_gateway.client.get("/v1/predictions").json()["results"][0]
    assert newest["status"] == "canceled"


def test_a_failure_during_a_stream_raises_an_error_in_javascript(
    cog: FakeCog, gateway: Gateway, node_clients: NodeClients
) -> None:
    cog.rules.script = Script(die_after=2)

    result = node_clients.call("openai.mjs", "failingStream", gateway.url, KEY)

    assert result == {"text": "The capital", "error": "APIError"}
