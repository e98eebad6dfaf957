"""How predictions are queued and given to servers, over HTTP and with fakes of Cog's server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from gateways import Gateway
from server_clients import Body, until

from benchmarks.fake_cog import FakeCog, Script

StartGateway = Callable[..., Gateway]


def start_of(cog: FakeCog) -> list[str]:
    """The prompts of the predictions that a server has accepted, in order."""
    return [served.inputs["prompt"] for served in cog.served]


def held() -> FakeCog:
    """A server that holds all predictions after their first piece."""
    return FakeCog(Script(hold_after=1))


def client_with_key(gateway: Gateway, name: str, **limits: int) -> httpx2.Client:
    """Return a client that has a key of its own."""
    return gateway.client_of(gateway.add_key(name, **limits))


def test_requests_wait_in_the_queue_instead_of_meeting_a_conflict(gateways: StartGateway) -> None:
    with FakeCog(Script(gap=0.01), places=2) as cog:
        gateway = gateways(cog.url, places=2)
        predictions = [gateway.create() for _ in range(10)]
        assert all(p["status"] == "starting" for p in predictions)
        assert {gateway.wait_for(p)["status"] for p in predictions} == {"succeeded"}
        assert cog.counts.most_running == 2


def test_false_conflicts_are_tried_again(gateways: StartGateway) -> None:
    with FakeCog(false_conflicts=8) as cog:
        gateway = gateways(cog.url)
        assert gateway.wait_for(gateway.create())["status"] == "succeeded"


def test_a_server_with_fewer_places_than_configured_still_serves_all(gateways: StartGateway) -> None:
    with FakeCog(Script(gap=0.01), places=1) as cog:
        gateway = gateways(cog.url, places=4)
        predictions = [gateway.create() for _ in range(8)]
        assert {gateway.wait_for(p)["status"] for p in predictions} == {"succeeded"}


def test_a_full_queue_is_refused_with_a_small_retry_after(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=1, queue=2)
        running = gateway.create()
        gateway.wait_for(running, "processing")
        waiting = [gateway.create() for _ in range(2)]
        refused = gateway.client.post(
            f"/v1/models/{gateway.settings.model}/predictions", json={"input": {"prompt": "Hi"}}
        )
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 5
        chat = gateway.client.post(
            "/v1/chat/completions",
            json={"model": gateway.settings.model, "messages": [{"role": "user", "content": "Hi"}]},
        )
        assert (chat.status_code, chat.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        cog.release()
        for prediction in [running, *waiting]:
            gateway.wait_for(prediction, "processing", "succeeded")
            cog.release()
            gateway.wait_for(prediction)


def test_each_request_goes_to_the_server_with_the_most_free_places(gateways: StartGateway) -> None:
    with held() as one, held() as other:
        gateway = gateways(one.url, other.url, places=4)
        until(lambda: gateway.client.get("/readyz").json()["ready"] == 2)
        for number in range(6):
            gateway.wait_for(gateway.create(prompt=f"question {number}"), "processing")
        assert (one.counts.running, other.counts.running) == (3, 3)


def turns(number: int) -> list[Body]:
    """A dialogue's inputs with so many user turns, in every form that the predictor takes."""
    answers = " ".join(f"answer {n} [INST] more {n} [/INST]" for n in range(number - 1))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "first"}]
    for n in range(number - 1):
        messages += [
            {"role": "assistant", "content": f"answer {n}"},
            {"role": "user", "content": f"more {n}"},
        ]
    return [
        {"prompt": f"[INST] first [/INST] {answers}" if number > 1 else "first"},
        {"prompt": "", "messages": messages},
    ]


@pytest.mark.parametrize("form", [0, 1])
def test_the_turns_of_one_dialogue_go_to_the_server_that_has_its_prefix(
    gateways: StartGateway, form: int
) -> None:
    with ExitStack() as stack:
        cogs = [stack.enter_context(FakeCog()) for _ in range(3)]
        gateway = gateways(*(cog.url for cog in cogs))
        until(lambda: gateway.client.get("/readyz").json()["ready"] == 3)
        for number in (1, 2, 3, 4):
            gateway.wait_for(gateway.create(**turns(number)[form]))
            gateway.wait_for(gateway.create(prompt=f"another dialogue {number}"))
        with_first = [sum("first" in str(served.inputs) for served in cog.served) for cog in cogs]
        assert sorted(with_first) == [0, 0, 4]


def test_equal_first_turns_are_spread_over_the_servers(gateways: StartGateway) -> None:
    with held() as one, held() as other:
        gateway = gateways(one.url, other.url, places=4)
        until(lambda: gateway.client.get("/readyz").json()["ready"] == 2)
        for _ in range(4):
            gateway.wait_for(gateway.create(prompt="Tell a story"), "processing")
        assert (one.counts.running, other.counts.running) == (2, 2)


def test_a_dialogue_does_not_wait_for_its_server_while_another_one_is_free(gateways: StartGateway) -> None:
    with held() as one, held() as other:
        gateway = gateways(one.url, other.url, places=1)
        until(lambda: gateway.client.get("/readyz").json()["ready"] == 2)
        for number in (1, 2):
            gateway.wait_for(gateway.create(**turns(number)[0]), "processing")
        assert (one.counts.running, other.counts.running) == (1, 1)


def test_a_key_runs_no_more_predictions_at_once_than_it_may(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=8)
        limited = client_with_key(gateway, "limited", at_once=2)
        for number in range(5):
            gateway.create(client=limited, prompt=f"limited {number}")
        other = gateway.create(prompt="other")
        gateway.wait_for(other, "processing")
        until(lambda: cog.counts.running == 3)
        assert sorted(start_of(cog)) == ["limited 0", "limited 1", "other"]


def test_a_key_with_many_waiting_predictions_does_not_delay_another_key(gateways: StartGateway) -> None:
    with FakeCog(
        lambda inputs: Script(hold_after=1 if inputs["prompt"] == "first" else None), places=1
    ) as cog:
        gateway = gateways(cog.url, places=1)
        second = client_with_key(gateway, "second")
        gateway.wait_for(gateway.create(prompt="first"), "processing")
        many = [gateway.create(prompt=f"many {number}") for number in range(5)]
        gateway.create(client=second, prompt="one of the second key")
        cog.release()
        for prediction in many:
            gateway.wait_for(prediction)
        assert start_of(cog).index("one of the second key") <= 2


def test_a_prediction_that_no_server_takes_in_time_fails(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=1, queue_timeout=0.5)
        running = gateway.create()
        gateway.wait_for(running, "processing")
        late = gateway.wait_for(gateway.create())
        assert late["status"] == "failed"
        assert late["error"].startswith("E4003 NotStarted: ")
        assert gateway.get(running)["status"] == "processing"  # it has started in time


def test_waiting_predictions_are_answered_after_a_restart_of_the_gateway(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=1)
        running, waiting = gateway.create(prompt="running"), gateway.create(prompt="waiting")
        gateway.wait_for(running, "processing")
        gateway.restart()
        failed = gateway.get(running)
        assert failed["status"] == "failed"
        assert failed["error"].startswith("E4002 GatewayRestarted: ")
        gateway.wait_for(waiting, "processing")
        cog.release()
        answered = gateway.wait_for(waiting)
        assert (answered["status"], "".join(answered["output"])) == (
            "succeeded",
            "The capital of France is Paris.",
        )


def test_a_waiting_prediction_can_be_cancelled_and_never_reaches_a_server(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=1)
        gateway.wait_for(gateway.create(prompt="running"), "processing")
        waiting = gateway.create(prompt="waiting")
        cancelled = gateway.client.post(f"/v1/predictions/{waiting['id']}/cancel")
        assert cancelled.json()["status"] == "canceled"
        cog.release()
        gateway.wait_for(gateway.create(prompt="last"), "processing")
        assert start_of(cog) == ["running", "last"]


def test_cancelling_a_running_prediction_frees_its_place_and_keeps_its_pieces(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=1)
        running = gateway.create()
        until(lambda: gateway.get(running)["output"] == ["The"])
        cancelled = gateway.client.post(f"/v1/predictions/{running['id']}/cancel").json()
        assert (cancelled["status"], cancelled["output"]) == ("canceled", ["The"])
        assert cancelled["metrics"]["output_token_count"] == 1
        until(lambda: cog.counts.cancelled == 1)
        gateway.wait_for(gateway.create(), "processing")


def test_only_the_paths_that_the_gateway_needs_reach_a_server(gateway: Gateway, cog: FakeCog) -> None:
    for path in ("/shutdown", "/v1/shutdown", "/predictions/../shutdown", "/health-check", "/trainings"):
        gateway.client.post(path)
        gateway.client.get(path)
    gateway.client.put("/v1/predictions/%2Ftmp%2Fx", json={"input": {"prompt": "Hi"}})
    gateway.wait_for(gateway.create())
    asked = {(request.method, request.path) for request in cog.received}
    assert asked == {("GET", "/health-check"), ("GET", "/openapi.json"), ("POST", "/predictions")}


def test_the_list_goes_page_by_page_to_the_end_and_back(gateway: Gateway) -> None:
    created = [gateway.create()["id"] for _ in range(103)]
    first = gateway.client.get("/v1/predictions").json()
    assert first["next"].startswith(gateway.url)
    assert first["previous"] is None
    second = gateway.client.get(first["next"]).json()
    assert [p["id"] for p in first["results"] + second["results"]] == created[::-1]
    assert second["next"] is None
    back = gateway.client.get(second["previous"]).json()
    assert [p["id"] for p in back["results"]] == created[:2:-1]
    assert back["previous"] is None
    assert back["next"] is not None


# --- faults that one prediction or one server must not turn into a fault of the gateway


@pytest.mark.parametrize(
    "inputs",
    [
        {"messages": [{"role": ["x"], "content": "Hi"}]},
        {"messages": [{"role": {"a": 1}, "content": ["Hi"]}]},
        {"messages": [{}]},
        {"prompt": "", "messages": [{"content": None}]},
    ],
)
def test_odd_inputs_reach_the_server_which_judges_them(gateway: Gateway, cog: FakeCog, inputs: Body) -> None:
    assert gateway.wait_for(gateway.create(**inputs))["status"] == "succeeded"
    assert gateway.wait_for(gateway.create())["status"] == "succeeded"


def test_a_server_with_unreadable_events_is_not_waited_for(gateways: StartGateway) -> None:
    with FakeCog(Script((), raw=b'event: output\ndata: {"no": "chunk"}\n\n')) as cog:
        gateway = gateways(cog.url)
        failed = gateway.wait_for(gateway.create())
        assert failed["status"] == "failed"
        assert failed["error"].startswith("E4001 ServerLost: ")


def test_a_ready_server_that_refuses_every_prediction_does_not_keep_them_for_ever(
    gateways: StartGateway,
) -> None:
    with FakeCog(refusal=500) as cog:
        gateway = gateways(cog.url)
        failed = gateway.wait_for(gateway.create())
        assert failed["error"].startswith("E4001 ServerLost: ")
        assert len(cog.predictions) == 3


def test_the_queue_timeout_also_ends_a_prediction_that_was_given_to_a_server_in_between(
    gateways: StartGateway,
) -> None:
    with FakeCog(places=0) as cog:  # it says that it is ready, and refuses everything with 409
        gateway = gateways(cog.url, queue_timeout=1.0)
        failed = gateway.wait_for(gateway.create())
        assert failed["error"].startswith("E4003 NotStarted: ")


def test_a_full_server_does_not_keep_a_dialogue_while_another_server_is_free(gateways: StartGateway) -> None:
    with FakeCog() as one, FakeCog() as other:
        gateway = gateways(one.url, other.url)
        until(lambda: gateway.client.get("/readyz").json()["ready"] == 2)
        gateway.wait_for(gateway.create(**turns(1)[0]))
        first, second = (one, other) if one.served else (other, one)
        first.rules.places = 0
        assert gateway.wait_for(gateway.create(**turns(2)[0]))["status"] == "succeeded"
        assert len(second.served) == 1


def test_predictions_on_a_server_that_leaves_the_list_and_vanishes_are_lost(
    gateways: StartGateway, tmp_path: Path
) -> None:
    servers = tmp_path / "servers.txt"
    with held() as leaving, held() as staying:
        servers.write_text(leaving.url)
        gateway = gateways(file=servers, wiring={"lost_after": 0.5})
        running = gateway.create()
        gateway.wait_for(running, "processing")
        servers.write_text(staying.url)
        gateway.inside.servers.reload()
        until(lambda: gateway.client.get("/readyz").json() == {"status": "ready", "servers": 1, "ready": 1})
        assert gateway.get(running)["status"] == "processing"  # it goes on
        leaving.rules.frozen = True
        assert gateway.wait_for(running)["error"].startswith("E4001 ServerLost: ")


def test_a_new_version_of_the_servers_brings_its_own_schema(gateway: Gateway, cog: FakeCog) -> None:
    model = f"/v1/models/{gateway.settings.model}"
    before = gateway.client.get(model).json()["latest_version"]["id"]
    cog.rules.title = "Another version"
    cog.rules.health = "STARTING"
    until(lambda: gateway.client.get("/readyz").status_code == 503)
    cog.rules.health = None
    gateway.wait_until_ready()
    assert gateway.client.get(model).json()["latest_version"]["id"] != before


def test_what_a_gateway_remembers_of_ended_predictions_does_not_grow(gateways: StartGateway) -> None:
    with FakeCog(Script(gap=0.001)) as cog:
        gateway = gateways(cog.url)
        for prediction in [gateway.create() for _ in range(50)]:
            gateway.wait_for(prediction)
        remembered = vars(gateway.inside.predictions)
        until(
            lambda: not any(remembered[name] for name in ("_active", "_unsaved", "_saved_counts", "_tasks"))
        )


def test_revoking_a_key_ends_its_waiting_and_running_predictions(gateways: StartGateway) -> None:
    with held() as cog:
        gateway = gateways(cog.url, places=1)
        revoked = client_with_key(gateway, "revoked")
        gateway.create(client=revoked, prompt="running")
        gateway.create(client=revoked, prompt="waiting")
        until(lambda: cog.counts.running == 1)
        other = gateway.create(prompt="other")
        gateway.revoke("revoked")
        gateway.wait_for(other, "processing")
        assert start_of(cog) == ["running", "other"]
        assert cog.counts.cancelled == 1


def test_choices_beyond_a_limit_are_refused_together_and_cost_nothing(gateways: StartGateway) -> None:
    with FakeCog() as cog:
        gateway = gateways(cog.url)
        client = client_with_key(gateway, "limited", requests_per_minute=4)

        def chat(n: int) -> httpx2.Response:
            messages = [{"role": "user", "content": "Hi"}]
            return client.post(
                "/v1/chat/completions", json={"model": gateway.settings.model, "messages": messages, "n": n}
            )

        assert chat(2).status_code == 200
        assert chat(3).status_code == 429
        never = chat(5)
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        assert chat(2).status_code == 200
        assert len(cog.predictions) == 4
        assert client.get("/v1/predictions").json()["results"][3:] != []
        assert len(client.get("/v1/predictions").json()["results"]) == 4


@pytest.mark.parametrize(
    "event",
    [
        b'event: metric\ndata: {"name": "output_token_count", "value": "\\ud800"}',
        b'event: metric\ndata: {"name": "output_token_count", "value": null}',
        b'event: metric\ndata: {"name": "output_token_count", "value": NaN}',
        b'event: metric\ndata: {"name": "output_token_count", "value": -1}',
        b'event: metric\ndata: {"name": "output_token_count", "value": 1e300}',
        b'event: output\ndata: {"chunk": 5}',
        b'event: output\ndata: {"chunk": "\\ud800"}',
        b'event: log\ndata: {"data": {}}',
        b"event: log\ndata: []",
        b'event: completed\ndata: {"status": "succeeded", "logs": [1]}',
        b'event: completed\ndata: {"status": "failed", "error": {"a": 1}}',
        b'event: completed\ndata: {"status": "succeeded", "metrics": {"a": Infinity}}',
        b"event: completed\ndata: " + b"[" * 100_000,
    ],
)
def test_a_server_that_sends_what_cog_never_sends_does_no_harm(gateways: StartGateway, event: bytes) -> None:
    with FakeCog(Script((), raw=event + b"\n\n")) as cog:
        gateway = gateways(cog.url)
        failed = gateway.wait_for(gateway.create())
        assert failed["status"] == "failed"
        assert failed["error"].startswith("E4001 ServerLost: ")
        cog.rules.script = Script()
        assert gateway.wait_for(gateway.create())["status"] == "succeeded"


def test_a_gateway_whose_database_was_deleted_is_not_ready(gateway: Gateway) -> None:
    gateway.settings.database.unlink()
    response = gateway.client.get("/readyz")
    assert response.status_code == 503
    assert "database was deleted" in response.json()["error"]
