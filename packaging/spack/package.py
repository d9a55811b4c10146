"""fedhpc for Spack: docs/containers.md."""

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyFedhpc(PythonPackage):
    """Federated prompt tuning of large language models over MPI."""

    license("MIT")

    version("0.1.0")

    variant("data", default=True, description="Fetch data sets from the Hugging Face hub")

    depends_on("c", type="build")
    depends_on("py-setuptools", type="build")

    with default_args(type=("build", "run")):
        depends_on("python@3.11:")
        depends_on("py-mpi4py@4.1:")
        depends_on("py-torch@2.10:")
        depends_on("py-transformers@5.0:")
        depends_on("py-h5py@3.14:")
        depends_on("py-jinja2@3.1:")
        depends_on("py-numpy@2.0:")
        depends_on("py-pydantic@2.10:")
        depends_on("py-pyyaml@6.0:")
        depends_on("py-safetensors@0.5:")
        depends_on("py-shtab@1.13:")
        depends_on("py-threadpoolctl@3.5:")
        depends_on("py-tqdm@4.66:")
        depends_on("py-datasets@4.0:", when="+data")
