"""The description of the protocol is that of the routes and bodies themselves."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from support.engines import engine_of
from support.fakes import fake_checkpoint, says

from stream_service.app import create_app
from stream_service.schemas import ChatCompletionRequest, CompletionRequest, StreamRequest


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    engine = engine_of(fake_checkpoint(says("abc"))).start()
    yield create_app(engine)
    engine.close()


@pytest.fixture(scope="module")
def document(app: Flask) -> Any:
    return app.test_client().get("/openapi.json").json


def test_every_route_is_described(app: Flask, document: Any) -> None:
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    there = {
        (method, re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert described == there
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"].endswith((".", ")."))


@pytest.mark.parametrize("body", [StreamRequest, ChatCompletionRequest, CompletionRequest])
def test_a_body_has_all_its_fields_and_each_number_its_bounds(document: Any, body: Any) -> None:
    properties = document["components"]["schemas"][body.__name__]["properties"]
    assert properties.keys() == body.model_fields.keys()
    for name, schema in properties.items():
        for kind in schema.get("anyOf", [schema]):
            bounds = {"minimum", "exclusiveMinimum"} & kind.keys()
            if kind.get("type") in ("number", "integer"):
                assert bounds, name
                assert {"maximum", "exclusiveMaximum"} & kind.keys(), name
            if kind.get("type") == "array" and "prefixItems" not in kind:
                assert "maxItems" in kind, name
            if kind.get("type") == "string":
                assert {"maxLength", "enum", "const"} & kind.keys(), name


def test_every_reference_leads_somewhere(document: Any) -> None:
    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    references = set(walk(document))
    assert references
    for reference in references:
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_the_page_for_people_loads_nothing_and_runs_nothing(app: Flask, document: Any) -> None:
    response = app.test_client().get("/docs")
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    page = response.text
    assert not re.search(r"<script|<link|<img|src=|https?://|@import|url\(", page)
    for path in document["paths"]:
        assert path in page
    assert "temperature" in page
    assert "≤ 5" in page
