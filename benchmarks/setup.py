"""Compiles rate.c beside itself (make bench): cd benchmarks && python setup.py -q build_ext --inplace."""

from setuptools import Extension, setup

FLAGS = {"avx512": ["-mavx512f", "-mfma"], "avx2": ["-mavx2", "-mfma"]}

setup(
    name="rate",
    py_modules=[],
    ext_modules=[
        Extension(
            f"rate_{name}",
            ["rate.c"],
            extra_compile_args=["-O3", "-fopenmp", *flags],
            extra_link_args=["-fopenmp"],
            optional=True,  # without it the limit is torch's matrix product
        )
        for name, flags in FLAGS.items()
    ],
)
