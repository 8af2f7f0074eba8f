"""The OpenAPI document matches the service's routes and bodies."""

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


def test_the_openapi_document_describes_every_route(app: Flask, document: Any) -> None:
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    registered = {
        (method, re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert described == registered
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"].endswith(".")


@pytest.mark.parametrize("body", [StreamRequest, ChatCompletionRequest, CompletionRequest])
def test_the_openapi_document_has_every_field_with_its_bounds(document: Any, body: Any) -> None:
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


def test_every_reference_in_the_openapi_document_resolves(document: Any) -> None:
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
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_the_docs_page_loads_no_files_and_runs_no_scripts(app: Flask, document: Any) -> None:
    response = app.test_client().get("/docs")
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    page = response.text
    assert not re.search(r"<script|<link|<img|src=|https?://|@import|url\(", page)
    for path in document["paths"]:
        assert path in page
    assert "temperature" in page
    assert "≤ 5" in page
