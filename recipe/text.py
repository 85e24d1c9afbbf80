"""Prompts: what a network with `model.text` sees of them, and guidance by the empty prompt.

A prompt is up to L tokens, of which the first `length` (1 at least) count: UTF-8 bytes after a mark of where
it begins, or embeddings that `streaming_convert --text-encoder` has stored. It has no tangent. Objectives
know nothing of it: the label that means none stands for the empty prompt too.

Embeddings are last hidden states: of T5 and its kin the encoder's, of CLIP its text model's after the final
norm, of any other text model of transformers (such as Qwen) its own. Weights are read from safetensors alone;
no code beside them is run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recipe.dual import Dual
from recipe.rules import check, one_of, rule, whole

FILES = ("config.json", "*.safetensors*", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
FILES += ("vocab*", "merges.txt", "*.model")  # what of a model's folder is used, downloaded and hashed
BATCH = 32  # prompts at once
FP16_MAX = 65504.0
BEGIN = 256  # the token before the bytes; alone it is the empty prompt


@dataclass
class TextConfig:
    """encoder: `bytes` (UTF-8, an embedding and two transformer layers of this width, trained with the
    network) or `dataset` (stored embeddings of this width); tokens: of a prompt at most, the rest is cut.
    """

    encoder: str = rule("bytes", one_of("bytes", "dataset"))
    tokens: int = rule(64, whole(1, 4096))
    width: int = rule(128, whole(1, 65536))

    def __post_init__(self) -> None:
        check(self, "model.text")
        if self.encoder == "bytes" and self.width % 32:
            raise ValueError(f"model.text.width: {self.width} must be a multiple of 32")


class Text(NamedTuple):
    """tokens: int64 (B, L) bytes or float (B, L, width) embeddings; length: int64 (B,)."""

    tokens: Tensor
    length: Tensor

    def to(self, device: torch.device) -> Text:
        """Both on a device."""
        return Text(self.tokens.to(device), self.length.to(device))


def byte_tokens(prompts: list[str], tokens: int) -> tuple[Text, int]:
    """UTF-8 of prompts, and how many of them were cut."""
    coded = [prompt.encode() for prompt in prompts]
    table = np.full((len(prompts), tokens), BEGIN)
    for row, code in zip(table, coded, strict=True):
        kept = np.frombuffer(code[: tokens - 1], np.uint8)
        row[1 : 1 + len(kept)] = kept
    length = torch.tensor([min(1 + len(code), tokens) for code in coded])
    return Text(torch.from_numpy(table), length), sum(len(code) >= tokens for code in coded)


def empty_prompt(config: TextConfig, stored: dict[str, Any] | None) -> Text:
    """Of one row; `stored` is what the manifest says of the encoder of a dataset's embeddings."""
    if config.encoder == "bytes":
        return byte_tokens([""], config.tokens)[0]
    values = np.frombuffer(base64.b64decode(stored["empty"]), "<f2").reshape(-1, config.width)
    tokens = torch.zeros(1, config.tokens, config.width)
    tokens[0, : len(values)] = torch.from_numpy(values.astype(np.float32))
    return Text(tokens, torch.tensor([len(values)]))


class Prompts(nn.Module):
    """The prompts of a batch for a network, and the empty one in their place where the label means none."""

    def __init__(self, config: TextConfig, stored: dict[str, Any] | None) -> None:
        super().__init__()
        tokens, length = empty_prompt(config, stored)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("length", length, persistent=False)

    def empty(self, count: int) -> Text:
        """So many empty prompts."""
        ones = [1] * (self.tokens.dim() - 1)
        return Text(self.tokens.repeat(count, *ones), self.length.repeat(count))

    def forward(self, net: Callable[..., Dual], text: Text, null: int) -> Callable[..., Dual]:
        """`net` as objectives call it, (x, t, d, label, ...); they may call it for n batches at once."""

        def evaluate(x: Dual, t: Dual, d: Dual, label: Tensor, *rest: Any, **options: Any) -> Dual:  # noqa: ANN401
            n, free = len(label) // len(text.length), label == null
            length = torch.where(free, self.length, text.length.repeat(n))
            ones = [1] * (text.tokens.dim() - 1)
            tokens = torch.where(free.view(-1, *ones), self.tokens, text.tokens.repeat(n, *ones))
            return net(x, t, d, label, *rest, text=Text(tokens, length), **options)

        return evaluate


# ---------------------------------------------------------------- embeddings of a text model


class TextEncoder:
    """A text model and its tokenizer, in float32 on a CPU and bfloat16 on a GPU.

    name: folder or hub name, as given; sha256: of weights, configuration and tokenizer; tokens: what every
    prompt is filled up or cut to; width: of an embedding; cut: how many prompts `encode` has cut so far.
    """

    def __init__(self, path: str, tokens: int, device: str | torch.device | None = None) -> None:
        """`path`: a folder (nothing is downloaded) or a hub name; `device`: None is a GPU if there is one.

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
        self.name, self.tokens, self.width, self.cut = path, tokens, self.model.config.hidden_size, 0
        self.sha256 = _sha256(folder)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (n, tokens, width) float16, zero beyond each prompt's length, and lengths (n,) int64.

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
        """Token ids and mask (n, tokens), filled up on the right."""
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
    """The folder itself, or where the files of the hub's model lie once they are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(FILES)))


def _load(folder: Path, device: torch.device) -> tuple[torch.nn.Module, object]:
    """The text model of `folder` and its tokenizer."""
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
    """Over names and contents of the FILES in `folder`, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
