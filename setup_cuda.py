"""The CUDA half of the build: finds the toolkit, chooses architectures, compiles csrc/cuda/*.cu.

The kernels need nothing of torch but its caching allocator and streams, so they are compiled by
nvcc directly, from a small ninja file, whatever the CUDA release of the torch at hand. setup.py
links them with csrc/cuda/*.cpp. Nothing here imports torch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# For releases, and where no GPU is visible: binaries run on later devices of their generation, and
# PTX on every newer one.
EVERY_ARCHITECTURE = ("7.5", "8.0+PTX", "8.6", "8.9", "9.0", "10.0", "12.0")
EVERY_GENERATION = ("7.5", "8.0+PTX", "9.0", "10.0", "12.0")
OLDEST = (7, 5)  # the kernels' tensor-core instructions
# What the sources tell apart (`__CUDA_ARCH__`). Translated to PTX once for each of these, and from
# there to the binaries of all newer devices, they take half the time.
SOURCES_KNOW = ((7, 5), (8, 0))
_NAMES = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;12.0",
}

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    # Compressed: a third of the size, unpacked by the driver when a kernel is first used.
    *("-Xfatbin", "-compress-all"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-g0"),
]


class CudaMissingError(Exception):
    """Why there will be no CUDA kernels."""


class BadSettingError(Exception):
    """An environment variable that makes no sense, whatever is installed."""


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit."""

    root: Path
    version: str  # of nvcc, "13.0.88"
    codes: tuple[str, ...]  # what it compiles for, "sm_75", ...

    @property
    def nvcc(self) -> Path:
        """The compiler itself."""
        return self.root / "bin" / "nvcc"

    @property
    def library_dir(self) -> Path:
        """The folder of the static runtime."""
        folders = [self.root / "lib64", self.root / "lib", *self.root.glob("targets/*/lib")]
        for folder in folders:
            if (folder / "libcudart_static.a").is_file():
                return folder
        raise CudaMissingError(f"the CUDA toolkit in {self.root} has no libcudart_static.a")


@dataclass(frozen=True)
class Architecture:
    """A compute capability to compile for."""

    major: int
    minor: int
    suffix: str = ""  # "a", "f": features of this very architecture
    ptx: bool = False  # also as PTX, for devices that are newer

    @property
    def number(self) -> str:
        """As nvcc writes it: 80, 90a."""
        return f"{self.major}{self.minor}{self.suffix}"

    @property
    def virtual(self) -> str:
        """The architecture whose PTX its binary is made from."""
        if self.suffix:
            return self.number
        return "{}{}".format(*max(v for v in SOURCES_KNOW if v <= (self.major, self.minor)))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"


def setting(environment: Mapping[str, str]) -> str:
    """DENSENET_FAST_CUDA: "0" for never, "1" and "all" for must, "" for "if possible"."""
    value = environment.get("DENSENET_FAST_CUDA", "").strip()
    if value not in ("", "0", "1", "all"):
        raise BadSettingError(f"DENSENET_FAST_CUDA should be 0, 1, all or unset, got {value!r}")
    return value


def find_toolkit(environment: Mapping[str, str]) -> Toolkit:
    """The toolkit of CUDA_HOME or CUDA_PATH, of the nvcc on the PATH, or of /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            root = Path(environment[variable])
            if not (root / "bin" / "nvcc").is_file():
                raise CudaMissingError(f"{variable} is {root}, where there is no bin/nvcc")
            return _toolkit(root)
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    if on_path is not None:
        return _toolkit(_root_of(on_path))
    if Path("/usr/local/cuda/bin/nvcc").is_file():
        return _toolkit(Path("/usr/local/cuda"))
    raise CudaMissingError(
        "no CUDA toolkit was found (nvcc is not on the PATH, CUDA_HOME is not set)"
    )


def _output(*command: str) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60, cwd="/"
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CudaMissingError(f"`{' '.join(command)}` fails: {error}") from error
    return result.stdout + result.stderr


def _root_of(nvcc: str) -> Path:
    """The toolkit of an nvcc, which may be a script that calls the real one."""
    for line in _output(nvcc, "--dryrun", "densenet_fast.cu").splitlines():
        if line.startswith("#$ TOP="):
            root = Path(line.removeprefix("#$ TOP=").strip())
            if (root / "bin" / "nvcc").is_file():
                return root.resolve()
    return Path(nvcc).resolve().parents[1]


def _toolkit(root: Path) -> Toolkit:
    nvcc = str(root / "bin" / "nvcc")
    version = re.search(r"\bV(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
    if version is None:
        raise CudaMissingError(f"{nvcc} does not say its version")
    toolkit = Toolkit(root, version[1], tuple(_output(nvcc, "--list-gpu-code").split()))
    assert toolkit.library_dir
    return toolkit


@dataclass(frozen=True)
class Choice:
    """What to compile for, and why that."""

    architectures: tuple[Architecture, ...]
    reason: str  # "for the GPUs that nvidia-smi sees"


def choose(environment: Mapping[str, str], toolkit: Toolkit) -> Choice:
    """The architectures that the environment names; else those of the GPUs here; else for all."""
    listed = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed:
        chosen = _listed(listed)
        # nvcc lists none with a suffix.
        unknown = [str(a) for a in chosen if f"sm_{a.major}{a.minor}" not in toolkit.codes]
        if unknown:
            raise CudaMissingError(
                f"TORCH_CUDA_ARCH_LIST asks for {', '.join(unknown)}, which nvcc "
                f"{toolkit.version} does not know (it knows {', '.join(toolkit.codes)})"
            )
        return Choice(tuple(chosen), "as TORCH_CUDA_ARCH_LIST says")
    if setting(environment) == "all":
        return Choice(_known(EVERY_ARCHITECTURE, toolkit), "as DENSENET_FAST_CUDA=all says")
    gpus = visible_gpus(environment)
    if gpus:
        return Choice(_of_gpus(gpus, toolkit), "for the GPUs that nvidia-smi sees")
    return Choice(
        _known(EVERY_GENERATION, toolkit), "one of each generation, as nvidia-smi sees no GPU"
    )


def _known(names: Sequence[str], toolkit: Toolkit) -> tuple[Architecture, ...]:
    known = tuple(a for a in map(parse, names) if f"sm_{a.number}" in toolkit.codes)
    if not known:
        raise CudaMissingError(
            f"nvcc {toolkit.version} knows none of the architectures {', '.join(names)}"
        )
    return known


def visible_gpus(environment: Mapping[str, str]) -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs in this machine, as nvidia-smi tells them."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return []
    try:
        text = _output(program, "--query-gpu=compute_cap", "--format=csv,noheader")
    except CudaMissingError:  # no driver
        return []
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", text, re.MULTILINE)
    return sorted({(int(major), int(minor)) for major, minor in found})


def _of_gpus(gpus: Sequence[tuple[int, int]], toolkit: Toolkit) -> tuple[Architecture, ...]:
    """Their own architectures; the newest older one as PTX for a GPU that nvcc does not know."""
    codes = [re.fullmatch(r"sm_(\d+)(\d)", code) for code in toolkit.codes]
    known = {(int(c[1]), int(c[2])) for c in codes if c}
    chosen = []
    for gpu in (gpu for gpu in gpus if gpu >= OLDEST):
        usable = [k for k in known if OLDEST <= k <= gpu]
        if usable:
            chosen.append(Architecture(*max(usable), ptx=gpu not in known))
    if not chosen:
        raise CudaMissingError(
            f"the GPUs here have compute capability {', '.join(f'{a}.{b}' for a, b in gpus)}: the "
            f"kernels need {OLDEST[0]}.{OLDEST[1]}, or nvcc {toolkit.version} is too new for them"
        )
    return tuple(dict.fromkeys(chosen))


def _listed(value: str) -> list[Architecture]:
    """What TORCH_CUDA_ARCH_LIST names, without what is too old for the kernels."""
    names = value.replace(";", " ").replace(",", " ").split()
    every = [parse(part) for name in names for part in _named(name)]
    usable = [a for a in every if (a.major, a.minor) >= OLDEST]
    if not usable:
        raise CudaMissingError(
            f"TORCH_CUDA_ARCH_LIST is {value!r}, but the kernels need compute capability "
            f"{OLDEST[0]}.{OLDEST[1]} or newer"
        )
    return list(dict.fromkeys(usable))


def _named(name: str) -> list[str]:
    base, plus, ptx = name.partition("+")
    if base not in _NAMES:
        return [name]
    parts = _NAMES[base].split(";")
    return [*parts[:-1], parts[-1] + plus + ptx]


def parse(text: str) -> Architecture:
    """An entry of TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "12.0+PTX"."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
    if match is None:
        raise BadSettingError(
            "TORCH_CUDA_ARCH_LIST should be a list like '8.0;9.0;12.0+PTX' or have names out of "
            f"{', '.join(_NAMES)}, got {text!r}"
        )
    return Architecture(int(match[1]), int(match[2]), match[3], match[4] is not None)


def code_flags(chosen: Sequence[Architecture]) -> list[str]:
    """What tells nvcc to compile for these architectures."""
    flags = []
    for a in chosen:
        flags.append(f"-gencode=arch=compute_{a.virtual},code=sm_{a.number}")
        if a.ptx:
            flags.append(f"-gencode=arch=compute_{a.number},code=compute_{a.number}")
    return flags


def ninja_file(
    toolkit: Toolkit, chosen: Sequence[Architecture], root: Path, sources: Sequence[Path], jobs: int
) -> tuple[str, list[Path]]:
    """A build.ninja that compiles `sources` in its own folder, and the objects it makes."""
    flags = [*NVCC_FLAGS, *code_flags(chosen), f"-I{root / 'csrc'}"]
    threads = max(1, jobs // len(sources))  # of one nvcc, where there are more jobs than files
    lines = [
        "ninja_required_version = 1.3",
        "rule nvcc",
        f"  command = {_escaped(str(toolkit.nvcc))} {_escaped(' '.join(map(_quoted, flags)))} "
        f"--threads {threads} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]
    objects = []
    for source in sources:
        objects.append(Path(source.stem + ".cuda.o"))
        lines.append(f"build {objects[-1]}: nvcc {_path(str(source))}")
    return "\n".join(lines) + "\n", objects


def _quoted(flag: str) -> str:
    return f"'{flag}'" if re.search(r"[^\w@%+=:,./-]", flag) else flag


def _escaped(text: str) -> str:
    return text.replace("$", "$$")


def _path(text: str) -> str:
    return _escaped(text).replace(" ", "$ ").replace(":", "$:")


def compile_kernels(
    toolkit: Toolkit, chosen: Sequence[Architecture], root: Path, directory: Path, jobs: int
) -> list[str]:
    """Compile every csrc/cuda/*.cu into `directory`, as far as it is out of date."""
    ninja = shutil.which("ninja")
    if ninja is None:
        raise CudaMissingError("the CUDA kernels are built with ninja, which is not on the PATH")
    sources = sorted((root / "csrc" / "cuda").glob("*.cu"))
    text, objects = ninja_file(toolkit, chosen, root, sources, jobs)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(text)
    try:
        subprocess.run([ninja, "-j", str(jobs)], cwd=directory, check=True)
    except subprocess.CalledProcessError as error:
        raise CudaMissingError(
            f"nvcc {toolkit.version} could not compile the kernels (its messages are in the "
            "output of `pip install -v .`)"
        ) from error
    return [str(directory / name) for name in objects]
