"""Models that others have trained: autoencoders of latents (diffusers), encoders of prompts (transformers).

Embeddings are last hidden states: of T5 and its kin the encoder's, of CLIP its text model's after the final
norm, of any other text model of transformers (such as Qwen) its own. Weights are read from safetensors alone;
no code beside them is run.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from recipe.patches import exact_float32
from recipe.pictures import decode, pixel_range
from storage.manifest import DatasetError
from storage.outside import file_digest

FILES = ("config.json", "*.safetensors*", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
FILES += ("vocab*", "merges.txt", "*.model")  # what of a text model's folder is used, downloaded and hashed
BATCH = 32  # prompts at once
FP16_MAX = 65504.0
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_vae(model: str, dtype: str = "fp32", device: str | None = None):  # noqa: ANN201 (diffusers is optional)
    """Return the autoencoder of images in the folder, or of the hub name, `model`, by its own class.

    Of a whole pipeline it is the one in its folder `vae`. Raises DatasetError if it cannot be loaded.
    """
    try:
        import diffusers
    except ImportError as error:
        raise DatasetError("a VAE needs diffusers: pip install 'terminal-velocity[vae]'") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    exact_float32()
    try:
        config, where = _vae_config(model)
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if not all(hasattr(kind, method) for method in ("from_pretrained", "encode", "decode")):
            raise ValueError(f"{config.get('_class_name')} is no autoencoder of this diffusers")
        vae = kind.from_pretrained(model, torch_dtype=DTYPES[dtype], use_safetensors=True, **where)
        return vae.to(device).eval()
    except Exception as error:  # torch, safetensors and the hub have their own
        reason = " ".join(str(error).split())
        raise DatasetError(f"--vae: cannot load {model} on {device}: {reason}") from error


def _vae_config(model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return an autoencoder's configuration and, of a pipeline's, where it lies: {"subfolder": "vae"}."""
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.load_config(model), {}
    except OSError as error:
        where = {"subfolder": "vae"}
        with suppress(OSError):
            return AutoencoderKL.load_config(model, **where), where
        raise error


def encode_pixels(network: nn.Module, pixels: Tensor) -> Tensor:
    """Return latents (N, 2c, h, w) of pixels (N, C, H, W) in 0..255: the posterior's means and deviations.

    The deviations of an autoencoder without a posterior are 0.
    """
    scale, offset = pixel_range(network)
    found = network.encode(pixels.to(network.device, network.dtype) / scale - offset)
    if hasattr(found, "latent_dist"):
        return torch.cat([found.latent_dist.mean, found.latent_dist.std], dim=1)
    latents = found.latents if hasattr(found, "latents") else found.latent
    return torch.cat([latents, torch.zeros_like(latents)], dim=1)


def hash_weights(model: nn.Module) -> str:
    """Return the xxh64 of the names and fp32 values of all parameters, in the order of their names."""
    digest = xxhash.xxh64()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_decoder(
    encoder: dict[str, Any], vae: str | None, device: str | torch.device, half: bool = True
) -> Callable[[Tensor], Tensor]:
    """Return a function from stored latents (N, c, h, w) to pixels (N, 3, H, W) in 0..255, not rounded.

    It works in fp16 on a GPU, as the published evaluations do, and in fp32 on a CPU or where `half` is false.
    Gradients flow through it to the latents.
    encoder: of the dataset's manifest, as the weights say; vae: folder of an autoencoder of diffusers, None
    for the one that `encoder` names, where that is a folder or a hub name such as stabilityai/sd-vae-ft-ema
    (the hub is not asked for other names, such as `precomputed`). Raises ValueError where diffusers is
    missing, there is no such autoencoder, or the latents were made with other weights.
    """
    model = vae or encoder.get("model") or encoder["name"]
    if vae is None and not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ValueError(
            f"the weights make latents, and their autoencoder ({model!r}) is not known here: give --vae "
            f"FOLDER, in a sweep vae=FOLDER"
        )
    network = load_vae(model, "fp32", str(device)).requires_grad_(False)
    made_with = encoder.get("hash")
    if made_with is not None and (found := hash_weights(network)) != made_with:
        raise ValueError(
            f"vae: the weights of {model} hash to {found}, the latents were made with {made_with}"
        )
    network = network.half() if half and torch.device(device).type == "cuda" else network
    return lambda latents: decode(network, latents, encoder, batch_size=16)


class TextEncoder:
    """A text model and its tokenizer, in float32 on a CPU and bfloat16 on a GPU.

    name: folder or hub name, as given; sha256: of weights, configuration and tokenizer; tokens: what every
    prompt is filled up or cut to; width: of an embedding; cut: how many prompts `encode` has cut so far.
    """

    def __init__(self, path: str, tokens: int, device: str | torch.device | None = None) -> None:
        """Load the model in a folder (nothing is downloaded) or of a hub name; device None is a GPU if any.

        Raises ValueError if the model cannot be loaded whole or does not take `tokens` tokens.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            folder = _folder(path)
            self.model, self.tokenizer = _load(folder, self.device)
        except ImportError as error:  # of transformers, or of what one of its tokenizers needs
            raise ValueError(f"{path}: {error}; pip install 'terminal-velocity[text]'") from error
        except Exception as error:  # torch, safetensors and the hub have their own
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot load {path} on {self.device}: {reason}") from error
        least = self.tokenizer.num_special_tokens_to_add() + 1
        most = getattr(self.model.config, "max_position_embeddings", None) or 2**16
        if not least <= tokens <= most:
            raise ValueError(f"{path} takes {least} to {most} tokens, not {tokens}")
        self.name, self.tokens = path, tokens
        self.width = self.model.config.hidden_size
        self.cut = 0
        self.sha256 = _sha256(folder)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings (n, tokens, width) float16, zero beyond a prompt's length, and lengths (n,)
        int64.

        Lengths are 1 to `tokens`: a prompt without any token, as the empty one of some models, becomes their
        BOS, EOS or padding token; one that is too long is cut, but for the tokens that end a prompt, and
        counted in `cut`. All are filled up to `tokens`, so that another batch changes a result by rounding at
        most. Values beyond float16 become its largest. Raises ValueError, quoting the prompt, for NaN.
        """
        text = np.zeros((len(prompts), self.tokens, self.width), np.float16)
        lengths = np.zeros(len(prompts), np.int64)
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            ids, mask = self._tokenize(prompts[part])
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            hidden = hidden.float().masked_fill(mask[..., None] == 0, 0).clamp(-FP16_MAX, FP16_MAX)
            text[part] = hidden.half().cpu().numpy()
            lengths[part] = mask.sum(1).cpu().numpy()
        bad = np.isnan(text).any((1, 2))
        if bad.any():
            raise ValueError(f"{self.name} gives NaN for {prompts[bad.argmax()][:80]!r}")
        return text, lengths

    def _tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask (n, tokens), filled up on the right."""
        self.cut += sum(len(ids) > self.tokens for ids in self.tokenizer(prompts, verbose=False)["input_ids"])
        found = self.tokenizer(
            prompts, truncation=True, max_length=self.tokens, padding="max_length", return_tensors="pt"
        )
        ids, mask = found["input_ids"].long(), found["attention_mask"].long()
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        nothing = mask.sum(1) == 0
        ids[nothing, 0] = next(token for token in known if token is not None)
        mask[nothing, 0] = 1
        return ids.to(self.device), mask.to(self.device)


def _folder(path: str) -> Path:
    """Return the folder itself, or where the files of the hub's model lie once they are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(FILES)))


def _load(folder: Path, device: torch.device) -> tuple[torch.nn.Module, object]:
    """Return the text model of `folder` and its tokenizer."""
    import transformers

    safe = {"trust_remote_code": False, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(folder, **safe)
    if config.model_type.startswith("clip"):
        kind = transformers.CLIPTextModel  # also where the folder holds the image model too
    elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        kind = transformers.AutoModelForTextEncoding  # of T5 the encoder alone
    else:
        kind = transformers.AutoModel
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, info = kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
    )
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has no padding, EOS or BOS token")
    return model.to(device).eval(), tokenizer


def _sha256(folder: Path) -> str:
    """Return the hash of names and contents of the FILES in `folder`, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        file_digest(path, digest)
    return digest.hexdigest()
