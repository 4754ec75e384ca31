"""The two optional extension modules; all else is in pyproject.toml.

Without a C compiler the package installs and runs all the same (`shardproof doctor` says what is
missing). They use Python's stable ABI, so that one wheel serves every Python from 3.11 on.
"""

from pathlib import Path

from setuptools import Extension, setup

# No fused multiply-add where C does not say so: the bits of a sum are what this project is about.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


def extension(name: str) -> Extension:
    """The module `shardproof._name`, from the C files of its folder."""
    folder = Path("csrc", name)
    return Extension(
        f"shardproof._{name}",
        sources=sorted(map(str, folder.glob("*.c"))),
        depends=sorted(map(str, folder.glob("*.[hi]*"))),
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[extension("kernels"), extension("shm")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
