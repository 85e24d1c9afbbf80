"""Networks by name: their settings, and how one is built from them."""

from recipe.dit import Denoiser, DiT, DiTConfig, NetworkConfig
from recipe.mit import MiT, MiTConfig
from recipe.settings import one_of

NETWORKS: dict[str, type[Denoiser]] = {"dit": DiT, "mit": MiT}
CONFIGS: dict[str, type[NetworkConfig]] = {"dit": DiTConfig, "mit": MiTConfig}
AnyNetwork = one_of("network", "dit", CONFIGS)


def build(config: NetworkConfig, initialize: bool = True) -> Denoiser:
    """Make the network of these settings; initialize=False leaves its weights to be loaded, to save time."""
    return NETWORKS[config.network](config, initialize)
