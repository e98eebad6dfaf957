"""Bodies of OpenAI's API: the predictor's inputs that they mean, and the ones that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama.gateway.model_card import ModelVersion
from llama.gateway.openai.model import NamedModel, find_model
from llama.gateway.openai.request import UP_TO_THE_CONTEXT, ChatBody, CompletionRequest, TextBody
from llama.gateway.problems import Problem
from llama.gateway.settings import PUBLISHED_VERSIONS, GatewaySettings
from llama.sampling_params import SamplingParams

MODEL = "meta/llama-2-70b-chat"
PLACES = 32
HI = [{"role": "user", "content": "Hi"}]


def chat(**body: Any) -> CompletionRequest:
    return ChatBody.parse({"model": MODEL, "messages": HI, **body}).request(PLACES)


def text(**body: Any) -> CompletionRequest:
    return TextBody.parse({"model": MODEL, "prompt": "Once", **body}).request(PLACES)


def dialog(*messages: dict[str, Any]) -> Any:
    (inputs,) = chat(messages=list(messages)).inputs
    return [(message["role"], message["content"]) for message in inputs["messages"]]


def refusal_of(read: Any, **body: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        read(**body)
    assert caught.value.status == 400
    return caught.value


def message(role: str, content: Any, **members: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **members}


# --- what the inputs are


def test_a_chat_gets_the_defaults_of_openai_and_not_those_of_the_predictor() -> None:
    (inputs,) = chat().inputs

    assert inputs == {
        "messages": HI,
        "system_prompt": "",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": UP_TO_THE_CONTEXT,
    }


def test_a_text_completion_is_sent_without_formatting_and_has_16_tokens_by_default() -> None:
    (inputs,) = text().inputs

    assert inputs == {
        "prompt": "Once",
        "prompt_template": "{prompt}",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 16,
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"max_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_tokens": 7.0}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": 8}, {"max_new_tokens": 8}),
        ({"max_tokens": 7, "max_completion_tokens": 8}, {"max_new_tokens": 8}),
        ({"max_tokens": 10**30}, {"max_new_tokens": UP_TO_THE_CONTEXT}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2, "frequency_penalty": 2}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -5}, {"seed": -5}),
        ({"top_k": 40, "repetition_penalty": 1.1}, {"top_k": 40, "repetition_penalty": 1.1}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"stop": "###"}, {"stop_sequences": "###"}),
        ({"stop": ["a", "b"]}, {"stop_sequences": "a,b"}),
        ({"stop": ["", "a", "a"]}, {"stop_sequences": "a"}),
    ],
)
def test_a_member_becomes_an_input(body: dict[str, Any], expected: dict[str, Any]) -> None:
    (inputs,) = chat(**body).inputs

    assert {name: inputs.get(name) for name in expected} == expected


@pytest.mark.parametrize("stop", [None, [], "", [""]])
def test_without_a_stop_sequence_the_input_is_unset(stop: Any) -> None:
    (inputs,) = chat(stop=stop).inputs

    assert "stop_sequences" not in inputs


@given(st.lists(st.text(min_size=1, max_size=256), max_size=64, unique=True))
def test_the_predictor_reads_every_stop_sequence_literally(stops: list[str]) -> None:
    (inputs,) = chat(stop=stops).inputs

    assert list(SamplingParams.from_inputs(inputs).stops) == stops


NULLABLE = (
    "temperature top_p n stop seed max_tokens stream stream_options logprobs user presence_penalty tools"
)


def test_a_null_counts_as_absent() -> None:
    nulls: dict[str, Any] = dict.fromkeys(NULLABLE.split())

    assert chat(**nulls, max_completion_tokens=None, unknown=None) == chat()
    assert text(**nulls, best_of=None, suffix=None, echo=None) == text()
    assert chat(stream=True, stream_options={"include_usage": None}) == chat(stream=True)


def test_every_choice_has_a_seed_of_its_own() -> None:
    assert [inputs["seed"] for inputs in chat(n=3, seed=7).inputs] == [7, 8, 9]
    assert all("seed" not in inputs for inputs in chat(n=3).inputs)


def test_choices_of_several_prompts_are_ordered_by_prompt() -> None:
    request = text(prompt=["a", "b"], n=2)

    assert [inputs["prompt"] for inputs in request.inputs] == ["a", "a", "b", "b"]
    assert request.choices_per_prompt == 2


def test_usage_in_a_stream_has_to_be_asked_for() -> None:
    assert not chat(stream=True).include_usage
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={"include_obfuscation": False}).include_usage


# --- messages


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([message("user", "a")], [("user", "a\n\nHi")]),
        ([message("developer", "Rhyme.")], [("system", "Rhyme."), ("user", "Hi")]),
        ([message("system", "A"), message("developer", "B")], [("system", "A\n\nB"), ("user", "Hi")]),
        ([message("user", "x"), message("system", "A")], [("system", "A"), ("user", "x\n\nHi")]),
        ([message("system", ""), message("user", "x")], [("user", "x\n\nHi")]),
        (
            [message("user", "a"), message("assistant", "b"), message("assistant", "c")],
            [("user", "a"), ("assistant", "b\n\nc"), ("user", "Hi")],
        ),
        (
            [message("user", [{"type": "text", "text": "a"}]), message("assistant", "b")],
            [("user", "a"), ("assistant", "b"), ("user", "Hi")],
        ),
        (
            [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            [("user", "a\nb\n\nHi")],
        ),
    ],
)
def test_messages_become_one_system_message_and_turns(
    messages: list[dict[str, Any]], expected: list[tuple[str, str]]
) -> None:
    assert dialog(*messages, *HI) == expected


def test_an_assistants_message_at_the_end_is_kept_to_be_continued() -> None:
    assert dialog(*HI, message("assistant", "Once")) == [("user", "Hi"), ("assistant", "Once")]


def test_an_assistants_message_of_this_gateway_can_be_sent_back_whole() -> None:
    answer = message(
        "assistant",
        "Hello!",
        name="bot",
        refusal=None,
        annotations=[],
        tool_calls=[],
        function_call=None,
        audio=None,
    )

    assert dialog(*HI, answer, *HI) == [("user", "Hi"), ("assistant", "Hello!"), ("user", "Hi")]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([message("system", "A")], "messages"),
        ([message("user", " ")], "messages"),
        ([message("assistant", "b"), *HI], "messages[0].role"),
        ([*HI, message("tool", "5", tool_call_id="x")], "messages[1].role"),
        ([message("function", "5", name="f")], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([message("user", None)], "messages[0].content"),
        ([message("user", 5)], "messages[0].content"),
        (["Hi"], "messages[0]"),
        ([None], "messages[0]"),
        ([message("user", ["Hi"])], "messages[0].content"),
        ([message("user", [{"type": "text"}])], "messages[0].content"),
        ([message("user", [{"type": "image_url", "image_url": {"url": "x"}}])], "messages[0].content"),
        ([*HI, message("user", [{"type": "input_audio"}])], "messages[1].content"),
        ([message("user", "Hi", image="x")], "messages[0].image"),
        (
            [*HI, message("assistant", "", tool_calls=[{"id": "1", "type": "function"}])],
            "messages[1].tool_calls",
        ),
    ],
)
def test_a_message_that_cannot_be_used_is_refused_by_name(messages: list[Any], param: str) -> None:
    problem = refusal_of(chat, messages=messages)

    assert problem.param == param
    assert param in problem.detail


# --- members that are not implemented


@pytest.mark.parametrize(
    "member",
    [
        {"user": "u1"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto", "tools": []},
        {"parallel_tool_calls": True},
        {"logprobs": False, "top_logprobs": 0},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
    ],
)
def test_a_member_that_changes_nothing_is_accepted(member: dict[str, Any]) -> None:
    assert chat(**member) == chat()


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("logit_bias", {"50256": -100}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("service_tier", "flex"),
    ],
)
def test_what_a_chat_cannot_do_is_refused_by_name(member: str, value: object) -> None:
    problem = refusal_of(chat, **{member: value})

    assert (problem.param, problem.code) == (member, "unsupported_parameter")


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "tools"),
        ({"function_call": {"name": "f"}, "functions": [{"name": "f"}]}, "functions"),
        ({"top_logprobs": 2, "logprobs": True}, "logprobs"),
    ],
)
def test_of_members_that_belong_together_the_main_one_is_named(members: dict[str, Any], named: str) -> None:
    assert refusal_of(chat, **members).param == named


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("logprobs", 0),
        ("logprobs", 5),
        ("echo", True),
        ("suffix", "the end"),
        ("best_of", 3),
        ("prompt", [1, 2, 3]),
        ("prompt", [[1, 2], [3]]),
    ],
)
def test_what_a_text_completion_cannot_do_is_refused_by_name(member: str, value: object) -> None:
    problem = refusal_of(text, **{member: value})

    assert (problem.param, problem.code) == (member, "unsupported_parameter")


def test_text_completions_accept_values_that_change_nothing() -> None:
    assert text(echo=False, suffix="", best_of=1, logit_bias={}) == text()
    assert text(n=2, best_of=2) == text(n=2)


@pytest.mark.parametrize("read", [chat, text])
def test_an_unknown_member_is_refused_in_openais_words(read: Any) -> None:
    problem = refusal_of(read, grammar="x")

    assert problem.param == "grammar"
    assert problem.detail == "Unrecognized request argument supplied: grammar"


# --- values that are invalid


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_completion_tokens", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("n", 0),
        ("n", PLACES + 1),
        ("n", "2"),
        ("seed", 2**63),
        ("seed", 1.5),
        ("top_k", -2),
        ("repetition_penalty", -1),
        ("repetition_penalty", float("inf")),
        ("stop", 5),
        ("stop", ["a" * 257]),
        ("stop", [str(number) for number in range(65)]),
        ("stream", "yes"),
        ("messages", "Hi"),
        ("model", 5),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_an_invalid_value_is_refused_by_name(member: str, value: object) -> None:
    problem = refusal_of(chat, **{member: value})

    assert problem.param == member
    assert member in problem.detail


@pytest.mark.parametrize(
    "prompt",
    [None, "", " \n", [], ["a", ""], 5, {"a": 1}, ["a", 5]],
)
def test_an_invalid_prompt_is_refused_by_name(prompt: object) -> None:
    assert str(refusal_of(text, prompt=prompt).param).startswith("prompt")


@pytest.mark.parametrize(
    ("read", "members"),
    [
        (chat, {f"member{number}": 0 for number in range(1000)}),
        (chat, {"stream": True, "stream_options": {f"member{number}": 0 for number in range(1000)}}),
        (chat, {"stop": [0] * 1000}),
        (text, {"prompt": ["x"] + [0] * 1000}),
    ],
)
def test_of_many_faults_only_the_first_is_described(read: Any, members: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        read(**members)
    cause = caught.value.__cause__
    assert cause is None or (isinstance(cause, ValidationError) and cause.error_count() == 1)
    assert len(str(caught.value.for_openai())) < 500


@pytest.mark.parametrize("digits", [10, 4300])
def test_a_huge_number_of_choices_is_an_invalid_value(digits: int) -> None:
    with pytest.raises(Problem) as caught:
        text(prompt=["x"] * 10, n=10 ** (digits - 1))
    assert (caught.value.status, caught.value.param) == (400, "n")
    assert len(caught.value.detail) < 200


def test_all_choices_of_all_prompts_together_are_bounded() -> None:
    assert len(text(prompt=["a"] * 16, n=2).inputs) == PLACES

    assert refusal_of(text, prompt=["a"] * 17, n=2).param == "n"


def test_an_unknown_stream_option_is_refused_by_name() -> None:
    problem = refusal_of(chat, stream=True, stream_options={"every": 3})

    assert problem.param == "stream_options.every"


@pytest.mark.parametrize("body", [[], "x", None, 5])
def test_a_body_that_is_not_an_object_is_refused(body: object) -> None:
    with pytest.raises(Problem, match="JSON object"):
        ChatBody.parse(body)


def test_a_missing_member_is_named() -> None:
    with pytest.raises(Problem) as caught:
        ChatBody.parse({"messages": HI})

    assert caught.value.param == "model"
    assert caught.value.code == "missing_required_parameter"


def test_an_error_never_quotes_a_text_of_the_client() -> None:
    for member in ("temperature", "n", "seed", "stream", "stop", "messages"):
        assert "secret" not in refusal_of(chat, **{member: {"a": "secret"}}).detail


# --- models

SETTINGS = GatewaySettings(deployments=("acme/llama",))
OWN = ModelVersion("f" * 64, {}, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (MODEL, NamedModel()),
        ("llama-2-70b-chat", NamedModel()),
        (f"{MODEL}:{PUBLISHED_VERSIONS[0]}", NamedModel(PUBLISHED_VERSIONS[0])),
        (f"llama-2-70b-chat:{OWN.id}", NamedModel(OWN.id)),
        ("acme/llama", NamedModel(deployment="acme/llama")),
    ],
)
def test_a_model_has_several_names(name: str, expected: NamedModel) -> None:
    assert find_model(name, SETTINGS, OWN) == expected


@pytest.mark.parametrize("name", ["", "gpt-4o", f"{MODEL}:", f"{MODEL}:latest", "meta", "x" * 100_000])
def test_an_unknown_model_is_not_found(name: str) -> None:
    with pytest.raises(Problem) as caught:
        find_model(name, SETTINGS, OWN)

    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.detail) < 300
