"""What randwire_d2 is made of and what it needs: the one list of its requirements."""

from setuptools import find_packages, setup

# Detectron2 is needed but can't be listed: it is not on PyPI under its own name, and it must be
# built against the torch that is already installed. tools/install.py sees to both.
INSTALL_REQUIRES = [
    "torch>=2.7",  # the first with torch.compiler.is_exporting
    "torchvision>=0.22",  # the partner of torch 2.7
    "fvcore>=0.1.5,<0.1.6",  # Detectron2's own bounds for fvcore and iopath
    "iopath>=0.1.7,<0.1.10",
    "matplotlib>=3.5",
    "networkx>=3.0",
    "numpy>=1.23",
    "pillow>=9.1",
    "pycocotools>=2.0.6",
    "shapely>=2.0",
    "submitit>=1.5",
    "tabulate>=0.9",
    "termcolor>=1.1",
    "tqdm>=4.60",
]

EXTRAS_REQUIRE = {
    # Detectron2's Visualizer needs some build of OpenCV. An extra, because this one would
    # overwrite the files of another: tools/install.py asks for it where `cv2` is missing.
    "opencv": ["opencv-python-headless>=4.6"],
    # For MODEL.WEIGHTS hf://… and from_pretrained("owner/name").
    "hub": ["huggingface_hub>=0.23", "safetensors>=0.4"],
    # For save_pretrained, and tools/convert_checkpoint.py where it reads or writes .safetensors.
    "safetensors": ["safetensors>=0.4"],
    "test": [
        "huggingface_hub>=0.23",
        "hypothesis>=6.80",
        "mypy>=1.11",
        "pytest>=7.4",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.0",
        "ruff~=0.17.6",  # another minor version formats differently
        "safetensors>=0.4",
    ],
}

setup(
    name="randwire_d2",
    version="0.1.0",
    description="Randomly wired neural networks as a Detectron2 backbone",
    author="randwire_d2 authors",
    license="Apache-2.0",
    packages=find_packages(include=["randwire_d2", "randwire_d2.*"]),
    package_data={"randwire_d2.ops": ["*.cpp", "*.h"]},  # compiled where it runs
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
