"""The network F(x, t, d, label, beta) of every objective: a diffusion transformer, and what it shares with
the other network (recipe/mit.py).

It differs from DiT (arXiv 2212.09748) as the TVM paper asks (arXiv 2511.19797, section 4): RMSNorm without
gain instead of LayerNorm, RMS-normed modulation, RMS-normed queries and keys, a second time input d = t - s,
a guidance input beta = 1/w, and a spectral initialisation. Options take the first three back, for pretrained
weights (SiT, arXiv 2401.08740), and another adds prompts, which the image tokens attend to. It is written
once, on (value, tangent) pairs; text has no tangent.

Shapes: B batch, C channels, H x W image, N = (H / patch) * (W / patch) tokens, D width, K classes, L tokens
of text.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipe import dual
from recipe.dual import Dual
from recipe.settings import ConfigError, Settings
from recipe.text import BEGIN, Text, TextConfig

PRESETS = {
    "S/2": {"width": 384, "depth": 12, "heads": 6, "patch": 2},
    "B/2": {"width": 768, "depth": 12, "heads": 12, "patch": 2},
    "L/2": {"width": 1024, "depth": 24, "heads": 16, "patch": 2},
    "XL/2": {"width": 1152, "depth": 28, "heads": 16, "patch": 2},
    "XL/2-18": {"width": 1152, "depth": 28, "heads": 18, "patch": 2},
}


NORMS = {"rms": dual.rms_norm, "layer": dual.layer_norm}
FREQUENCIES = 256  # of the sinusoid of a scalar
HEAD, TEXT_LAYERS = 32, 2  # head dimension and depth of the encoder of bytes


@dataclass
class NetworkConfig(Settings):
    """What every network is told of its images and of its size.

    Of the class: presets: published sizes; v_head: whether there is an auxiliary head for v; interval:
    whether it is told a guidance interval; text: what prompts are made of, None for none.
    """

    network: str
    size: int = Field(32, ge=1, le=8192, description="Height and width of an image, or of its latents.")
    channels: int = Field(4, ge=1, le=1024, description="Channels of an image, or of its latents.")
    classes: int = Field(1000, ge=0, le=10**7, description="Number of classes; 0 is unconditional.")
    patch: int = Field(2, ge=1, le=8192, description="Height and width of the patch that makes a token.")
    width: int = Field(384, ge=1, le=65536, description="Width of a token, a multiple of heads.")
    depth: int = Field(12, ge=1, le=1000, description="Number of transformer blocks.")
    heads: int = Field(6, ge=1, le=65536, description="Number of attention heads.")
    output: Literal["v", "x"] = Field(
        "v",
        description="What the last layer gives: the velocity (v), or an image X, whose velocity is "
        "(x - X) / max(t, t_floor) (x).",
    )
    t_floor: float = Field(0.05, gt=0, le=1, description="Smallest time that output x divides by.")

    presets: ClassVar[dict[str, dict[str, int]]] = {}
    v_head: ClassVar[bool] = False
    interval: ClassVar[bool] = False
    text: ClassVar[TextConfig | None] = None

    @model_validator(mode="after")
    def combinations(self) -> NetworkConfig:
        """Fill in the preset. Raises ConfigError for sizes that do not divide each other."""
        if (preset := getattr(self, "preset", None)) is not None:
            vars(self).update(self.presets[preset])
        if self.width % self.heads:
            raise ConfigError(f"heads: {self.heads} does not divide model.width {self.width}")
        if self.size % self.patch:
            raise ConfigError(f"patch: {self.patch} does not divide model.size {self.size}")
        self.check()
        return self

    def check(self) -> None:
        """Raise ConfigError for what this network cannot be."""

    @property
    def tokens(self) -> int:
        """The number of patches."""
        return (self.size // self.patch) ** 2

    @property
    def sequence(self) -> int:
        """The number of tokens in a block."""
        return self.tokens

    @property
    def null(self) -> int:
        """The label that means none, and the empty prompt; below it are those that mean something."""
        return max(self.classes, int(self.text is not None))


@dataclass
class DiTConfig(NetworkConfig):
    """The diffusion transformer with modulation, by default TVM's."""

    network: Literal["dit"] = Field("dit", description="A diffusion transformer with modulation.")
    preset: Literal[tuple(PRESETS)] | None = Field(
        None, description="Name of a published size, which sets width, depth, heads, and patch to 2."
    )
    mlp_ratio: float = Field(4.0, gt=0, le=100, description="Hidden width of the MLP in units of width.")
    label_std: float = Field(0.02, ge=0, le=100, description="Deviation of the initial class embeddings.")
    time_init: Literal["normal", "spectral"] = Field(
        "normal",
        description="How the embedders of times begin: N(0, 0.02^2) (normal), or scaled to their spectral "
        "norm (spectral).",
    )
    patch_init: Literal["spectral", "xavier"] = Field(
        "spectral",
        description="How the embedder of patches begins: as in the paper (spectral), or as in the released "
        "code (xavier).",
    )
    norm: Literal[tuple(NORMS)] = Field("rms", description="Normalisation of tokens: RMS norm or layer norm.")
    modulation_norm: bool = Field(True, description="Whether the conditioning's modulation is RMS-normed.")
    qk_norm: bool = Field(True, description="Whether queries and keys are RMS-normed.")
    reverse_time: bool = Field(False, description="Whether the network is told 1 - t for t, as SiT is.")
    text: TextConfig | None = Field(None, description="What prompts are made of; null for a network without.")

    presets: ClassVar[dict[str, dict[str, int]]] = PRESETS

    def check(self) -> None:
        """Raise ConfigError for a width that the position embedding or the MLP cannot have."""
        if self.width % 4:
            raise ConfigError(f"width: {self.width} must be a multiple of 4 (2-D position embedding)")
        if int(self.width * self.mlp_ratio) < 1:
            raise ConfigError(
                f"mlp_ratio: {self.mlp_ratio} leaves the MLP of model.width {self.width} nothing"
            )


def position_embedding(width: int, side: int) -> Tensor:
    """Return the 2-D sine-cosine embedding, (1, side^2, width): half from the column, half from the row."""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * freqs
    line = torch.cat([angles.sin(), angles.cos()], -1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], -1).float()[None]


class ScalarEmbedder(nn.Module):
    """(B,) -> (B, D): sinusoid of `scale` times the number, then a two-layer MLP."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, u: Dual) -> Dual:
        scaled = dual.map_linear(lambda x: self.scale * x, u)
        hidden = dual.linear(self.mlp[0], dual.sinusoid(scaled, FREQUENCIES))
        return dual.linear(self.mlp[2], dual.silu(hidden))


class LabelEmbedder(nn.Module):
    """(B,) class indices -> (B, D); index K, the last row, stands for "no label". K = 0: for any index."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, label: Tensor) -> Dual:
        return Dual(self.embedding_table(label if self.classes else torch.zeros_like(label)))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): a strided convolution, evaluated as one matrix product."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Dual) -> Dual:
        p = self.proj.kernel_size[0]
        return dual.linear(self.proj, dual.map_linear(lambda z: patchify(z, p), x))


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut images (B, C, H, W) into tokens (B, N, C p p) in row-major order."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)


def unpatchify(z: Tensor, p: int, channels: int) -> Tensor:
    """Assemble images (B, C, H, W) from tokens (B, N, p p C), whose features are ordered (row, column,
    channel).
    """
    side = int(z.shape[1] ** 0.5)
    z = z.reshape(z.shape[0], side, side, p, p, channels)
    return z.permute(0, 5, 1, 3, 2, 4).reshape(z.shape[0], channels, side * p, side * p)


class Modulation(nn.Sequential):
    """SiLU(cond) (B, D) -> n vectors (B, 1, D), each RMS-normed if asked for (paper, section 4)."""

    def __init__(self, width: int, n: int, normed: bool) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, n * width))
        self.n, self.normed = n, normed

    def forward(self, c: Dual) -> list[Dual]:
        m = dual.map_linear(lambda z: z.unflatten(-1, (self.n, 1, -1)), dual.linear(self[1], c))
        return dual.unbind(dual.rms_norm(m) if self.normed else m, 1)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys RMS-normed if asked for (gain shared by the heads)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, z: Dual) -> Dual:
        qkv = dual.map_linear(lambda y: y.unflatten(-1, (3, self.heads, -1)), dual.linear(self.qkv, z))
        gains = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        out = dual.map_linear(lambda y: y.flatten(2), dual.attention(qkv, *gains))
        return dual.linear(self.proj, out)


class CrossAttention(nn.Module):
    """Multi-head attention to the first `length` (B,) of other tokens (B, L, D); norms as in `Attention`."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, z: Dual, context: Tensor, length: Tensor) -> Dual:
        q = dual.map_linear(self._split, dual.linear(self.q, z))
        k, v = map(self._split, dual.linear(self.kv, Dual(context)).value.chunk(2, -1))
        if self.q_norm is not None:
            q = dual.rms_norm(q, self.q_norm.weight)
            k = dual.rms_norm(Dual(k), self.k_norm.weight).value
        out = dual.attend(q, Dual(k.to(v.dtype)), Dual(v), length)
        return dual.linear(self.proj, dual.map_linear(lambda y: y.transpose(1, 2).flatten(2), out))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, z: Dual, detach_tangent: bool = False) -> Dual:
        return dual.linear(self.fc2, dual.linear_gelu(self.fc1, z, detach_tangent))


class Block(nn.Module):
    """z += gate1 Attn(modulate(norm(z))); z += gate2 MLP(modulate(norm(z))). z (B, N, D), c (B, D).

    With text, between them z += gate3 CrossAttn(norm(z), context); its gate begins at zero as the others do.
    detach_tangent: here, where a compiler sees it, so that nothing is kept or differentiated for the tangent.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = NORMS[config.norm]
        self.attn = Attention(width, config.heads, config.qk_norm)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = Modulation(width, 6, config.modulation_norm)
        if config.text is not None:
            self.text_attn = CrossAttention(width, config.heads, config.qk_norm)
            self.text_adaLN_modulation = Modulation(width, 1, config.modulation_norm)

    def forward(
        self, z: Dual, c: Dual, detach_tangent: bool = False, context: tuple[Tensor, Tensor] | None = None
    ) -> Dual:
        """Evaluate the block; context: tokens of text (B, L, D) and their lengths (B,)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        h = self.attn(dual.modulate(self.norm(z), shift1, scale1))
        z = dual.add(z, dual.mul(gate1, h))
        if context is not None:
            (gate3,) = self.text_adaLN_modulation(c)
            z = dual.add(z, dual.mul(gate3, self.text_attn(self.norm(z), *context)))
        h = self.mlp(dual.modulate(self.norm(z), shift2, scale2), detach_tangent)
        z = dual.add(z, dual.mul(gate2, h))
        return dual.detach(z) if detach_tangent else z


class TextLayer(nn.Module):
    """x += Attn(norm(x)); x += MLP(norm(x)), among the first `length` (B,) tokens of x (B, L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, width // HEAD, qk_norm=True)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        y = dual.rms_norm(Dual(x))
        x = x + self.attn(y, y.value, length).value
        return x + self.mlp(dual.rms_norm(Dual(x))).value


class TextEmbedder(nn.Module):
    """Text => (B, L, D), a linear map of stored embeddings or of what two layers make of bytes, and (B, D), a
    linear map of their mean, which begins at zero.
    """

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.layers = None
        if config.encoder == "bytes":
            self.byte_table = nn.Embedding(BEGIN + 1, config.width)
            self.position_table = nn.Embedding(config.tokens, config.width)
            self.layers = nn.ModuleList(TextLayer(config.width) for _ in range(TEXT_LAYERS))
        self.proj = nn.Linear(config.width, width)
        self.pool = nn.Linear(config.width, width)

    def forward(self, text: Text) -> tuple[Tensor, Tensor]:
        if self.layers is None:
            x = text.tokens.to(self.proj.weight.dtype)
        else:
            x = self.byte_table(text.tokens) + self.position_table.weight
            for layer in self.layers:
                x = layer(x, text.length)
            x = dual.rms_norm(Dual(x)).value
        unseen = torch.arange(x.shape[1], device=x.device) >= text.length[:, None]
        mean = x.masked_fill(unseen[..., None], 0).sum(1) / text.length[:, None]
        return self.proj(x), self.pool(mean)


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, p p C)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = NORMS[config.norm]
        self.linear = nn.Linear(config.width, config.patch**2 * config.channels)
        self.adaLN_modulation = Modulation(config.width, 2, config.modulation_norm)

    def forward(self, z: Dual, c: Dual) -> Dual:
        shift, scale = self.adaLN_modulation(c)
        return dual.linear(self.linear, dual.modulate(self.norm(z), shift, scale))


def keep_casts_with_a_graph(device: str) -> AbstractContextManager:
    """Keep casts that are made without gradient out of autocast's cache; all others may stay in it.

    Such a cast of a weight has no graph. In the cache, it would serve an evaluation of the same step that is
    differentiated, and the weight would get no gradient.
    """
    if torch.is_grad_enabled() or device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, cache_enabled=False)


class Inputs(NamedTuple):
    """What a network is evaluated at: the arguments of `Denoiser.forward`, with pairs for its tensors."""

    x: Dual
    t: Dual
    d: Dual
    label: Tensor
    beta: Tensor | None
    detach_tangent: bool


class Denoiser(nn.Module):
    """A network F(x, t, d, label, beta): what all of them are told, and what they have in common."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        d: Tensor | Dual,
        label: Tensor,
        beta: Tensor | None = None,
        detach_tangent: bool = False,
        **more: Any,
    ) -> Dual | tuple[Dual, Dual | None]:
        """Return F and, where x, t or d carries a tangent, its directional derivative, each (B, C, H, W).

        x: (B, C, H, W); t, d: (B,) times in [0, 1] with d = t - s; label: (B,) int64 in 0..K, K meaning none;
        beta: (B,) = 1/w, or None for no guidance; detach_tangent: no gradient through the derivative, which
        then costs a forward pass and no backward; more: what one network alone is told (its `evaluate`).
        """
        given = Inputs(dual.dual(x), dual.dual(t), dual.dual(d), label, beta, detach_tangent)
        with keep_casts_with_a_graph(given.x.value.device.type):
            return self.evaluate(given, **more)

    def evaluate(self, given: Inputs, **more: Any) -> Dual | tuple[Dual, Dual | None]:
        """Return what `forward` does."""
        raise NotImplementedError

    def image(self, z: Dual, x: Dual, t: Dual) -> Dual:
        """Turn features of patches (B, N, p p C) into F (B, C, H, W), as the network's `output` says."""
        config = self.config
        F = dual.map_linear(lambda y: unpatchify(y, config.patch, config.channels), z)
        if config.output == "v":
            return F
        late = (t.value > config.t_floor).to(t.value.dtype)
        time = Dual(t.value.clamp(min=config.t_floor), None if t.tangent is None else late * t.tangent)
        difference = dual.add(x, dual.map_linear(torch.neg, F))
        return dual.divide(difference, dual.map_linear(lambda u: u[:, None, None, None], time))


class DiT(Denoiser):
    """F(x, t, d, label, beta); parameter names are those of the published weights."""

    def __init__(self, config: DiTConfig, initialize: bool = True) -> None:
        """Make the network; initialize=False leaves its weights to be loaded, which saves time."""
        super().__init__(config)
        width, side = config.width, config.size // config.patch
        self.x_embedder = PatchEmbed(config.channels, width, config.patch)
        self.t_embedder = ScalarEmbedder(width)
        self.s_embedder = ScalarEmbedder(width)
        self.guidance_embedder = ScalarEmbedder(width)
        self.y_embedder = LabelEmbedder(config.classes, width)
        self.text_embedder = TextEmbedder(config.text, width) if config.text is not None else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", position_embedding(width, side), persistent=False)
        if initialize:
            self.init_weights()

    def evaluate(self, given: Inputs, text: Text | None = None) -> Dual:
        """Return F; without beta the guidance term is left out. text: for a network with `text` alone."""
        told, detach = given.t, given.detach_tangent
        if self.config.reverse_time:
            told = Dual(1 - told.value, None if told.tangent is None else -told.tangent)
        cond, context = [self.t_embedder(told), self.s_embedder(given.d), self.y_embedder(given.label)], None
        if given.beta is not None:
            cond.append(self.guidance_embedder(Dual(given.beta)))
        if text is not None:
            tokens, pooled = self.text_embedder(text)
            context = tokens, text.length
            cond.append(Dual(pooled))
        c = dual.silu(dual.add(*cond))
        z = dual.add(self.x_embedder(given.x), Dual(self.pos_embed))
        if detach:
            z, c = dual.detach(z), dual.detach(c)
        for block in self.blocks:
            z = block(z, c, detach, context)
        F = self.image(self.final_layer(z, c), given.x, given.t)
        return dual.detach(F) if detach else F

    def unused(self, guidance: bool, auxiliary: bool) -> list[nn.Module]:
        """Return the parts that are never evaluated: without guidance its embedder."""
        return [] if guidance else [self.guidance_embedder]

    def fix_guidance(self, beta: Tensor) -> None:
        """Change the weights, in place, so that the output without guidance is what it was at beta (1,)."""
        self.t_embedder.mlp[2].bias.add_(self.guidance_embedder(Dual(beta)).value[0])

    def begin_guidance(self) -> None:
        """Change the weights, in place, so that the output at every beta is what it was without guidance."""
        for p in self.guidance_embedder.mlp[2].parameters():
            p.zero_()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Give every linear layer spectral norm 1; modulation and output layers start at zero, so F = 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.label_std)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)
                time = name.startswith(("t_embedder", "s_embedder", "guidance_embedder"))
                if "adaLN_modulation" in name or name in ("final_layer.linear", "text_embedder.pool"):
                    nn.init.zeros_(module.weight)
                elif time and self.config.time_init == "normal":
                    nn.init.normal_(module.weight, std=0.02)
                elif name == "x_embedder.proj" and self.config.patch_init == "xavier":
                    nn.init.xavier_normal_(module.weight.flatten(1))
                else:
                    spectral_(module.weight)


def spectral_(weight: Tensor) -> None:
    """Fill with a Gaussian matrix scaled to spectral norm 1; in place."""
    nn.init.normal_(weight)
    if not weight.is_meta:
        matrix = weight.flatten(1).double()
        gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        weight.div_(torch.linalg.eigvalsh(gram)[-1].sqrt())
