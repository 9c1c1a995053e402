"""EDM's networks as they come: ``net(x, sigma, class_labels)`` of NVlabs/edm (arXiv:2206.00364) is a denoiser unwrapped."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fastode.schedules.noise import EDM

ATTRIBUTES = ("sigma_min", "sigma_max", "label_dim", "img_channels", "img_resolution", "round_sigma")


def is_edm(network: Any) -> bool:
    """Whether ``network`` has the interface of EDM's preconditioned networks (EDMPrecond, VPPrecond, VEPrecond, ...)."""
    return isinstance(network, nn.Module) and all(hasattr(network, name) for name in ATTRIBUTES)


class OneHot(nn.Module):
    """``net`` with labels [B] in place of the rows [B, label_dim] that EDM's networks take; label ``label_dim`` is "no
    class", a row of zeros."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if class_labels is not None:
            count = int(self.net.label_dim)  # type: ignore[arg-type]
            kwargs["class_labels"] = functional.one_hot(class_labels, count + 1)[:, :count].float()
        output: Tensor = self.net(x, sigma, **kwargs)
        return output


def edm_fields(net: Any) -> dict[str, Any]:
    """The arguments of :class:`Denoiser` that ``net`` itself tells. Its noise range is cut to 0.002 .. 80, as EDM's sampler
    does. Guidance needs a network that was trained without labels too (``label_dropout`` > 0)."""
    low, high = max(0.002, float(net.sigma_min)), min(80.0, float(net.sigma_max))
    classes, dropout = int(net.label_dim), getattr(getattr(net, "model", None), "label_dropout", 0)
    return {
        "network": OneHot(net),
        "prediction": "denoised",
        "schedule": EDM(low, high) if low < high < math.inf else EDM(),
        "num_classes": classes,
        "null_label": classes if classes and dropout else None,
        "sample_shape": (int(net.img_channels), int(net.img_resolution), int(net.img_resolution)),
        "name": type(net).__name__,
    }
