"""What randwire_d2 is made of and what it needs: the one list of its requirements."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Detectron2 is needed but can't be listed: it is not on PyPI under its own name, and it must be
# built against the torch that is already installed. tools/install.py sees to both.
INSTALL_REQUIRES = [
    "torch>=2.9",  # 2.8 can't export for variable image sizes; its Triton can't be interpreted
    "torchvision>=0.24",  # the partner of torch 2.9
    "fvcore>=0.1.5.post20221221,<0.1.6",  # the upper bounds are Detectron2's
    "iopath>=0.1.7,<0.1.10",
    "matplotlib>=3.7",
    "networkx>=2.8",
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
    "opencv": ["opencv-python-headless>=4.6.0.66"],
    # For tools/export_model.py, where it writes .onnx, and tools/predict.py, where it runs one.
    "export": ["onnx>=1.16", "onnxruntime>=1.19"],
    # For tools/predict.py, which takes it where it is faster, and tools/benchmark.py --runtimes.
    "openvino": ["openvino>=2025.0"],
    # For MODEL.WEIGHTS hf://… and from_pretrained("owner/name").
    "hub": ["huggingface_hub>=0.23", "safetensors>=0.4"],
    # For tools/make_shards.py; what it writes is read without it.
    "shards": ["webdataset>=1.0.2"],
    # For save_pretrained, and tools/convert_checkpoint.py where it reads or writes .safetensors.
    "safetensors": ["safetensors>=0.4"],
    "test": [
        "huggingface_hub>=0.23",
        "hypothesis>=6.80",
        "mypy>=1.11",
        "onnx>=1.16",
        "onnxruntime>=1.19",
        "openvino>=2025.0",
        "pytest>=7.4",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.0.2",
        "ruff~=0.17.6",  # another minor version formats differently
        "safetensors>=0.4",
        "webdataset>=1.0.2",
    ],
}

setup(
    name="randwire_d2",
    version=re.findall(r'__version__ = "(.+)"', (ROOT / "randwire_d2/__init__.py").read_text())[0],
    description="Randomly wired neural networks as a Detectron2 backbone",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="randwire_d2 authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="detectron2 randomly-wired-networks object-detection neural-architecture",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=[
        *find_packages(include=["randwire_d2", "randwire_d2.*"]),
        "randwire_d2.configs",
        "randwire_d2_command",
    ],
    package_dir={
        "randwire_d2.configs": "configs",  # randwire_d2.get_config_file finds them
        "randwire_d2_command": "randwire_d2/command",  # which says why it has a second name
    },
    package_data={
        "": ["py.typed", "*.cpp", "*.cu", "*.h"],
        "randwire_d2.configs": ["**/*.yaml", "**/*.py"],
    },
    entry_points={"console_scripts": ["randwire-d2 = randwire_d2_command:main"]},
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
