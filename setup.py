"""Builds `densenet_fast._C` (schemas, CPU kernels) and `densenet_fast._cuda` (CUDA kernels).

`_cuda` is built where torch has CUDA and a toolkit is found, see setup_cuda.py. In the environment
DENSENET_FAST_CUDA=0 leaves it out, DENSENET_FAST_CUDA=1 makes leaving it out an error, and
DENSENET_FAST_CUDA=all does so too and compiles for every architecture.

Everything is compiled against the LibTorch Stable ABI, so that one binary runs under every torch
from TORCH_TARGET on, whichever torch it was built with. Everything else about the package is in
pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look here
import setup_cuda  # noqa: E402

TORCH_TARGET = "0x020a000000000000"  # 2.10

Compile = Callable[..., list[str]]  # sources and options -> object files

BOTH_AT_ONCE = 8  # compiler processes with which the modules are compiled beside each other

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags ask for debug information: it would make the module 20 times larger
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # Multiplications and additions may fuse and nobody reads errno or floating-point traps. Nothing
    # else is relaxed: NaN, infinities and the order of summation keep their meaning.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]

# Instruction sets, each compiled from csrc/cpu/isa_<name>.cpp with flags of its own and chosen at
# run time. "baseline" needs no flags and is always there.
ISA_FLAGS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
            "-mprefer-vector-width=512",
        ],
        "avx2": ["-mavx2", "-mfma"],
        "baseline": [],
    },
    "aarch64": {"neon": [], "baseline": []},
}


def compiler_processes() -> int:
    """As many as MAX_JOBS allows, or processors."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def isa_flags() -> dict[str, list[str]]:
    """Instruction sets to compile for this machine and the compiler flags each of them needs."""
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return ISA_FLAGS.get(machine, {"baseline": []})


def sources() -> list[str]:
    """All C++ files of the module, without the instruction sets of other machines."""
    files = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    wanted = {f"isa_{isa}" for isa in isa_flags()}
    kept = (f for f in files if not f.stem.startswith("isa_") or f.stem in wanted)
    return sorted(str(f.relative_to(ROOT)) for f in kept)


def headers() -> list[str]:
    """What the sources include: setuptools builds again when one of them changed."""
    files = [*ROOT.glob("csrc/*"), *ROOT.glob("csrc/cpu/*")]
    return sorted(str(f.relative_to(ROOT)) for f in files if f.suffix in {".h", ".inc"})


def flags_by_source() -> dict[str, list[str]]:
    """Flags of single files, by stem. They extend CXX_FLAGS."""
    fingerprints = runpy.run_path(str(ROOT / "densenet_fast" / "operators" / "fingerprint.py"))
    fingerprint = fingerprints["fingerprint"]
    # Only module.cpp sees what changes with every edit and every torch: the rest stays up to date.
    module = [
        f'-DDENSENET_FAST_FINGERPRINT="{fingerprint(ROOT)}"',
        f'-DDENSENET_FAST_BUILT_WITH_TORCH="{torch.__version__}"',
        f'-DDENSENET_FAST_CUDA_MISSING="{_literal(CUDA.missing)}"',
    ]
    cuda_module = []
    if CUDA.toolkit is not None:
        cuda_fingerprint = fingerprint(ROOT, fingerprints["CUDA_FOLDERS"])
        cuda_module = [
            f'-DDENSENET_FAST_FINGERPRINT="{cuda_fingerprint}"',
            f'-DDENSENET_FAST_CUDA_ARCHITECTURES="{";".join(map(str, CUDA.architectures))}"',
            f'-DDENSENET_FAST_CUDA_REASON="{_literal(CUDA.reason)}"',
            f'-DDENSENET_FAST_NVCC="{CUDA.toolkit.version}"',
        ]
    return {
        "module": module,
        "cuda_module": cuda_module,
        # Vectors of statistics get the bits that PyTorch's operators would give them.
        "dispatch": ["-ffp-contract=off"],
        **{f"isa_{isa}": flags for isa, flags in isa_flags().items()},
    }


def _literal(text: str) -> str:
    """`text` for a C string on a command line: without what compiler or shell might read."""
    return "".join(
        c if c.isascii() and c.isprintable() and c not in '"\\$`%' else " " for c in text
    )


class Cuda:
    """Whether there will be CUDA kernels, and what they need; otherwise why not."""

    def __init__(self) -> None:
        """Look for the toolkit, unless the environment forbids it."""
        self.toolkit: setup_cuda.Toolkit | None = None
        self.architectures: tuple[setup_cuda.Architecture, ...] = ()
        self.reason = ""  # why these
        self.missing = ""
        try:
            self.wanted = setup_cuda.setting(os.environ)
            if self.wanted == "0":
                self.give_up("DENSENET_FAST_CUDA=0 was set")
                return
            if torch.version.cuda is None:
                raise setup_cuda.CudaMissingError(
                    f"torch {torch.__version__} is built without CUDA"
                )
            toolkit = setup_cuda.find_toolkit(os.environ)
            choice = setup_cuda.choose(os.environ, toolkit)
            self.architectures, self.reason = choice.architectures, choice.reason
            self.toolkit = toolkit
        except setup_cuda.BadSettingError as error:
            raise SystemExit(f"densenet_fast: {error}") from error
        except setup_cuda.CudaMissingError as error:
            self.give_up(str(error))

    def give_up(self, reason: str) -> None:
        """Go on without CUDA kernels, or not at all where they are a must."""
        if self.wanted not in ("", "0"):
            raise SystemExit(
                "densenet_fast: no CUDA kernels, which "
                f"DENSENET_FAST_CUDA={self.wanted} demands: {reason}"
            )
        self.toolkit, self.missing = None, reason

    def announce(self) -> None:
        """Say what is being built (pip shows it with -v)."""
        if self.toolkit is None:
            print(f"densenet_fast: no CUDA kernels: {self.missing}")
            return
        names = " ".join(map(str, self.architectures))
        print(
            f"densenet_fast: CUDA kernels for {names} ({self.reason}) "
            f"with nvcc {self.toolkit.version}"
        )
        if self.toolkit.version.split(".")[0] != str(torch.version.cuda).split(".")[0]:
            print(
                f"densenet_fast: torch has CUDA {torch.version.cuda}; the kernels bring a runtime "
                f"of their own and need a driver for CUDA {self.toolkit.version.split('.')[0]}"
            )


CUDA = Cuda()


class BuildPerFile(BuildExtension):
    """BuildExtension in which some files have compiler flags of their own.

    Files with own flags are compiled in directories of their own, each by its own (ninja or plain)
    run, since one run has one set of flags. Incremental builds follow headers as usual with ninja.
    """

    def build_extensions(self) -> None:
        CUDA.announce()
        with ThreadPoolExecutor(1) as pool:
            self.kernels = pool.submit(self._compile_kernels)
            if compiler_processes() < BOTH_AT_ONCE:
                self.kernels.result()
            super().build_extensions()

    def _compile_kernels(self) -> None:
        for ext in [e for e in self.extensions if e.name == "densenet_fast._cuda"]:
            assert CUDA.toolkit is not None
            directory = Path(self.build_temp).resolve() / "cuda_kernels"
            try:
                ext.extra_objects = setup_cuda.compile_kernels(
                    CUDA.toolkit, CUDA.architectures, ROOT, directory, compiler_processes()
                )
            except setup_cuda.CudaMissingError as error:
                CUDA.give_up(str(error))
                CUDA.announce()
                self.extensions.remove(ext)

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "densenet_fast._cuda":
            self.kernels.result()
        compile_group = self.compiler.compile
        self.compiler.compile = self._compile_per_file(compile_group)
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_group

    def _compile_per_file(self, compile_group: Compile) -> Compile:
        stems = flags_by_source().keys()
        # torch's ninja-less path swaps attributes of the shared compiler object: one thread then.
        jobs = compiler_processes() if self.use_ninja else 1

        def compile_all(sources: list[str], output_dir: str, **options: Any) -> list[str]:
            common = options.pop("extra_postargs")

            def compile_one(source: str) -> list[str]:
                stem = Path(source).stem
                if stem == "module":  # it says why there are no kernels
                    self.kernels.result()
                own = flags_by_source()[stem]
                flags = {lang: args + own for lang, args in common.items()}
                directory = os.path.join(output_dir, stem)
                return compile_group([source], directory, extra_postargs=flags, **options)

            special = [s for s in sources if Path(s).stem in stems]
            plain = [s for s in sources if s not in special]
            objects: list[str] = []
            if plain:  # ninja refuses to compile nothing
                objects += compile_group(plain, output_dir, extra_postargs=common, **options)
            with ThreadPoolExecutor(jobs) as pool:
                for compiled in pool.map(compile_one, special):
                    objects += compiled
            return objects

        return compile_all


def cuda_extension(toolkit: setup_cuda.Toolkit) -> Extension:
    """The dispatch on CUDA tensors; the kernels' objects are added when they are compiled."""
    ext = CppExtension(
        "densenet_fast._cuda",
        sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/cuda/*.cpp")),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), str(toolkit.root / "include")],
        library_dirs=[str(toolkit.library_dir)],
        define_macros=[("USE_CUDA", "1")],
        extra_compile_args={"cxx": CXX_FLAGS},
        # No symbols, and none of the static runtime for others to see.
        extra_link_args=["-s", "-Wl,--exclude-libs,ALL"],
        depends=sorted(
            str(f.relative_to(ROOT)) for f in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")]
        ),
    )
    ext.libraries = ["torch_cuda", "torch_cpu", "cudart_static", "dl", "rt", "pthread"]
    return ext


def extension() -> Extension:
    macros = [(f"DENSENET_FAST_HAVE_{isa.upper()}", "1") for isa in isa_flags()]
    ext = CppExtension(
        "densenet_fast._C",
        sources(),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=headers(),
    )
    # The stable C interface is all the module uses of torch.
    ext.libraries = ["torch_cpu"]
    return ext


if os.name == "nt":
    raise SystemExit(
        "densenet_fast builds with GCC or Clang on Linux and macOS; on Windows use it inside WSL."
    )

extensions = [extension()]
if CUDA.toolkit is not None:
    extensions.append(cuda_extension(CUDA.toolkit))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildPerFile})
