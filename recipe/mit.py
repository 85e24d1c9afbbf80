"""The network of iMF (arXiv 2512.02012) and of pixel mean flow, pMF (arXiv 2601.22158): a plain transformer
that is told all conditions by tokens in context, with one head for u and an auxiliary one for v.

The tokens are those of class, guidance, start and end of the guidance interval, time, and the patches; each
group but the last consists of learned tokens plus one embedded vector. The network knows d = t - s, not t.
Blocks have no modulation: RMS norms with gain, rotary positions, SwiGLU, and a learned gate of each branch.
Of the `depth` blocks the last `head_depth` belong to u; v has as many of its own.

Shapes: as in recipe/dit.py; M tokens in context, S = M + N.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipe import dual
from recipe.dit import Denoiser, Inputs, LabelEmbedder, NetworkConfig, PatchEmbed, ScalarEmbedder
from recipe.dual import Dual
from recipe.settings import ConfigError, Count, NotNegative, Positive

PRESETS = {
    "B": {"width": 768, "depth": 12, "heads": 12},
    "M": {"width": 768, "depth": 24, "heads": 12},
    "L": {"width": 1024, "depth": 32, "heads": 16},
    "XL": {"width": 1024, "depth": 48, "heads": 16},
    "H": {"width": 1280, "depth": 48, "heads": 16},
}
BLOCK_SCALE = 0.32  # of the initial weights of blocks, in units of 1 / sqrt(fan in)
PERIOD = 10000.0  # of the slowest rotation
Interval = tuple[Tensor | float, Tensor | float]


@dataclass
class MiTConfig(NetworkConfig):
    """The transformer of iMF and pMF, conditioned by tokens in context."""

    network: Literal["mit"] = Field("mit", description="The transformer of iMF and pMF.")
    preset: Literal[tuple(PRESETS)] | None = Field(
        None, description="Name of a published size, which sets width, depth and heads."
    )
    head_depth: int = Field(
        8, ge=1, le=1000, description="Number of blocks, of depth, that u does not share with v."
    )
    v_head: bool = Field(True, description="Whether there is an auxiliary head for the velocity v.")
    context: list[Count] = Field(
        [8, 4, 2, 4],
        min_length=4,
        max_length=4,
        description="Numbers of tokens in context for the class, for the guidance weight, for each end of "
        "the guidance interval, and for the time t - s.",
    )
    rotary: Literal["sequence", "grid"] = Field(
        "sequence",
        description="Rotary positions: one along all tokens (sequence), or row and column of patches (grid).",
    )
    learned_positions: bool = Field(False, description="Whether a learned position is added to each token.")
    bottleneck: Count | None = Field(
        None, description="Width between the two linear maps that embed a patch; null for a single one."
    )
    embedding_scale: Positive = Field(
        1.0,
        description="Factor of a number (1 - 1/w, an end of the guidance interval, t - s) before its "
        "sinusoids: 1 as published; a high learning rate needs more.",
    )
    gate_init: NotNegative = Field(
        0.0,
        description="Initial gate of each branch of a block: 0 as published; a short run, in which gates "
        "hardly grow, needs more.",
    )

    presets: ClassVar[dict[str, dict[str, int]]] = PRESETS
    interval: ClassVar[bool] = True

    def check(self) -> None:
        """Raise ConfigError for heads that cannot be rotated, or more blocks in the heads than there are."""
        pairs = 2 if self.rotary == "sequence" else 4
        if self.width // self.heads % pairs:
            raise ConfigError(
                f"heads: {self.heads} leaves each head {self.width // self.heads} of model.width "
                f"{self.width}, which must be a multiple of {pairs} to be rotated"
            )
        if self.head_depth > self.depth:
            raise ConfigError(f"head_depth: {self.head_depth} is more than model.depth, {self.depth}")

    @property
    def groups(self) -> dict[str, int]:
        """The number of tokens of each group in context, in their order."""
        label, guidance, interval, time = self.context
        return {"label": label, "guidance": guidance, "start": interval, "end": interval, "time": time}

    @property
    def sequence(self) -> int:
        """The number of tokens in a block."""
        return sum(self.groups.values()) + self.tokens

    @property
    def hidden(self) -> int:
        """The hidden width of SwiGLU: 8/3 of the width, above 1024 a multiple of 8."""
        hidden = int(self.width * 8 / 3)
        return hidden if self.width <= 1024 else -(-hidden // 8) * 8


def rotations(config: MiTConfig) -> Tensor:
    """Return the angles by which each token's pairs of features turn, float64 (S, D / heads / 2).

    In a sequence, of positions 0, 1, ...; on a grid, the first half of a head turns by the patch's row, the
    second by its column, and tokens in context do not turn.
    """
    features = config.width // config.heads // (1 if config.rotary == "sequence" else 2)
    frequencies = PERIOD ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    if config.rotary == "sequence":
        return torch.arange(config.sequence)[:, None] * frequencies
    side = config.size // config.patch
    line = torch.arange(side)[:, None] * frequencies
    patches = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], -1)
    return torch.cat([patches.new_zeros(config.sequence - config.tokens, patches.shape[1]), patches])


class BottleneckEmbed(PatchEmbed):
    """Embeds patches (B, C, H, W) -> (B, N, D) by way of fewer features."""

    def __init__(self, channels: int, bottleneck: int, width: int, patch: int) -> None:
        super().__init__(channels, bottleneck, patch)
        self.out = nn.Linear(bottleneck, width)

    def forward(self, x: Dual) -> Dual:
        return dual.linear(self.out, super().forward(x))


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are RMS-normed with gain, then rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, z: Dual, cos: Tensor, sin: Tensor) -> Dual:
        q, k, v = dual.unbind(dual.map_linear(self._split, dual.linear(self.qkv, z)), 0)
        q = dual.rotate(dual.rms_norm(q, self.q_norm.weight), cos, sin)
        k = dual.rotate(dual.rms_norm(k, self.k_norm.weight), cos, sin)
        out = dual.map_linear(lambda y: y.transpose(1, 2).flatten(2), dual.attend(q, k, v))
        return dual.linear(self.proj, out)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MLP(nn.Module):
    """An MLP: linear, SwiGLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, z: Dual) -> Dual:
        return dual.linear(self.fc2, dual.swiglu(dual.linear(self.fc1, z)))


class MiTBlock(nn.Module):
    """A block z += a Attn(norm(z)); z += b MLP(norm(z)) of tokens (B, S, D), with learned gates a, b (D,)."""

    def __init__(self, config: MiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn = Attention(width, config.heads)
        self.mlp = MLP(width, config.hidden)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, z: Dual, cos: Tensor, sin: Tensor, detach_tangent: bool = False) -> Dual:
        """Return the tokens after the block; detach_tangent: as in `recipe.dit.Block`."""
        h = self.attn(dual.rms_norm(z, self.norm1.weight), cos, sin)
        z = dual.add(z, dual.mul(Dual(self.attn_scale), h))
        h = self.mlp(dual.rms_norm(z, self.norm2.weight))
        z = dual.add(z, dual.mul(Dual(self.mlp_scale), h))
        return dual.detach(z) if detach_tangent else z


class FinalLayer(nn.Module):
    """The last layer of a head, (B, N, D) -> (B, N, p p C)."""

    def __init__(self, config: MiTConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width)
        self.linear = nn.Linear(config.width, config.patch**2 * config.channels)

    def forward(self, z: Dual) -> Dual:
        return dual.linear(self.linear, dual.rms_norm(z, self.norm.weight))


class MiT(Denoiser):
    """The network u(x, t, d, label, beta, interval), and v of the same where there is a head for it."""

    def __init__(self, config: MiTConfig, initialize: bool = True) -> None:
        """Make the network; initialize=False leaves its weights to be loaded, which saves time."""
        super().__init__(config)
        width, channels, patch = config.width, config.channels, config.patch
        if config.bottleneck is None:
            self.x_embedder = PatchEmbed(channels, width, patch)
        else:
            self.x_embedder = BottleneckEmbed(channels, config.bottleneck, width, patch)
        self.y_embedder = LabelEmbedder(config.classes, width)
        scale = config.embedding_scale
        self.guidance_embedder = ScalarEmbedder(width, scale=scale)
        self.start_embedder = ScalarEmbedder(width, scale=scale)
        self.end_embedder = ScalarEmbedder(width, scale=scale)
        self.s_embedder = ScalarEmbedder(width, scale=scale)
        groups = config.groups.items()
        self.tokens = nn.ParameterDict({name: torch.zeros(count, width) for name, count in groups})
        learned = torch.zeros(1, config.sequence, width) if config.learned_positions else None
        self.positions = None if learned is None else nn.Parameter(learned)
        self.blocks = nn.ModuleList(MiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        if config.v_head:
            self.v_blocks = nn.ModuleList(MiTBlock(config) for _ in range(config.head_depth))
            self.v_final_layer = FinalLayer(config)
        angles = rotations(config)
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        if initialize:
            self.init_weights()

    def evaluate(
        self, given: Inputs, interval: Interval = (0.0, 1.0), head: Literal["u", "v", "both"] = "u"
    ) -> Dual | tuple[Dual, Dual | None]:
        """Return u; t counts only for output x, and beta None means guidance 1.

        interval: the times between which guidance is in force, numbers or (B,). head: v asks for the velocity
        alone, which is u's where there is no head for v; both for (u, v), v without a tangent and None where
        there is no head for it.
        """
        x, t, detach = given.x, given.t, given.detach_tangent
        z = self.sequence(given, interval)
        z = dual.detach(z) if detach else z
        run = *self.rotation.to(x.value.dtype), detach
        shared = self.config.depth - self.config.head_depth
        for block in list(self.blocks)[:shared]:
            z = block(z, *run)
        u = v = None
        if head != "u" and self.config.v_head:
            plain = [Dual(y.value) for y in (z, x, t)]
            v = self.read(list(self.v_blocks), self.v_final_layer, run, *plain)
        if head != "v" or v is None:
            u = self.read(list(self.blocks)[shared:], self.final_layer, run, z, x, t)
            u = dual.detach(u) if detach else u
        return (u, v) if head == "both" else u or v

    def sequence(self, given: Inputs, interval: Interval) -> Dual:
        """Return all tokens, (B, S, D)."""
        x, d, beta = given.x, given.d, given.beta
        ones = torch.ones_like(d.value)
        start, end = (Dual(time * ones) for time in interval)
        told = {
            "label": self.y_embedder(given.label),
            "guidance": self.guidance_embedder(Dual(0 * ones if beta is None else 1 - beta)),
            "start": self.start_embedder(start),
            "end": self.end_embedder(end),
            "time": self.s_embedder(d),
        }
        groups = [
            dual.add(
                Dual(self.tokens[name]),
                dual.map_linear(lambda e, n=n: e[:, None].expand(-1, n, -1), told[name]),
            )
            for name, n in self.config.groups.items()
        ]
        z = dual.cat([*groups, self.x_embedder(x)], 1)
        z = z if self.positions is None else dual.add(z, Dual(self.positions))
        return dual.map_linear(lambda y: y.to(x.value.dtype), z)  # parameters may have been gathered in bf16

    def read(self, blocks: list[MiTBlock], final: FinalLayer, run: tuple, z: Dual, x: Dual, t: Dual) -> Dual:
        """Return what one head makes of the shared tokens, (B, C, H, W)."""
        for block in blocks:
            z = block(z, *run)
        patches = dual.map_linear(lambda y: y[:, -self.config.tokens :], z)
        return self.image(final(patches), x, t)

    def unused(self, guidance: bool, auxiliary: bool) -> list[nn.Module]:
        """Return the parts that are never evaluated: of the auxiliary head, where nobody asks for it."""
        return [] if auxiliary or not self.config.v_head else [self.v_blocks, self.v_final_layer]

    def fix_guidance(self, beta: Tensor) -> None:
        """Change the weights, in place, so that the output without guidance is what it was at beta (1,)."""
        told, untold = (self.guidance_embedder(Dual(z)).value[0] for z in (1 - beta, 0 * beta))
        self.guidance_embedder.mlp[2].bias.add_(told - untold)

    def begin_guidance(self) -> None:
        """Change the weights, in place, so that the output at every beta is what it was without guidance."""
        last = self.guidance_embedder.mlp[2]
        last.bias.copy_(self.guidance_embedder(Dual(last.bias.new_zeros(1))).value[0])
        last.weight.zero_()

    def begin_auxiliary(self) -> None:
        """Change the weights, in place, so that v is u(x, t, t)."""
        shared = self.config.depth - self.config.head_depth
        self.v_blocks.load_state_dict(nn.ModuleList(list(self.blocks)[shared:]).state_dict())
        self.v_final_layer.load_state_dict(self.final_layer.state_dict())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights from N(0, c^2 / fan in), c = 0.32 in blocks and 1 in embedders; tokens and labels from
        N(0, 1 / D); patches by Xavier; gates are `gate_init`; final layers and biases are zero, and so is
        the output.
        """
        for name, p in self.named_parameters():
            module = name.split(".")[0]
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
                nn.init.ones_(p)
            elif module in ("tokens", "positions") or "embedding_table" in name:
                nn.init.normal_(p, std=self.config.width**-0.5)
            elif name.endswith(("attn_scale", "mlp_scale")):
                nn.init.constant_(p, self.config.gate_init)
            elif p.dim() == 1 or module.endswith("final_layer"):
                nn.init.zeros_(p)
            elif module == "x_embedder":
                nn.init.xavier_uniform_(p.flatten(1))
            else:
                scale = BLOCK_SCALE if module.endswith("blocks") else 1.0
                nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)
