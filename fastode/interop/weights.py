"""Putting a checkpoint's tensors into a module of ours: all of them, and none too many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def fit(network: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> nn.Module:
    """``network`` with ``tensors`` as its weights, in eval mode and without gradients.

    Numbers are kept; narrower ones (half precision checkpoints) are widened to the module's dtype. Raises ``ValueError``
    naming tensors that are missing, that belong nowhere, or whose shape differs.
    """
    own = network.state_dict()
    _complain(where, "lacks", [name for name in own if name not in tensors], "which the network needs")
    _complain(where, "has", [name for name in tensors if name not in own], "which belong nowhere in the network")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"weights: {where} has {name} of shape {list(value.shape)}, the network needs {list(own[name].shape)}"
            )
    network.load_state_dict({name: value.to(own[name].dtype) for name, value in tensors.items()})
    return network.eval().requires_grad_(False)


def _complain(where: str, verb: str, names: list[str], why: str) -> None:
    if not names:
        return
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise ValueError(f"weights: {where} {verb} {len(names)} tensors ({listed}), {why}")
