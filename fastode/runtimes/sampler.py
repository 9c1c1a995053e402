"""A whole sampler, network and solver, as one file: a ``torch.export`` program (``.pt2``) or an ONNX model (``.onnx``).

    export_sampler("five.onnx", SOLVERS["unipc"](grid), denoiser, batch=8)
    images = load_sampler("five.onnx")(seeds=range(8), class_labels=[3] * 8)

The tables of the solver become constants between the network's calls, so whoever runs the file needs neither fastode nor the
model: its inputs are ``x`` (the state at the first level), the labels and conditions, and one ``noise<k>`` per draw.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.files import whole
from fastode.noise import check_seeds, normal
from fastode.program import Program
from fastode.program.lower import Source, lower
from fastode.runtimes.base import describe, export
from fastode.scalar import evaluate

FORMAT = "fastode-sampler-1"


class Portable(nn.Module):
    """``portable(x, *inputs) -> [B, *sample]`` in plain tensor operations: what exporters can take.

    Args:
        program: a compiled solver whose coefficients are known (the guidance strength aside).
        denoiser: its network is a torch module; no transforms.
        guidance_scale: a strength, which becomes a constant.
        names: the inputs after ``x``, in order: "class_labels", conditions, then "noise0", "noise1", ...

    The state has the dtype of ``x``; the network is called in its own. Raises ``ValueError`` for late coefficients.
    """

    def __init__(
        self,
        program: Program,
        denoiser: Denoiser,
        *,
        names: Sequence[str] = (),
        guidance_scale: float | None = None,
        guidance: Guidance | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if program.late:
            late = ", ".join(sorted(x.name for x in program.late))
            raise ValueError(f"program: {program.name} learns {late} in the run, so its table is not static")
        if denoiser.transforms:
            raise ValueError("denoiser: transforms are not linear and not part of a table; put them into the network")
        if not isinstance(denoiser.network, nn.Module):
            raise TypeError(f"denoiser: its network must be a torch module, got {type(denoiser.network).__name__}")
        self.names = tuple(names)
        self._denoiser, self.network = denoiser, denoiser.network
        self._guidance = (guidance or Guidance()) if guidance_scale is not None else None
        self._net_dtype = denoiser.dtype or dtype
        known: dict[Any, Any] = {} if guidance_scale is None else {GUIDANCE_SCALE: float(guidance_scale)}
        lowered = lower(
            program,
            denoiser.scaling,
            lambda level: denoiser.columns(level, self._guidance),
            exact_input=self._net_dtype == dtype,
        )
        self._slots = lowered.slots
        self._guided = tuple(call.outputs > 1 for call in lowered.calls)
        self._levels = tuple(float(evaluate(call.c_noise, known)) for call in lowered.calls)
        self._updates: list[tuple[Any, ...]] = []
        memo: dict[int, Any] = {}
        for update in lowered.updates:
            rows = []
            for target, entries in zip(update.targets, update.entries, strict=True):
                weights = [evaluate(c, known, memo) for c in entries]
                terms = [(s, w) for s, w in zip(update.sources, weights, strict=True) if not _is_zero(w)]
                rows.append((target, [(s, self._constant(w, dtype)) for s, w in terms]))
            self._updates.append(tuple(rows))

    def _constant(self, weight: Any, dtype: torch.dtype) -> float | str:
        """A weight as a number, or the name of the buffer that holds its values per element."""
        if not isinstance(weight, Tensor) or weight.ndim == 0:
            return float(weight)
        name = f"field{sum(1 for _ in self.buffers(recurse=False))}"
        self.register_buffer(name, weight.detach().to(dtype))
        return name

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        draws = {k: v for k, v in given.items() if k.startswith("noise")}
        cond = {k: v for k, v in given.items() if k not in draws and k != "class_labels"}
        condition = Condition(given.get("class_labels"), cond, None)
        slots: dict[int, Tensor] = {}
        net_in, outputs, result = x, [x], x
        for i, rows in enumerate(self._updates):

            def read(source: Source, net_in: Tensor = net_in, outputs: list[Tensor] = outputs) -> Tensor:
                if source.kind == "noise":
                    return draws[f"noise{source.index}"]
                if source.kind == "slot":
                    return slots[source.index]
                if source.kind == "output":
                    return outputs[source.index].to(x.dtype)
                return {"start": x, "input": net_in.to(x.dtype), "one": torch.ones_like(x)}[source.kind]

            made = []
            for target, terms in rows:
                total: Tensor | None = None
                for source, weight in terms:
                    term = read(source) * (getattr(self, weight) if isinstance(weight, str) else weight)
                    total = term if total is None else total + term
                made.append((target, torch.zeros_like(x) if total is None else total))
            for target, value in made:
                if target.kind == "slot":
                    slots[target.index] = value
                elif target.kind == "input":
                    net_in = value.to(self._net_dtype)
                else:
                    result = value
            if i < len(self._levels):
                c_noise = self._denoiser.c_noise(self._levels[i], net_in)
                on = self._guidance if self._guided[i] else None
                outputs = list(self._denoiser.raw(net_in, c_noise, condition, on))
        return result


class ExportedSampler:
    """``sampler(seeds=...)`` or ``sampler(x)``: one file from :func:`export_sampler`, ready to run. ``card`` describes it."""

    def __init__(self, card: Mapping[str, Any], run: Any) -> None:
        self.card, self._run = dict(card), run

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        class_labels: Tensor | Sequence[int] | int | None = None,
        noise: Sequence[Tensor] | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Samples [B, *sample] from the state ``x`` or from ``seeds``, for up to as many as the file was made for."""
        card = self.card
        sample, most = tuple(card["sample_shape"]), int(card["batch"])
        numbers = None if seeds is None else check_seeds(seeds)
        if (x is None) == (numbers is None):
            raise ValueError("x: give the state at the first level, or seeds" + (", not both" if x is not None else ""))
        if x is None:
            assert numbers is not None
            x = normal(numbers, 0, sample, dtype=torch.float32) * float(card["sigma"])
        batch = x.shape[0]
        if tuple(x.shape[1:]) != sample or not 1 <= batch <= most:
            raise ValueError(f"x: this sampler takes up to {most} samples of shape {list(sample)}, got {list(x.shape)}")
        given: dict[str, Any] = {"x": x.float(), **cond}
        if class_labels is not None:
            given["class_labels"] = torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1).expand(batch)
        elif "class_labels" in card["inputs"] and card["null_label"] is not None and card["guidance_scale"] is None:
            given["class_labels"] = torch.full((batch,), int(card["null_label"]))
        for k in range(int(card["draws"])):
            if noise is None and numbers is None:
                raise ValueError(f"noise: this sampler makes {card['draws']} draws; give seeds, or noise")
            z = noise[k] if noise is not None else normal(numbers, k + 1, sample, dtype=torch.float32)  # type: ignore[arg-type]
            given[f"noise{k}"] = z
        for name in given:
            if name not in card["inputs"]:
                raise ValueError(f"{name}: this sampler has no such input; it takes {', '.join(card['inputs'])}")
        inputs = []
        for name in card["inputs"]:
            if name not in given:
                raise ValueError(f"{name}: this sampler needs it")
            value = given[name]
            if batch < most:
                value = torch.cat([value, value[-1:].expand(most - batch, *value.shape[1:])])
            inputs.append(value.contiguous())
        made: Tensor = self._run(inputs)
        return made[:batch]


def export_sampler(
    path: str | os.PathLike[str],
    program: Program,
    denoiser: Denoiser,
    *,
    batch: int = 1,
    guidance_scale: float | None = None,
    guidance: Guidance | None = None,
    cond: Mapping[str, Tensor] | None = None,
) -> ExportedSampler:
    """Write ``program`` with ``denoiser``'s network into one file, by its suffix ``.pt2`` or ``.onnx``, and open it.

    ``batch``: samples per call (a smaller call is padded). ``guidance_scale`` becomes a constant. ``cond``: an example
    [B, ...] of every further condition. Raises ``ValueError`` for other suffixes, programs whose tables are not static, and
    networks that cannot be exported (naming the module and the operation).
    """
    target = Path(path)
    if target.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path: must end in .pt2 or .onnx, got {target.name!r}")
    if target.suffix == ".onnx":
        from fastode.runtimes.onnx import need

        need("onnx", "onnxscript", "onnxruntime")
    if denoiser.sample_shape is None:
        raise ValueError("denoiser: its sample_shape must be known; give Denoiser(sample_shape=...)")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: must be finite, got {guidance_scale}")
    names = [*(["class_labels"] if denoiser.num_classes else []), *(cond or {})]
    names += [f"noise{k}" for k in range(program.draws)]
    module = Portable(program, denoiser, names=names, guidance_scale=guidance_scale, guidance=guidance).eval()
    shape = (int(batch), *denoiser.sample_shape)
    example: dict[str, Tensor] = {"x": torch.randn(shape)}
    for name in names:
        if name == "class_labels":
            example[name] = torch.zeros(shape[0], dtype=torch.int64)
        elif cond and name in cond:
            value = cond[name]
            example[name] = value.expand(shape[0], *value.shape[1:]).contiguous()
        else:
            example[name] = torch.randn(shape)
    device = denoiser.device or torch.device("cpu")
    inputs = tuple(value.to(device) for value in example.values())
    card = {
        "format": FORMAT,
        **describe(denoiser),
        "solver": program.name,
        "options": {k: v for k, v in program.options.items() if isinstance(v, (str, int, float, bool, type(None)))},
        "nfe": program.nfe,
        "sigmas": program.grid.sigmas.tolist(),
        "sigma": float(program.grid[0].sigma),
        "draws": program.draws,
        "batch": shape[0],
        "guidance_scale": guidance_scale,
        "inputs": list(example),
    }
    card = json.loads(json.dumps(card))
    if target.suffix == ".onnx":
        from fastode.runtimes.onnx import to_onnx

        to_onnx(module, inputs, target, list(example), ["samples"], {"fastode": json.dumps(card)})
    else:
        made = export(module, inputs)
        with whole(target) as part:
            temporary = part.with_name(part.name + ".pt2")
            try:
                torch.export.save(made, str(temporary), extra_files={"fastode.json": json.dumps(card)})
                os.replace(temporary, part)
            finally:
                temporary.unlink(missing_ok=True)
    return load_sampler(target)


def load_sampler(path: str | os.PathLike[str], *, providers: Sequence[str] | None = None) -> ExportedSampler:
    """Open a file that :func:`export_sampler` wrote. ``providers``: of ONNX Runtime, by default TensorRT, CUDA, CPU.

    Raises ``FileNotFoundError``, or ``ValueError`` for foreign and damaged files.
    """
    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(f"path: {target} does not exist")
    if target.suffix == ".onnx":
        from fastode.runtimes.onnx import bound, need, open_session

        need("onnxruntime")
        session = open_session(target, providers)
        card = _card(session.get_modelmeta().custom_metadata_map.get("fastode"), target)

        def run(inputs: Sequence[Tensor]) -> Tensor:
            return bound(session, dict(zip(card["inputs"], inputs, strict=True)), ["samples"])[0]

        return ExportedSampler(card, run)
    extra = {"fastode.json": ""}
    try:
        loaded = torch.export.load(str(target), extra_files=extra)
    except Exception as error:
        raise ValueError(f"path: {target} is not an exported program or is damaged ({error})") from error
    card = _card(extra["fastode.json"], target)
    module = loaded.module()

    def call(inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            made: Tensor = module(*inputs)
        return made

    return ExportedSampler(card, call)


def _card(text: Any, path: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads(text)
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']!r}")
        return card
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"path: {path} is not a sampler that fastode exported ({error})") from error


def _is_zero(weight: Any) -> bool:
    return not isinstance(weight, Tensor) and float(weight) == 0.0
