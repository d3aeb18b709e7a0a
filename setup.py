"""The one part that is compiled, where a compiler and libjpeg-turbo's headers are: everything else stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aplantida_dist.data._jpeg_region",
            ["aplantida_dist/data/_jpeg_region.c"],
            libraries=["jpeg"],
            py_limited_api=True,
            optional=True,  # data/region.py decodes the same pixels without it, only slower
        )
    ]
)
