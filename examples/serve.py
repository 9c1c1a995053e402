"""An exported sampler behind HTTP: ``GET /sample?seed=1&label=7`` answers with a PNG; ``GET /`` describes the sampler.

    python examples/export_sampler.py --out five.onnx --batch 1
    python examples/serve.py five.onnx --port 8000
    curl -o seven.png 'localhost:8000/sample?seed=1&label=7'

One request at a time goes through the network, which is what one device does best; a seed always gives the same picture.
"""

import argparse
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from PIL import Image

from fastode.runtimes import load_sampler
from fastode.runtimes.sampler import ExportedSampler


def png(sample: torch.Tensor) -> bytes:
    """[C, H, W] in [-1, 1] as a PNG, gray or colour."""
    pixels = ((sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).save(out, "PNG")
    return out.getvalue()


def server(sampler: ExportedSampler, port: int) -> ThreadingHTTPServer:
    """Ready for ``serve_forever()``; port 0 picks a free one."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlparse(self.path)
            try:
                if url.path == "/":
                    return self.answer(200, "application/json", json.dumps(sampler.card).encode())
                if url.path != "/sample":
                    return self.answer(404, "text/plain", b"there are / and /sample")
                query = {k: int(v[-1]) for k, v in parse_qs(url.query).items()}
                unknown = sorted(set(query) - {"seed", "label"})
                if unknown:
                    raise ValueError(f"{unknown[0]}: the parameters are seed and label")
                label, classes = query.get("label"), sampler.card["num_classes"]
                if label is not None and not 0 <= label < (classes or 0):
                    raise ValueError(f"label: must be in 0 .. {(classes or 0) - 1}, got {label}")
                with lock:
                    sample = sampler(seeds=[query.get("seed", 0)], class_labels=None if label is None else [label])[0]
                self.answer(200, "image/png", png(sample))
            except ValueError as error:
                self.answer(400, "text/plain", str(error).encode())

        def answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="from examples/export_sampler.py")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    running = server(load_sampler(args.file), args.port)
    print(f"http://127.0.0.1:{running.server_address[1]}/sample?seed=0")
    running.serve_forever()


if __name__ == "__main__":
    main()
