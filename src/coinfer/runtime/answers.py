"""What the edge answers over HTTP where it does not do what was asked: one line of JSON, `{"error": "..."}`."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..protocol.messages import one_line


def error(status: int, line: str, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer of that status with one line that says why."""
    return JSONResponse({"error": one_line(line)}, status_code=status, headers=headers)


def unauthorised() -> JSONResponse:
    """The answer to somebody who may not come in."""
    return error(401, "a token is needed: Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"})


async def say(request: Request, problem: Exception) -> JSONResponse:
    """The answer to what a route, or the lack of one, refuses."""
    assert isinstance(problem, HTTPException)
    line = f"there is nothing at {request.url.path}" if problem.detail == "Not Found" else problem.detail
    return error(problem.status_code, line, headers=problem.headers)


async def fail(request: Request, problem: Exception) -> JSONResponse:
    """The answer where this edge is at fault; why is in its log alone."""
    return error(500, "this edge failed; its log says why")
