"""Sessions of the page over real HTTP: login, cookies, their end, and requests from pages of other sites."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest
from browsers import browser, cookie_of, replace_cookie, stored_secret
from gateways import KEY, MODEL, Gateway
from itsdangerous import TimestampSigner, URLSafeTimedSerializer

from benchmarks.fake_cog import FakeCog
from llama.gateway.storage.keys import hash_of

DAY = 24 * 3600
CREATE = f"/v1/models/{MODEL}/predictions"
INPUT = {"input": {"prompt": "Hello"}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for all tests that do not change its settings."""
    with (
        FakeCog() as cog,
        Gateway([cog.url], tmp_path_factory.mktemp("sessions") / "gateway.sqlite3") as running,
    ):
        running.wait_until_ready()
        yield running


def key_name(client: httpx2.Client) -> str | None:
    """The key that the page's session names."""
    name: str | None = client.get("/page/session").json()["key"]
    return name


def status(client: httpx2.Client, **headers: str) -> int:
    """The status of a request that needs a key."""
    return client.get("/v1/account", headers=headers).status_code


def set_cookie(gateway: Gateway, **headers: str) -> str:
    """The cookie of a login with these headers, whose names have `_` in place of `-`."""
    named = {"origin": gateway.url} | {name.replace("_", "-"): value for name, value in headers.items()}
    response = gateway.client_of(None).post("/page/login", json={"key": KEY}, headers=named)
    assert response.status_code == 204, response.text
    return str(response.headers["set-cookie"])


class TestLogin:
    def test_a_login_sets_a_cookie_that_only_the_browser_can_read(self, gateway: Gateway) -> None:
        name, *attributes = set_cookie(gateway).split("; ")
        assert name.startswith("llama_session_")
        assert {attribute.lower() for attribute in attributes} == {
            "httponly",
            "max-age=2592000",
            "path=/",
            "samesite=strict",
        }

    def test_the_cookie_contains_neither_the_key_nor_its_hash(self, gateway: Gateway) -> None:
        _, token = cookie_of(browser(gateway))
        payload = base64.urlsafe_b64decode(token.split(".")[0] + "==")
        for text in (token, payload.decode()):
            assert KEY not in text
            assert hash_of(KEY)[:8] not in text

    def test_a_session_stands_for_the_key_in_the_api(self, gateway: Gateway) -> None:
        client = browser(gateway)
        assert client.get("/v1/account").json()["username"] == "environment"
        created = client.post(CREATE, json=INPUT)
        assert created.status_code == 201
        assert gateway.get(created.json())["id"] == created.json()["id"]

    def test_the_white_space_around_a_pasted_key_does_not_count(self, gateway: Gateway) -> None:
        assert key_name(browser(gateway, f"  {KEY}\n")) == "environment"

    @pytest.mark.parametrize("key", ["", "wrong", "Test", "test test", "Bearer test", "x" * 100_000, "é"])
    def test_a_wrong_key_gets_no_cookie(self, gateway: Gateway, key: str) -> None:
        response = browser(gateway, None).post("/page/login", json={"key": key})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.json()["detail"] == "This key is wrong, or it was revoked."
        assert "set-cookie" not in response.headers

    @pytest.mark.parametrize("body", [b"[]", b"{}", b'{"key": null}', b'{"key": 1}', b'{"key": ["test"]}'])
    def test_a_body_without_a_key_is_refused(self, gateway: Gateway, body: bytes) -> None:
        response = browser(gateway, None).post("/page/login", content=body)
        assert response.status_code == 422
        assert "`key` is a string" in response.json()["detail"]

    def test_a_body_that_is_not_json_is_refused(self, gateway: Gateway) -> None:
        assert browser(gateway, None).post("/page/login", content=b"key=test").status_code == 400

    def test_a_logout_deletes_the_cookie(self, gateway: Gateway) -> None:
        client = browser(gateway)
        assert client.post("/page/logout").status_code == 204
        assert not client.cookies.jar
        assert (key_name(client), status(client)) == (None, 401)

    def test_a_logout_without_a_session_does_no_harm(self, gateway: Gateway) -> None:
        assert browser(gateway, None).post("/page/logout").status_code == 204


class TestSession:
    def test_without_a_login_the_page_learns_the_model_and_the_prices(self, gateway: Gateway) -> None:
        assert browser(gateway, None).get("/page/session").json() == {
            "key": None,
            "needs_key": True,
            "model": MODEL,
            "notice": None,
            "prices": {"input": 0.65, "output": 2.75},
        }

    def test_the_prices_are_those_of_the_settings(
        self, cog: FakeCog, gateways: Callable[..., Gateway]
    ) -> None:
        gateway = gateways(cog.url, input_price="0.1", output_price=0)
        assert browser(gateway).get("/page/session").json()["prices"] == {"input": 0.1, "output": 0.0}

    def test_a_key_in_the_header_is_named_as_well(self, gateway: Gateway) -> None:
        assert key_name(gateway.client) == "environment"
        assert key_name(gateway.client_of("wrong")) is None

    def test_an_open_gateway_needs_no_login(self, cog: FakeCog, gateways: Callable[..., Gateway]) -> None:
        gateway = gateways(cog.url, key=None)
        client = browser(gateway, None)
        session = client.get("/page/session").json()
        assert (session["key"], session["needs_key"]) == ("local", False)
        response = client.post("/page/login", json={"key": "anything"})
        assert (response.status_code, response.headers.get("set-cookie")) == (204, None)
        assert client.post(CREATE, json=INPUT).status_code == 201

    def test_a_key_that_is_added_ends_the_time_without_login(
        self, cog: FakeCog, gateways: Callable[..., Gateway]
    ) -> None:
        gateway = gateways(cog.url, key=None)
        client = browser(gateway, None)
        key = gateway.add_key("ann")
        assert client.get("/page/session").json()["needs_key"]
        assert (key_name(client), status(client)) == (None, 401)
        assert key_name(browser(gateway, key)) == "ann"


class TestEnd:
    @pytest.mark.parametrize(("age", "expected"), [(29 * DAY, 200), (31 * DAY, 401), (-DAY, 401)])
    def test_a_session_ends_after_30_days(self, gateway: Gateway, age: float, expected: int) -> None:
        client = browser(gateway)
        name, token = cookie_of(client)
        replace_cookie(client, name, signed(gateway, payload_of(token), age))
        assert status(client) == expected

    def test_an_ended_session_asks_for_a_login(self, gateway: Gateway) -> None:
        client = browser(gateway)
        name, token = cookie_of(client)
        replace_cookie(client, name, signed(gateway, payload_of(token), 31 * DAY))
        response = client.get("/v1/models")
        assert response.json()["error"]["message"] == "The session has ended. Log in again."
        assert key_name(client) is None
        assert key_name(browser(gateway)) == "environment"

    @pytest.mark.parametrize(
        "change",
        [
            lambda token: "",
            lambda token: "x",
            lambda token: "." * 1000,
            lambda token: token[:-4],
            lambda token: f"{token}A",
            lambda token: f"A{token}",
            lambda token: token.swapcase(),
            lambda token: token.rpartition(".")[0],
            lambda token: ".".join([encoded([2, "0"]), *token.split(".")[1:]]),
            lambda token: ".".join([token.split(".")[0], "zzzzzz", token.split(".")[2]]),
            lambda token: f".{token}",  # itsdangerous decompresses what begins with a dot
        ],
    )
    def test_a_changed_cookie_is_refused(self, gateway: Gateway, change: Callable[[str], str]) -> None:
        client = browser(gateway)
        name, token = cookie_of(client)
        replace_cookie(client, name, change(token))
        assert status(client) == 401
        assert key_name(client) is None

    @pytest.mark.parametrize("payload", [[2, "0" * 16], [1, ""], [99, "0" * 16], ["1", "0" * 16]])
    def test_a_session_names_the_hash_of_its_key(self, gateway: Gateway, payload: list[object]) -> None:
        client = browser(gateway)
        replace_cookie(client, cookie_of(client)[0], signed(gateway, payload, 0))
        assert status(client) == 401

    def test_a_revoked_key_ends_its_sessions_only(self, gateway: Gateway) -> None:
        ann, other = browser(gateway, gateway.add_key("ann")), browser(gateway)
        assert key_name(ann) == "ann"
        gateway.revoke("ann")
        assert status(ann) == 401
        assert (key_name(ann), key_name(other)) == (None, "environment")
        gateway.add_key("ann")  # a new key with the same name
        assert status(ann) == 401

    def test_a_copy_of_the_cookie_works_after_a_log_out_until_its_key_is_revoked(
        self, gateway: Gateway
    ) -> None:
        client = browser(gateway, gateway.add_key("copied"))
        name, token = cookie_of(client)
        assert client.post("/page/logout").status_code == 204
        assert not client.cookies.jar
        thief = browser(gateway, None)
        replace_cookie(thief, name, token)
        assert (key_name(thief), status(thief)) == ("copied", 200)
        gateway.revoke("copied")
        assert (key_name(thief), status(thief)) == (None, 401)

    def test_a_session_outlives_a_restart(self, gateway: Gateway) -> None:
        client, file = browser(gateway), Path(f"{gateway.settings.database}.session-secret")
        file.chmod(0o644)
        gateway.restart()
        assert key_name(client) == "environment"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_a_copy_of_the_database_logs_nobody_in(
        self, cog: FakeCog, gateway: Gateway, tmp_path: Path
    ) -> None:
        (_, token), copy = cookie_of(browser(gateway)), tmp_path / "copy.sqlite3"
        with (
            closing(sqlite3.connect(gateway.settings.database)) as database,
            closing(sqlite3.connect(copy)) as target,
        ):
            database.backup(target)
        assert stored_secret(gateway).encode() not in copy.read_bytes()
        with Gateway([cog.url], copy) as other:
            assert status(other.client_of(None), cookie=f"{other.inside.sessions.cookie}={token}") == 401

    @pytest.mark.parametrize("damage", [b"", b"short", b"\xff" * 43, None])
    def test_a_damaged_secret_is_replaced_and_ends_all_sessions(
        self, cog: FakeCog, tmp_path: Path, damage: bytes | None
    ) -> None:
        with Gateway([cog.url], tmp_path / "gateway.sqlite3") as gateway:
            file = Path(f"{gateway.settings.database}.session-secret")
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            cookie = "=".join(cookie_of(browser(gateway)))
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
                file.chmod(0o644)
            gateway.restart()
            assert status(gateway.client_of(None), cookie=cookie) == 401
            assert status(browser(gateway)) == 200
            assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_another_key_in_the_environment_ends_the_sessions_of_the_old_one(
        self, cog: FakeCog, tmp_path: Path
    ) -> None:
        database = tmp_path / "gateway.sqlite3"
        with Gateway([cog.url], database, key="old") as gateway:
            cookie = cookie_of(browser(gateway, "old"))
        with Gateway([cog.url], database, key="new") as gateway:
            assert status(gateway.client_of(None), cookie="=".join(cookie)) == 401
        with Gateway([cog.url], database, key="old") as gateway:
            assert status(gateway.client_of(None), cookie="=".join(cookie)) == 200

    def test_the_sessions_of_two_gateways_on_a_host_do_not_disturb_each_other(
        self, cog: FakeCog, gateway: Gateway, tmp_path: Path
    ) -> None:
        with Gateway([cog.url], tmp_path / "other.sqlite3") as other:
            client, of_other = browser(gateway), browser(other)
            (name, token), (other_name, other_token) = cookie_of(client), cookie_of(of_other)
            assert name != other_name
            both = f"{name}={token}; {other_name}={other_token}"
            for each in (gateway, other):
                assert status(each.client_of(None), cookie=both) == 200
            replace_cookie(client, name, other_token)
            assert status(client) == 401


class TestAuthorizationHeader:
    @pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", "Basic dGVzdA==", "nonsense"])
    def test_a_wrong_header_is_not_rescued_by_the_cookie(self, gateway: Gateway, authorization: str) -> None:
        client = browser(gateway)
        assert status(client, authorization=authorization) == 401
        assert status(client) == 200

    def test_the_header_is_used_and_the_cookie_is_not(self, gateway: Gateway) -> None:
        authorization = f"Bearer {gateway.add_key('bob')}"
        response = browser(gateway).get("/v1/account", headers={"authorization": authorization})
        assert response.json()["username"] == "bob"

    def test_a_request_with_a_header_may_come_from_any_page(self, gateway: Gateway) -> None:
        client = browser(gateway)
        headers = {
            "authorization": f"Bearer {KEY}",
            "origin": "https://any.example",
            "sec-fetch-site": "cross-site",
        }
        assert client.post(CREATE, json=INPUT, headers=headers).status_code == 201


OWN, OTHER_PORT = "own", "http://127.0.0.1:1"


class TestOtherSites:
    """`None` removes the header that a client of these tests would send."""

    @pytest.mark.parametrize(
        ("origin", "site", "allowed"),
        [
            (OWN, None, True),
            (OWN, "same-origin", True),
            (None, "same-origin", True),
            ("null", "same-origin", True),  # from a page with `Referrer-Policy: no-referrer`
            (None, None, False),
            ("null", None, False),
            ("", None, False),
            (OTHER_PORT, None, False),
            (OTHER_PORT, "same-site", False),
            ("http://localhost", None, False),
            ("https://evil.example", None, False),
            ("https://evil.example", "cross-site", False),
            (None, "same-site", False),
            (None, "cross-site", False),
            (None, "none", False),
        ],
    )
    def test_only_the_own_page_can_change_something(
        self, gateway: Gateway, origin: str | None, site: str | None, allowed: bool
    ) -> None:
        client = from_page(gateway, origin, site)
        for path in (CREATE, "/v1/predictions/unknown/cancel", "/v1/chat/completions", "/page/markdown"):
            response = client.post(path, json={})
            assert (response.status_code != 403) == allowed, path
            if not allowed:
                assert "does not come from that page" in response.text
        for method in ("PUT", "PATCH", "DELETE", "QUERY"):
            assert (client.request(method, "/v1/models").status_code != 403) == allowed, method
        for path in ("/page/login", "/page/logout"):
            response = client.post(path, json={"key": KEY})
            assert (response.status_code == 204) == allowed, path
            assert ("set-cookie" in response.headers) == allowed, path

    @pytest.mark.parametrize(
        ("origin", "site", "expected"),
        [
            (None, None, 200),
            (OWN, None, 200),
            (None, "same-origin", 200),
            (None, "none", 200),  # the address bar
            (None, "same-site", 403),
            (None, "cross-site", 403),
            (OTHER_PORT, None, 403),
            ("null", None, 403),
        ],
    )
    def test_other_pages_cannot_read_with_the_session(
        self, gateway: Gateway, origin: str | None, site: str | None, expected: int
    ) -> None:
        client = from_page(gateway, origin, site)
        assert client.get("/v1/predictions").status_code == expected
        assert client.head("/page/usage").status_code == expected
        assert (key_name(client) is not None) == (expected == 200)

    @pytest.mark.parametrize("allowed", ["https://page.example", "*"])
    def test_an_allowed_origin_cannot_use_the_session(
        self, cog: FakeCog, gateways: Callable[..., Gateway], allowed: str
    ) -> None:
        gateway = gateways(cog.url, allowed_origins=allowed)
        client = from_page(gateway, "https://page.example", None)
        for response in (
            client.get("/v1/predictions"),
            client.post(CREATE, json=INPUT),
            client.get("/page/session"),
            client.options(CREATE, headers={"access-control-request-method": "POST"}),
        ):
            assert "access-control-allow-credentials" not in response.headers
        assert client.get("/v1/predictions").status_code == 403


class TestProxies:
    def test_a_trusted_proxy_names_the_address_of_the_page(
        self, cog: FakeCog, gateways: Callable[..., Gateway]
    ) -> None:
        gateway = gateways(cog.url, trusted_proxies="127.0.0.1")
        forwarded = {"host": "inner:8000", "x_forwarded_proto": "https", "x_forwarded_host": "gw.example"}
        cookie = set_cookie(gateway, **forwarded, origin="https://gw.example")
        assert "; Secure" in cookie
        assert "; Path=/;" in cookie
        with pytest.raises(AssertionError, match="403"):
            set_cookie(gateway, **forwarded, origin="https://evil.example")

    def test_other_proxies_are_not_believed(self, gateway: Gateway) -> None:
        forwarded = {"x_forwarded_proto": "https", "x_forwarded_host": "evil.example"}
        assert "; Secure" not in set_cookie(gateway, **forwarded)
        with pytest.raises(AssertionError, match="403"):
            set_cookie(gateway, **forwarded, origin="https://evil.example")

    def test_a_proxy_that_keeps_the_host_and_ends_tls_needs_no_setting(self, gateway: Gateway) -> None:
        assert "; Secure" in set_cookie(gateway, host="gw.example", origin="https://gw.example")
        assert "; Secure" not in set_cookie(gateway, host="gw.example", origin="http://gw.example")
        with pytest.raises(AssertionError, match="403"):
            set_cookie(gateway, host="gw.example", origin="https://gw.example:8443")

    @pytest.mark.parametrize("origin", ["http://[", "http://a]b", "https://gw.example/x; Domain=gw.example"])
    def test_the_cookie_takes_nothing_but_the_scheme_from_the_origin(
        self, gateway: Gateway, origin: str
    ) -> None:
        cookie = set_cookie(gateway, origin=origin, sec_fetch_site="same-origin")
        assert "; Path=/;" in cookie
        assert "Domain" not in cookie

    def test_a_host_that_is_no_address_gets_a_cookie(self, gateway: Gateway) -> None:
        assert "; Path=/;" in set_cookie(gateway, host="[:::]", sec_fetch_site="same-origin")

    def test_the_cookie_belongs_to_the_path_of_the_public_url(
        self, cog: FakeCog, gateways: Callable[..., Gateway]
    ) -> None:
        gateway = gateways(cog.url, public_url="https://gw.example/llama/")
        cookie = set_cookie(gateway, origin="https://gw.example")
        assert "; Secure" in cookie
        assert "; Path=/llama;" in cookie
        out = gateway.client_of(None).post("/page/logout", headers={"origin": "https://gw.example"})
        assert "Path=/llama;" in out.headers["set-cookie"]

    def test_a_page_that_is_opened_beside_the_public_url_gets_a_cookie_that_works_there(
        self, cog: FakeCog, gateways: Callable[..., Gateway]
    ) -> None:
        gateway = gateways(cog.url, public_url="https://gw.example/llama")
        client = browser(gateway)
        assert key_name(client) == "environment"
        assert client.post(CREATE, json=INPUT).status_code == 201
        assert client.post("/page/logout").status_code == 204
        assert not client.cookies.jar


def from_page(gateway: Gateway, origin: str | None, site: str | None) -> httpx2.Client:
    """A logged-in browser, in which a page of this origin sends the requests."""
    client = browser(gateway)
    del client.headers["origin"]
    named = {"origin": gateway.url if origin == OWN else origin, "sec-fetch-site": site}
    client.headers.update({name: value for name, value in named.items() if value is not None})
    return client


def encoded(payload: list[object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(payload, separators=(",", ":")).encode()).decode().rstrip("=")


def payload_of(token: str) -> list[object]:
    part, *_ = token.split(".")
    payload: list[object] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return payload


def signed(gateway: Gateway, payload: list[object], age: float) -> str:
    """A token with the gateway's own signature, as the gateway would have made it `age` seconds ago."""

    class Earlier(TimestampSigner):
        def get_timestamp(self) -> int:
            return int(time.time() - age)

    serializer = URLSafeTimedSerializer(
        stored_secret(gateway),
        "session-1",
        signer=Earlier,
        signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"},
    )
    token = serializer.dumps(payload)
    return token if isinstance(token, str) else token.decode()
