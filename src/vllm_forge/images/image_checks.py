"""The checks that run inside the image, by its own Python, without network or GPU.

Started with ``-I -S``: neither a variable nor a .pth file of a wheel changes how it runs, and only
what must import vLLM does so, in a child. Imports the standard library only, and a copy of the stub
driver in its folder, where expect.json is too: vLLM refuses even --help on a host where it cannot
detect the device. Prints one JSON object with a verdict per check as its last line, and exits 0 if
it could run at all: the host decides what a failed verdict means.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import getpass
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
# Started as vLLM, its workers and its JIT compilers start Python.
STARTS = (
    ("-c", "import json, urllib.request"),
    ("-m", "json.tool", "--help"),
    (
        "-c",
        "import multiprocessing as m; p = m.get_context('spawn').Process(target=len, args=('',)); "
        "p.start(); p.join(); raise SystemExit(p.exitcode)",
    ),
)
# What `bench serve` needs of a model: a tokenizer, here of words w0 to w999.
TOKENIZER: dict[str, dict[str, Any]] = {
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0, "content": "w0", "special": True, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False,
            }
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "unk_token": "w0",
            "vocab": {f"w{number}": number for number in range(1000)},
        },
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"},
    "config.json": {"model_type": "llama"},
}  # fmt: skip
BENCH_PROMPTS, BENCH_TOKENS = 2, 4
# Importing humming starts two compilers, whose output nobody reads: the container ends before
# (humming-kernels 0.1.10: humming/utils/nvrtc.py:105, humming/ops/utils.py:131).
QUIET = {"HUMMING_DISABLE_PARALLEL_BUILD": "1"}
VLLM_CHECKS = ("imports", "quantization", "kernels", "vllm-help", "vllm-bench-serve", *COMMANDS)
DIED = {"passed": False, "detail": "died", "seconds": 0.0}
PR_SET_DUMPABLE = 4  # prctl(2): 0 hides this process's memory and files from others of its user
PLANTED = ("json", "urllib", "multiprocessing")
Verdict = dict[str, Any]


def imports(expect: dict[str, Any]) -> str:
    """Torch and vllm import, with the versions of the lock."""
    torch = importlib.import_module("torch")
    vllm = importlib.import_module("vllm")
    if vllm.__version__ != expect["vllm"]:
        raise AssertionError(f"vllm.__version__ is {vllm.__version__}")
    if torch.__version__.partition("+")[0] != expect["torch"]:
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


def run_in(folder: str, *argv: str) -> None:
    """Run a program in a folder, which is also its place for temporary files; it must succeed."""
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "TMPDIR": folder},
    )  # fmt: skip
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip()
        raise AssertionError(f"exit {done.returncode} of {' '.join(argv)[:200]}: {output}")


def compiler(expect: dict[str, Any]) -> str:
    """The image's nvcc compiles and links a kernel for its SKU, as the JIT compilers do."""
    arch = expect["arch"]
    home = Path(os.environ["CUDA_HOME"])
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "add.cu"), Path(folder, "add")
        source.write_text(KERNEL)
        run_in(
            folder, str(home / "bin" / "nvcc"), f"-arch={arch}", "-cudart=shared",
            f"-L{home}/lib64", f"-Xlinker=-rpath={home}/lib64", "-o", str(binary), str(source),
        )  # fmt: skip
        run_in(folder, str(binary))
    return f"{arch} compiled and linked"


def nvrtc(expect: dict[str, Any]) -> str:
    """NVRTC compiles, loaded by its path as JIT compilers load it: its builtins have no RUNPATH."""
    (path,) = Path(os.environ["CUDA_HOME"], "lib").glob("libnvrtc.so.*")
    library, program = ctypes.CDLL(str(path)), ctypes.c_void_p()
    source = b'extern "C" __global__ void add(float *x) { x[threadIdx.x] += 1.0f; }'
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={expect['arch']}".encode())
    made = library.nvrtcCreateProgram(ctypes.byref(program), source, b"add.cu", 0, None, None)
    code = made or library.nvrtcCompileProgram(program, 1, options)
    if code != 0:  # 7: NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
        raise AssertionError(f"NVRTC cannot compile (error {code}): is LD_LIBRARY_PATH complete?")
    return path.name


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
        for line in commands.values():
            script = line.format(cuda=os.environ["CUDA_HOME"], code=NO_DEVICE)
            run_in(folder, "/bin/sh", "-c", script)
    return ", ".join(LINKERS)


def run_vllm(*argv: str) -> str:
    """Output of ``vllm ARGV``: runs the script that is on PATH, in this process.

    A process of its own would spend its time on importing torch and vLLM once more.
    """
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
    if code not in (0, None):
        raise AssertionError(f"exit {code}, printed {out.getvalue()[-300:]!r}")
    return out.getvalue()


def command(*argv: str) -> Check:
    """A ``vllm`` command that prints its version or a usage."""

    def run(expect: dict[str, Any]) -> str:
        output = run_vllm(*argv)
        word = expect["vllm"] if argv == ("--version",) else "usage"
        if word not in output.lower():
            raise AssertionError(f"printed {output[-300:]!r}")
        return output.strip() if argv == ("--version",) else f"{len(output.splitlines())} lines"

    return run


def bench_serve(expect: dict[str, Any]) -> str:
    """``vllm bench serve`` measures a server, here one that answers with fixed words.

    It exits with 0 also if every request failed, so the check reads what it counted.
    """
    with tempfile.TemporaryDirectory() as folder, fake_server() as url:
        for name, content in TOKENIZER.items():
            Path(folder, name).write_text(json.dumps(content))
        run_vllm(
            "bench", "serve", f"--base-url={url}", f"--tokenizer={folder}", "--model=tiny",
            "--backend=openai", "--dataset-name=random", "--random-input-len=8",
            f"--random-output-len={BENCH_TOKENS}", f"--num-prompts={BENCH_PROMPTS}",
            "--disable-tqdm", "--save-result", f"--result-dir={folder}",
            "--result-filename=result.json",
        )  # fmt: skip
        result = json.loads(Path(folder, "result.json").read_text())
    counts = (result["completed"], result["total_output_tokens"])
    if counts != (BENCH_PROMPTS, BENCH_PROMPTS * BENCH_TOKENS):
        raise AssertionError(f"counted {counts[0]} answers of {counts[1]} tokens in all")
    return f"{counts[0]} answers, {counts[1]} tokens"


def kernels(expect: dict[str, Any]) -> str:
    """FlashInfer finds each file of the carried archives, also to compile, and asks no server."""
    if not expect["kernels"]:
        return "none carried"
    artifacts, loader, core = (
        importlib.import_module(f"flashinfer.{name}")
        for name in ("artifacts", "jit.cubin_loader", "jit.core")
    )

    def refuse(source: str, *_: object, **__: object) -> None:
        raise AssertionError(f"FlashInfer downloads {source}")

    vars(loader)["download_file"] = refuse
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = expect["device"]["compute_capability"]
    core.current_compilation_context.__init__()  # the declared driver cannot be initialized
    files, users = 0, dict[str, Any]()
    for name in expect["kernels"]:
        path, pin = (getattr(row, name) for row in (artifacts.ArtifactPath, artifacts.CheckSumHash))
        rows = loader.get_artifact(f"{path}/checksums.txt", pin).decode().splitlines()
        files += sum(bool(loader.get_artifact(f"{path}/{row[66:]}", row[:64])) for row in rows)
        for module in [row for key, row in sys.modules.items() if key.startswith("flashinfer.jit")]:
            for key, row in vars(module).items():
                if name in getattr(getattr(row, "__code__", None), "co_names", ()):
                    users[key] = row
    for function in users.values():
        function()  # writes what a compiler gets, and links to the archive's headers
    if not files or not users:
        raise AssertionError("FlashInfer has no use for them")
    return f"{files} files; {', '.join(sorted(users))}"


@contextlib.contextmanager
def fake_server() -> Iterator[str]:
    """A server that streams completions; its URL."""
    import http.server  # noqa: PLC0415 - only one of the processes needs it
    import threading  # noqa: PLC0415

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            rows: list[dict[str, Any]] = [
                {"choices": [{"index": 0, "text": " w1"}]}
                for _ in range(asked.get("max_tokens", 1))
            ]
            usage = {"prompt_tokens": 8, "completion_tokens": len(rows)}
            for row in [*rows, {"choices": [], "usage": usage}]:
                self.wfile.write(f"data: {json.dumps(row)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


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


def working_directory(expect: dict[str, Any]) -> str:
    """No Python imports what lies in the working directory: in an image that is the volume."""
    with tempfile.TemporaryDirectory() as folder:
        for name in PLANTED:
            text = "raise SystemExit('imported from the working directory')\n"
            Path(folder, f"{name}.py").write_text(text)
        for argv in STARTS:
            run_in(folder, sys.executable, *argv)
    return f"{len(STARTS)} ways to start Python"


def load_driver() -> Any:
    """The module beside this one: its folder is not searched for modules."""
    spec = importlib.util.spec_from_file_location("driver", INPUTS / "driver.py")
    if spec is None or spec.loader is None:
        raise AssertionError("cannot load driver.py")
    driver = sys.modules["driver"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


def declare_device(expect: dict[str, Any], folder: Path) -> None:
    """Build the stub driver and make this process, and those it starts, find it."""
    driver = load_driver()
    driver.build_stubs(folder, driver.Device(**expect["device"]))
    driver.load_stubs(folder)


def _verdict(check: Check, expect: dict[str, Any]) -> Verdict:
    start = time.monotonic()
    try:
        detail, passed = check(expect), True
    except Exception as error:  # noqa: BLE001 - any failure is the verdict
        detail, passed = f"{type(error).__name__}: {error}", False
    return {"passed": passed, "detail": detail, "seconds": round(time.monotonic() - start, 2)}


def _forked(check: Check, expect: dict[str, Any]) -> Callable[[], Verdict]:
    """Run a check in a child; returns what waits for its verdict."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        verdict = _verdict(check, expect)
        with os.fdopen(writer, "w") as out:
            json.dump(verdict, out)
        os._exit(0)
    os.close(writer)

    def wait() -> Verdict:
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(text) if text else dict(DIED)

    return wait


def with_vllm(run: str, names: Sequence[str], folder: Path) -> Callable[[], dict[str, Verdict]]:
    """Start a run in a Python as vLLM gets it; returns what waits for the verdicts ``names``.

    These can be forged by what the child imports; the others cannot: they have other names, and no
    process of this user may look into this one.
    """
    argv = [sys.executable, __file__, run, str(folder)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    def wait() -> dict[str, Verdict]:
        lines = child.communicate()[0].strip().splitlines()
        try:
            rows = json.loads(lines[-1])
            return {name: {key: rows[name][key] for key in DIED} for name in names}
        except (IndexError, ValueError, LookupError, TypeError):
            return {name: dict(DIED) for name in names}

    return wait


def as_vllm(expect: dict[str, Any]) -> dict[str, Verdict]:
    """What imports vLLM."""
    verdicts = {"imports": _verdict(imports, expect)}
    if not verdicts["imports"]["passed"]:
        return verdicts | {name: dict(DIED) for name in VLLM_CHECKS if name != "imports"}
    # In this process, so that the others have its modules already: in a child of its own, the
    # quantization modules take three times as long, on a core that the other checks need.
    verdicts["vllm-help"] = _verdict(command("--help"), expect)
    verdicts["quantization"] = _verdict(quantization, expect)
    gc.freeze()  # or each child would copy the pages of all objects when it collects
    started = {name: _forked(command(*argv), expect) for name, argv in COMMANDS.items()}
    started["vllm-bench-serve"] = _forked(bench_serve, expect)
    started["kernels"] = _forked(kernels, expect)
    return verdicts | {name: wait() for name, wait in started.items()}


def as_image_user(expect: dict[str, Any], folder: Path) -> dict[str, Verdict]:
    """All checks, side by side."""
    checks: dict[str, Check] = {"sandbox": sandbox, "working-directory": working_directory}
    if expect["compiler"]:
        checks |= {"compiler": compiler, "nvrtc": nvrtc, "driver-link": driver_link}
    vllm = with_vllm("vllm", VLLM_CHECKS, folder)
    started = {name: _forked(check, expect) for name, check in checks.items()}
    return {name: wait() for name, wait in started.items()} | vllm()


def as_any_user(expect: dict[str, Any], folder: Path) -> dict[str, Verdict]:
    """What depends on who runs it."""
    vllm = with_vllm("imports", ["any-user-imports"], folder)
    return {"any-user-sandbox": _verdict(sandbox, expect)} | vllm()


def main(run: str, folder: str = "") -> None:
    """Run the checks of one run: ``image``, as the image's user, or ``user``, as another one.

    ``vllm`` and ``imports`` are their children, which find the declared driver in ``folder``.
    """
    expect = json.loads((INPUTS / "expect.json").read_text())
    if folder:
        gc.disable()  # a fifth of an import; what is imported stays
        os.environ |= QUIET
        if expect["compiler"]:
            load_driver().load_stubs(Path(folder))
        rows = as_vllm(expect) if run == "vllm" else {"any-user-imports": _verdict(imports, expect)}
        print("\n" + json.dumps(rows), flush=True)
        # Tearing torch down takes seconds and proves nothing.
        os._exit(0)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)
    with tempfile.TemporaryDirectory() as stubs:
        if expect["compiler"]:
            declare_device(expect, Path(stubs))
        rows = {"image": as_image_user, "user": as_any_user}[run](expect, Path(stubs))
        print("\n" + json.dumps(rows), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
