"""What the edge answers over HTTP where it does not do what was asked: one line of JSON, `{"error": "..."}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse

from ..protocol.messages import one_line

if TYPE_CHECKING:
    from .app import Edge


def error(status: int, line: str, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer of that status with one line that says why."""
    return JSONResponse({"error": one_line(line)}, status_code=status, headers=headers)


def unauthorised() -> JSONResponse:
    """The answer to somebody who may not come in."""
    return error(401, "a token is needed: Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"})


def client_of(connection: HTTPConnection) -> str:
    """HOST:PORT of who asks."""
    return f"{connection.client.host}:{connection.client.port}" if connection.client is not None else "a client"


async def say(request: Request, problem: Exception) -> JSONResponse:
    """The answer to what a route, or the lack of one, refuses; with its line in the log."""
    assert isinstance(problem, HTTPException)
    line = f"there is nothing at {request.url.path}" if problem.detail == "Not Found" else problem.detail
    edge: Edge = request.app.state.edge
    edge.refuse(request, line)
    return error(problem.status_code, line, headers=problem.headers)


async def fail(request: Request, problem: Exception) -> JSONResponse:
    """The answer where this edge is at fault; why is in its log alone."""
    return error(500, "this edge failed; its log says why")
