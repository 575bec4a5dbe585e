"""The checks that run inside the image, by its own Python, without network or GPU.

Imports the standard library only, and a copy of the stub driver in its folder, where expect.json
is too: vLLM refuses even --help on a host where it cannot detect the device. Prints one JSON
object with a verdict per check as its last line, and exits 0 if it could run at all: the host
decides what a failed verdict means.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Check = Callable[[dict[str, Any]], str]

INPUTS = Path(__file__).parent
QUANTIZATION = "vllm.model_executor.layers.quantization"
COMMANDS = {
    "vllm-version": ("--version",),
    "vllm-serve-help": ("serve", "--help"),
    "vllm-bench-serve-help": ("bench", "serve", "--help"),
}
KERNEL = """
#include <cuda_runtime.h>
__global__ void add(float *x) { x[threadIdx.x] += 1.0f; }
int main() { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess && n < 0; }
"""
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, as the declared driver answers
PROBE = "int cuInit(unsigned flags); int probe(void) { return cuInit(0); }"
# How JIT compilers link with the driver; {cuda} is CUDA_HOME.
LINKERS = {
    "flashinfer": "g++ probe.o -shared -L{cuda}/lib64 -L{cuda}/lib64/stubs -lcudart -lcuda -o",
    "tilelang": "{cuda}/bin/nvcc probe.o -shared -L{cuda}/lib64 -lcuda -o",
    "triton": "gcc probe.c -O3 -shared -fPIC -Wno-psabi -lcuda -o",
}
# Names and first bytes of what must not be in an image.
FORBIDDEN_NAMES = {".git", ".netrc", ".pypirc", ".docker", ".ssh", "id_rsa", ".aws"}
# Outside of site-packages, where every file is a locked wheel's.
WEIGHTS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth")
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
SKIP_TREES = {"/proc", "/sys", "/dev", "/mnt"}

Verdict = dict[str, Any]


def packages(expect: dict[str, Any]) -> str:
    """The installed distributions are exactly those of the lock."""
    installed = {
        re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower(): dist.version
        for dist in importlib.metadata.distributions()
    }
    wrong = sorted(set(installed.items()) ^ set(expect["packages"].items()))
    if wrong:
        raise AssertionError(f"installed and locked packages differ: {wrong[:10]}")
    return f"{len(installed)} distributions"


def tree(expect: dict[str, Any]) -> str:
    """Every Python file of vLLM is the one in the patched source tree."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise AssertionError("no package vllm")
    site = Path(spec.submodule_search_locations[0]).parent
    seen = 0
    for path, blob in expect["blobs"].items():
        file = site / path
        if not file.exists():
            if path in expect["changed_files"]:
                raise AssertionError(f"a patched file is not installed: {path}")
            continue  # a file of the source tree that the wheel does not ship
        content = file.read_bytes()
        name = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        if name.hexdigest() != blob:
            raise AssertionError(f"{path} is not the file of tree {expect['tree']}")
        seen += 1
    missing = sorted(set(expect["changed_files"]) - set(expect["blobs"]))
    if missing:
        raise AssertionError(f"patched files outside the checked tree: {missing}")
    return f"{seen} files, {len(expect['changed_files'])} of them patched"


def stack(expect: dict[str, Any]) -> str:
    """/opt/vllm-forge/stack.json is readable and is the record of this build."""
    record = json.loads(Path("/opt/vllm-forge/stack.json").read_text())
    if record != expect["stack"]:
        raise AssertionError("stack.json is not the record of this build")
    return str(record["tree"])


def imports(expect: dict[str, Any]) -> str:
    """Torch and vllm import, with the versions of the lock."""
    torch = importlib.import_module("torch")
    vllm = importlib.import_module("vllm")
    if vllm.__version__ != expect["packages"]["vllm"]:
        raise AssertionError(f"vllm.__version__ is {vllm.__version__}")
    if torch.__version__.partition("+")[0] != expect["packages"]["torch"]:
        raise AssertionError(f"torch.__version__ is {torch.__version__}")
    return f"torch {torch.__version__}, vllm {vllm.__version__}"


def quantization(expect: dict[str, Any]) -> str:
    """Every module below vLLM's quantization package imports."""
    package = importlib.import_module(QUANTIZATION)
    failed = {}
    names = [QUANTIZATION]

    def note(name: str) -> None:
        failed[name] = traceback.format_exc(limit=-1).strip()

    for module in pkgutil.walk_packages(package.__path__, QUANTIZATION + ".", onerror=note):
        names.append(module.name)
        try:
            importlib.import_module(module.name)
        except Exception as error:  # noqa: BLE001 - any failure is the verdict
            failed[module.name] = f"{type(error).__name__}: {error}"
    allowed = expect["unimportable"]
    if stale := sorted(set(allowed) - set(failed)):
        raise AssertionError(f"listed as not importable, but they import: {stale}")
    if unexpected := {name: why for name, why in failed.items() if name not in allowed}:
        raise AssertionError(f"{len(unexpected)} of {len(names)} do not import: {unexpected}")
    return f"{len(names) - len(failed)} modules"


def compiler(expect: dict[str, Any]) -> str:
    """The image's nvcc compiles and links a kernel for its SKU, as the JIT compilers do."""
    arch = expect["stack"]["arch"]
    home = Path(os.environ["CUDA_HOME"])
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "add.cu"), Path(folder, "add")
        source.write_text(KERNEL)
        done = subprocess.run(
            [
                str(home / "bin" / "nvcc"), f"-arch={arch}", "-cudart=shared",
                f"-L{home}/lib64", f"-Xlinker=-rpath={home}/lib64", "-o", str(binary), str(source),
            ],
            capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        if done.returncode != 0:
            raise AssertionError((done.stdout + done.stderr).strip())
        ran = subprocess.run([str(binary)], check=False).returncode
        if ran != 0:
            raise AssertionError(f"the linked program exits with {ran}")
    return f"{arch} compiled and linked"


def driver_link(expect: dict[str, Any]) -> str:
    """What JIT compilers link with -lcuda runs with the host's driver, here the declared one.

    At link time there is only the image's stub, which has no function: a program that loaded
    it would not find cuInit.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.c").write_text(PROBE)
        commands = {"object": "gcc -fPIC -c probe.c -o probe.o"}
        commands |= {
            name: f"{line} {name}.so && {sys.executable} -c "
            f"'import ctypes, sys; sys.exit(ctypes.CDLL(\"./{name}.so\").probe() != {{code}})'"
            for name, line in LINKERS.items()
        }
        for name, line in commands.items():
            done = subprocess.run(
                ["/bin/sh", "-c", line.format(cuda=os.environ["CUDA_HOME"], code=NO_DEVICE)],
                capture_output=True, text=True, check=False, cwd=folder,
                env={**os.environ, "TMPDIR": folder},
            )  # fmt: skip
            if done.returncode != 0:
                raise AssertionError(f"{name}: {(done.stdout + done.stderr).strip()}")
    return ", ".join(LINKERS)


def command(*argv: str) -> Check:
    """``vllm ARGV``: runs the script that is on PATH, in this process.

    A process of its own would spend its time on importing torch and vLLM once more.
    """

    def run(expect: dict[str, Any]) -> str:
        path = Path("/opt/venv/bin/vllm")
        interpreter = path.read_text().partition("\n")[0].removeprefix("#!")
        if not os.access(path, os.X_OK) or not os.access(interpreter, os.X_OK):
            raise AssertionError(f"{path} with {interpreter} cannot be executed")
        out = io.StringIO()
        sys.argv = [str(path), *argv]
        code: object = 0
        with contextlib.redirect_stdout(out):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        output = out.getvalue()
        word = expect["packages"]["vllm"] if argv == ("--version",) else "usage"
        if code not in (0, None) or word not in output.lower():
            raise AssertionError(f"exit {code}, printed {output[-300:]!r}")
        return output.strip() if argv == ("--version",) else f"{len(output.splitlines())} lines"

    return run


def sandbox(expect: dict[str, Any]) -> str:
    """This user is not root, has a name, and can write to its cache and nowhere else."""
    if os.geteuid() == 0:
        raise AssertionError("runs as root")
    getpass.getuser()  # torch asks for it
    Path("/cache/probe").write_text("x")
    for folder in ("/opt/venv", "/opt/vllm-forge", "/etc", "/usr"):
        if os.access(folder, os.W_OK):
            raise AssertionError(f"{folder} is writable")
    return f"uid {os.geteuid()}"


def hygiene(expect: dict[str, Any]) -> str:
    """No repositories, credentials, caches of installers, or weights."""
    bad = []
    seen = 0
    for folder, folders, files in os.walk("/"):
        prefix = folder.rstrip("/")
        folders[:] = [name for name in folders if f"{prefix}/{name}" not in SKIP_TREES]
        names = {*folders, *files}
        seen += len(files)
        bad += [f"{folder}/{name}" for name in names & FORBIDDEN_NAMES]
        for name in files:
            path = f"{folder}/{name}"
            if name.endswith(WEIGHTS) and "/site-packages/" not in path:
                bad.append(path)
            if name.endswith((".pem", ".key")) and os.access(path, os.R_OK):
                with contextlib.suppress(IsADirectoryError):
                    if PRIVATE_KEY.search(Path(path).read_bytes()):
                        bad.append(path)
    for folder in ("/root/.cache", "/cache/pip", "/cache/uv", "/var/cache/pip"):
        if os.path.isdir(folder) and os.listdir(folder):  # noqa: PTH112, PTH208
            bad.append(folder)
    secrets = Path("/run/secrets")
    if secrets.exists():
        bad += [str(path) for path in secrets.iterdir() if path.stat().st_size]
    if bad:
        raise AssertionError(f"must not be in an image: {bad[:20]}")
    return f"{seen} files seen"


def declare_device(expect: dict[str, Any], folder: Path) -> None:
    """Build the stub driver and make this process, and those it starts, find it."""
    driver = importlib.import_module("driver")  # a copy of vllm_forge.kernels.selection.inside's
    driver.build_stubs(folder, driver.Device(**expect["device"]))
    driver.load_stubs(folder)


def _verdict(check: Check, expect: dict[str, Any]) -> Verdict:
    start = time.monotonic()
    try:
        detail, passed = check(expect), True
    except Exception as error:  # noqa: BLE001 - any failure is the verdict
        detail, passed = f"{type(error).__name__}: {error}", False
    return {"passed": passed, "detail": detail, "seconds": round(time.monotonic() - start, 2)}


def _forked(check: Check, expect: dict[str, Any]) -> tuple[int, int]:
    """Run a check in a child that has torch and vllm imported already."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        verdict = _verdict(check, expect)
        with os.fdopen(writer, "w") as out:
            json.dump(verdict, out)
        os._exit(0)
    os.close(writer)
    return pid, reader


def main(run: str) -> None:
    """Run the checks of one run: ``image``, as the image's user, or ``user``, as another one."""
    expect = json.loads((INPUTS / "expect.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        if expect["compiler"]:
            declare_device(expect, Path(folder))
        print(json.dumps(RUNS[run](expect)), flush=True)
    # Tearing torch down takes seconds and proves nothing.
    os._exit(0)


def as_any_user(expect: dict[str, Any]) -> dict[str, Verdict]:
    """What depends on who runs it."""
    verdicts = {"any-user-sandbox": _verdict(sandbox, expect)}
    verdicts["any-user-imports"] = _verdict(imports, expect)
    return verdicts


def as_image_user(expect: dict[str, Any]) -> dict[str, Verdict]:
    """All checks."""
    checks: dict[str, Check] = {"packages": packages, "tree": tree, "stack": stack}
    checks |= {"sandbox": sandbox, "hygiene": hygiene}
    if expect["compiler"]:
        checks |= {"compiler": compiler, "driver-link": driver_link}
    # What needs no import of torch runs beside the import; both cores are busy then.
    started = {name: _forked(check, expect) for name, check in checks.items()}
    verdicts = {"imports": _verdict(imports, expect)}
    if verdicts["imports"]["passed"]:
        # In this process, so that the children of the others have its modules already.
        verdicts["vllm-help"] = _verdict(command("--help"), expect)
        for name, argv in COMMANDS.items():
            started[name] = _forked(command(*argv), expect)
        verdicts["quantization"] = _verdict(quantization, expect)
    for name, (pid, reader) in started.items():
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        died = {"passed": False, "detail": "died", "seconds": 0.0}
        verdicts[name] = json.loads(text) if text else died
    return verdicts


RUNS = {"image": as_image_user, "user": as_any_user}


if __name__ == "__main__":
    main(sys.argv[1])
