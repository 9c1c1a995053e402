"""Models of diffusers called as networks here: ``network(x, c_noise, class_labels=..., **cond)`` -> raw output.

Each wrapper holds the model as it is. Prompt embeddings and what else a model is conditioned on are keyword arguments under
the model's own names; those that diffusers puts into a dict (``added_cond_kwargs``) stand on their own here, so that
guidance can pair each with its unconditional twin. With ``features=True`` the U-Nets run their submodules one by one and
return ``(raw, {"bottleneck": h})``, h the output of the middle block; there are no hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Output = Tensor | tuple[Tensor, dict[str, Tensor]]


def _needs(name: str, value: Tensor | None, x: Tensor) -> Tensor:
    """A condition in the network's dtype."""
    if value is None:
        raise ValueError(f"cond: the network needs {name!r}, give cond={{{name!r}: ...}}")
    return value.to(x) if value.is_floating_point() else value.to(x.device)


class UNet(nn.Module):
    """``UNet2DModel``: images without prompts, with classes or without.

    Networks of score-SDE (``time_embedding_type="fourier"``) divide their output by sigma; it is multiplied back: the raw
    output is sigma times the score. Their frequencies, of size 16, stay in float32 whatever the model is cast to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.by_sigma = model.config.time_embedding_type == "fourier"  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UNet:
        exact = self.model.time_proj.weight.data if self.by_sigma else None
        super()._apply(fn, recurse)
        if exact is not None:
            weight = self.model.time_proj.weight
            weight.data = exact.to(weight.device)
        return self

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, *, features: bool = False
    ) -> Output:
        told = c_noise.reshape(-1).expand(x.shape[0])
        if features:
            out, middle = self._by_parts(x, told, class_labels)
        else:
            out = self.model(x, told, class_labels, return_dict=False)[0]
            out = out * told.reshape(-1, 1, 1, 1).to(out) if self.by_sigma else out
        raw = out[:, : x.shape[1]].to(x.dtype)
        return (raw, {"bottleneck": middle}) if features else raw

    def _by_parts(self, x: Tensor, told: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        m = self.model
        h = 2 * x - 1.0 if m.config.center_input_sample else x
        embedding = m.time_embedding(m.time_proj(told).to(x.dtype))
        if m.class_embedding is not None:
            given = _needs("class_labels", labels, x)
            given = m.time_proj(given) if m.config.class_embed_type == "timestep" else given
            embedding = embedding + m.class_embedding(given).to(x.dtype)
        image: Tensor | None = h
        h = m.conv_in(h)
        skips: tuple[Tensor, ...] = (h,)
        for block in m.down_blocks:
            if hasattr(block, "skip_conv"):
                h, kept, image = block(hidden_states=h, temb=embedding, skip_sample=image)
            else:
                h, kept = block(hidden_states=h, temb=embedding)
            skips += kept
        if m.mid_block is not None:
            h = m.mid_block(h, embedding)
        middle = h
        image = None
        for block in m.up_blocks:
            taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            if hasattr(block, "skip_conv"):
                h, image = block(h, taken, embedding, image)
            else:
                h = block(h, taken, embedding)
        h = m.conv_out(m.conv_act(m.conv_norm_out(h)))
        return h if image is None else h + image, middle


class ConditionalUNet(nn.Module):
    """``UNet2DConditionModel``: Stable Diffusion's U-Nets. ``text_embeds``, ``time_ids`` (SDXL) and ``image_embeds`` are what
    diffusers passes as ``added_cond_kwargs``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        image_embeds: Tensor | None = None,
        features: bool = False,
    ) -> Output:
        told = c_noise.reshape(-1).expand(x.shape[0])
        text = _needs("encoder_hidden_states", encoder_hidden_states, x)
        added = {"text_embeds": text_embeds, "time_ids": time_ids, "image_embeds": image_embeds}
        given = {k: _needs(k, v, x) for k, v in added.items() if v is not None}
        if not features:
            raw: Tensor = self.model(
                x,
                told,
                text,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                encoder_attention_mask=encoder_attention_mask,
                added_cond_kwargs=given or None,
                return_dict=False,
            )[0]
            return raw[:, : x.shape[1]]
        raw, middle = self._by_parts(x, told, text, class_labels, timestep_cond, encoder_attention_mask, given)
        return raw[:, : x.shape[1]], {"bottleneck": middle}

    def _by_parts(
        self,
        x: Tensor,
        told: Tensor,
        text: Tensor,
        labels: Tensor | None,
        extra: Tensor | None,
        mask: Tensor | None,
        added: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        m = self.model
        bias = None if mask is None else ((1 - mask.to(x.dtype)) * -10000.0)[:, None]
        h = 2 * x - 1.0 if m.config.center_input_sample else x
        embedding = m.time_embedding(m.get_time_embed(sample=h, timestep=told), extra)
        of_class = m.get_class_embed(sample=h, class_labels=labels)
        if of_class is not None:
            joined = m.config.class_embeddings_concat
            embedding = torch.cat([embedding, of_class], dim=-1) if joined else embedding + of_class
        more = m.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added)
        embedding = embedding if more is None else embedding + more
        if m.time_embed_act is not None:
            embedding = m.time_embed_act(embedding)
        text = m.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)

        def attending(block: Any) -> dict[str, Any]:
            if not getattr(block, "has_cross_attention", False):
                return {}
            return {"encoder_hidden_states": text, "encoder_attention_mask": bias}

        h = m.conv_in(h)
        skips: tuple[Tensor, ...] = (h,)
        for block in m.down_blocks:
            h, kept = block(hidden_states=h, temb=embedding, **attending(block))
            skips += kept
        if m.mid_block is not None:
            h = m.mid_block(h, embedding, **attending(m.mid_block))
        middle = h
        ragged = any(side % 2**m.num_upsamplers for side in x.shape[-2:])
        for i, block in enumerate(m.up_blocks):
            taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            size = skips[-1].shape[2:] if ragged and i + 1 < len(m.up_blocks) else None
            h = block(
                hidden_states=h, temb=embedding, res_hidden_states_tuple=taken, upsample_size=size, **attending(block)
            )
        if m.conv_norm_out is not None:
            h = m.conv_act(m.conv_norm_out(h))
        return m.conv_out(h), middle


class DiT(nn.Module):
    """``DiTTransformer2DModel``, and ``Transformer2DModel`` on patches (DiT before it had a class of its own). The label
    behind the last class, or none at all, is "no class"."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        classes: Any = getattr(model.config, "num_embeds_ada_norm", None)
        if classes is None:
            raise ValueError(f"network: a {type(model).__name__} without classes (num_embeds_ada_norm) is not a DiT")
        self.null_label = int(classes)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        told = c_noise.reshape(-1).expand(x.shape[0])
        if class_labels is None:
            class_labels = torch.full((x.shape[0],), self.null_label, device=x.device)
        out: Tensor = self.model(x, timestep=told, class_labels=class_labels, return_dict=False)[0]
        return out[:, : x.shape[1]]


class SD3(nn.Module):
    """``SD3Transformer2DModel``: prompts as ``encoder_hidden_states`` and ``pooled_projections``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.model(
            hidden_states=x,
            timestep=c_noise.reshape(-1).expand(x.shape[0]),
            encoder_hidden_states=_needs("encoder_hidden_states", encoder_hidden_states, x),
            pooled_projections=_needs("pooled_projections", pooled_projections, x),
            return_dict=False,
        )[0]
        return out


class Flux(nn.Module):
    """``FluxTransformer2DModel`` on latents [B, C, H, W]; it works on patches of 2 x 2, which are made and undone here.

    ``guidance`` [B]: the strength that guidance-distilled networks are told, 3.5 where it is left out.
    """

    def __init__(self, model: nn.Module, label_scale: float = 1000.0) -> None:
        super().__init__()
        self.model: Any = model
        self.label_scale = label_scale

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        b, c, height, width = x.shape
        if height % 2 or width % 2:
            raise ValueError(f"x: Flux needs even sides, got {height} x {width}")
        rows, columns = height // 2, width // 2
        text = _needs("encoder_hidden_states", encoder_hidden_states, x)
        sides = (torch.arange(1), torch.arange(rows), torch.arange(columns))
        at = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)  # (0, row, column) of each patch
        if self.model.config.guidance_embeds and guidance is None:
            guidance = torch.full((b,), 3.5)
        patches = x.reshape(b, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, 4 * c)
        out = self.model(
            hidden_states=patches,
            timestep=(c_noise.reshape(-1).expand(b) / self.label_scale).to(x.dtype),
            guidance=None if guidance is None else guidance.to(x),
            encoder_hidden_states=text,
            pooled_projections=_needs("pooled_projections", pooled_projections, x),
            img_ids=at.reshape(-1, 3).to(x),
            txt_ids=x.new_zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
        out = out.reshape(b, rows, columns, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, c, height, width)


WRAPPERS: dict[str, type[nn.Module]] = {
    "UNet2DModel": UNet,
    "UNet2DConditionModel": ConditionalUNet,
    "DiTTransformer2DModel": DiT,
    "Transformer2DModel": DiT,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
}
"""Model classes of diffusers, by name."""
