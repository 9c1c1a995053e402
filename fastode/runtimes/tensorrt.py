"""TensorRT two ways: as a provider of ONNX Runtime, and through Torch-TensorRT. Engines are cached on disk.

Both run on the paths that are tested everywhere, with another provider or backend: what is specific to TensorRT is the
engine cache and a clear word about what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.files import write_json
from fastode.runtimes.base import Card, MissingError, Runtime, Source
from fastode.runtimes.onnx import ORDER, Onnx

PROVIDER = ORDER[0]


def missing(kind: str) -> str | None:
    """Why "provider" or "torch" cannot run here, or None."""
    import importlib.util

    if not torch.cuda.is_available():
        return "no CUDA device"
    if kind == "torch":
        found = importlib.util.find_spec("torch_tensorrt")
        return None if found else "torch_tensorrt is not installed: pip install torch-tensorrt"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime-gpu"
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no TensorRT provider: pip install onnxruntime-gpu tensorrt"
    return None


def cache_key(card: Card, bucket: int) -> dict[str, Any]:
    """What an engine depends on: weights, shapes of its inputs, precision, device, and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "model": card.model,
        "inputs": {name: [bucket, *shape] for name, shape in card.inputs.items()},
        "dtype": card.dtype,
        "device": device,
        "versions": {k: card.versions[k] for k in sorted(card.versions) if k != "provider"},
    }


class EngineCache:
    """Engines on disk, one folder per key; ``key.json`` beside them says what they were built for.

    :meth:`folder` gives the folder of a key. :meth:`check` raises ``ValueError`` for a folder that holds another key's
    engines (copied, renamed or edited), naming the first entry that differs.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @staticmethod
    def name(key: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]

    def folder(self, key: Mapping[str, Any]) -> Path:
        folder = self.root / self.name(key)
        if folder.exists():
            self.check(folder, key)
        else:
            folder.mkdir(parents=True)
            write_json(folder / "key.json", dict(key))
        return folder

    def check(self, folder: Path, key: Mapping[str, Any]) -> None:
        try:
            built = json.loads((folder / "key.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cache: {folder} holds no readable key.json ({error}); delete it") from error
        for name in sorted({*built, *key}):
            if built.get(name) != json.loads(json.dumps(key.get(name))):
                raise ValueError(
                    f"cache: {folder} is stale: it was built for {name} = {built.get(name)!r}, now it is {key.get(name)!r}; "
                    "delete it"
                )

    def stale(self, keys: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Folders that belong to none of ``keys``: engines of other weights, shapes or versions."""
        current = {self.name(key) for key in keys}
        return sorted(p for p in self.root.glob("*") if p.is_dir() and p.name not in current)


class TensorRT(Onnx):
    """ONNX Runtime's TensorRT provider, with CUDA and the CPU behind it for what TensorRT cannot do."""

    @classmethod
    def build(  # type: ignore[override]
        cls,
        denoiser: Denoiser,
        path: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        batches: Sequence[int] = (1,),
        dtype: torch.dtype | None = None,
        providers: Sequence[str] | None = None,
        **options: Any,
    ) -> Onnx:
        """As :meth:`Onnx.build`; engines go to ``cache`` (by default inside ``path``), one folder per bucket's key.

        ``providers``: without it TensorRT is required, and :class:`MissingError` says what it lacks here.
        """
        if providers is None:
            reason = missing("provider")
            if reason is not None:
                raise MissingError(f"tensorrt: {reason}")
            providers = [PROVIDER, *ORDER[1:]]
        source = Source.of(denoiser, "tensorrt", batches, dtype=dtype, cond=options.get("cond"))
        engines = EngineCache(cache or Path(path) / "engines")
        folders = [engines.folder(cache_key(source.card, b)) for b in source.card.buckets]
        settings = {PROVIDER: provider_settings(folders[0], source.card.dtype)}
        return super().build(
            denoiser, path, batches=batches, dtype=dtype, providers=providers, provider_options=settings,
            name="tensorrt", **options,
        )  # fmt: skip


def provider_settings(folder: Path, dtype: str) -> dict[str, str]:
    """Options of the provider: engines and timings are kept in ``folder``."""
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if dtype == "float16" else "0",
    }


class TorchTensorRT(Runtime):
    """Torch-TensorRT: the exported program of each bucket compiled to engines, run inside torch."""

    def __init__(self, card: Card, modules: Mapping[int, Any]) -> None:
        super().__init__(card)
        self.modules = modules

    @classmethod
    def build(
        cls,
        denoiser: Denoiser,
        *,
        cache: str | os.PathLike[str],
        batches: Sequence[int] = (1,),
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Tensor] | None = None,
        features: bool | None = None,
    ) -> TorchTensorRT:
        """Raises :class:`MissingError` saying what is not there."""
        reason = missing("torch")
        if reason is not None:
            raise MissingError(f"torch_tensorrt: {reason}")
        from dataclasses import replace

        import torch_tensorrt

        from fastode.runtimes.base import export

        source = Source.of(denoiser, "torch_tensorrt", batches, dtype=dtype, cond=cond, features=features)
        card = replace(source.card, versions={**source.card.versions, "torch_tensorrt": torch_tensorrt.__version__})
        engines, modules = EngineCache(cache), {}
        for bucket in card.buckets:
            inputs = source.example(bucket)
            modules[bucket] = torch_tensorrt.dynamo.compile(
                export(source.module, inputs),
                inputs=list(inputs),
                enabled_precisions={getattr(torch, card.dtype)},
                cache_built_engines=True,
                reuse_cached_engines=True,
                engine_cache_dir=str(engines.folder(cache_key(card, bucket))),
            )
        made = cls(card, modules)
        made.card = replace(card, error=source.measured(made.run))
        return made

    def run(self, bucket: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: Any = self.modules[bucket](*inputs)
        return outputs if isinstance(outputs, (tuple, list)) else (outputs,)
