"""ONNX: export, and ONNX Runtime with its inputs and outputs bound to torch's memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastode.denoisers.base import Denoiser
from fastode.files import whole
from fastode.runtimes.base import Card, MissingError, Runtime, Source, export

ORDER = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
"""Providers in the order in which they are preferred."""

_KINDS = {"float32": "float32", "float16": "float16", "float64": "float64", "int64": "int64", "bfloat16": "bfloat16"}


class Onnx(Runtime):
    """A folder: ``card.json`` and one ``b<batch>.onnx`` per bucket, run by ONNX Runtime without torch's network.

    ``card.capturable`` is False: the runtime has a stream of its own.
    """

    def __init__(self, card: Card, sessions: Mapping[int, Any]) -> None:
        super().__init__(card)
        self.sessions = sessions

    @classmethod
    def build(
        cls,
        denoiser: Denoiser,
        path: str | os.PathLike[str],
        *,
        batches: Sequence[int] = (1,),
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Tensor] | None = None,
        features: bool | None = None,
        providers: Sequence[str] | None = None,
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        progress: bool = False,
        name: str = "onnx",
    ) -> Onnx:
        """Export every bucket into the folder ``path`` and open it; the card is written last.

        Raises ``ValueError`` naming the operation and the module where ONNX has none for it, :class:`MissingError` without
        the packages.
        """
        need("onnx", "onnxscript", "onnxruntime")
        source = Source.of(denoiser, name, batches, dtype=dtype, cond=cond, features=features)
        if source.card.dtype == "bfloat16":
            raise ValueError("dtype: ONNX Runtime computes in float32 or float16 here, got bfloat16")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for bucket in tqdm(source.card.buckets, desc=name, unit="bucket", disable=not progress):
            inputs = source.example(bucket)
            to_onnx(source.module, inputs, folder / f"b{bucket}.onnx", list(source.card.inputs), source.card.outputs)
        made = cls(source.card, _sessions(folder, source.card, providers, provider_options))
        import onnx

        used = made.providers
        versions = {**source.card.versions, "onnx": onnx.__version__, "onnxruntime": _version(), "provider": used[0]}
        made.card = replace(source.card, versions=versions, error=source.measured(made.run))
        made.card.write(folder / "card.json")
        return made

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Onnx:
        """Open what :meth:`build` wrote, on the best of this machine's ``providers``."""
        need("onnxruntime")
        card = Card.read(Path(path) / "card.json")
        return cls(card, _sessions(Path(path), card, providers, provider_options))

    @property
    def providers(self) -> tuple[str, ...]:
        """What really executes it, the first one for as much as it can."""
        return tuple(next(iter(self.sessions.values())).get_providers())

    def run(self, bucket: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return bound(self.sessions[bucket], dict(zip(self.card.inputs, inputs, strict=True)), self.card.outputs)


def bound(session: Any, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
    """Run ``session`` on torch's own memory: nothing is copied on the way in, and outputs stay where they are made."""
    binding = session.io_binding()
    device = next(iter(inputs.values())).device
    for name, value in inputs.items():
        value = value.detach()
        binding.bind_input(
            name, device.type, device.index or 0, _numpy(value.dtype), tuple(value.shape), value.data_ptr()
        )
    made = []
    for described in session.get_outputs():
        dtype = _torch(described.type)
        value = torch.empty(tuple(described.shape), dtype=dtype, device=device)
        binding.bind_output(
            described.name, device.type, device.index or 0, _numpy(dtype), tuple(value.shape), value.data_ptr()
        )
        made.append((described.name, value))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # its stream is another one
    session.run_with_iobinding(binding)
    named = dict(made)
    return [named[name] for name in outputs]


def available(asked: Sequence[str] | None = None) -> list[str]:
    """The providers of this machine's ONNX Runtime in the preferred order. Raises :class:`MissingError` naming one that was
    asked for and is not there."""
    import onnxruntime

    here = onnxruntime.get_available_providers()
    for name in asked or ():
        if name not in here:
            package = "onnxruntime-gpu and CUDA" + (" with TensorRT" if name.startswith("Tensorrt") else "")
            raise MissingError(f"providers: {name} is not in this ONNX Runtime ({', '.join(here)}); it needs {package}")
    return list(asked) if asked else [name for name in ORDER if name in here]


def open_session(
    path: Path, providers: Sequence[str] | None, options: Mapping[str, Mapping[str, str]] | None = None
) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    chosen = available(providers)
    try:
        return onnxruntime.InferenceSession(
            str(path), settings, providers=[(name, dict((options or {}).get(name, {}))) for name in chosen]
        )
    except Exception as error:  # its exceptions have no common class
        raise ValueError(f"path: {path} cannot be opened by ONNX Runtime ({str(error).splitlines()[0]})") from error


def to_onnx(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: Path,
    names: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``module`` as one ONNX file with fixed shapes."""
    import onnx

    program = export(module, inputs)
    try:
        made = torch.onnx.export(
            program, (), None, input_names=list(names), output_names=list(outputs), dynamo=True, verbose=False
        )
    except Exception as error:
        raise ValueError(_unsupported(program, error)) from error
    assert made is not None
    proto = made.model_proto
    for key, value in (metadata or {}).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    with whole(path) as part:
        onnx.save(proto, str(part))


def _unsupported(program: Any, error: BaseException) -> str:
    """Which operation of which module ONNX has no translation for."""
    text = str(error)
    chain: BaseException | None = error
    while chain is not None:
        text += "\n" + str(chain)
        chain = chain.__cause__ or chain.__context__
    found = re.search(r"<OpOverload\(op='([^']+)'", text)
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if found is None:
        return f"network: cannot be exported to ONNX: {first}"
    op = found.group(1).replace("::", ".")
    for graph in (program.graph, program.run_decompositions().graph):  # it may be part of another operation
        for node in graph.nodes:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if node.op == "call_function" and str(node.target).startswith(op) and stack:
                where, kind = stack[-1]
                kind = kind if isinstance(kind, str) else kind.__name__
                return f"network: ONNX has no operation for {op}, used in {where or 'network'} ({kind.split('.')[-1]})"
    return f"network: ONNX has no operation for {op}"


def _sessions(folder: Path, card: Card, providers: Any, options: Any) -> dict[int, Any]:
    for bucket in card.buckets:
        if not (folder / f"b{bucket}.onnx").exists():
            raise FileNotFoundError(f"path: {folder / f'b{bucket}.onnx'} is missing beside its card")
    return {b: open_session(folder / f"b{b}.onnx", providers, options) for b in card.buckets}


def lacking(*packages: str) -> str | None:
    """Which of ``packages`` are not installed, and how to get them."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"onnx: needs {', '.join(missing)}: pip install 'fastode[onnx]'" if missing else None


def need(*packages: str) -> None:
    reason = lacking(*packages)
    if reason is not None:
        raise MissingError(reason)


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _numpy(dtype: torch.dtype) -> Any:
    import numpy

    return getattr(numpy, _KINDS[str(dtype).removeprefix("torch.")])


def _torch(kind: str) -> torch.dtype:
    names = {"float": "float32", "double": "float64"}
    inner = kind.removeprefix("tensor(").removesuffix(")")
    found: torch.dtype = getattr(torch, names.get(inner, inner))
    return found
