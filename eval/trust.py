"""Whether the features of a classifier can tell good samples from bad; what speaks against it, in sentences.

A classifier can be right about every real image and still look at its colours alone: noise of the right
colours then agrees with its class, and lies near the real images in its features. So it is asked about real
images whose pixels have been shuffled, which keeps all colours and nothing else.
"""

import torch
from torch import Tensor

from recipe.features import SmallImageClassifier

PROBED = 1000  # real images at most, drawn at random
FEWEST_PER_FEATURE, FEWEST_PER_CLASS = 5, 10
TOO_MUCH = 0.5  # of what separates the worst case from the best


def doubts(classifier: SmallImageClassifier, images: Tensor, labels: Tensor, total: int) -> list[str]:
    """Return the reasons not to trust the classifier, in sentences; none if nothing speaks against it.

    images: real ones, uint8 (N, C, S, S); labels: (N,); total: how many there are in the whole reference.
    """
    counts = labels.bincount()
    counts = counts[counts > 0]
    if len(counts) < 2:
        return ["The reference has one class only, so the classifier has learned nothing."]
    found, features = [], classifier.num_features
    if total < FEWEST_PER_FEATURE * features:
        found.append(f"{total} real images are few for {features} features: distances are mostly chance.")
    if (smallest := round(int(counts.min()) * total / len(labels))) < FEWEST_PER_CLASS:
        found.append(f"The smallest class has about {smallest} real images, too few to learn from.")
    guess = float(counts.max()) / len(labels)  # right by naming the largest class always
    if _share(classifier.accuracy, guess, 1.0) < TOO_MUCH:
        found.append(
            f"The classifier is right about {classifier.accuracy:.3f} of the real images that it has not "
            f"seen; to name the largest class always is right about {guess:.3f}."
        )
    strangers, chance = _strangers(classifier(images).cpu(), labels)
    if strangers > TOO_MUCH * chance:
        found.append(
            f"For {strangers:.3f} of the real images the nearest other one is of another class; by chance it "
            f"would be {chance:.3f}."
        )
    right = float((classifier.logits(shuffled(images)).argmax(1).cpu() == labels).double().mean())
    if _share(right, guess, classifier.accuracy) > TOO_MUCH:
        found.append(
            f"The classifier names the class of {right:.3f} of the real images from their colours alone, "
            "with their pixels shuffled: noise of the right colours would agree with its class as well."
        )
    return found


def _share(value: float, worst: float, best: float) -> float:
    """Return how far a value is on the way from the worst to the best."""
    return (value - worst) / max(best - worst, 1e-9)


def _strangers(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the share of rows (N, F) whose nearest other has another label (N,), and that by chance."""
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    strangers = float((labels[distances.argmin(1)] != labels).double().mean())
    shares = labels.bincount().double() / len(labels)
    return strangers, 1 - float(shares.square().sum())


def shuffled(images: Tensor, seed: int = 0) -> Tensor:
    """Return the images (N, C, H, W) with the pixels of each in a random order."""
    n, channels, height, width = images.shape
    order = torch.rand(n, 1, height * width, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return images.flatten(2).gather(2, order.expand(-1, channels, -1).to(images.device)).view_as(images)
