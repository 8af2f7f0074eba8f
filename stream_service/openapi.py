"""The OpenAPI document, generated from the routes and bodies, and a page that shows it."""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, render_template_string
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from werkzeug.routing import Rule

from stream_service.guard import OPEN_PATHS
from stream_service.schemas import types_of

View = TypeVar("View", bound=Callable[..., Any])

ERRORS = {
    400: "the request is invalid, or the prompt is too long for the context",
    401: "the API key is missing or wrong",
    403: "the host, or the origin of the page, is not allowed",
    404: "the route, model or request does not exist",
    406: "Accept allows no form of the answer",
    409: "a request with this id is still running",
    413: "the body is too large",
    415: "the Content-Type is not application/json",
    429: "too many requests wait; try again after the time in Retry-After",
    500: "the generation failed",
    503: "the model is loading, the service is shutting down, or the time limit is reached",
}


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class ErrorBody(BaseModel):
    """The body of every error, on every route."""

    error: ErrorDetails


def describes(
    body: type[BaseModel] | None = None, answers: tuple[str, ...] = ("application/json",)
) -> Callable[[View], View]:
    """Record the body of a view, and the content types of its answers."""

    def mark(view: View) -> View:
        view.body, view.answers = body, answers  # type: ignore[attr-defined]
        return view

    return mark


def document(app: Flask, version: str) -> dict[str, Any]:
    """Describe all routes of an application, as OpenAPI 3.1."""
    rules = sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule)
    marked = [getattr(app.view_functions[rule.endpoint], "body", None) for rule in rules]
    bodies: set[type[BaseModel]] = {body for body in marked if body is not None}
    ordered = sorted(bodies, key=lambda body: body.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in (*ordered, ErrorBody)],  # type: ignore[misc]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for rule in rules:
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            path = rule.rule.replace("<path:", "<").replace("<", "{").replace(">", "}")
            view = app.view_functions[rule.endpoint]
            paths.setdefault(path, {})[method.lower()] = _operation(rule, view)
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLM Stream Service", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(rule: Rule, view: Any) -> dict[str, Any]:
    body = getattr(view, "body", None)
    answers = getattr(view, "answers", ("application/json",))
    summary, _, details = (view.__doc__ or "").strip().partition("\n\n")
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    known = ERRORS if body else {s: ERRORS[s] for s in (401, 403, 404, 503)}
    operation: dict[str, Any] = {
        "operationId": rule.endpoint.removeprefix("native.").replace(".", "_"),
        "summary": " ".join(summary.split()),
        "responses": {
            "200": {"description": "the answer", "content": {kind: {} for kind in answers}},
            **{str(s): {"description": text, "content": error} for s, text in known.items()},
        },
        "security": [] if rule.rule in OPEN_PATHS else [{"key": []}, {}],
    }
    if details:
        operation["description"] = " ".join(details.split())
    if rule.arguments:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in sorted(rule.arguments)
        ]
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LLM Stream Service</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, th { font-family: ui-monospace, monospace; font-weight: 600 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
details { margin: .25rem 0 1rem }
</style>
<h1>LLM Stream Service</h1>
<p>For programs: <a href="openapi.json">openapi.json</a></p>
{% for path, methods in doc.paths.items() %}{% for method, operation in methods.items() %}
<h2><code>{{ method | upper }} {{ path }}</code></h2>
<p>{{ operation.summary }} {{ operation.description }}</p>
{% if operation.requestBody %}
{% set name = operation.requestBody.content["application/json"].schema["$ref"].split("/")[-1] %}
<details><summary>Body: {{ name }}</summary><table>
{% for field, schema in doc.components.schemas[name].properties.items() %}
<tr><th>{{ field }}</th><td>{{ schema | kind }}</td><td>{{ schema.description }}</td></tr>
{% endfor %}</table></details>
{% endif %}
<p>Answer: {{ operation.responses["200"].content | join(", ") }}</p>
{% endfor %}{% endfor %}
<h2>Errors</h2>
<p>The body is <code>{"error": {"message", "type", "param", "code", "request_id"}}</code>.</p>
<table>{% for status, text in errors.items() %}<tr><th>{{ status }}</th><td>{{ text }}</td></tr>
{% endfor %}</table>
"""


def page(app: Flask, version: str) -> str:
    """Write the document as HTML that loads no other file and runs no script."""
    app.jinja_env.filters["kind"] = _type_text
    return render_template_string(PAGE, doc=document(app, version), errors=ERRORS)


BOUNDS = {
    "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<",
    "minLength": "length ≥", "maxLength": "length ≤", "minItems": "items ≥", "maxItems": "items ≤",
}  # fmt: skip


def _type_text(schema: dict[str, Any]) -> str:
    """Describe the type and the bounds of a field in a few words."""
    words = []
    for kind in types_of(schema):
        name = kind.get("type") or kind.get("$ref", "").split("/")[-1]
        bounds = [f"{sign} {kind[key]}" for key, sign in BOUNDS.items() if key in kind]
        words.append(" ".join([name, ", ".join(bounds)]).strip())
    return " or ".join(words)
