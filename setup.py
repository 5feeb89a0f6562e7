from setuptools import find_packages, setup

setup(
    name="consistency-toolkit",
    version="0.1.0",
    description="Train, distil, sample, edit and evaluate diffusion and consistency models, launched with MPI.",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["cm", "cm.*", "evaluations", "evaluations.*"]),
    package_data={"cm.report": ["assets/*"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "pillow>=10",
        "tqdm>=4.60",
        "blobfile>=2.0.5",
        "pyyaml>=6",
        "piq>=0.8",
        "torchvision>=0.15",
    ],
    extras_require={
        "mpi": ["mpi4py>=4", "mpich>=4"],
        "demo": ["scikit-learn>=1.3"],
        "lsun": ["lmdb>=1.3"],
        "tf": ["tensorflow>=2.16"],
        "test": [
            "consistency-toolkit[lsun,tf]", "diffusers>=0.30", "hypothesis>=6", "pytest>=8", "pytest-xdist>=3",
            "ruff>=0.6",
        ],
        "tensorboard": ["tensorboard>=2.15"],
    },
)
