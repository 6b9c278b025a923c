"""Package metadata. The stage folders stand at the top level and are installed as `autoseg.<stage>`."""

from pathlib import Path

from setuptools import setup

STAGES = ("experiment_planning", "preprocessing", "training", "inference")

# what one option needs and nothing else does; the tests of Ray, which starts slowly, are for those who install it
OPTIONAL = {
    "mlflow": ["alembic>=1.13", "mlflow-skinny>=3.13", "sqlalchemy>=2.0"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "torch>=2.13"],
    "ray": ["ray>=2.40"],
    "tensorboard": ["tensorboard>=2.16"],
}

setup(
    name="autoseg",
    version="0.1.0",
    description="Self-configuring segmentation of medical images: a folder of labelled images in, a model out.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["autoseg", "autoseg.networks", *(f"autoseg.{stage}" for stage in STAGES)],
    package_dir={"autoseg": "autoseg", **{f"autoseg.{stage}": stage for stage in STAGES}},
    package_data={"autoseg": ["py.typed"]},
    install_requires=[
        "acvl-utils>=0.2",
        "batchgenerators>=0.25",
        "batchgeneratorsv2>=0.3",
        "blosc2>=3.0",
        "connected-components-3d>=3.12",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "SimpleITK>=2.3",
        "torch>=2.4",
        "typer>=0.12",
    ],
    extras_require={
        **OPTIONAL,
        "test": [
            "hypothesis>=6",
            "pytest>=8",
            "pytest-timeout>=2",
            *(name for option in ("mlflow", "onnx", "tensorboard") for name in OPTIONAL[option]),
        ],
        "benchmarks": ["psutil>=5.9"],
        "dev": ["mypy>=1.10", "ruff>=0.6"],
    },
    entry_points={"console_scripts": ["autoseg=autoseg.cli:main"]},
)
