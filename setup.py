from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
init = (here / "block_recurrent_transformer_pytorch" / "__init__.py").read_text(encoding="utf-8")
version = next(line.split('"')[1] for line in init.splitlines() if line.startswith("__version__"))
train = [line for line in (here / "requirements.txt").read_text(encoding="utf-8").split() if not line.startswith("#")]

setup(
    name="block-recurrent-transformer-pytorch",
    version=version,
    description="The Block-Recurrent Transformer in PyTorch: reads a stream in any pieces, at a flat cost per token",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["block_recurrent_transformer_pytorch*"]),
    package_data={"block_recurrent_transformer_pytorch": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5", "einops>=0.8", "beartype>=0.18", "packaging>=21", "tqdm>=4.60", "numpy>=1.24", "safetensors>=0.4",
    ],
    extras_require={
        "train": [*train, "matplotlib>=3.7", "tokenizers>=0.15"],
        "test": [*train, "pytest>=8", "hypothesis>=6.100"],
        "transformers": ["transformers>=5.23", "accelerate>=1.10"],
        "lm-eval": ["lm_eval>=0.4.13"],
        "peft": ["peft>=0.21"],
        "quantization": ["torchao>=0.18"],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo>=2024.8.6"],
        "check": ["ruff>=0.8", "mypy>=1.13"],
    },
    entry_points={
        "console_scripts": [
            f"brt-{name} = block_recurrent_transformer_pytorch.commands.{name}:main"
            for name in ("train", "evaluate", "generate")
        ],
        "lm_eval.models": ["block-recurrent = block_recurrent_transformer_pytorch.adapters.lm_eval:BlockRecurrentLM"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
