"""The build: patches, caching, sanitizers; and the same headers under nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import host_build
import pytest
from test_emulator import SAMPLES

PROGRAM = [host_build.HERE / "samples" / "under_sanitizers.cpp"]


@pytest.mark.slow
def test_a_build_is_made_once():
    first = host_build.build(SAMPLES)
    made = first.stat().st_ino
    again = host_build.build(SAMPLES)
    assert again == first and again.stat().st_ino == made


@pytest.mark.slow
def test_patches_apply_to_a_copy():
    launch = (host_build.CSRC / "cuda" / "launch.cuh").read_bytes()
    patch = host_build.Patch(
        "cuda/ptx.cuh",
        "return ::emulator::float_to_tf32(x);",
        "return ::emulator::float_to_tf32(-x);",
    )
    patched = host_build.build(SAMPLES, patches=[patch])
    assert patched != host_build.build(SAMPLES)
    assert patched == host_build.build(SAMPLES, patches=[patch])
    assert (host_build.CSRC / "cuda" / "launch.cuh").read_bytes() == launch


def test_patches_must_apply_exactly_once():
    for old in ("no such text", "DENSENET_FAST_EMULATOR"):
        with pytest.raises(ValueError, match=r"csrc/cuda/ptx.cuh has \d+ times, not once"):
            host_build.build(SAMPLES, patches=[host_build.Patch("cuda/ptx.cuh", old, "")])


def test_without_headers_tests_skip_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_build, "_find_cuda_include", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="needs CUDA's headers"):
        host_build.build(SAMPLES)


def test_errors_of_the_compiler_are_shown(tmp_path: Path):
    source = tmp_path / "broken.cu"
    source.write_text("__shared__ int x;\n")
    with pytest.raises(RuntimeError, match="kernels use dynamic shared memory only"):
        host_build.build([source])


@pytest.fixture(scope="module")
def sanitized() -> Path:
    for sanitizer in ("address", "undefined"):
        if not host_build.supports(sanitizer):
            pytest.skip(f"the compiler builds no programs with -fsanitize={sanitizer}")
    return host_build.build(
        PROGRAM, program=True, sanitize=["address", "undefined"], optimize="-O1"
    )


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "UBSAN_OPTIONS": ""}
    return subprocess.run(
        [program, *arguments],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_the_emulator_is_clean_under_sanitizers(sanitized: Path):
    result = run(sanitized)
    assert (result.returncode, result.stdout) == (0, "passed\n"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("shared", "heap-buffer-overflow"),
        ("below", "heap-buffer-overflow"),
        ("global", "heap-buffer-overflow"),
        ("copy", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_sanitizers_see_faults_of_kernels(sanitized: Path, fault: str, report: str):
    result = run(sanitized, fault)
    assert result.returncode != 0
    assert report in result.stderr


# The product's own compiler; what the emulator cannot know of its headers.
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["75", "80", "90", "120"])
def test_headers_compile_for_devices(tmp_path: Path, architecture: str):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    if f"sm_{architecture}" not in known.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    source = tmp_path / "headers.cu"
    source.write_text(
        """
        #include "cuda/launch.cuh"
        #include "cuda/ptx.cuh"
        namespace ptx = densenet_fast::cuda::ptx;
        __global__ void uses_all_instructions(const float4* from, float* to, __half h, int n) {
          DF_DYNAMIC_SHARED(shared);
          ptx::cp_async<16>(shared, from, n);
          ptx::cp_async<4>(shared + 16, from, n % 4);
          ptx::cp_async<8>(shared + 24, from, n % 8);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();
          uint32_t a[4], b[4];
          ptx::ldmatrix_x4(a, shared + threadIdx.x % 32 * 16);
          ptx::ldmatrix_x4_trans(b, shared + threadIdx.x % 32 * 16);
          const uint32_t (&pair)[2] = reinterpret_cast<const uint32_t (&)[2]>(b);
          float d[4] = {__uint_as_float(ptx::float_to_tf32(to[0]))};
          ptx::mma_m16n8k16(d, a, pair, h);
          if (n > 100) ptx::mma_m16n8k16(d, a, pair, __nv_bfloat16());
          if (n > 200) ptx::mma_m16n8k8_tf32(d, a, pair);
          for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = d[i];
        }
        void run(const densenet_fast::cuda::LaunchConfig& config) {
          densenet_fast::cuda::launch(&uses_all_instructions, config, nullptr, nullptr, __half(),
                                      16);
          (void)densenet_fast::cuda::current_device_limits();
        }
        """
    )
    command = [nvcc, "-std=c++20", f"-arch=sm_{architecture}", "-O1", f"-I{host_build.CSRC}"]
    command += ["--Werror=all-warnings", "-c", str(source), "-o", str(tmp_path / "headers.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
