"""Low-rank adapters (LoRA, arXiv 2106.09685) of the products of attention and MLP, on frozen weights.

A product x W' becomes x W' + (alpha / rank) (x A') B', of value and tangent alike (`recipe.dual.linear`),
with trained A (rank, in) and B (out, rank): no matrix of W's size is made and no gradient of W computed.
Weights of such a run hold what is trained alone, under the names that peft gives it; W is in the base, other
weights that their JSON names.
"""

import re
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipe.settings import ConfigError, Many, Positive, Settings, Word

PREFIX = "base_model.model."  # of peft's names
PRODUCTS = r"(v_)?blocks\.\d+\.(attn|text_attn|mlp)\.(qkv|q|kv|proj|fc1|fc2)"


@dataclass
class AdapterConfig(Settings):
    """A low-rank adapter of the products of attention and MLP, trained on the frozen weights of init_from."""

    rank: int = Field(16, ge=1, le=4096, description="Rank of the adapter, peft's `r`.")
    alpha: Positive = Field(
        16.0, description="Size of the adapter, peft's `lora_alpha`: its product is multiplied by alpha/rank."
    )
    modules_to_save: Many[Word] = Field(
        [],
        description="Parts of the network that are trained whole and saved with the adapter, such as those "
        "that init_from does not have: [y_embedder].",
    )


@dataclass(kw_only=True)
class Adapter(AdapterConfig):
    """What weights say of their adapter: its settings, and the base by its name and its tensors' checksum."""

    base: str = Field(description="Path of the base, without suffix.")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Checksum of the base's tensors.")]


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Return what peft writes in adapter_config.json of such an adapter."""
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": PRODUCTS,
        "modules_to_save": adapter.modules_to_save or None,
        "base_model_name_or_path": adapter.base,
    }


def trained(name: str, whole: list[str]) -> bool:
    """Return True if a parameter belongs to an adapter, or to one of the modules that are trained whole."""
    return not {"lora_A", "lora_B", *whole}.isdisjoint(name.split("."))


def add_adapter(net: nn.Module, config: AdapterConfig) -> None:
    """Freeze a network, but for an adapter that begins as nothing, and for the modules trained whole.

    Raises ConfigError for one that the network does not have.
    """
    names = [name.split(".") for name, _ in net.named_parameters()]
    if unknown := [part for part in config.modules_to_save if not any(part in name for name in names)]:
        parts = ", ".join(dict.fromkeys(name[0] for name in names))
        raise ConfigError(f"adapter.modules_to_save: {unknown[0]!r} is no part of the network: {parts}")
    for name, layer in list(net.named_modules()):
        if re.fullmatch(PRODUCTS, name) and not trained(name, config.modules_to_save):
            layer.lora_A = nn.Linear(layer.in_features, config.rank, bias=False)
            layer.lora_B = nn.Linear(config.rank, layer.out_features, bias=False)
            layer.lora_scale = config.alpha / config.rank
            nn.init.zeros_(layer.lora_B.weight)
    for name, p in net.named_parameters():
        p.requires_grad_(trained(name, config.modules_to_save))


def adapter_state(state: dict[str, Tensor], whole: list[str]) -> dict[str, Tensor]:
    """Return those weights of a network that are trained, under peft's names."""
    return {PREFIX + name: x for name, x in state.items() if trained(name, whole)}


def merge(base: dict[str, Tensor], state: dict[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Return the weights `base` with what `adapter_state` gave: W + (alpha / rank) B A."""
    merged, state = dict(base), {name.removeprefix(PREFIX): x for name, x in state.items()}
    for name, x in state.items():
        layer, factor, _ = name.rpartition(".lora_A.")
        if factor:
            change = state[f"{layer}.lora_B.weight"] @ x
            merged[f"{layer}.weight"] = base[f"{layer}.weight"] + config.alpha / config.rank * change
        elif ".lora_B." not in name:
            merged[name] = x
    return merged
