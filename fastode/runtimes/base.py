"""What all runtimes share: a card, batch buckets, named outputs, and the way to a :class:`Denoiser`.

A runtime executes a network; it is a callable ``network(x, c_noise, class_labels=..., features=..., **cond)`` and takes the
place of ``Denoiser.network``. Compiled and exported ones are built for a few batch sizes (*buckets*): a smaller batch is
padded by its last sample, a larger one is an error that names the buckets.
"""

from __future__ import annotations

import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastode.artifact import weights_hash
from fastode.buckets import plan
from fastode.denoisers.base import Denoiser
from fastode.files import write_json
from fastode.schedules.noise import schedule_from_dict, schedule_to_dict

FORMAT = "fastode-runtime-1"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Card:
    """What a runtime can do, and how far it is from the eager network.

    ``inputs``: name -> shape of one sample ([] for one number a sample), in the order of the call; ``kinds``: name -> dtype.
    ``outputs``: "raw", then the named outputs. ``buckets``: batch sizes; empty for any. ``capturable``: whether its calls can
    be recorded in a CUDA graph. ``error``: bucket -> largest difference to the eager network in its own precision, relative
    to the largest value, measured at build on random inputs. ``model``: hash of the weights. ``denoiser``: what the output
    means. ``versions``: of what it was built with.
    """

    runtime: str
    dtype: str
    buckets: tuple[int, ...] = ()
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("raw",)
    capturable: bool = False
    error: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None
    device: str = "cpu"
    denoiser: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Card:
        """Raises ``FileNotFoundError``, or ``ValueError`` for a foreign or damaged file."""
        try:
            values = json.loads(Path(path).read_text())
            if values.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            values["inputs"] = {k: tuple(v) for k, v in values["inputs"].items()}
            return cls(**{**values, "buckets": tuple(values["buckets"]), "outputs": tuple(values["outputs"])})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"path: {path} is not a card of a runtime or is damaged ({error})") from error


class MissingError(ImportError):
    """A package or device that this runtime needs is not there; the message says which, and how to get it."""


class Runtime(ABC):
    """``runtime(x, c_noise, class_labels=..., features=False)`` gives F [B, *sample], or (F, {name: output}) with features."""

    def __init__(self, card: Card) -> None:
        self.card = card

    @abstractmethod
    def run(self, bucket: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs for exactly ``bucket`` samples; inputs in the card's order and dtypes, contiguous."""

    def __call__(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, *, features: bool = False, **cond: Tensor
    ) -> Any:
        card = self.card
        if features and len(card.outputs) == 1:
            raise ValueError(f"features: this {card.runtime} network has no named outputs")
        given: dict[str, Tensor | None] = {"x": x, "c_noise": c_noise.reshape(-1), "class_labels": class_labels, **cond}
        batch = x.shape[0]
        bucket = self._bucket(batch)
        inputs = [self._input(name, given.pop(name, None), batch, bucket) for name in card.inputs]
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"{extra[0]}: this {card.runtime} network was built for {', '.join(card.inputs)} only")
        outputs = [out[:batch].to(x.dtype) for out in self.run(bucket, inputs)]
        return (outputs[0], dict(zip(card.outputs[1:], outputs[1:], strict=True))) if features else outputs[0]

    def _bucket(self, batch: int) -> int:
        if not self.card.buckets:
            return batch
        try:
            return plan(batch, self.card.buckets, "error")[0][2]
        except ValueError as error:
            built = ", ".join(map(str, self.card.buckets))
            raise ValueError(
                f"batch: {batch} samples, but this {self.card.runtime} network was built for {built}"
            ) from error

    def _input(self, name: str, value: Tensor | None, batch: int, bucket: int) -> Tensor:
        card = self.card
        if value is None:
            none = card.denoiser.get("null_label")
            if name != "class_labels" or none is None:
                raise ValueError(f"{name}: this {card.runtime} network was built with it; give it")
            value = torch.full((batch,), int(none), device=card.device)
        shape = (batch, *card.inputs[name])
        value = value.expand(shape) if value.numel() == 1 else value
        if tuple(value.shape) != shape:
            built = f"[B, {', '.join(map(str, card.inputs[name]))}]" if card.inputs[name] else "[B]"
            raise ValueError(
                f"{name}: has shape {list(value.shape)}, but this {card.runtime} network was built for {built}"
            )
        value = value.to(DTYPES.get(card.kinds[name], torch.int64))
        if bucket > batch:
            value = torch.cat([value, value[-1:].expand(bucket - batch, *value.shape[1:])])
        return value.contiguous()

    def denoiser(self, like: Denoiser | None = None) -> Denoiser:
        """This network as a denoiser: ``like`` with its network replaced, or as the card describes it."""
        if like is not None:
            return replace(like, network=self)
        fields = dict(self.card.denoiser)
        shape = fields.pop("sample_shape")
        schedule = schedule_from_dict(fields.pop("schedule"))
        return Denoiser(self, schedule=schedule, sample_shape=None if shape is None else tuple(shape), **fields)


class Named(nn.Module):
    """``forward(*inputs)`` with tensors only, in and out: what exporters take. Named outputs follow the raw one."""

    def __init__(self, network: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.network, self.inputs, self.outputs = network, tuple(inputs), tuple(outputs)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, values, strict=True))
        x, c_noise = given.pop("x"), given.pop("c_noise")
        if len(self.outputs) == 1:
            made = self.network(x, c_noise, **given)
            return (made[0] if isinstance(made, (tuple, list)) else made,)
        raw, named = self.network(x, c_noise, features=True, **given)
        return (raw, *(named[name] for name in self.outputs[1:]))


@dataclass(frozen=True)
class Source:
    """A module with everything an exporter wants to know about it."""

    module: Named
    card: Card

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        runtime: str,
        buckets: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Tensor] | None = None,
        features: bool | None = None,
        capturable: bool = False,
    ) -> Source:
        """Raises ``ValueError`` or ``TypeError`` naming the argument that a runtime cannot be built from.

        ``cond``: an example of every further condition, [1, ...] or [B, ...]. ``features``: keep the named outputs; by
        default where the network has them.
        """
        network = denoiser.network
        if not isinstance(network, nn.Module):
            raise TypeError(f"denoiser: its network must be a torch module, got {type(network).__name__}")
        if denoiser.sample_shape is None:
            raise ValueError("denoiser: its sample_shape must be known; give Denoiser(sample_shape=...)")
        sizes = tuple(sorted({int(b) for b in buckets}))
        if not sizes or sizes[0] < 1:
            raise ValueError(f"batches: need at least one positive batch size, got {list(buckets)}")
        own = dtype or denoiser.dtype or torch.float32
        name = str(own).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {own}")
        if own != denoiser.dtype:
            import copy

            network = copy.deepcopy(network).to(own)
        level = "float32" if own != torch.float64 else "float64"  # labels are told in float32 at least
        inputs: dict[str, tuple[int, ...]] = {"x": tuple(denoiser.sample_shape), "c_noise": ()}
        kinds = {"x": name, "c_noise": level}
        if denoiser.num_classes:
            inputs["class_labels"], kinds["class_labels"] = (), "int64"
        for key, value in (cond or {}).items():
            inputs[key] = tuple(value.shape[1:])
            kinds[key] = name if value.dtype.is_floating_point else "int64"
        takes = "features" in inspect.signature(network.forward).parameters
        if features and not takes:
            raise ValueError("features: this network has no named outputs")
        outputs = ("raw",)
        card = Card(
            runtime, name, sizes, inputs, kinds, outputs, capturable, {}, weights_hash(denoiser.network),
            str(denoiser.device or "cpu"), describe(denoiser), {"torch": torch.__version__},
        )  # fmt: skip
        module = Named(network.eval(), list(inputs), outputs)
        if takes and features is not False:
            with torch.no_grad():
                x, c_noise, *rest = cls(module, card).example(sizes[0])
                found = network(x, c_noise, features=True, **dict(zip(list(inputs)[2:], rest, strict=True)))[1]
            outputs = ("raw", *sorted(found))
            card, module = replace(card, outputs=outputs), Named(network.eval(), list(inputs), outputs)
        return cls(module, card)

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs for ``batch`` samples."""
        g, card = torch.Generator().manual_seed(seed), self.card
        made = []
        for name, shape in card.inputs.items():
            kind, size = card.kinds[name], (batch, *shape)
            if kind == "int64":
                top = int(card.denoiser.get("num_classes") or 1) if name == "class_labels" else 2
                value = torch.randint(0, top, size, generator=g)
            elif name == "c_noise":
                value = torch.rand(size, generator=g, dtype=torch.float64) * 2 - 1
                value = value if card.denoiser["prediction"] == "edm" else value.abs() * 500
            else:
                value = torch.randn(size, generator=g, dtype=torch.float64)
            made.append(value.to(device=card.device, dtype=DTYPES.get(kind, torch.int64)))
        return tuple(made)

    def measured(self, run: Callable[[int, Sequence[Tensor]], Sequence[Tensor]]) -> dict[str, float]:
        """Bucket -> how far ``run`` is from eager, over all outputs."""
        error = {}
        for bucket in self.card.buckets:
            inputs = self.example(bucket, seed=1)
            with torch.no_grad():
                wanted = self.module(*inputs)
                got = run(bucket, inputs)
            pairs = zip(got, wanted, strict=True)
            error[str(bucket)] = max(
                float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) for a, b in pairs
            )
        return error


def describe(denoiser: Denoiser) -> dict[str, Any]:
    """What a network's output means, as plain data."""
    if denoiser.transforms:
        raise ValueError("denoiser: transforms are not part of a network; add them to the denoiser of the runtime")
    return {
        "prediction": denoiser.prediction,
        "schedule": json.loads(json.dumps(schedule_to_dict(denoiser.schedule))),
        "sigma_data": denoiser.sigma_data,
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        "sample_shape": None if denoiser.sample_shape is None else list(denoiser.sample_shape),
        "name": denoiser.name,
    }


def blame(module: nn.Module, error: BaseException) -> str:
    """The innermost module of ``module`` in whose forward ``error`` arose, by name and class."""
    names = {id(m): (n or "network", type(m).__name__) for n, m in module.named_modules()}
    found = ""
    while True:
        frames: Iterator[Any] = iter(())
        tb = error.__traceback__
        while tb is not None:
            frames = iter([*frames, tb.tb_frame])
            tb = tb.tb_next
        for frame in frames:
            owner = names.get(id(frame.f_locals.get("self")))
            if owner is not None:
                found = f"{owner[0]} ({owner[1]})"
        cause = error.__cause__ or error.__context__
        if found or cause is None:
            return found or "network"
        error = cause


def export(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """``torch.export`` of ``module``. Raises ``ValueError`` naming the module and operation that cannot be exported."""
    try:
        with torch.no_grad():
            return torch.export.export(module, tuple(inputs), strict=False)
    except Exception as error:  # whatever the exporter raises: it has many kinds
        first = str(error).strip().splitlines()
        raise ValueError(
            f"network: cannot be exported; in {blame(module, error)}: {first[0] if first else type(error).__name__}"
        ) from error
