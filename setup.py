"""Package description: three top-level packages from three folders, and their optional parts."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "megatron_hydra/__init__.py").read_text(encoding="utf-8")
)
assert VERSION is not None

setup(
    name="megatron-hydra",
    version=VERSION[1],
    description="Turn a pretrained transformer into a head-level hybrid of full and linear "
    "attention, with Megatron and NeMo",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[
        *find_packages(include=["megatron_hydra", "megatron_hydra.*"]),
        *find_packages("kernels", include=["hydra_kernels", "hydra_kernels.*"]),
        *find_packages("tools", include=["hydra_tools", "hydra_tools.*"]),
    ],
    # No package is named `kernels` or `tools`: the first would shadow Hugging Face's.
    package_dir={"hydra_kernels": "kernels/hydra_kernels", "hydra_tools": "tools/hydra_tools"},
    package_data={"megatron_hydra.report": ["templates/*"]},
    install_requires=[
        "torch>=2.6",
        # Tested with 0.16.1: from 0.17 on it needs Python 3.12, and NeMo 2.7.3 cannot import it.
        "megatron-core>=0.16.1,<0.17",
        "numpy<3",
        "scipy>=1.9",
        "safetensors",
        "tokenizers",
        "transformers>=4.57,<5",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "jinja2>=3.1",
        "packaging",
    ],
    extras_require={
        # What its language-model parts import beside its own requirements. nemo-toolkit's extras
        # name these too, but among speech packages.
        "nemo": [
            "nemo-toolkit==2.7.3",
            "lightning==2.4.0",
            "nemo_run",
            "leptonai<0.27",  # what nemo_run imports of it is gone from later ones
            "nvidia-modelopt",
            "nv-one-logger-core",
            "nv-one-logger-pytorch-lightning-integration",
            "nv-one-logger-training-telemetry",
            "datasets",
            "einops",
            "hydra-core",
            "pandas",
            "psutil",
            "sentencepiece",
            "tensorstore",
            "tiktoken",
        ],
        "te": ["transformer-engine[pytorch]>=2.9", "fla-core==0.6.0"],
        "flash-attn": ["flash-attn>=2.7"],
        # fla takes its kernels where they fit: Hopper, bf16, head dimension 128.
        "flash-qla": ["flash-qla==0.1.3", "tilelang==0.1.15"],
        "dev": [
            "hypothesis",
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "mkdocs",
            "types-PyYAML",
            "pre-commit",
        ],
    },
    entry_points={"console_scripts": ["megatron-hydra = hydra_tools.cli:main"]},
)
