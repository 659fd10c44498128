"""The fuzz of the HTTP front, for seconds; and that it sees what it is there to see."""

from __future__ import annotations

import io
import os
from pathlib import Path

import requests
from bench.fuzz_http import Fuzz, fuzz_edge, uploads_bundle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from http_edge import served


def test_the_http_front_takes_whatever_comes(tmp_path: Path) -> None:
    log = io.StringIO()
    found = fuzz_edge(uploads_bundle(tmp_path), num_schema=250, num_hostile=250, seed=7, log=log)
    assert found.requests == {"schemathesis": 250, "hostile": 250}
    assert len(log.getvalue().splitlines()) == 500
    assert found.is_alive
    # How long an answer takes is the benchmark's to judge.
    assert [fault for fault in found.faults if fault.kind != "slow"] == []
    assert found.statuses["200"] > 20 and found.statuses["400"] > 100


def broken(status: int, kind: type[Response]) -> Starlette:
    """An app whose one route is described as answering {"a": 1}, and does something else."""
    answer = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "x", "version": "1"},
        "paths": {
            "/thing": {
                "get": {
                    "responses": {"200": {"description": "", "content": {"application/json": {"schema": answer}}}}
                }
            }
        },
    }

    async def describe(request: Request) -> Response:
        return JSONResponse(document)

    async def thing(request: Request) -> Response:
        return kind({"a": "text"} if kind is JSONResponse else "text", status_code=status)

    return Starlette(routes=[Route("/v2/openapi.json", describe), Route("/thing", thing)])


def test_the_fuzz_sees_answers_that_should_not_be() -> None:
    for status, kind, line in (
        (500, JSONResponse, "500: "),
        (418, JSONResponse, "Undocumented status code"),
        (200, PlainTextResponse, "Undocumented Content-Type"),
        (200, JSONResponse, "Response violates schema"),
    ):
        with served(broken(status, kind)) as where:
            fuzz = Fuzz(f"http://{where}", os.getpid(), seed=1, settle=1, log=io.StringIO())
            fuzz.by_schema(1)
            found = fuzz.summary()
        assert found.num_faults > 0 and any(line in fault.what for fault in found.faults), found


def test_the_fuzz_sees_an_edge_that_does_not_answer() -> None:
    fuzz_log = io.StringIO()
    with served(broken(200, JSONResponse)) as where:
        fuzz = Fuzz(f"http://{where}", os.getpid(), seed=1, settle=1, log=fuzz_log)
        fuzz.send("hostile", "gone", lambda: requests.get("http://127.0.0.1:9/", timeout=5))
        found = fuzz.summary()
    assert [fault.kind for fault in found.faults] == ["lost"] and found.statuses == {"none": 1}
