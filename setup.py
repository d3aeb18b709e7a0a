"""The one part that is compiled, where a compiler and libjpeg-turbo's headers are: everything else stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aplantida_dist.data._jpeg_region",
            ["aplantida_dist/data/_jpeg_region.c"],
            libraries=["jpeg"],
            extra_compile_args=["-O2"],
            py_limited_api=True,
            optional=True,  # data/jpeg_region.py decodes the same pixels without it, only slower
        )
    ]
)
