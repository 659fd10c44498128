"""The OpenAPI document of everything that an edge answers over HTTP: its routes, requests, answers and refusals.

It names the models that are offered, so that whoever reads it can ask for them.  The link of `coinfer.protocol` is a
WebSocket, which OpenAPI has no words for; it is not in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import __version__
from .oip_models import VERSION, Model
from .oip_wire import BYTES, DATATYPES, MAX_ID_CHARS

Json = dict[str, Any]
_REASONS = {
    400: "It is not understood, or does not fit the model.",
    401: "A token is needed.",
    404: "There is no such model, or no such version of it.",
    405: "The path has another method.",
    408: "The body did not arrive in time.",
    413: "The body, or the JSON in it, is too long.",
    415: "The body is compressed.",
    503: "There is no time for it now: ask again after Retry-After seconds.",
}
_DATATYPE: Json = {"type": "string", "enum": [*DATATYPES.values(), BYTES]}
_SHAPE: Json = {"type": "array", "items": {"type": "integer"}}


def document(models: Mapping[str, Model]) -> Json:
    """The document of an edge that offers these models."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "coinfer edge",
            "version": __version__,
            "description": "Inference at the edge by the Open Inference Protocol; state of the edge.",
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/healthz": _get("Whether this process lives; with a token, what it holds and has done", _object("status")),
            "/readyz": _get("Whether it takes requests", _object(ready="boolean"), busy=_object(ready="boolean")),
            "/metrics": {"get": _operation("Counts, for Prometheus", _answer({"text/plain": {"schema": {}}}), [401])},
            "/v2": _get("What this server is", _ref("Server"), [401]),
            "/v2/health/live": _get("Whether this process lives", _object(live="boolean")),
            "/v2/health/ready": _get(
                "Whether it takes requests", _object(ready="boolean"), busy=_object(ready="boolean")
            ),
            "/v2/openapi.json": _get("This document", {"type": "object"}, [401]),
            "/v2/repository/index": {"post": _index()},
            **_model_paths(),
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "parameters": {
                "model": _path("model", list(models)),
                "version": _path("version", [VERSION]),
            },
            "schemas": _schemas(models),
        },
    }


def _model_paths() -> Json:
    paths: Json = {}
    for start, names in (
        ("/v2/models/{model}", ["model"]),
        ("/v2/models/{model}/versions/{version}", ["model", "version"]),
    ):
        parameters = [{"$ref": f"#/components/parameters/{name}"} for name in names]
        ready = _object("name", ready="boolean")
        paths[start] = _get("A model's inputs and outputs", _ref("Metadata"), [401, 404])
        paths[f"{start}/ready"] = _get("Whether a model takes requests", ready, [401, 404], busy=ready)
        paths[f"{start}/config"] = _get("A model's configuration, as Triton has it", _ref("Config"), [401, 404])
        paths[f"{start}/infer"] = {"post": _infer()}
        for end in ("", "/ready", "/config", "/infer"):
            paths[start + end]["parameters"] = parameters
    return paths


def _infer() -> Json:
    operation = _operation(
        "Inference",
        _answer(
            {"application/json": {"schema": _ref("Answer")}, "application/octet-stream": {"schema": {}}},
            headers={
                "Inference-Header-Content-Length": {
                    "description": "Where binary data follow the JSON: its length.",
                    "schema": {"type": "integer"},
                }
            },
        ),
        [400, 401, 404, 408, 413, 415, 503],
    )
    operation["parameters"] = [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Where binary data follow the JSON: its length; 0: the body is the input's data alone.",
            "schema": {"type": "integer", "minimum": 0},
        }
    ]
    operation["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {"schema": _ref("Request")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
    return operation


def _index() -> Json:
    index = {"type": "array", "items": _object("name", "version", "state", "reason")}
    operation = _operation("The models", _answer(_json(index)), [400, 401, 408, 413, 415, 503])
    operation["requestBody"] = {"content": _json({"type": "object", "properties": {"ready": {"type": "boolean"}}})}
    return operation


def _schemas(models: Mapping[str, Model]) -> Json:
    port = _object("name", datatype=_DATATYPE, shape=_SHAPE)
    size = {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}}
    data: Json = {"type": "array", "description": "Flat, or nested as the shape says; row-major."}
    tensor = _object("name", datatype=_DATATYPE, shape=_SHAPE)
    tensor["properties"] |= {"parameters": size, "data": data}
    given = _object(
        name=_one_of(model.input.name for model in models.values()),
        datatype=_one_of(model.input.datatype for model in models.values()),
        shape=_SHAPE,
    )
    given["properties"] |= {"parameters": size, "data": data}
    asked = _object(name=_one_of(port.name for model in models.values() for port in model.outputs))
    asked["properties"]["parameters"] = {
        "type": "object",
        "properties": {
            "binary_data": {"type": "boolean"},
            "classification": {"type": "integer", "minimum": 0, "description": "So many best classes instead."},
        },
    }
    answer = _object("model_name", "model_version", outputs={"type": "array", "items": _ref("Tensor")})
    answer["properties"]["id"] = {"type": "string"}
    return {
        "Error": _object("error"),
        "Server": _object("name", "version", extensions={"type": "array", "items": {"type": "string"}}),
        "Metadata": _object(
            "name",
            "platform",
            versions={"type": "array", "items": {"type": "string"}},
            inputs={"type": "array", "items": port},
            outputs={"type": "array", "items": port},
        ),
        "Config": _object(
            "name",
            "platform",
            "backend",
            max_batch_size="integer",
            input={"type": "array", "items": {"type": "object"}},
            output={"type": "array", "items": {"type": "object"}},
        ),
        "Tensor": tensor,
        "Input": given,
        "Request": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string", "maxLength": MAX_ID_CHARS},
                "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
                "inputs": {"type": "array", "items": _ref("Input"), "minItems": 1, "maxItems": 1},
                "outputs": {"type": "array", "items": asked},
            },
        },
        "Answer": answer,
    }


def _get(summary: str, schema: Json, refusals: Iterable[int] = (), *, busy: Json | None = None) -> Json:
    operation = _operation(summary, _answer(_json(schema)), refusals)
    if busy is not None:
        operation["responses"]["503"] = {"description": "It takes none.", "content": _json(busy)}
    return {"get": operation}


def _operation(summary: str, answer: Json, refusals: Iterable[int]) -> Json:
    responses = {"200": answer}
    for status in (*refusals, 405):
        headers = {"Retry-After": {"schema": {"type": "integer"}}} if status == 503 else {}
        responses[str(status)] = {
            "description": _REASONS[status],
            "headers": headers,
            "content": _json(_ref("Error")),
        }
    return {"summary": summary, "responses": responses}


def _answer(content: Json, *, headers: Json | None = None) -> Json:
    return {"description": "It is answered.", "headers": headers or {}, "content": content}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _path(name: str, values: list[str]) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": _one_of(values)}


def _one_of(values: Iterable[str]) -> Json:
    """The schema of one of these texts; of any where there are none."""
    known = [*dict.fromkeys(values)]
    return {"type": "string", "enum": known} if known else {"type": "string"}


def _object(*texts: str, **others: str | Json) -> Json:
    """The schema of an object whose members are all there: texts, and others of a type or a schema."""
    properties: Json = {name: {"type": "string"} for name in texts}
    properties |= {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in others.items()}
    return {"type": "object", "required": [*properties], "properties": properties}
