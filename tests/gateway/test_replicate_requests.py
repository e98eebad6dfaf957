"""What clients of Replicate's API send is read as they mean it, or refused in Replicate's words."""

from __future__ import annotations

from typing import Any

import pytest

from llama.gateway.model_card import ModelVersion, version_of
from llama.gateway.prediction import Webhook
from llama.gateway.problems import Problem
from llama.gateway.replicate.request import (
    ALL_EVENTS,
    Creation,
    cancel_after_seconds,
    read_creation,
    version_id,
    wait_seconds,
)
from llama.gateway.settings import PUBLISHED_VERSIONS, GatewaySettings
from llama.gateway.stop_sequences import join_stops
from llama.sampling_params import split_stops
from llama.serving.schema import openapi_schema
from predict import Predictor

SCHEMA = openapi_schema(Predictor.run)
HOOK = "https://example.com/hook"
LISTED, OTHER = "a" * 64, "d" * 64


@pytest.fixture(scope="module")
def version() -> ModelVersion:
    version = version_of(SCHEMA)
    assert version is not None
    return version


def read(version: ModelVersion | None, inputs: Any, **members: Any) -> Creation:
    return read_creation({"input": inputs, **members}, version, ())


@pytest.mark.parametrize(
    ("sent", "read_as"),
    [
        ({"prompt": "Hi", "seed": None, "max_tokens": None}, {"prompt": "Hi"}),
        ({"prompt": "Hi", "stream": True}, {"prompt": "Hi"}),
        ({"stop_sequences": ["Paris"]}, {"stop_sequences": "Paris"}),
        ({"stop_sequences": [", and", "\\n", "a\nb"]}, {"stop_sequences": "\\, and,\\\\n,a\nb"}),
        ({"stop_sequences": []}, {"stop_sequences": ""}),
        ({"stop_sequences": "a,b\\,c"}, {"stop_sequences": "a,b\\,c"}),
        ({"max_new_tokens": 5.0, "temperature": 1}, {"max_new_tokens": 5.0, "temperature": 1}),
        ({"max_length": 3900, "temperature": 0.01}, {"max_length": 3900, "temperature": 0.01}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"seed": 0, "prompt": "", "debug": False}, {"seed": 0, "prompt": "", "debug": False}),
    ],
)
def test_inputs_are_read_as_the_client_means_them(
    version: ModelVersion, sent: dict[str, Any], read_as: dict[str, Any]
) -> None:
    assert read(version, sent).inputs == read_as
    assert read(None, sent).inputs == read_as


@pytest.mark.parametrize(
    "stops", [["a"], ["a,b", "c"], ["\\"], ["\\,"], ["\\n"], ["\n"], [",", "\\\\n,", " x "], ["é\u2028"]]
)
def test_the_predictor_reads_every_stop_sequence_of_a_list_as_it_was(stops: list[str]) -> None:
    assert list(split_stops(join_stops(stops))) == stops


@pytest.mark.parametrize(
    ("inputs", "fields"),
    [
        ({"temperature": 9}, [("number_lte", "input.temperature", "Must be less than or equal to 5")]),
        ({"max_tokens": 0}, [("number_gte", "input.max_tokens", "Must be greater than or equal to 1")]),
        ({"seed": "1"}, [("invalid_type", "input.seed", "Invalid type. Expected: integer, given: string")]),
        ({"seed": 1.5}, [("invalid_type", "input.seed", "Invalid type. Expected: integer, given: number")]),
        ({"debug": 1}, [("invalid_type", "input.debug", "Invalid type. Expected: boolean, given: integer")]),
        ({"stop_sequences": ["a", 1]}, [("invalid_type", "input.stop_sequences", None)]),
        ({"messages": ["hi"]}, [("invalid_type", "input.messages.0", None)]),
        (
            {"top_p": 2, "top_k": -2},
            [("number_gte", "input.top_k", None), ("number_lte", "input.top_p", None)],
        ),
    ],
)
def test_invalid_inputs_are_all_named_in_replicates_words(
    version: ModelVersion, inputs: dict[str, Any], fields: list[tuple[str, str, str | None]]
) -> None:
    with pytest.raises(Problem) as caught:
        read(version, inputs)
    body = caught.value.for_replicate()
    assert (body["status"], body["title"]) == (422, "Input validation failed")
    for (kind, field, description), error in zip(fields, body["invalid_fields"], strict=True):
        assert (error["type"], error["field"]) == (kind, field)
        assert description in (None, error["description"])
        assert f"- {field}: {error['description']}\n" in body["detail"]


def test_of_many_errors_only_some_are_told(version: ModelVersion) -> None:
    with pytest.raises(Problem) as caught:
        read(version, {"messages": [0] * 4000})
    assert len(caught.value.for_replicate()["invalid_fields"]) == 20


@pytest.mark.parametrize("item", [0, {}, "x"])
@pytest.mark.parametrize("name", ["messages", "stop_sequences"])
def test_a_list_that_is_longer_than_the_context_is_refused_before_its_items_are_read(
    version: ModelVersion, name: str, item: object
) -> None:
    with pytest.raises(Problem) as caught:
        read(version, {name: [item] * 4097})
    (error,) = caught.value.for_replicate()["invalid_fields"]
    assert (error["field"], error["description"]) == (f"input.{name}", "Must have at most 4096 items")


@pytest.mark.parametrize("event", [0, "start"])
def test_a_long_list_of_events_is_one_error(version: ModelVersion, event: object) -> None:
    with pytest.raises(Problem) as caught:
        read(version, {}, webhook_events_filter=[event] * 100_000)
    assert len(str(caught.value.for_replicate())) < 1000


def test_a_missing_required_input_is_named_as_replicate_names_it() -> None:
    schema = {"components": {"schemas": {"Input": {"type": "object", "required": ["prompt"]}}}}
    with pytest.raises(Problem) as caught:
        read(version_of(schema), {})
    assert caught.value.for_replicate() == {
        "title": "Input validation failed",
        "detail": "- input: prompt is required\n",
        "status": 422,
        "invalid_fields": [{"type": "required", "field": "input", "description": "prompt is required"}],
    }


def test_a_schema_is_read_once_however_often_a_request_asks_for_its_version() -> None:
    class Counted(dict[str, Any]):
        reads = 0

        def items(self) -> Any:
            self.reads += 1
            return super().items()

    schema = Counted(SCHEMA)
    assert version_of(schema) is version_of(schema)
    assert schema.reads == 1


def test_a_refused_input_is_not_quoted(version: ModelVersion) -> None:
    with pytest.raises(Problem) as caught:
        read(version, {"seed": "a secret text"})
    assert "secret" not in str(caught.value.for_replicate())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": "Hi"}, "input"),
        ({"input": None}, "input"),
        ([], "body"),
        ("Hi", "body"),
        (None, "body"),
        ({"input": {}, "version": 5}, "version"),
        ({"input": {}, "webhook": 5}, "webhook"),
        ({"input": {}, "webhook": ""}, "webhook"),
        ({"input": {}, "webhook": "example.com/hook"}, "webhook"),
        ({"input": {}, "webhook": "ftp://example.com/hook"}, "webhook"),
        ({"input": {}, "webhook": "http://10.0.0.1/hook"}, "webhook"),
        ({"input": {}, "webhook_completed": "http://127.0.0.1/hook"}, "webhook_completed"),
        ({"input": {}, "webhook": HOOK, "webhook_events_filter": "completed"}, "webhook_events_filter"),
        ({"input": {}, "webhook": HOOK, "webhook_events_filter": ["ended"]}, "webhook_events_filter.0"),
    ],
)
def test_an_invalid_body_is_refused_and_the_member_is_named(
    version: ModelVersion, body: Any, field: str
) -> None:
    with pytest.raises(Problem) as caught:
        read_creation(body, version, ())
    assert caught.value.status == 422
    assert caught.value.for_replicate()["invalid_fields"][0]["field"] == field


@pytest.mark.parametrize(
    ("members", "webhook"),
    [
        ({}, None),
        ({"webhook": None, "webhook_events_filter": None}, None),
        ({"webhook_events_filter": ["start"]}, None),
        ({"webhook": HOOK}, Webhook(HOOK, ALL_EVENTS)),
        ({"webhook": HOOK, "webhook_events_filter": []}, Webhook(HOOK, ALL_EVENTS)),
        (
            {"webhook": HOOK, "webhook_events_filter": ["start", "logs", "start"]},
            Webhook(HOOK, frozenset({"start", "logs"})),
        ),
        ({"webhook_completed": HOOK}, Webhook(HOOK, frozenset({"completed"}))),
        ({"webhook": HOOK, "webhook_completed": "https://example.com/old"}, Webhook(HOOK, ALL_EVENTS)),
    ],
)
def test_a_webhook_gets_the_events_that_were_asked_for(
    version: ModelVersion, members: dict[str, Any], webhook: Webhook | None
) -> None:
    assert read(version, {}, **members).webhook == webhook


def test_a_version_can_be_named_in_every_form_that_clients_use(version: ModelVersion) -> None:
    settings = GatewaySettings(versions=(LISTED, OTHER))
    named = {
        version.id: version.id,
        f"{settings.model}:{version.id}": version.id,
        settings.model: "hidden",
        LISTED: LISTED,
        f"{settings.model}:{OTHER}": OTHER,
    }
    assert {name: version_id(name, settings, version) for name in named} == named


@pytest.mark.parametrize(
    "named",
    ["", "0" * 64, "meta/other", f"meta/other:{LISTED}", "meta/llama-2-70b-chat:", "undefined", f":{LISTED}"],
)
def test_an_unknown_version_is_refused_in_replicates_words(version: ModelVersion, named: str) -> None:
    with pytest.raises(Problem) as caught:
        version_id(named, GatewaySettings(versions=(LISTED,)), version)
    assert caught.value.for_replicate() == {
        "title": "Invalid version or not permitted",
        "detail": "The specified version does not exist (or perhaps you don't have permission to use it?)",
        "status": 422,
    }


def test_the_versions_that_replicate_published_are_known_before_a_server_is_ready() -> None:
    assert version_id(PUBLISHED_VERSIONS[0], GatewaySettings(), None) == PUBLISHED_VERSIONS[0]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], None),
        (["wait"], 60),
        (["wait=1"], 1),
        (["wait=60"], 60),
        (["Wait = 5"], 5),
        (['wait="5"'], 5),
        (["wait=5; foo=bar"], 5),
        (["wait=600"], 60),
        (["respond-async, wait=10"], 10),
        (["respond-async", "wait=10"], 10),
        (["wait=10, wait=20"], 10),
        (["respond-async"], None),
        (["wait=0"], None),
        (["wait=-1"], None),
        (["wait=abc"], None),
        (["wait=1.5"], None),
        (["wait="], None),
        (["waiting"], None),
        (["wait=٣"], None),
        ([",,;"], None),
    ],
)
def test_a_preference_to_wait_is_read_and_a_malformed_one_is_ignored(
    headers: list[str], seconds: float | None
) -> None:
    assert wait_seconds(headers) == seconds


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("5", 5),
        ("30", 30),
        ("30s", 30),
        (" 5m ", 300),
        ("1h30m45s", 5445),
        ("2h", 7200),
        ("1h5s", 3605),
    ],
)
def test_a_time_to_cancel_is_read(header: str | None, seconds: float | None) -> None:
    assert cancel_after_seconds(header) == seconds


@pytest.mark.parametrize(
    "header", ["", "4", "4s", "0", "-5", "5x", "s", "m", "1.5m", "5s1m", "1m30", "soon", "٣٠", "9" * 12]
)
def test_a_time_to_cancel_that_is_malformed_or_too_short_is_refused(header: str) -> None:
    with pytest.raises(Problem) as caught:
        cancel_after_seconds(header)
    assert caught.value.status == 422
    assert "Cancel-After" in caught.value.detail


def test_the_versions_id_does_not_depend_on_how_the_schema_is_written() -> None:
    reordered = {name: SCHEMA[name] for name in reversed(SCHEMA)}
    whole = {"default": 1, **reordered}
    fraction = {"default": 1.0, **reordered}
    ids = [getattr(version_of(schema), "id") for schema in (SCHEMA, reordered, whole, fraction)]  # noqa: B009
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert len(ids[0]) == 64
