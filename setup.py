"""Packaging of Terminal Velocity: metadata, dependencies, extras, and the YAMLs that come along.

The build system and the tools' settings are in pyproject.toml, exact versions in constraints.txt.
"""

from pathlib import Path

from setuptools import setup

PACKAGES = ["storage", "kernels", "recipe", "recipe.objectives", "streaming_convert", "eval", "benchmarks"]

INSTALL_REQUIRES = [
    "numpy>=2",
    "torch>=2.7",
    "triton>=3.3; platform_system == 'Linux'",
    "mosaicml>=0.32.1,<0.33",
    "mosaicml-streaming>=0.13,<0.14",
    "omegaconf>=2.3,<3",
    "pydantic>=2.10,<3",
    "wandb>=0.18,<0.19",
    "torchmetrics>=1.7,<2",
    "torch-fidelity>=0.4,<0.5",
    "oci-cli",
    "safetensors>=0.4",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "matplotlib>=3.8",
    "pillow>=10.3",
    "xxhash>=3",
    "tqdm>=4.66",
]

EXTRAS = {
    "vae": ["diffusers>=0.30,<0.40", "accelerate>=1,<2"],
    "text": ["transformers>=4.56,<5"],
    "data": ["pyarrow>=15"],
    "lora": ["peft>=0.17,<0.22"],  # to use a run's adapter elsewhere; training needs none
    # pip takes 6.17 beside transformers 4, since later ones want a newer huggingface_hub
    "app": ["gradio>=6,<7"],
    # Older runtimes know no cosine of float64, and newer ones no Python 3.10
    "onnx": ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.32; python_version >= '3.11'"],
}
EXTRAS["dev"] = [
    *EXTRAS["text"],
    *EXTRAS["vae"],
    *EXTRAS["data"],
    *EXTRAS["onnx"],
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "moto[server]>=5",
    "ruff>=0.8",
]

setup(
    name="terminal-velocity",
    version="0.1.0",
    description="Train one-step image generators at scale with Terminal Velocity Matching",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    # The YAMLs are installed inside recipe/, where recipe.commands.YAMLS finds them.
    packages=[*PACKAGES, "recipe.yamls"],
    package_dir={"recipe.yamls": "yamls"},
    package_data={"recipe.yamls": ["*.yaml", "*.json", "eval/*", "launch/*"]},
)
