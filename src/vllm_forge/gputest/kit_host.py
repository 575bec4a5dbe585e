"""An image and its GPU suite on a host without network, registry or container engine.

    kit.py take                   keep the parts beside this file; once for each batch of parts
    kit.py unpack                 take, verify and join the parts, verify and unpack the image
    kit.py go OUTPUT [ARG]...     unpack, then run the suite in the image as root
    kit.py bench OUTPUT [ARG]...  the same for the sessions of benchmarks that the kit has:
                                  [NAME]... [--retry]
    kit.py exec [OPTION]... -- COMMAND [ARG]...
                                  run a command in the image: --uid N (default: the image's user),
                                  --env NAME=VALUE, --bind SOURCE:TARGET
    kit.py caches OUTPUT [--max-part MB]
                                  pack what `go` compiled into OUTPUT/caches.tar.gz.000 and so on,
                                  each of at most so many megabytes (default: 61)

Stands alone on Python's standard library (3.9), tar, gzip, split and mount. Needs root. Works in
FORGE_KIT_WORK (default: the user's cache folder), which must belong to the user alone.

What runs is the image: its manifest, configuration and the content of every layer are verified from
the image digest down, its root is mounted read-only, and its own variables are set. As an engine's
GPU hook does, the driver of the host is mounted into it; so are its names and its name server.
Variables are passed on with which a host's operator restricts NCCL, NVSHMEM and symmetric memory to
what its links can do, or a run to some of its GPUs (HOST_VARIABLES). Several runs may go side by
side.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

HERE = Path(__file__).resolve().parent
HOST_VARIABLES = ("NCCL_", "NVSHMEM_", "TORCH_SYMM_MEM_", "CUDA_VISIBLE_DEVICES")
DRIVER_FOLDER = "usr/local/nvidia"  # of GKE and other hosts; images search it for libraries
DRIVER_LIBRARIES = (
    "libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-ptxjitcompiler.so.1", "libnvidia-nvvm.so.4",
    "libnvidia-nvvm70.so.4", "libnvidia-gpucomp.so", "libcudadebugger.so.1",
)  # fmt: skip
# Mount points that the image lacks; an engine makes them as well.
FOLDERS = ("proc", "sys", "dev", "forge", "output", "cache", "tmp", DRIVER_FOLDER)
SMI, NAMES = "usr/bin/nvidia-smi", ("etc/hosts", "etc/resolv.conf")
PART = re.compile(r"part-\d+")
CHUNK = 1 << 22
SHM = "16g"
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x8000000, 0x20000000
PR_SET_PDEATHSIG, SI_KERNEL = 1, 0x80
NO_USER = 2**32 - 1  # chown(2) changes nothing for it


def fail(message: str) -> NoReturn:
    sys.exit(f"kit.py: {message}")


def work_folder() -> Path:
    """The work folder; what others can write is not used, since programs in it run as root."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("FORGE_KIT_WORK") or Path(cache) / "vllm-forge-kit")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.geteuid():
        fail(f"{folder} is a link or belongs to another user: set FORGE_KIT_WORK to another folder")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        fail(f"{folder} is mounted noexec: set FORGE_KIT_WORK to a folder that programs may run in")
    folder.chmod(0o700)
    return folder.resolve()


def read_manifest() -> dict[str, Any]:
    try:
        manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
        for part in manifest["parts"]:
            if not PART.fullmatch(part["name"]) or not {"size", "sha256"} <= set(part):
                raise ValueError(f"invalid part: {part}")  # noqa: TRY301
        manifest["digest"].encode()
        for name in ("suite", "bench"):
            _ = [manifest[name][key] for key in ("argv", "last", "env")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fail(f"invalid manifest.json ({type(error).__name__}: {error}): copy it again")
    return dict(manifest)


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def take(manifest: dict[str, Any], work: Path) -> None:
    """Copy the parts beside this file to those of this kit; a damaged one replaces none."""
    kept = place(work, "parts", manifest)
    kept.mkdir(mode=0o700, exist_ok=True)
    for part in manifest["parts"]:
        source, target = HERE / part["name"], kept / part["name"]
        if source.is_file():
            if file_digest(source) != part["sha256"]:
                fail(f"{source} does not match manifest.json: copy it again")
            aside = target.with_name(f"{target.name}.new")
            try:
                shutil.copyfile(source, aside)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
    taken = sum((kept / part["name"]).is_file() for part in manifest["parts"])
    print(f"{taken} of {len(manifest['parts'])} parts taken", flush=True)


def place(work: Path, what: str, manifest: dict[str, Any]) -> Path:
    """A folder of this kit alone; others have parts of the same names."""
    digest = hashlib.sha256(json.dumps(manifest["parts"]).encode()).hexdigest()
    return work / f"{what}-{digest[:16]}"


def content(manifest: dict[str, Any], work: Path) -> Path:
    """Folder with the joined parts: layers, bundle, caches. Made once per kit."""
    folder, kept = place(work, "content", manifest), place(work, "parts", manifest)
    if folder.is_dir():
        return folder
    take(manifest, work)
    for part in manifest["parts"]:
        path = kept / part["name"]
        if not path.is_file():
            fail(f"missing {part['name']} in {kept}: run `take` where it is, as this user")
        if file_digest(path) != part["sha256"]:
            fail(f"{path} does not match manifest.json: run `take` with it again")
    with fresh(work / "content.new") as aside:
        with untar(aside, "--no-same-owner") as tar:
            for part in manifest["parts"]:
                with (kept / part["name"]).open("rb") as file:
                    shutil.copyfileobj(file, tar, CHUNK)
        aside.rename(folder)
    print("parts verified and joined", flush=True)
    return folder


@contextlib.contextmanager
def untar(folder: Path, *options: str) -> Iterator[IO[bytes]]:
    """A pipe to a tar that unpacks into ``folder``; ends this process if it fails."""
    argv = ["tar", "--extract", f"--directory={folder}", *options]
    with contextlib.suppress(BrokenPipeError), subprocess.Popen(argv, stdin=subprocess.PIPE) as tar:
        assert tar.stdin is not None  # noqa: S101
        yield tar.stdin
        tar.stdin.close()
    if tar.returncode:
        fail(f"cannot unpack into {folder}: tar exited with {tar.returncode}")


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty folder, which is removed at the end unless it was renamed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verified(path: Path, digest: str) -> bytes:
    """Content of a file with that SHA-256."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest.removeprefix("sha256:"):
        fail(f"{path} does not have {digest}")
    return data


def unpack_image(folder: Path, digest: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Unpack an image once, every byte verified from its digest down: its root, and its settings.

    The settings are the ``config`` object of its configuration: Env, User, WorkingDir.
    Layers travel as gzip, whatever they are in the registry, so what is verified of each is the
    SHA-256 of its tar, which the image's configuration lists (``rootfs.diff_ids``).
    """
    manifest = json.loads(verified(folder / "image" / "manifest.json", digest))
    config = json.loads(verified(folder / "image" / "config.json", manifest["config"]["digest"]))
    root = work / f"root-{digest.removeprefix('sha256:')[:16]}"
    if not root.is_dir():
        with fresh(work / "root.new") as aside:
            aside.chmod(0o755)
            for number, diff_id in enumerate(config["rootfs"]["diff_ids"]):
                unpack_layer(folder / "image" / f"{number}.tar.gz", diff_id, aside)
            if marker := next(aside.rglob(".wh.*"), None):  # a whiteout of the OCI's layer format
                fail(f"a layer deletes files ({marker.name}), unsupported: make the kit of an "
                     "image whose layers only add files")  # fmt: skip
            for name in FOLDERS:
                (aside / name).mkdir(parents=True, exist_ok=True)
            for name in (SMI, *NAMES):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(aside / name):
                    (aside / name).touch()
            aside.rename(root)
        print(f"image {digest} verified and unpacked", flush=True)
    return root, config["config"]


def unpack_layer(path: Path, diff_id: str, root: Path) -> None:
    """Unpack one layer; end unless its tar has that SHA-256."""
    digest = hashlib.sha256()
    with (
        subprocess.Popen(["gzip", "-dc", str(path)], stdout=subprocess.PIPE) as packed,
        untar(root, "--same-permissions", "--numeric-owner", "--same-owner") as tar,
    ):
        assert packed.stdout is not None  # noqa: S101
        while block := packed.stdout.read(CHUNK):
            digest.update(block)
            tar.write(block)
    if packed.returncode:
        fail(f"cannot unpack {path.name}: gzip exited with {packed.returncode}")
    if f"sha256:{digest.hexdigest()}" != diff_id:
        fail(f"layer {path.name} does not have {diff_id}: copy the kit again")


@dataclass(frozen=True)
class Run:
    """One command in an image."""

    root: Path  # the image's files
    argv: Sequence[str]
    uid: int  # user and group
    env: dict[str, str]  # see ``variables``
    binds: dict[str, Path]  # target in the image -> source on the host
    read_only: frozenset[str] = frozenset()  # of the targets
    cwd: str = "/"


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"cannot mount {' '.join(arguments)}: {done.stderr.strip()}")


def driver_mounts() -> Iterator[tuple[Path, str]]:
    """The host's driver: (file or folder, its place in the image)."""
    folder = Path("/") / DRIVER_FOLDER
    if (folder / "lib64").is_dir():
        yield folder, DRIVER_FOLDER
    else:
        argv = ["sh", "-c", "PATH=$PATH:/usr/sbin:/sbin ldconfig -p"]  # `su` leaves these out
        listing = subprocess.run(argv, capture_output=True, text=True, check=False)
        rows = [line.split() for line in listing.stdout.splitlines() if "x86-64" in line]
        for name, file in {row[0]: Path(row[-1]) for row in reversed(rows)}.items():
            if name.startswith(DRIVER_LIBRARIES):
                yield file.resolve(), f"{DRIVER_FOLDER}/lib64/{name}"
    program = shutil.which("nvidia-smi") or folder / "bin" / "nvidia-smi"
    if Path(program).is_file():
        yield Path(program).resolve(), SMI


def name_files(work: Path) -> Iterator[tuple[Path, str]]:
    """What hosts are found by, as engines hand it over: (file, its place in the image).

    A question that no name server answers takes 10 s. vLLM asks for its host's name once for each
    group of processes, and c10d for the names of addresses that are mapped into IPv6.
    """
    own, hosts, resolver = Path("/etc/hosts"), work / "hosts", Path("/etc/resolv.conf")
    known = own.read_bytes() if own.is_file() else b""
    lines, name = [b"\n127.0.0.1 localhost\n::ffff:127.0.0.1 localhost\n"], socket.gethostname()
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))  # sends nothing, and fails without a network
        address = one.getsockname()[0]
        lines.append(f"{address} {name}\n::ffff:{address} {name}\n".encode())
    (aside := work / f"hosts.{os.getpid()}").write_bytes(b"".join([known, *lines]))
    aside.rename(hosts)
    yield hosts, NAMES[0]
    if resolver.is_file():
        yield resolver.resolve(), NAMES[1]


def mount_all(run: Run) -> None:
    """Mount all but /proc, in the mount namespace of this process."""
    root = run.root
    mount("--make-rprivate", "/")
    mount("--bind", str(root), str(root))
    mount("--rbind", "/sys", f"{root}/sys")
    mount("--rbind", "/dev", f"{root}/dev")
    mount("-t", "tmpfs", "-o", f"size={SHM},mode=1777", "shm", f"{root}/dev/shm")  # noqa: S108 - in the image
    mount("-t", "tmpfs", "-o", "mode=1777", "tmp", f"{root}/tmp")  # noqa: S108 - in the image
    drivers = list(driver_mounts())
    if any(target.startswith(f"{DRIVER_FOLDER}/") for _, target in drivers):
        mount("-t", "tmpfs", "driver", f"{root}/{DRIVER_FOLDER}")
        for _, target in drivers:
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            (root / target).touch()
    for source, target in [*drivers, *name_files(root.parent)]:
        mount("--bind", str(source), f"{root}/{target}")
    for target, source in run.binds.items():
        if not (root / target.lstrip("/")).is_dir():
            fail(f"cannot mount at {target}: the image has no such folder")
        mount("--bind", str(source), f"{root}{target}")
        if target in run.read_only:
            mount("-o", "remount,bind,ro", f"{root}{target}")
    mount("-o", "remount,bind,ro", str(root))


def unshare(flags: int) -> None:
    """Leave namespaces by a system call that Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        fail(f"cannot make namespaces: {os.strerror(ctypes.get_errno())}; run this as root")


def run_in(run: Run) -> int:
    """Run a command in the image, in namespaces of its own; its exit code.

    SIGTERM and SIGINT are passed on, but Ctrl-C, which a terminal sends to the command as well. The
    command ends with this process, however that ends.
    """
    unshare(CLONE_NEWNS | CLONE_NEWIPC)
    mount_all(run)
    unshare(CLONE_NEWPID)  # last: the next process is the first of the namespace, and ends it
    awaited = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    first = os.fork()
    if first == 0:
        be_init()
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        become(run)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        got = signal.sigwaitinfo(awaited)
        if got.si_signo != signal.SIGCHLD and got.si_code != SI_KERNEL:
            os.kill(pid, got.si_signo)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)  # returns when all processes of the namespace have ended
    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code  # as a shell says which signal ended it


def be_init() -> NoReturn:
    """Be the first process of a PID namespace until it is killed; reap what others leave.

    The command cannot be it: the kernel ends that process by no signal that it does not handle.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # others are blocked
    while True:
        signal.pause()


def become(run: Run) -> NoReturn:
    """Turn this process into the command."""
    libc = ctypes.CDLL(None)  # the image has another one
    mount("-t", "proc", "proc", f"{run.root}/proc")
    os.chroot(run.root)
    os.chdir(run.cwd)
    os.setgroups([])
    os.setgid(run.uid)
    os.setuid(run.uid)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user clears it
    program = shutil.which(run.argv[0], path=run.env.get("PATH", os.defpath))
    if program is None:
        fail(f"the image has no program {run.argv[0]}")
    os.execve(program, list(run.argv), run.env)  # noqa: S606 - the command was asked for


def variables(config: dict[str, Any], more: dict[str, str]) -> dict[str, str]:
    """Those of the image, of the host's operator, and more; the later wins."""
    host = {name: value for name, value in os.environ.items() if name.startswith(HOST_VARIABLES)}
    return dict(item.split("=", 1) for item in config.get("Env") or ()) | host | more


def volume(work: Path, uid: int) -> Path:
    """The folder that is /cache for a user: what one user compiles another cannot replace."""
    folder = work / f"cache-{uid}"
    folder.mkdir(mode=0o755, exist_ok=True)
    os.chown(folder, uid, uid)
    return folder


def bring_caches(folder: Path, target: Path) -> None:
    """Copy compiled kernels that the kit carries into a volume, once for each stack."""
    for stack in (folder / "jit").glob("*"):
        kept = target / "jit" / stack.name
        if not kept.exists():
            with fresh(target / "jit.new") as aside:
                shutil.copytree(stack, aside, dirs_exist_ok=True)
                kept.parent.mkdir(exist_ok=True)
                aside.rename(kept)


def pack_caches(arguments: list[str]) -> int:
    """Pack the kernels that runs of the suite compiled."""
    parser = argparse.ArgumentParser("kit.py caches", usage=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-part", type=float, default=61)
    args = parser.parse_args(arguments)
    if not 0 < args.max_part < math.inf:
        fail("invalid --max-part: expected a number above 0")
    folder, output = work_folder() / "cache-0", args.output
    if not (folder / "jit").is_dir():
        fail(f"no compiled kernels in {folder / 'jit'}: run `go` first")
    output.mkdir(parents=True, exist_ok=True)
    with fresh(output / ".new") as aside:
        pack = ["tar", "--create", "--gzip", f"--directory={folder}", "jit"]
        size = f"--bytes={max(1, int(args.max_part * 1_000_000))}"
        cut = ["split", size, "--numeric-suffixes", "--suffix-length=3", "-"]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
            split = subprocess.run([*cut, f"{aside}/caches.tar.gz."], stdin=tar.stdout, check=False)
        if split.returncode:
            fail(f"cannot write into {output}: split exited with {split.returncode}")
        if tar.returncode:
            fail(f"cannot pack {folder / 'jit'}: tar exited with {tar.returncode}; end all runs")
        for old in output.glob("caches.tar.gz.*"):
            old.unlink()
        parts = [part.rename(output / part.name) for part in sorted(aside.iterdir())]
    print(f"{len(parts)} parts of compiled kernels in {output}", flush=True)
    return 0


def exec_run(root: Path, config: dict[str, Any], work: Path, arguments: list[str]) -> Run:
    parser = argparse.ArgumentParser("kit.py exec", usage=__doc__, allow_abbrev=False)
    user = str(config.get("User") or "0").partition(":")[0]
    parser.add_argument("--uid", type=int, default=user)
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("argv", nargs="+")
    args = parser.parse_args(arguments)
    if not 0 <= args.uid < NO_USER:
        parser.error(f"invalid --uid {args.uid}: expected 0 to {NO_USER - 1}")
    binds = {"/cache": volume(work, args.uid)}
    for bind in args.bind:
        source, _, target = bind.rpartition(":")
        if not source or not target.strip("/") or target[0] != "/":
            parser.error(f"invalid --bind {bind!r}: expected SOURCE:/TARGET")
        binds[target] = Path(source).resolve()
    if wrong := [item for item in args.env if "=" not in item]:
        parser.error(f"invalid --env {wrong[0]!r}: expected NAME=VALUE")
    env = dict(item.split("=", 1) for item in args.env)
    cwd = str(config.get("WorkingDir") or "/")
    return Run(root, args.argv, args.uid, variables(config, env), binds, cwd=cwd)


def main(arguments: list[str]) -> int:
    commands = (["take"], ["unpack"], ["go"], ["bench"], ["exec"], ["caches"])
    if arguments[:1] not in commands or arguments in (["go"], ["bench"], ["caches"]):
        fail(f"usage:\n{__doc__}")
    if arguments[0] == "caches":
        return pack_caches(arguments[1:])
    if arguments[0] in {"go", "bench"} and arguments[1][:1] in {"", "-"}:
        fail(f"missing OUTPUT: expected {arguments[0]} OUTPUT [ARG]...")
    if arguments[0] != "take" and os.geteuid() != 0:
        fail("cannot mount and enter the image: run this as root")
    os.umask(0o022)  # as engines do: the image's user reaches what root makes here
    manifest, work = read_manifest(), work_folder()
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another call, which unpacks in {work}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if arguments[0] == "take":
            take(manifest, work)
            return 0
        folder = content(manifest, work)
        root, config = unpack_image(folder, manifest["digest"], work)
        if arguments[0] == "unpack":
            return 0
        if arguments[0] in {"go", "bench"}:
            if arguments[0] == "bench" and not (folder / "bundle" / "bench").is_dir():
                fail("this kit has no sessions: make it with --session")
            bring_caches(folder, cache := volume(work, 0))
            output = Path(arguments[1]).resolve()
            output.mkdir(parents=True, exist_ok=True)
            binds = {"/forge": folder / "bundle", "/output": output, "/cache": cache}
            suite = manifest["suite" if arguments[0] == "go" else "bench"]
            argv = [*suite["argv"], *arguments[2:], *suite["last"]]
            env, only = variables(config, suite["env"]), frozenset({"/forge"})
            run = Run(root, argv, uid=0, env=env, binds=binds, read_only=only, cwd="/forge")
        else:
            run = exec_run(root, config, work, arguments[1:])
    return run_in(run)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (OSError, RuntimeError) as error:  # a full disk, no home
        fail(f"{type(error).__name__}: {error}")
