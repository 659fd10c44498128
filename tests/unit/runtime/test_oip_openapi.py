"""The document of the routes says what the routes do."""

from __future__ import annotations

import json

import schemathesis
from starlette.routing import Route

from coinfer.bundle import Bundle
from coinfer.runtime.app import make_app
from http_edge import ask, served


def test_every_route_over_http_is_in_the_document(tiny_bundle: Bundle) -> None:
    app = make_app(tiny_bundle)
    with served(app) as where:
        document = json.loads(ask(where, "GET", "/v2/openapi.json")[2])
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    routes = {(r.path, method) for r in app.routes if isinstance(r, Route) for method in r.methods or ()}
    assert {one for one in described if one[1] != "PARAMETERS"} == {one for one in routes if one[1] != "HEAD"}
    assert document["components"]["parameters"]["model"]["schema"]["enum"] == ["tiny"]


def test_the_document_is_one_of_openapi(tiny_bundle: Bundle) -> None:
    with served(make_app(tiny_bundle)) as where:
        document = json.loads(ask(where, "GET", "/v2/openapi.json")[2])
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 16
