"""A denoiser: a network, what its output means, and what it is conditioned on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastode.denoisers.edm import edm_fields, is_edm
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.denoisers.precondition import PREDICTIONS, Scaling, scaling
from fastode.scalar import Late, Scalar, evaluate
from fastode.schedules.grid import Level
from fastode.schedules.noise import EDM, Flow, NoiseSchedule, VPLinear

if TYPE_CHECKING:
    from fastode.program.lower import Call

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Condition:
    """What one call is conditioned on. ``class_labels``: [B] int64; the mappings hold further keyword arguments.

    ``uncond`` replaces ``cond`` in the unconditional half of guidance; entries whose first dimension is the batch are
    concatenated for a batched call.
    """

    class_labels: Tensor | None = None
    cond: Mapping[str, Any] = field(default_factory=dict)
    uncond: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Denoiser:
    """D(x; sigma) = E[x_0 | x] from a network.

    ``network(x, c_noise, class_labels=..., **cond)`` is called with [B, *sample] in its own dtype and ``c_noise`` [B] in
    float32 or wider; for ``prediction="denoised"`` it is called as ``network(x, sigma, ...)`` in the EDM frame (x = x_0 +
    sigma n), with sigma a tensor without dimensions (or [B, 1, ...] when it differs between samples), as the analytic
    denoisers and EDM's preconditioned networks expect.

    ``prediction``: "edm" (raw network of EDM preconditioning, ``sigma_data``), "eps", "score" (sigma times the score, -eps),
    "x0", "v", "flow" or "denoised".
    ``schedule``: the noise schedule the network was trained on; by default VP-linear for eps, score, x0, v and Flow for flow.
    ``num_classes``: labels are 0 .. num_classes - 1; ``null_label`` stands for "no class" and makes guidance possible.
    ``transforms`` are applied to D itself (clipping, thresholding); they cannot be folded into a table.
    ``features``: named outputs that the network offers besides, e.g. "bottleneck", [B, C, h, w]: called with
    ``features=True`` it then returns ``(raw, {name: tensor})``. By default ("bottleneck",) where its ``forward`` has an
    argument of that name, none elsewhere. Under guidance they are those of the conditional half.

    Raises ``ValueError`` for unknown predictions, or schedules that contradict them.
    """

    network: Callable[..., Any]
    prediction: str = "edm"
    schedule: NoiseSchedule | None = None
    sigma_data: float = 0.5
    num_classes: int | None = None
    null_label: int | None = None
    sample_shape: tuple[int, ...] | None = None
    transforms: tuple[Transform, ...] = ()
    features: tuple[str, ...] | None = None
    name: str = "denoiser"
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise TypeError(f"network: must be callable, got {type(self.network).__name__}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction: must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data: must be positive, got {self.sigma_data}")
        if self.schedule is None:
            default: NoiseSchedule
            default = (
                Flow() if self.prediction == "flow" else EDM() if self.prediction in ("edm", "denoised") else VPLinear()
            )
            object.__setattr__(self, "schedule", default)
        if self.prediction == "flow" and not isinstance(self.schedule, Flow):
            raise ValueError(f"schedule: flow prediction needs a Flow schedule, got {type(self.schedule).__name__}")
        if self.features is None:
            offers = self._parameters is not None and "features" in self._parameters
            object.__setattr__(self, "features", ("bottleneck",) if offers else ())

    @classmethod
    def of(cls, denoiser: Denoiser | Callable[..., Any]) -> Denoiser:
        """``denoiser`` itself, or a plain callable ``D(x, sigma)`` in the EDM frame as one; EDM's own networks too."""
        if isinstance(denoiser, Denoiser):
            return denoiser
        if is_edm(denoiser):
            return cls(**edm_fields(denoiser))
        if not callable(denoiser):
            raise TypeError(f"denoiser: must be a Denoiser or a callable D(x, sigma), got {type(denoiser).__name__}")
        return cls(denoiser, prediction="denoised", name=getattr(denoiser, "__name__", type(denoiser).__name__))

    @classmethod
    def from_diffusers(cls, source: Any, **options: Any) -> Denoiser:
        """A pipeline or model of diffusers, loaded or by its folder or name; see :func:`fastode.interop.diffusers.load`."""
        from fastode.interop.diffusers import load

        return load(source, **options)

    @property
    def dtype(self) -> torch.dtype | None:
        """The network's dtype; None for callables without parameters, which take the state's."""
        parameter = self._parameter()
        return None if parameter is None or not parameter.dtype.is_floating_point else parameter.dtype

    @property
    def device(self) -> torch.device | None:
        parameter = self._parameter()
        return None if parameter is None else parameter.device

    def _parameter(self) -> Tensor | None:
        if not isinstance(self.network, nn.Module):
            return None
        return next(iter(self.network.parameters()), None)

    def to(self, *args: Any, **kwargs: Any) -> Denoiser:
        """Move or cast the network (a module) in place, as ``torch.nn.Module.to``; returns self."""
        if isinstance(self.network, nn.Module):
            self.network.to(*args, **kwargs)
        return self

    def scaling(self, level: Level) -> Scaling:
        """c_skip, c_out, c_in, c_noise on ``level``, in the frame of the level."""
        return scaling(self.prediction, level, schedule=self.schedule, sigma_data=self.sigma_data)

    def columns(self, level: Level, guidance: Guidance | None) -> tuple[Scalar, ...]:
        """Weights of the network outputs in F: one output, or (unconditional, conditional) under guidance."""
        if guidance is None or not guidance.active(level):
            return (1.0,)
        return 1 - GUIDANCE_SCALE, GUIDANCE_SCALE

    def check_condition(self, batch: int, condition: Condition, guidance: Guidance | None) -> Condition:
        """``condition`` as the network takes it. Raises ``ValueError`` naming the argument."""
        labels = condition.class_labels
        if labels is not None:
            if self.num_classes == 0 or not self._takes("class_labels"):
                raise ValueError(f"class_labels: {self.name} is not class-conditional")
            labels = torch.as_tensor(labels)
            if labels.dtype.is_floating_point or labels.dtype == torch.bool:
                raise ValueError(f"class_labels: must be integers, got {labels.dtype}")
            if labels.ndim == 0:
                labels = labels.expand(batch)
            if labels.shape != (batch,):
                raise ValueError(f"class_labels: need one label per sample [{batch}], got shape {list(labels.shape)}")
            if self.num_classes is not None and labels.device.type == "cpu":  # elsewhere, looking makes the host wait
                top = self.num_classes - 1 if self.null_label is None else max(self.num_classes - 1, self.null_label)
                wrong = labels[(labels < 0) | (labels > top)]
                if wrong.numel():
                    raise ValueError(f"class_labels: must be in 0 .. {top}, got {int(wrong[0])}")
            labels = labels.to(device=self.device, dtype=torch.int64, non_blocking=True)  # the host need not wait
        for name in condition.cond:
            if not self._takes(name):
                raise ValueError(f"cond: {self.name} takes no argument {name!r}")
        if guidance is not None:
            if labels is None and not condition.cond:
                raise ValueError("guidance_scale: guidance needs a condition (class_labels or cond=...)")
            if condition.uncond is None and (labels is None or self.null_label is None):
                raise ValueError(
                    f"guidance_scale: {self.name} has no unconditional input; give null_label to Denoiser or uncond=... here"
                )
            _check_uncond(condition, batch, guidance.batched)
        return condition if labels is condition.class_labels else replace(condition, class_labels=labels)

    def _takes(self, name: str) -> bool:
        return self._parameters is None or name in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str] | None:
        """Names of the arguments that the network takes; None if it takes any."""
        target = self.network.forward if isinstance(self.network, nn.Module) else self.network
        try:
            parameters = inspect.signature(target).parameters
        except (TypeError, ValueError):
            return None
        return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)

    def check_outputs(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` if a program asks for a named output that the network does not offer."""
        for name in names:
            if name not in ("denoised", *(self.features or ())):
                offered = ", ".join(self.features or ()) or "none"
                raise ValueError(
                    f"denoiser: this solver looks at the network's {name!r}, which {self.name} does not offer (it offers "
                    f"{offered}); train one without features, or give the network a `features` argument"
                )

    def raw(
        self, net_in: Tensor, c_noise: Tensor, condition: Condition, guidance: Guidance | None = None
    ) -> Sequence[Tensor]:
        """Raw outputs at ``net_in`` [B, *sample] (already scaled by c_in), one per column. ``c_noise``: see class."""
        return self.raw_and_features(net_in, c_noise, condition, guidance, ())[0]

    def raw_and_features(
        self,
        net_in: Tensor,
        c_noise: Tensor,
        condition: Condition,
        guidance: Guidance | None,
        names: Sequence[str],
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """:meth:`raw`, and the named outputs ``names``, each [B, ...]."""
        if guidance is None:
            raw, made = self._call(net_in, c_noise, condition.class_labels, condition.cond, names)
            return (raw,), made
        labels, cond = condition.class_labels, condition.cond
        uncond = cond if condition.uncond is None else {**cond, **condition.uncond}
        none = labels
        if labels is not None and self.null_label is not None and "class_labels" not in uncond:
            none = torch.full_like(labels, self.null_label)
        elif "class_labels" in uncond:
            none = uncond["class_labels"]
            uncond = {k: v for k, v in uncond.items() if k != "class_labels"}
        if not guidance.batched:
            without, _ = self._call(net_in, c_noise, none, uncond, ())
            with_it, made = self._call(net_in, c_noise, labels, cond, names)
            return (without, with_it), made
        b = net_in.shape[0]
        both = {k: _join(uncond[k], v, b) for k, v in cond.items()}
        pair = None if labels is None or none is None else torch.cat([none, labels])
        c_pair = c_noise if c_noise.ndim == 0 else torch.cat([c_noise, c_noise])
        raw, made = self._call(torch.cat([net_in, net_in]), c_pair, pair, both, names)
        return raw.chunk(2), {name: feature[b:] for name, feature in made.items()}

    def _call(
        self,
        net_in: Tensor,
        c_noise: Tensor,
        labels: Tensor | None,
        cond: Mapping[str, Any],
        names: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kwargs = dict(cond) if labels is None else {"class_labels": labels, **cond}
        raw = (
            self.network(net_in, c_noise, **kwargs, features=True) if names else self.network(net_in, c_noise, **kwargs)
        )
        made: dict[str, Tensor] = {}
        if names:
            raw, offered = raw
            made = {name: offered[name] for name in names}
        if isinstance(raw, (tuple, list)) and raw:
            raw = raw[0]
        if not isinstance(raw, Tensor):
            raise TypeError(f"network: must return a tensor, got {type(raw).__name__}")
        if raw.shape != net_in.shape:
            raise ValueError(f"network: returned shape {list(raw.shape)} for an input of shape {list(net_in.shape)}")
        if not raw.dtype.is_floating_point:
            raise TypeError(f"network: must return floating point, got {raw.dtype}")
        if raw.device != net_in.device:
            raise ValueError(f"network: returned a tensor on {raw.device} for an input on {net_in.device}")
        return raw, made

    def c_noise(self, value: Any, net_in: Tensor) -> Tensor:
        """``c_noise`` as the network takes it: [B] for networks, no dimension for plain denoisers.

        At least float32 also where the network is narrower: in bfloat16 label 999 would be 1000, and 997 would be 996.
        """
        dtype = torch.promote_types(net_in.dtype, torch.float32)
        tensor = torch.as_tensor(value, device=net_in.device, dtype=dtype)
        if self.prediction == "denoised":
            return tensor
        return tensor.reshape(-1).expand(net_in.shape[0])

    def told(self, call: Call, net_in: Tensor) -> Tensor | None:
        """What the network is told in ``call``: its number as :meth:`c_noise` makes it; room for one per sample where the
        run makes it; None where it comes with the call of the engine."""
        if not isinstance(call.c_noise, Late):
            return self.c_noise(call.c_noise, net_in)
        if not call.due:
            return None
        room = torch.ones((net_in.shape[0], *[1] * (net_in.ndim - 1)), device=net_in.device)
        return self.c_noise(room, net_in).clone()

    def denoise(
        self,
        x: Tensor,
        level: Level,
        condition: Condition | None = None,
        *,
        guidance: Guidance | None = None,
        known: Mapping[Any, Any] | None = None,
        check: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """D at state ``x`` [B, *sample] of ``level``, unfolded; the definition that lowered programs are tested against.

        ``check`` is shown every raw output of the network before anything is made of it.
        """
        return self.denoise_and_features(x, level, condition, guidance=guidance, known=known, check=check)[0]

    def denoise_and_features(
        self,
        x: Tensor,
        level: Level,
        condition: Condition | None = None,
        *,
        guidance: Guidance | None = None,
        known: Mapping[Any, Any] | None = None,
        check: Callable[[Tensor], None] | None = None,
        names: Sequence[str] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`denoise`, and the named outputs ``names``."""
        on = guidance if guidance is not None and guidance.active(level) else None
        memo: dict[int, Any] = {}
        s = self.scaling(level)
        net_in = _weigh(evaluate(s.c_in, known or {}, memo), x).to(self.dtype or x.dtype)
        net_in = net_in.clone() if net_in is x else net_in  # the network's own copy, whatever it does to it
        c_noise = self.c_noise(evaluate(s.c_noise, known or {}, memo), net_in)
        outputs, made = self.raw_and_features(net_in, c_noise, condition or Condition(), on, names)
        if check is not None:
            for raw in outputs:
                check(raw)
        return self.assemble(x, outputs, level, on, known), made

    def assemble(
        self,
        x: Tensor,
        outputs: Sequence[Tensor],
        level: Level,
        guidance: Guidance | None = None,
        known: Mapping[Any, Any] | None = None,
    ) -> Tensor:
        """D from the state and the raw outputs of one level: c_skip x + c_out sum_g w_g F_g, then the transforms."""
        memo: dict[int, Any] = {}
        s = self.scaling(level)
        c_skip, c_out = (evaluate(c, known or {}, memo) for c in (s.c_skip, s.c_out))
        weights = [evaluate(w, known or {}, memo) for w in self.columns(level, guidance)]
        denoised = _weigh(c_skip, x)
        for w, raw in zip(weights, outputs, strict=True):
            denoised = denoised + _weigh(w * c_out, raw.to(x.dtype))
        for transform in self.transforms:
            denoised = transform(denoised)
        return denoised

    def __call__(self, x: Tensor, sigma: Any, class_labels: Tensor | None = None, **cond: Any) -> Tensor:
        """D(x; sigma) in the EDM frame: x = x_0 + sigma n, [B, *sample]; ``sigma`` a number."""
        condition = self.check_condition(x.shape[0], Condition(class_labels, cond), None)
        return self.denoise(x, Level(1.0, float(sigma), None), condition)


def _weigh(c: Any, x: Tensor) -> Tensor:
    """c * x with the coefficient in float64 until the last moment."""
    if isinstance(c, Tensor):
        return c.to(device=x.device, dtype=x.dtype) * x
    return x if _plain_one(c) else x * c


def _plain_one(c: Any) -> bool:
    return isinstance(c, (int, float)) and c == 1


def _per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def _join(uncond: Any, cond: Any, batch: int) -> Any:
    return torch.cat([uncond.to(cond), cond]) if _per_sample(cond, batch) else cond


def _check_uncond(condition: Condition, batch: int, batched: bool) -> None:
    uncond = condition.uncond or {}
    unknown = sorted(set(uncond) - set(condition.cond) - {"class_labels"})
    if unknown:
        raise ValueError(f"uncond: {unknown[0]!r} replaces nothing; cond has {sorted(condition.cond) or 'no entries'}")
    for name, value in uncond.items() if batched else ():
        given: Any = condition.class_labels if name == "class_labels" else condition.cond[name]
        if _per_sample(given, batch):
            if not isinstance(value, Tensor) or value.shape != given.shape:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"uncond: {name!r} must be a tensor of shape {list(given.shape)} like cond's, got {got}"
                )
        elif value is not given and (isinstance(value, Tensor) or isinstance(given, Tensor) or value != given):
            raise ValueError(
                f"uncond: {name!r} is not per sample ([{batch}, ...]), so both halves of one batched call would share it; "
                "use Guidance(batched=False)"
            )
