"""Weights that make images: `load("runs/photos/weights").sample(labels=["cat"], n=8)`.

Sample i has the seed `seed` + i and depends on nothing else, so the same call gives the same images as
`python -m eval.sample` and as a sweep of the same arithmetic.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from recipe.networks import AnyNetwork
from recipe.normalizer import Normalizer
from recipe.objectives import Objective, from_facts
from recipe.objectives.base import Condition
from recipe.patches import exact_float32
from recipe.pictures import to_uint8
from recipe.pretrained import TextEncoder, load_decoder
from recipe.sampler import check_steps, initial_noise, sample
from recipe.settings import Count, Interval, Positive, make
from recipe.text import Prompts, Text, byte_tokens
from recipe.weights import find_label, load_weights, newest_weights

DTYPES = ("fp32", "fp64", "amp_bf16")
Seed = Annotated[int, Field(ge=0, le=2**62)]  # sample i has the seed + i, an int64


class Sampler(nn.Module):
    """Weights that turn noise into images: the network with its prompts, objective and normaliser.

    w, interval: the guidance weight, and the times between which it is in force, where none are asked for
    (`default_guidance`).
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.net, self.facts = load_weights(path, device)
        data, config = self.facts["data"], self.net.config
        self.normalizer = Normalizer(data["mean"], data["std"])
        self.objective = from_facts(self.facts["method"])
        self.w, self.interval = default_guidance(self.facts)
        check_interval(self.facts, self.interval)
        self.prompts = None if config.text is None else Prompts(config.text, data.get("text"), config.null)

    def guidance(self, w: float | None, interval: list[float] | None) -> tuple[float, list[float] | None]:
        """Return the guidance asked for, or else its own. Warns of a w of no training; raises ValueError."""
        if interval is not None:
            check_interval(self.facts, interval)
        w = self.w if w is None else w
        check_guidance(self.objective, w)
        return w, self.interval if interval is None else interval

    def values(
        self,
        noise: Tensor,
        label: Tensor,
        nfe: int,
        w: float,
        text: Text | None,
        interval: list[float] | None,
    ) -> Tensor:
        """Return images, or latents, in their own units from noise (B, C, H, W), for labels int64 (B,).

        text: B prompts for a network that takes them; interval: None for guidance at every time.
        """
        net, config = self.net, self.net.config
        if self.prompts is not None:
            label = label if config.classes else self.prompts.unlabelled(label, text)
            net = self.prompts(net, text)
        if interval is not None:
            net = partial(net, interval=tuple(interval))
        x0 = sample(net, noise, Condition(label, w, config.null), nfe, self.objective)
        return self.normalizer.invert(x0)


class Generator(Sampler):
    """Weights ready to make images: uint8 (B, C, H, W) from labels and seeds. A folder means its newest.

    dtype: of the network's arithmetic; in fp64 an image does not depend on its batch, in fp32 some pixels
    may change by 1 with the batch size. rounding: of pixels to uint8, `nearest` or `down`. vae, text_encoder:
    folder or hub name of the decoder of latents and of the encoder of prompts; None: as the weights say.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str = "fp32",
        rounding: str = "nearest",
        vae: str | None = None,
        text_encoder: str | None = None,
    ) -> None:
        """Load the weights. Raises OSError and ValueError, in one line, where that cannot be."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
        exact_float32()
        super().__init__(newest_weights(path), device)
        self.device, self.rounding = torch.device(device), rounding
        self.dtype = torch.float64 if dtype == "fp64" else torch.float32
        self.autocast = dtype == "amp_bf16"
        self.to(self.device, self.dtype)
        self._text_encoder = text_encoder
        data = self.facts["data"]
        latent = data["column"] == "latents"
        self.decode = load_decoder(data["encoder"], vae, device) if latent else None

    @property
    def class_names(self) -> list[str]:
        """The names of the network's classes in the order of their labels; [] where they are not known."""
        return self.facts["data"].get("class_names", [])[: self.net.config.classes]

    def sample(
        self,
        labels: Sequence[int | str] | int | str | None = None,
        prompts: Sequence[str] | str | None = None,
        n: int = 8,
        nfe: int = 1,
        w: float | None = None,
        interval: Sequence[float] | None = None,
        seed: int = 0,
        interpolate: int | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> np.ndarray:
        """Draw images uint8 (R * n, H, W, C): n of each of R labels or prompts, in their order.

        labels: numbers or names of classes, or "none" for no label; None means the first ten classes, or no
        prompt where the network takes prompts. prompts: with classes, one label for all of them or one for
        each. nfe: network evaluations, that is steps. w: guidance weight; interval: the times (lo, hi)
        between which it is in force; None means what the weights were finished at, or else trained for.
        interpolate: a seed; then each row goes from the noise of `seed` to that one's. progress: show a bar.
        Raises ValueError, which begins with the argument's name, and FloatingPointError.
        """
        limits = {"n": (n, Count), "seed": (seed, Seed), "batch_size": (batch_size, Count)}
        limits |= {} if w is None else {"w": (w, Positive)}
        limits |= {} if interpolate is None else {"interpolate": (interpolate, Seed)}
        for name, (value, kind) in limits.items():
            if value is None or isinstance(value, str | bool):
                raise ValueError(f"{name}: {value!r} must be a number")
            make(kind, value, name)
        check_steps(nfe)
        if interval is not None:
            interval = make(Interval, list(interval) if isinstance(interval, tuple) else interval, "interval")
        if interpolate == seed:
            raise ValueError(f"interpolate: {seed} is the seed that the rows start from")
        w, interval = self.guidance(w, interval)
        label, text = self.asked(labels, prompts, n)
        seeds = seed + torch.arange(len(label))
        if interpolate is not None:
            ends = self.noise(torch.tensor([seed, interpolate]))
            way = great_circle(ends[0], ends[1], n)
        images, parts = [], torch.arange(len(label)).split(batch_size)
        for index in tqdm(parts, "sampling", unit="batch", disable=not progress):
            noise = self.noise(seeds[index]) if interpolate is None else way[index % n]
            images.append(self.from_noise(noise, label[index], nfe, w, text and text(index), interval).cpu())
        return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()

    def asked(
        self, labels: Sequence[int | str] | int | str | None, prompts: Sequence[str] | str | None, n: int
    ) -> tuple[Tensor, Callable[[Tensor], Text] | None]:
        """Return labels int64 (R * n,), n for each of R labels or prompts of `sample`, and a function from an
        index of samples to their prompts, None where there are no prompts. Raises ValueError.
        """
        label, prompts = self.rows(labels, prompts)
        row = torch.arange(len(label)).repeat_interleave(n)
        if not prompts:
            return label[row], None
        text = self.encode(prompts)
        return label[row], lambda index: Text(*(x[row[index]] for x in text))

    def rows(
        self, labels: Sequence[int | str] | int | str | None, prompts: Sequence[str] | str | None
    ) -> tuple[Tensor, list[str]]:
        """Return labels int64 (R,) and R prompts, or none, of what `sample` is asked. Raises ValueError."""
        if prompts is None:
            found = self.labels(labels)
            if self.prompts is not None and (found != self.net.config.null).any():
                raise ValueError(
                    "labels: these weights take prompts too, and know no label alone: give prompts"
                )
            return found, []
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.prompts is None:
            raise ValueError("prompts: these weights take none")
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts: {prompts!r} must be one text or more")
        if not self.net.config.classes:
            return torch.zeros(len(prompts), dtype=torch.int64), prompts
        found = torch.tensor([]) if labels is None else self.labels(labels)
        if len(found) not in (1, len(prompts)):
            raise ValueError(
                f"labels: one for all prompts, or one for each of {len(prompts)}, since there are classes"
            )
        return found.expand(len(prompts)), prompts

    def labels(self, given: Sequence[int | str] | int | str | None) -> Tensor:
        """Return int64 labels of numbers, names of classes, and "none" for no label. Raises ValueError.

        A text is the name of a class first, and a number where no class has that name. None means the first
        ten, or no label where there are no classes or the network takes prompts.
        """
        config, names, found = self.net.config, self.class_names, []
        if given is None:
            first = range(0 if config.text else min(config.classes, 10))
            given = list(first) or ["none"]
        given = given.tolist() if hasattr(given, "tolist") else given  # of NumPy or torch
        for one in [given] if isinstance(given, int | str) else given:
            label = config.null if one == "none" else find_label(one, config.classes, names)
            if label is None:
                allowed = f"in 0..{config.classes - 1}, nor `none`" if config.classes else "`none`"
                named = f", nor a class such as {names[0]!r}" if names else ""
                raise ValueError(f"labels: {str(one)!r} is not {allowed}{named}")
            found.append(label)
        if not found:
            raise ValueError("labels: none are given")
        return torch.tensor(found)

    def noise(self, seeds: Tensor) -> Tensor:
        """Return noise (B, C, H, W) of int64 seeds (B,)."""
        config = self.net.config
        shape = config.channels, config.size, config.size
        return initial_noise(seeds.to(self.device), shape, self.dtype)

    def __call__(self, label: Tensor, seeds: Tensor, nfe: int, w: float, *more: Any) -> Tensor:
        """Return images; label, seeds: int64 (B,), the label K stands for none; more: text and interval, see
        `from_noise`.
        """
        return self.from_noise(self.noise(seeds), label, nfe, w, *more)

    def from_noise(
        self,
        noise: Tensor,
        label: Tensor,
        nfe: int,
        w: float,
        text: Text | None = None,
        interval: list[float] | None = None,
    ) -> Tensor:
        """Return images from noise (B, C, H, W), for labels int64 (B,).

        text: B prompts. A network with prompts takes None for no prompts, and no labels either: it was never
        trained with a label alone. interval: None for guidance at every time, also where the weights have an
        `interval` of their own. Raises ValueError for a label or a number of steps that cannot be,
        FloatingPointError where the output is not finite.
        """
        null = self.net.config.null
        if len(wrong := label[(label < 0) | (label > null)]):
            raise ValueError(f"label: {wrong[0]} must be from 0 to {null}, where {null} means none")
        label = label.to(self.device)
        if self.prompts is not None:
            label = torch.full_like(label, null) if text is None else label
            text = self.prompts.empty(len(label)) if text is None else text.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            values = self.values(noise, label, nfe, w, text, interval)
        if not values.isfinite().all():
            raise FloatingPointError(f"the network's output is not finite with {nfe} steps at w = {w:g}")
        return quantize(self.decode(values.float()) if self.decode else values, self.rounding)

    def batches(
        self,
        label: Tensor,
        seeds: Tensor,
        nfe: int,
        w: float,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        text: Callable[[Tensor], Text] | None = None,
        interval: list[float] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, index) of every world-th batch, beginning with the rank's; index: which samples.

        text: from an index to these samples' prompts; None for empty ones; interval: see `from_noise`.
        """
        for index in torch.arange(len(seeds)).split(batch_size)[rank::world]:
            yield self(label[index], seeds[index], nfe, w, text and text(index), interval), index

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The model whose embeddings the network was trained with. Raises ValueError for another one."""
        stored = self.facts["data"]["text"]
        encoder = TextEncoder(
            self._text_encoder or stored["encoder"], self.net.config.text.tokens, self.device
        )
        if encoder.sha256 != stored["sha256"]:
            raise ValueError(
                f"text_encoder: {encoder.name} hashes to {encoder.sha256[:12]}, the network was "
                f"trained with {stored['encoder']}, {stored['sha256'][:12]}"
            )
        return encoder

    def encode(self, prompts: list[str]) -> Text:
        """Return prompts for this network; those that are too long are cut, with a warning that counts them.

        Raises ValueError where these weights take none, or their text encoder is not to be had.
        """
        config = self.net.config.text
        if config is None:
            raise ValueError("prompts: these weights take none")
        if config.encoder == "bytes":
            text, cut = byte_tokens(prompts, config.tokens)
        else:
            before = self.text_encoder.cut
            text = Text(*map(torch.from_numpy, self.text_encoder.encode(prompts)))
            cut = self.text_encoder.cut - before
        if cut:
            said = f"{cut} of {len(prompts)} prompts are longer than {config.tokens} tokens"
            warnings.warn(said, stacklevel=2)
        return text


def quantize(values: Tensor, rounding: str) -> Tensor:
    """Return pixel values in 0..255 units as uint8, rounded to the `nearest` integer or `down`."""
    return to_uint8(values if rounding == "nearest" else values.floor())


def check_guidance(objective: Objective, w: float) -> None:
    """Warn of a w that the network has not been trained for."""
    low, high = objective.guidance_range
    if not low <= w <= high:
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        warnings.warn(f"w = {w:g} is outside what {objective.name} was trained for, {trained}", stacklevel=2)


def default_guidance(facts: dict[str, Any]) -> tuple[float, list[float] | None]:
    """Return weight and interval of guidance where none are asked for: a finish's, else of training."""
    found = own_finish(facts)
    w = found.get("w")
    return from_facts(facts["method"]).default_w if w is None else w, found.get("interval")


def usual_steps(facts: dict[str, Any]) -> int:
    """Return the number of steps that weights are for: that of a finish, 50 of flow matching, else 1."""
    many = facts["method"]["objective"] == "flow_matching"
    return own_finish(facts).get("nfe", 50 if many else 1)


def own_finish(facts: dict[str, Any]) -> dict[str, Any]:
    """Return how the samples of a finish were drawn, if that is the last that was done to the weights.

    What says its steps was done before the run that the weights are of, which has gone on without.
    """
    last = (facts.get("finished") or [{}])[-1]
    return {} if "steps" in last else last


def check_interval(facts: dict[str, Any], interval: list[float] | None) -> None:
    """Raise ValueError for weights that have been trained without a guidance interval, if there is one."""
    network, objective = make(AnyNetwork, facts["model"], "model"), from_facts(facts["method"])
    if interval is not None and not (network.interval and objective.auxiliary):
        raise ValueError(f"interval: {interval} is for iMF on the network mit, not for these weights")


def great_circle(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return `steps` points of the great circle between two noises (C, H, W), ends included.

    A straight line would pass through noise of too small a norm, which the network has never seen.
    """
    angle = torch.acos((start * end).sum() / (start.norm() * end.norm()))
    fraction = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None, None, None]
    return (torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end) / torch.sin(angle)
