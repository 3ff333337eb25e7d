"""Packaging: the rooms lie at the top level of the repository and are imported as ``rewire.<room>``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "rewire/__init__.py").read_text(), re.M).group(1)

# every package (a folder with Python in it) of every room; `rewire/demo` and `hparams` are data
PACKAGES = {
    "rewire": "rewire",
    "rewire.engine": "engine",
    "rewire.engine.datasets": "engine/datasets",
    "rewire.engine.editors": "engine/editors",
    "rewire.engine.evaluation": "engine/evaluation",
    "rewire.engine.experiment": "engine/experiment",
    "rewire.engine.judges": "engine/judges",
    "rewire.engine.page": "engine/page",
    "rewire.kernels": "kernels",
    "rewire.kernels.delta_linear": "kernels/delta_linear",
    "rewire.kernels.gather_mean": "kernels/gather_mean",
    "rewire.kernels.gram": "kernels/gram",
    "rewire.kernels.requantize_add": "kernels/requantize_add",
    "rewire.kernels.spd_solve": "kernels/spd_solve",
    "rewire.kernels.target_nll": "kernels/target_nll",
    "rewire.stats": "stats",
    "rewire.cli": "cli",
    "rewire.bench": "bench",
    "rewire.bench.operations": "bench/operations",
    "rewire.hparams": "hparams",
}

LINUX = 'sys_platform == "linux"'

setup(
    name="rewire",
    version=VERSION,
    description="Edit facts in large language models, fast",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "rewire": ["py.typed", "demo/*"],
        "rewire.engine.page": ["*.html", "*.css", "*.js"],
        "rewire.hparams": ["models.yaml", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        f"triton>=3.6; {LINUX}",
        "transformers>=5",
        "accelerate>=1",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "pydantic>=2.8",
        "pyyaml>=6",
        "jinja2>=3",
        "typer>=0.15",
        "rich>=13",
        "psutil>=5.9",
        f"bitsandbytes>=0.46; {LINUX}",
    ],
    extras_require={
        "corpora": ["datasets>=3", "pyarrow>=15"],
        "eval": ["lm-eval>=0.4.13", "scikit-learn>=1.4"],
        "judge": ["openai>=1"],
        "plot": ["matplotlib>=3.8"],
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "matplotlib>=3.8",
            "openai>=1",
            "pyarrow>=15",
            "scikit-learn>=1.4",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["rewire = rewire.cli:main"]},
)
