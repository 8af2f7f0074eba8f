"""API keys, host names and origins: which requests the service accepts."""

from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.engines import engine_of
from support.fakes import fake_checkpoint, says

from stream_service.app import create_app
from stream_service.settings import ServiceSettings

PATHS_WITHOUT_KEY = {"/health", "/ready"}


@pytest.fixture
def engine() -> Iterator[object]:
    engine = engine_of(fake_checkpoint(says("abc"))).start()
    yield engine
    engine.close()


def routes(app: Flask) -> list[tuple[str, str]]:
    """The methods and paths of all routes, and two unknown paths."""
    found = [
        (method, rule.rule.replace("<request_id>", "x").replace("<path:name>", "x"))
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
    ]
    assert len(found) > 15
    return [*found, ("GET", "/nowhere"), ("POST", "/v1/nowhere")]


@pytest.mark.parametrize(
    "header",
    [None, "Bearer wrong", "Bearer ", "Basic right", "right", "Bearer RIGHT", "Bearer right x",
     "Bearer righté"],
)  # fmt: skip
def test_only_health_and_ready_answer_without_a_key(engine: object, header: str | None) -> None:
    app = create_app(engine, ServiceSettings(api_keys=("right", "second")))
    client = app.test_client()
    headers = {"Authorization": header} if header else {}
    for method, path in routes(app):
        response = client.open(path, method=method, headers=headers)
        if path in PATHS_WITHOUT_KEY:
            assert response.status_code == 200, path
        else:
            assert response.status_code == 401, (method, path)
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert response.json["error"]["code"] == "invalid_api_key"
                assert len(response.data) < 2048


@pytest.mark.parametrize("key", ["right", "second"])
def test_each_key_gives_access_to_every_route(engine: object, key: str) -> None:
    app = create_app(engine, ServiceSettings(api_keys=("right", "second")))
    client = app.test_client()
    for method, path in routes(app):
        response = client.open(path, method=method, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code not in (401, 403), (method, path)


def client_for(engine: object, **settings: object) -> FlaskClient:
    return create_app(engine, ServiceSettings(**settings)).test_client()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8800", 200), ("127.0.0.1:1", 200), ("[::1]:8800", 200),
        ("evil.example", 403), ("evil.example:8800", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("", 403),
    ],
)  # fmt: skip
def test_only_allowed_host_names_are_accepted(engine: object, host: str, status: int) -> None:
    client = client_for(engine, allowed_hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
    response = client.get("/", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json["error"]["code"] == "not_allowed"


def test_without_allowed_hosts_every_host_name_is_accepted(engine: object) -> None:
    assert client_for(engine).get("/", headers={"Host": "any.example"}).status_code == 200


def test_cors_headers_allow_only_the_configured_origins(engine: object) -> None:
    client = client_for(engine, cors_origins=("https://a.example",), api_keys=("k",))
    preflight = {"Access-Control-Request-Method": "POST"}
    allow = "Access-Control-Allow-Origin"
    allowed = client.options("/stream", headers={"Origin": "https://a.example", **preflight})
    assert allowed.status_code == 200
    assert allowed.headers[allow] == "https://a.example"
    other = client.options("/stream", headers={"Origin": "https://b.example", **preflight})
    assert allow not in other.headers
    answer = client.get("/", headers={"Origin": "https://a.example", "Authorization": "Bearer k"})
    assert answer.headers[allow] == "https://a.example"
    assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
    assert allow not in client_for(engine).get("/", headers={"Origin": "https://a.example"}).headers


@pytest.mark.parametrize(
    "settings",
    [
        {"api_keys": ("k",), "cors_origins": ("*",)},
        {"api_keys": ("",)},
        {"api_keys": ("schlüssel",)},
        {"api_keys": ("a\nb",)},
    ],
)
def test_settings_reject_bad_keys_and_keys_with_cors_for_all(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\*|API key"):
        ServiceSettings(**settings)


@pytest.mark.parametrize(
    "origin", [".*", "https://*.example.com", "https://a.example/", "a.example"]
)
def test_settings_reject_a_cors_origin_that_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        ServiceSettings(cors_origins=(origin,))
    ServiceSettings(cors_origins=("https://a.example", "http://localhost:3000", "null"))


def test_a_post_from_an_origin_that_is_not_allowed_is_rejected(engine: object) -> None:
    client = client_for(engine, cors_origins=("https://mine.example",))
    for origin, status in (
        ("https://evil.example", 403), ("null", 403), ("https://mine.example", 200),
        ("http://localhost", 200),  # the service's own origin
    ):  # fmt: skip
        assert client.post("/clear", headers={"Origin": origin}).status_code == status, origin


def test_health_and_ready_accept_any_host_name(engine: object) -> None:
    client = client_for(engine, allowed_hosts=frozenset({"localhost"}))
    for path in PATHS_WITHOUT_KEY:
        assert client.get(path, headers={"Host": "10.0.0.7:8800"}).status_code == 200
