"""Installs Terminal Velocity from a checkout: `pip install -e . -c constraints.txt`."""

from setuptools import setup

setup(
    name="terminal-velocity",
    version="0.1.0",
    description="Train one-step image generators at scale with Terminal Velocity Matching",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=["storage", "recipe", "kernels", "streaming_convert", "eval", "benchmarks"],
    install_requires=[
        "numpy>=2",
        "torch>=2.7",
        "torchvision",
        "triton>=3.3; platform_system == 'Linux'",
        "mosaicml>=0.32.1,<0.33",
        "mosaicml-streaming>=0.13,<0.14",
        "omegaconf>=2.3,<3",
        "wandb>=0.18,<0.19",
        "torchmetrics>=1.7,<2",
        "torch-fidelity>=0.4,<0.5",
        "oci-cli",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "pillow>=10.1",
        "xxhash>=3",
        "tqdm>=4.66",
    ],
    extras_require={
        "vae": ["diffusers>=0.30,<0.40", "accelerate>=1,<2"],
        "text": ["transformers>=4.56,<5"],
        "dev": [
            "transformers>=4.56,<5",
            "diffusers>=0.30,<0.40",
            "accelerate>=1,<2",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "moto[server]>=5",
            "ruff>=0.8",
        ],
    },
)
