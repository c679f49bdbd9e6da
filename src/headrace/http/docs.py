"""What `/openapi.json` says: the schemas that the routes really parse by."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from headrace.http.native_wire import ChatQuestion, DetokenizeQuestion, TokenizeQuestion
from headrace.http.openai_wire import ChatCompletionRequest, CompletionRequest

_REF = "#/components/schemas/"


def takes(name: str, *, many: bool = False) -> dict[str, Any]:
    """The documentation of a route whose body is `name`, or a list of it."""
    schema: dict[str, Any] = {"$ref": _REF + name}
    if many:
        schema = {"type": "array", "items": schema}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


STREAM: dict[str, Any] = {"description": "Server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
JSON_OBJECT: dict[str, Any] = {"description": "As OpenAI documents it", "content": {"application/json": {"schema": {"type": "object"}}}}
JSON_OR_STREAM: dict[str, Any] = {
    "description": "As OpenAI documents it; with `stream: true` server-sent events",
    "content": {**JSON_OBJECT["content"], **STREAM["content"]},
}
OPENAI_ERROR: dict[str, Any] = {
    "description": "The request is refused",
    "content": {
        "application/json": {
            "example": {
                "error": {"message": "Unknown field `foo`.", "type": "invalid_request_error", "param": "foo", "code": "unknown_field"}
            }
        }
    },
}


def document(app: FastAPI) -> None:
    """Make the application's schema hold the bodies that its routes parse by themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
            )
            schema.setdefault("components", {})["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            known = schema["components"].setdefault("schemas", {})
            native = [(kind, "validation") for kind in (ChatQuestion, TokenizeQuestion, DetokenizeQuestion)]
            _, made = models_json_schema(native, ref_template=_REF + "{model}")  # type: ignore[arg-type]
            known.update(made.get("$defs", {}))
            _, components = msgspec.json.schema_components([ChatCompletionRequest, CompletionRequest], ref_template=_REF + "{name}")
            known.update(components)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
