"""Package metadata of mmlm; the settings of the tools are in pyproject.toml.

Versions here are the ranges the code is written for. The exact set that is tested is in
constraints.txt, and tools/environment.sh installs it.
"""

from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    # 2.7 is the first that tells where a file has its tensors; the upper bound is the newest tried.
    "torch>=2.7,<2.14",
    # Exact: mmlm/parallel/cpu_backend.py names lines of this version and refuses others.
    "megatron-core==0.16.1",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pillow>=10.1",
    # megatron-core's checkpoint writers need psutil without declaring it: a save hangs without.
    "psutil>=5.9",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2.0",
    "tensorboard>=2.15",
    "tqdm>=4.66",
]

# NVIDIA's apex is used where it is importable, and is never a requirement: the package of that
# name on PyPI is an unrelated project. The bounds of transformer-engine are megatron-core's.
GPU = [
    "flash-attn>=2.8,<3",
    "transformer-engine[pytorch]>=2.9,<2.12",
]

# What `mmlm data prepare` needs to download and to read parquet files.
DATA = [
    # The command `hf` is new in 0.34.
    "huggingface_hub>=0.34",
    "pyarrow>=15",
]

DEV = [
    *DATA,
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "mypy>=1.13",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.8",
    # Only tests use it: the decoder is compared with its Llama.
    "transformers>=4.45,<5",
]

setup(
    name="mmlm",
    version="0.1.0",
    description="3D-parallel training of InternVL-Chat-V1-2 on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mmlm", "mmlm.*"]),
    install_requires=RUNTIME,
    extras_require={"data": DATA, "gpu": GPU, "dev": DEV},
    entry_points={"console_scripts": ["mmlm = mmlm.cli:main"]},
)
