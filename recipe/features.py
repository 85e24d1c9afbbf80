"""Feature extractors, images (N, C, H, W) => float64 features (N, F), and sets of their features.

Scoring passes uint8 images; training passes the same pixels as floats, through the same code, with gradients.
"""

import hashlib
import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.error import URLError

import torch
from composer.utils import dist
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypedDict

from recipe.metrics import FeatureMoments
from recipe.patches import exact_float32
from recipe.settings import make
from storage.outside import read_json

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 4096


class FeatureExtractor(ABC):
    """What the metrics and the objective `frechet` need to know of a network, whose weights are frozen."""

    name: str
    num_features: int
    device: torch.device
    network: nn.Module = nn.Identity()
    has_logits = True

    @abstractmethod
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return float64 features (N, F) and, if the extractor has them, class scores (N, K).

        pixels: (N, C, H, W) in 0..255, uint8, or floats through which gradients flow.
        """

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Evaluate `forward` on uint8 images, without gradients. Raises ValueError for anything else."""
        _require_uint8(images)
        with torch.inference_mode():
            return self.forward(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features alone."""
        return self.features_and_logits(images)[0]


Device = str | torch.device


def load_extractor(name: str, weights: str | None = None, device: Device = "cpu") -> FeatureExtractor:
    """Load the extractor that `EXTRACTORS` calls `name`.

    weights: for "inception-2015" torch-fidelity's .pth file, for "dinov2-vitl14" a transformers folder, both
    fetched if not given; for "image-model" a transformers folder; for "classifier" the path given to
    `SmallImageClassifier.train`. Raises ValueError for an unknown name, FileNotFoundError where the weights
    are nowhere to be had.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor: {name!r} is not one of {', '.join(EXTRACTORS)}")
    exact_float32()
    return EXTRACTORS[name](weights, device)


def _require_uint8(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}")


# ---------------------------------------------------------------- a classifier trained on the spot

EPOCHS, BATCH_SIZE, NUM_FEATURES = 20, 64, 64


class Training(TypedDict):
    """What a classifier was trained with; see `SmallImageClassifier.train`."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    channels: Annotated[int, Field(ge=1, le=2**16)]
    size: Annotated[int, Field(ge=8, le=2**16)]
    num_classes: Annotated[int, Field(ge=1, le=2**20)]
    num_features: Annotated[int, Field(ge=1, le=2**20)]
    epochs: int
    seed: int
    data_sha256: str


class Trained(TypedDict):
    """The JSON beside a classifier's weights."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    settings: Training
    accuracy: Annotated[float, Field(ge=0, le=1)]


class SmallImageClassifier(FeatureExtractor):
    """A small convolutional network, made by `train` from labelled images in seconds, for more of their kind.

    Its features are the activations before the last linear layer; it is retrained when any of `settings`, all
    that determines it, changes.
    """

    name = "classifier"

    def __init__(self, settings: dict[str, Any], network: nn.Module, accuracy: float) -> None:
        self.settings = settings
        # In float64 the features of an image do not depend on the batch that it is in.
        self.network = network.double().eval().requires_grad_(False)
        self.num_features = settings["num_features"]
        self.accuracy = accuracy

    @classmethod
    def train(
        cls,
        images: Tensor,
        labels: Tensor,
        seed: int = 0,
        path: str | Path | None = None,
    ) -> "SmallImageClassifier":
        """Train on 80 % of every class; `accuracy` is measured on the rest.

        It takes about 5 seconds for 1,800 images of 8x8 on one core, leaves torch's random state alone and is
        deterministic for a given number of threads. With several ranks, train on one of them.

        images: uint8 (N, C, S, S) with S at least 8; labels: int64 (N,), 0..K-1; path: `path`.safetensors and
        `path`.json are read if they were made in the same way from the same images and labels, and written
        otherwise. Raises ValueError for images or labels of the wrong kind.
        """
        exact_float32()
        _require_uint8(images)
        size = tuple(images.shape[2:])
        if size[0] != size[1] or size[0] < 8:
            raise ValueError(f"images must be square and at least 8 pixels wide, got {size}")
        if labels.shape != images.shape[:1] or labels.min() < 0:
            raise ValueError(f"labels must be (N,) class indices from 0, got {tuple(labels.shape)}")
        images, labels = images.cpu(), labels.cpu().long()
        digest = hashlib.sha256(images.contiguous().numpy()).hexdigest()
        digest = hashlib.sha256(digest.encode() + labels.contiguous().numpy().tobytes()).hexdigest()
        settings = {
            "channels": images.shape[1],
            "size": size[0],
            "num_classes": int(labels.max()) + 1,
            "num_features": NUM_FEATURES,
            "epochs": EPOCHS,
            "seed": seed,
            "data_sha256": digest,
        }
        with suppress(FileNotFoundError, ValueError):  # there is none of use yet
            if (kept := cls.load(path)).settings == settings:
                return kept
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            held_out = _stratified(labels, share=0.2)
            network = _build_network(settings)
            _fit(network, images[~held_out], labels[~held_out])
        classifier = cls(settings, network, accuracy=float("nan"))
        predicted = classifier.logits(images[held_out]).argmax(1)
        classifier.accuracy = float((predicted == labels[held_out]).double().mean())
        if path is not None:
            classifier.save(path)
        return classifier

    @classmethod
    def load(cls, path: str | Path | None, device: Device = "cpu") -> "SmallImageClassifier":
        """Read what `save` wrote to `path`. Raises FileNotFoundError or ValueError."""
        if path is None:
            raise FileNotFoundError("extractor classifier: no path to weights given")
        weights_file, facts_file = _files(path)
        for file in (weights_file, facts_file):
            if not file.is_file():
                raise FileNotFoundError(f"classifier weights {file} do not exist")
        try:
            facts = make(Trained, read_json(facts_file), str(facts_file))
            with torch.device("meta"):  # so that no number in the JSON fills the memory
                network = _build_network(facts["settings"])
            network.load_state_dict(load_file(weights_file), assign=True)
            return cls(facts["settings"], network.double(), facts["accuracy"]).to(device)
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} is not a classifier of this project: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `path`.safetensors and, last, `path`.json."""
        weights_file, facts_file = _files(path)
        weights_file.parent.mkdir(parents=True, exist_ok=True)
        # An interrupted save must not leave new weights beside the description of old ones.
        facts_file.unlink(missing_ok=True)
        save_file(self.network.state_dict(), weights_file)
        facts = {"settings": self.settings, "accuracy": self.accuracy}
        facts_file.write_text(json.dumps(facts, indent=2) + "\n")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it takes."""
        return self.settings["channels"], self.settings["size"], self.settings["size"]

    @property
    def device(self) -> torch.device:
        """Where its features are."""
        return next(self.network.parameters()).device

    def to(self, device: Device) -> "SmallImageClassifier":
        """Move the network, and return self."""
        self.network.to(device)
        return self

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, F) and class scores (N, K) of pixels (N, C, S, S)."""
        if pixels.shape[1:] != self.shape:
            wanted = "{} channels of {}x{} pixels".format(*self.shape)
            raise ValueError(f"expected images with {wanted}, got {tuple(pixels.shape[1:])}")
        parts = (part.to(self.device, torch.float64) for part in pixels.split(512))
        features = torch.cat([self.network[:-1](_to_network(part)) for part in parts])
        return features, self.network[-1](features)

    def logits(self, images: Tensor) -> Tensor:
        """Return the class scores alone."""
        return self.features_and_logits(images)[1]


def _files(path: str | Path) -> tuple[Path, Path]:
    return Path(f"{path}.safetensors"), Path(f"{path}.json")


def _to_network(images: Tensor) -> Tensor:
    return images / 127.5 - 1


def _stratified(labels: Tensor, share: float) -> Tensor:
    """Return a boolean mask (N,) of a random `share` of every class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = round(share * len(members))
        chosen[members[torch.randperm(len(members))[:count]]] = True
    return chosen


def _build_network(settings: dict[str, Any]) -> nn.Sequential:
    """Build convolutions, halving the image until at most 3 pixels are left, then two linear layers."""
    layers: list[nn.Module] = []
    channels, size, features = (settings[name] for name in ("channels", "size", "num_features"))
    while size > 3:
        width = max(16, min(64, 256 // size))
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
        size //= 2
    layers += [nn.Flatten(), nn.Linear(channels * size * size, features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(features, settings["num_classes"]))


def _fit(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Minimise the cross-entropy by AdamW at a one-cycle rate, on images shifted by up to a pixel."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            down, right = torch.randint(-1, 2, (2,)).tolist()
            x = torch.roll(_to_network(images[batch]), (down, right), dims=(2, 3))
            loss = F.cross_entropy(network(x), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


# ---------------------------------------------------------------- published networks


class Inception2015(FeatureExtractor):
    """The Inception-v3 graph of 2015-12-05, 2048 pooled features, by torch-fidelity.

    It takes images of any size and resizes as TensorFlow 1 did. weights: torch-fidelity's
    `weights-inception-2015-12-05-6726825d.pth`.
    """

    name = "inception-2015"
    num_features = 2048

    def __init__(self, weights: str | None = None, device: Device = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                FeatureExtractorInceptionV3,
                interpolate_bilinear_2d_like_tensorflow1x,
            )
        except ImportError as error:
            raise ImportError("extractor inception-2015 needs `pip install torch-fidelity`") from error
        if weights is not None:
            if not Path(weights).is_file():
                raise FileNotFoundError(f"Inception-2015 weights {weights} do not exist")
            # torch-fidelity unpickles without restrictions: let the file pass torch's safe reader first.
            try:
                torch.load(weights, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise ValueError(f"Inception-2015 weights {weights}: not a file of tensors") from error
        try:
            graph = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], weights)
        except URLError as error:
            raise FileNotFoundError(f"Inception-2015: no path to weights given, and {error}") from error
        self.device = torch.device(device)
        self.network = graph.to(self.device)
        self.resize = interpolate_bilinear_2d_like_tensorflow1x

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 2048) and, from the same pass, the logits (N, 1008) for the Inception score.

        The graph's own `forward` takes uint8 alone; its layers stand in the order in which they are called.
        """
        size = (self.network.INPUT_IMAGE_SIZE,) * 2
        x = self.resize(_to_rgb(pixels).to(self.device, torch.float32), size=size, align_corners=False)
        x = (x - 128) / 128
        *layers, classes = self.network.children()
        for layer in layers:
            x = layer(x)
        features = x.flatten(1)
        return features.double(), features.mm(classes.weight.T).double()


class ImageModel(FeatureExtractor):
    """Any image model of transformers in a folder (SigLIP, MAE, CLIP, ConvNeXt, ViT): its pooled output or,
    where it has none, its class token. Images are resized to the model's own size, bicubic with antialiasing,
    and normalised as its preprocessor_config.json says.
    """

    name = "image-model"
    has_logits = False

    def __init__(self, weights: str | None = None, device: Device = "cpu") -> None:
        if weights is None or not (Path(weights) / "config.json").is_file():
            raise FileNotFoundError(f"{self.name} weights: {weights} is not a folder with a config.json")
        self.network, self.pooled = _load_image_model(weights)
        self.device = torch.device(device)
        self.network.to(self.device).eval().requires_grad_(False)
        config = self.network.config
        self.num_features = config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]
        self.size, mean, std = self.preprocessing(weights)
        self.mean, self.std = (255 * torch.tensor(x, device=self.device).view(-1, 1, 1) for x in (mean, std))

    def preprocessing(self, weights: str) -> tuple[int, Sequence[float], Sequence[float]]:
        """Return the model's input size in pixels, and mean and deviation of its input in 0..1."""
        file = Path(weights, "preprocessor_config.json")
        told = json.loads(file.read_text()) if file.is_file() else {}
        size = getattr(self.network.config, "image_size", 224)
        return size, told.get("image_mean", IMAGENET_MEAN), told.get("image_std", IMAGENET_STD)

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Return features (N, F) of RGB or grey pixels (N, C, H, W)."""
        pixels = _to_rgb(pixels).to(self.device, torch.float32)
        pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        options = {}
        if self.network.config.model_type == "vit_mae":  # masks nothing, in the order of the patches
            patches = (self.size // self.network.config.patch_size) ** 2
            options["noise"] = torch.arange(patches, device=self.device).float().expand(len(pixels), -1)
        found = self.network((pixels - self.mean) / self.std, **options)
        return (found.pooler_output if self.pooled else found.last_hidden_state[:, 0]).double(), None


def _load_image_model(folder: str) -> tuple[nn.Module, bool]:
    """Return the model of a transformers folder, and whether its pooled output was trained.

    Of CLIP and its kin it is the vision part. Raises ValueError where it cannot be loaded whole.
    """
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # torch, safetensors and the hub have their own
        raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())}") from error
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    if missing:
        raise ValueError(f"{folder}: its weights lack {sorted(missing)[0]}")
    model = getattr(model, "vision_model", model)
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
    return model, model.config.model_type != "vit_mae" and not info["missing_keys"]


class DinoV2(ImageModel):
    """DINOv2 ViT-L/14, the normalised class token (1024 features), by transformers, for FD-DINOv2 (Stein et
    al. 2023). Images are resized to 224x224 pixels, bicubic with antialiasing.
    """

    name = "dinov2-vitl14"

    def __init__(self, weights: str | None = None, device: Device = "cpu") -> None:
        super().__init__(weights or _fetched("facebook/dinov2-large"), device)

    def preprocessing(self, weights: str) -> tuple[int, Sequence[float], Sequence[float]]:
        """Return size, mean and deviation of the published distances, whatever the folder says."""
        return 224, IMAGENET_MEAN, IMAGENET_STD


def _fetched(model: str) -> str:
    """Return the folder of a hub's model, fetched if needed. Raises FileNotFoundError."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # the hub and its client have their own
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{model} could not be read or fetched: {reason}") from error


# ---------------------------------------------------------------- pixels


class Pixels(FeatureExtractor):
    """The pixels themselves, divided by 32, of small images; first averaged over squares `pool` wide."""

    name = "pixels"
    has_logits = False

    def __init__(self, shape: tuple[int, int, int], pool: int = 1, device: Device = "cpu") -> None:
        """Take images of `shape` (C, H, W). Raises ValueError where squares of `pool` do not divide them."""
        channels, height, width = self.shape = shape
        self.pool, self.device = pool, torch.device(device)
        self.num_features = channels * (height // pool) * (width // pool)
        if height % pool or width % pool or self.num_features > MAX_PIXELS:
            raise ValueError(
                f"pixels: squares of {pool} must divide images of {height}x{width} pixels and leave at most "
                f"{MAX_PIXELS} features"
            )

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Return features (N, C H W / pool^2) of pixels (N, C, H, W)."""
        return F.avg_pool2d(pixels.to(self.device, torch.float64), self.pool).flatten(1) / 32, None


# ---------------------------------------------------------------- what they have in common


def _to_rgb(pixels: Tensor) -> Tensor:
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"expected images (N, 1 or 3, H, W), got {tuple(pixels.shape)}")
    return pixels.expand(-1, 3, -1, -1)


EXTRACTORS: dict[str, Callable[[str | None, Device], FeatureExtractor]] = {
    "inception-2015": Inception2015,
    "dinov2-vitl14": DinoV2,
    "image-model": ImageModel,
    "classifier": SmallImageClassifier.load,
}


# ---------------------------------------------------------------- a set of images


class FeatureSet:
    """Features of one set of images; every rank adds its share, and all ranks get the same results.

    Memory grows with the number of images only for what `keep` names beside moments: `features`, `logits`.
    """

    def __init__(self, extractor: FeatureExtractor, keep: Collection[str] = ()) -> None:
        self.extractor = extractor
        self._moments = FeatureMoments(extractor.num_features).to(extractor.device)
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in keep}
        self._matches = torch.zeros(1, dtype=torch.int64, device=extractor.device)

    def add(self, images: Tensor, index: Tensor, labels: Tensor | None = None) -> None:
        """Add uint8 images (B, C, H, W); index: their places in the set, int64 (B,); labels: as asked."""
        features, logits = self.extractor.features_and_logits(images)
        self._moments.update(features)
        for name, kept in self._kept.items():
            kept.append((index, {"features": features, "logits": logits}[name].cpu()))
        if labels is not None and logits is not None:
            self._matches += (logits.argmax(1) == labels.to(logits.device)).sum()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (F,) and covariance (F, F) over all ranks."""
        return self._moments.compute()

    def rows(self, name: str) -> Tensor:
        """Return the kept `features` (N, F) or `logits` (N, K) of all ranks, in the order of the index."""
        gathered = [pair for part in dist.all_gather_object(self._kept[name]) for pair in part]
        index, rows = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        return rows[index.argsort()]

    def matches(self) -> int:
        """Return how many images are, by the extractor's own classifier, of the class that was asked for."""
        total = self._matches.clone()
        dist.all_reduce(total)
        return int(total)
