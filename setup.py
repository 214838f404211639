"""Packages: vold (the trainer) and vold_kernels (the fused heads in kernels/vold_kernels, usable in any trainer).

kernels/ has no __init__.py on purpose: Hugging Face ships a package called `kernels`, and transformers looks for
it; a regular package of that name on sys.path would shadow it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vold", "vold.*"]), *find_packages("kernels")],
    package_dir={"vold_kernels": "kernels/vold_kernels"},
    package_data={
        "vold": [
            "py.typed",
            "**/*.jinja",
            "**/*.css",
            "report/*.yaml",
            "miniature/configs/*.yaml",
            "miniature/configs/methods/*.yaml",
            "miniature/science/parts/*.yaml",
        ],
        "vold_kernels": ["py.typed"],
    },
)
