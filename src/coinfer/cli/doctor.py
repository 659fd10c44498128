"""`coinfer doctor`: what is wrong with an installation, a bundle on this machine, or the way to an edge."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from .. import __version__
from ..bundle import Bundle, load_bundle
from ..errors import CoinferError, LinkError, PlanError, ProtocolError, RefusedError, UsageError
from ..units import format_duration
from .installation import Finding, installation
from .options import DeviceCert, DeviceKey, EdgeCa, Json, TokenFile
from .output import print_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.segments import Segments
    from ..plan import Plan

PINGS = 5
# A doctor's patience with an edge.
EDGE_S = 5.0
SAMPLES = "samples.safetensors"


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="Folder that `coinfer build` wrote.", show_default=False),
    ] = None,
    edge: Annotated[
        str | None,
        typer.Option("--edge", metavar="URL", help="The edge that this device is to use.", show_default=False),
    ] = None,
    token_file: TokenFile = None,
    ca: EdgeCa = None,
    cert: DeviceCert = None,
    key: DeviceKey = None,
    json: Json = False,
) -> None:
    """Say what is wrong.

    Checks this installation; a BUNDLE as a device would load it; with --edge the way there. One line a check: ok,
    warning or wrong, and what to do. Ends with 1 if something is wrong.
    """
    if edge is not None and bundle is None:
        raise UsageError("--edge needs a BUNDLE too: device and edge compare theirs before anything else")
    if edge is None and (token_file or ca or cert or key):
        raise UsageError("--token-file, --ca, --cert and --key are for an --edge")
    found: list[Finding] = []
    for finding in _findings(bundle, edge, token_file, ca, cert, key):
        found.append(finding)
        if not json:
            print(_line(finding), flush=True)
    is_wrong = any(finding.state == "wrong" for finding in found)
    if json:
        print_json({"ok": not is_wrong, "coinfer": __version__, "checks": found})
    if is_wrong:
        raise typer.Exit(1)


def _line(finding: Finding) -> str:
    advice = f" -> {finding.advice}" if finding.advice else ""
    return " ".join(f"{finding.state:<8}{finding.check}: {finding.text}{advice}".splitlines())


def _findings(bundle: Path | None, edge: str | None, *secrets: Path | None) -> Iterator[Finding]:
    yield from installation()
    if bundle is None:
        return
    try:
        loaded = load_bundle(bundle)
    except (CoinferError, OSError) as error:
        advice = "copy the bundle anew, all of its files"
        yield Finding(check="bundle", state="wrong", text=str(error), advice=advice)
        return
    files = len(loaded.manifest.files)
    text = f"{loaded.digest:.12}, {files} files as their sha256 says, {len(loaded.manifest.menu)} plans"
    yield Finding(check="bundle", state="ok", text=text)
    try:
        yield from bundle_findings(loaded)
        if edge is not None:
            yield from edge_findings(loaded, edge, *secrets)
    except ImportError as error:
        advice = "see the packages above"
        yield Finding(check="bundle", state="wrong", text=f"not all was tried: {error}", advice=advice)


def bundle_findings(bundle: Bundle) -> Iterator[Finding]:
    """What a device would meet with a bundle that is whole."""
    from ..engine.segments import Segments

    yield versions(bundle)
    segments = Segments(bundle.path, bundle.manifest.outputs)
    yield device_segments(bundle, segments)
    yield codecs(bundle, segments)
    yield fallback(bundle)


def versions(bundle: Bundle) -> Finding:
    """Whether coinfer and ONNX Runtime are those that the bundle was built with."""
    built = bundle.manifest.coinfer
    others = []
    if built != __version__:
        others.append(f"coinfer {built}, here {__version__}")
    if "profile.json" in bundle.manifest.files:
        from ..engine.measure import describe_machine

        try:
            there, here = bundle.profile().machine.versions, describe_machine().versions
        except CoinferError as error:
            return Finding(check="versions", state="wrong", text=str(error), advice="build the bundle anew")
        for name in ("onnxruntime", "numpy", "constriction"):
            if name in there and there[name] != here.get(name):
                others.append(f"{name} {there[name]}, here {here.get(name, 'none')}")
    if not others:
        return Finding(check="versions", state="ok", text=f"built with coinfer {built} and what is here")
    advice = "times differ: `coinfer profile` measures them here; answers agree but for rounding"
    return Finding(check="versions", state="warning", text=f"built with {'; '.join(others)}", advice=advice)


def device_segments(bundle: Bundle, segments: Segments) -> Finding:
    """Whether everything that a device computes with loads."""
    names: set[str] = set()
    for plan in bundle.manifest.menu:
        try:
            segments.parts(plan, "device")
            if plan.codec is not None:
                segments.codec(plan)
        except (CoinferError, OSError) as error:
            advice = "build the bundle anew, or install the onnxruntime that it was built with"
            return Finding(check="segments", state="wrong", text=f"plan {plan.number}: {error}", advice=advice)
        names |= set(plan.segments_on("device"))
    return Finding(check="segments", state="ok", text=f"the device's {len(names)} load, and every codec")


def codecs(bundle: Bundle, segments: Segments) -> Finding:
    """Whether what each plan sends comes back as it should: the bundle's pictures by its heads and codecs."""
    count = 0
    for plan in bundle.manifest.menu:
        if plan.codec is None:
            continue
        try:
            _check_codec(bundle, segments, plan)
        except (CoinferError, OSError) as error:
            advice = "device and edge would not understand each other: build the bundle anew"
            return Finding(check="codecs", state="wrong", text=f"plan {plan.number}: {error}", advice=advice)
        count += 1
    source = "the bundle's pictures" if SAMPLES in bundle.manifest.files else "pictures of noise"
    return Finding(check="codecs", state="ok", text=f"{source} come back as they should by {count} plans")


def _check_codec(bundle: Bundle, segments: Segments, plan: Plan) -> None:
    import numpy as np

    from ..engine.sides import run_side

    codec = segments.codec(plan)
    for pixels in _samples(bundle):
        picture = pixels[None]
        sent = [picture] if plan.kind == "upload" else segments.head(plan).run([picture])
        if plan.kind == "split" and plan.exits_on("device"):
            side = run_side(plan, "device", segments, [picture])
            if side.exit is not None:
                continue
            sent = side.values
        wanted, _ = codec.roundtrip(sent)
        for have, want in zip(codec.decode(codec.encode(sent)), wanted, strict=True):
            if not np.array_equal(have, want):
                raise PlanError(f"what is decoded is not what was encoded (codec {codec.spec.name})")


def _samples(bundle: Bundle) -> NDArray[Any]:
    """Four requests: the bundle's own, or noise."""
    import numpy as np

    if SAMPLES in bundle.manifest.files:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(bundle.path(SAMPLES).read_bytes())["pixels"]
        except (SafetensorError, KeyError) as error:
            raise PlanError(f"{SAMPLES} cannot be read: {error}") from error
    spec = bundle.manifest.input
    return np.random.default_rng(0).integers(0, 256, (4, *spec.shape)).astype(spec.dtype)


def fallback(bundle: Bundle) -> Finding:
    """Whether the device can answer without an edge."""
    alone = [plan.number for plan in bundle.manifest.menu if plan.kind == "device"]
    if alone:
        numbers = ", ".join(map(str, alone))
        return Finding(check="fallback", state="ok", text=f"without an edge the device answers by plan {numbers}")
    text, advice = "no plan of the device alone: without an edge no request is answered", "build the bundle anew"
    return Finding(check="fallback", state="wrong", text=text, advice=advice)


def edge_findings(bundle: Bundle, url: str, *files: Path | None) -> Iterator[Finding]:
    """Whether the edge is there, trusted, of the same protocol and bundle, and how far away it is."""
    from ..runtime.device import Device
    from .run import secrets_of

    try:
        with Device(bundle, edge=url, timeout_s=EDGE_S, **secrets_of(url, *files)) as device:
            yield Finding(check="edge", state="ok", text=f"{url} is reached and speaks this protocol")
            yield encryption(url)
            yield Finding(check="edge's bundle", state="ok", text=f"the same, {bundle.digest:.12}")
            seconds = [device.ping() for _ in range(PINGS)]
            text = f"{format_duration(statistics.median(seconds))}, the median of {PINGS} heartbeats"
            yield Finding(check="round trip", state="ok", text=text)
    except (CoinferError, OSError) as error:
        yield Finding(check="edge", state="wrong", text=str(error), advice=_advice(error))


def encryption(url: str) -> Finding:
    """Whether what crosses the link can be read on the way."""
    parts = urlsplit(url)
    if parts.scheme == "wss":
        return Finding(check="TLS", state="ok", text="the edge's certificate and name were verified")
    if _is_own(parts.hostname or ""):
        return Finding(check="TLS", state="ok", text="none, and none is needed on this machine itself")
    text, advice = "none: whoever is on the way reads and alters everything", "serve with --cert, use wss://"
    return Finding(check="TLS", state="warning", text=text, advice=advice)


def _is_own(host: str) -> bool:
    from ..runtime.addresses import is_loopback

    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def _advice(error: Exception) -> str:
    if isinstance(error, RefusedError):
        if "token" in str(error):
            return "give this machine a token that the edge knows: --token-file"
        return "give both machines the same bundle"
    if isinstance(error, ProtocolError):
        return "is it the edge of coinfer, in the same version, at this address?"
    return "is the edge running, and no firewall in between?" if isinstance(error, LinkError) else "see above"
