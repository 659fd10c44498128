"""Butterfly's own comparison for ResNet-50 at 224 x 224: a unit after each residual block against the raw upload.

    python -m bench.butterfly       docs/results/raw/bottleneck/butterfly.jsonl.gz: times and bytes of all sixteen cuts

Eshratifar et al., 2019: c' = 1 / 2 / 5 / 10 channels after blocks 1-3 / 4-7 / 8-13 / 14-16, s = 2, 8 bits
(s = 1 behind the last stage, whose 7 x 7 values 2 does not divide).  Units are
started (principal components), not trained, on photographs; accuracy is not measured.  Segments run in ONNX Runtime,
fp32, on one core, side by side; the codec is the range coder on per-channel tables.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coinfer.codec import make_codec
from coinfer.compress.batches import as_inputs
from coinfer.compress.bottleneck import UnitSpec
from coinfer.compress.divided import Deployable, behind_reduction, codecs_of, insert_unit
from coinfer.data import load_source
from coinfer.engine.measure import allowed_cores, measure_interleaved, pinned
from coinfer.engine.onnx import Session
from coinfer.model.export import cut_onnx, export_onnx
from coinfer.model.graph import capture, first_of
from coinfer.model.zoo import build_model
from coinfer.plan import CodecSpec, TensorSpec
from coinfer.report.results import write_raw

from .cells import note_commit

RAW = Path("docs/results/raw/bottleneck/butterfly.jsonl.gz")
BLOCKS = tuple(f"layer{stage}.{block}#0" for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(count))
WIDTHS = {"layer1": 1, "layer2": 2, "layer3": 5, "layer4": 10}
PICTURES = 32
REPEATS = 15


def measure() -> None:
    """Times of the whole network, of all heads and tails, and bytes; a line each."""
    torch.manual_seed(0)
    model = build_model("resnet50")
    graph = capture(model.module, torch.zeros(2, 3, 224, 224))
    assert model.preprocess is not None
    pixels = load_source("imagenette", size=(224, 224)).images("test").pixels[:PICTURES]
    inputs = as_inputs(pixels, model.preprocess).contiguous()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(graph, folder / "whole.onnx", preprocess=model.preprocess)
        whole = Session(folder / "whole.onnx")
        lines: list[dict[str, Any]] = []
        with pinned(next(iter(allowed_cores()), None)):
            for block, name in enumerate(BLOCKS, 1):
                cut = graph.cut(name)
                stride = 2 if cut.specs[0].shape[1] % 2 == 0 else 1
                divided = insert_unit(graph, cut, UnitSpec(width=WIDTHS[name[:6]], stride=stride, bits=8))
                with torch.no_grad():
                    divided.unit.start_from(first_of(divided.head(inputs)))
                deployed = capture(Deployable(divided), torch.zeros(2, 3, 224, 224))
                cut_network = export_onnx(deployed, folder / "unit.onnx", preprocess=model.preprocess)
                place = behind_reduction(divided.unit.spec)
                cut_onnx(cut_network, place, head=folder / "head.onnx", tail=folder / "tail.onnx")
                head, tail = Session(folder / "head.onnx"), Session(folder / "tail.onnx")
                crossing = cut_network.cut(place).specs[0]
                ((spec, tables),) = codecs_of(divided.unit, crossing)
                codec = make_codec(spec, (crossing,), tables)
                given = head.run([pixels[:1]])
                payload = codec.encode(given)
                calls: dict[str, Callable[[], object]] = {
                    "whole": partial(whole.run, [pixels[:1]]),
                    "head": partial(head.run, [pixels[:1]]),
                    "encode": partial(codec.encode, given),
                    "decode": partial(codec.decode, payload),
                    "tail": partial(tail.run, given),
                }
                times = measure_interleaved(calls, warmup=2, repeats=REPEATS)
                sizes = [len(codec.encode(head.run([pixels[n : n + 1]]))) for n in range(PICTURES)]
                lines.append(
                    {
                        "block": block,
                        "cut": name,
                        "width": divided.unit.spec.width,
                        "stride": stride,
                        "raw_bytes": crossing.num_elements,
                        "coded_bytes": float(np.mean(sizes)),
                        **{f"{stage}_s": timing.median_s for stage, timing in times.items()},
                        "share": times["head"].median_s / times["whole"].median_s,
                        "repeats": REPEATS,
                        "pictures": PICTURES,
                    }
                )
                print({key: value for key, value in lines[-1].items() if key != "repeats"}, flush=True)
            lines.append(_uploads(pixels, whole))
    note_commit(RAW.parent, "butterfly")
    write_raw(RAW, lines)


def _uploads(pixels: Any, whole: Session) -> dict[str, Any]:
    """What the raw picture and a JPEG of quality 90 send and take, and the whole network beside them."""
    picture = TensorSpec(name="input", shape=pixels.shape[1:], dtype="uint8")
    jpeg = make_codec(CodecSpec(transform="image", coder="jpeg-bare", quality=90), (picture,))
    payload = jpeg.encode((pixels[:1],))
    times = measure_interleaved(
        {
            "whole": lambda: whole.run([pixels[:1]]),
            "jpeg_encode": lambda: jpeg.encode((pixels[:1],)),
            "jpeg_decode": lambda: jpeg.decode(payload),
        },
        warmup=2,
        repeats=REPEATS,
    )
    sizes = [len(jpeg.encode((pixels[n : n + 1],))) for n in range(len(pixels))]
    return {
        "block": 0,
        "raw_bytes": int(np.prod(pixels.shape[1:])),
        "jpeg_bytes": float(np.mean(sizes)),
        **{f"{stage}_s": timing.median_s for stage, timing in times.items()},
        "repeats": REPEATS,
        "pictures": len(pixels),
    }


if __name__ == "__main__":
    measure()
