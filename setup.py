"""Packages: vold (the trainer) and vold_kernels (the folder kernels/, usable in anybody's trainer).

kernels/ has no __init__.py on purpose: Hugging Face ships a package called `kernels`, and transformers looks for
it; a regular package of that name on sys.path would shadow it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vold", "vold.*"]), "vold_kernels"],
    package_dir={"vold_kernels": "kernels"},
    package_data={"vold": ["**/*.jinja", "**/*.html", "**/*.css"]},
)
