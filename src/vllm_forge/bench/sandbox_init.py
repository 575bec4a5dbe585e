"""Process 1 of a sandbox: an almost empty, read-only root, and one process in it, as nobody.

Run as a program by `sandbox.start`, in new mount, PID, network, IPC and UTS namespaces, as root or
as root of a user namespace. What it starts has a user namespace of its own without capabilities,
so it can neither trace this process nor end it; this process ends all others when it ends.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

NOBODY = 65534
# The dynamic loader, libc, and a Python of the distribution; of Nix, all of these.
LIBRARIES = ("usr", "lib", "lib64", "nix/store")
ROOT_BYTES = 1 << 20
STARTED = "started\n"
MS_BIND, MS_REC, MNT_DETACH = 4096, 16384, 2  # mount(2), umount2(2)
CLONE_NEWUSER = 0x10000000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
READ_ONLY_NOSUID_NODEV = 1 | 2 | 4  # MOUNT_ATTR_* of mount_setattr(2)
SYS_MOUNT_SETATTR = 442  # of all architectures; glibc has a function from 2.36 on
# Segments, queues and semaphores outlive what a process has mapped, and no rlimit counts them.
IPC_LIMITS = {"shmmni": "0", "msgmni": "0", "sem": "0 0 0 0"}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A function of libc; OSError."""
    encoded = [item.encode() if isinstance(item, str) else item for item in arguments]
    if getattr(libc, name)(*encoded) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def build_root(root: Path, python: Path) -> None:
    """Mount the libraries and Python's folder, read-only, at their own paths in an empty root."""
    call("mount", "tmpfs", str(root), "tmpfs", 0, f"size={ROOT_BYTES},mode=755")
    for name in LIBRARIES:
        source = Path("/", name)
        if source.is_symlink():
            (root / name).symlink_to(source.readlink())
        elif source.is_dir():
            bind(source, root / name)
    if not (root / python.relative_to("/")).exists():
        bind(python, root / python.relative_to("/"))
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, str(root), AT_RECURSIVE,
         attributes, size)  # fmt: skip


def bind(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    call("mount", str(source), str(target), None, MS_BIND | MS_REC, None)


def enter(root: Path) -> None:
    """Make a folder the root; nothing of the old one remains mounted."""
    os.chdir(root)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")


def write(folder: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def become_nobody(proc: int) -> None:
    """Drop root, and enter a user namespace that may not create others."""
    if os.getuid() == 0 and not _is_mapped(proc):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
    uid, gid = os.getuid(), os.getgid()
    call("unshare", CLONE_NEWUSER)
    write(proc, "self/setgroups", "deny")
    write(proc, "self/uid_map", f"{NOBODY} {uid} 1")
    write(proc, "self/gid_map", f"{NOBODY} {gid} 1")
    write(proc, "sys/user/max_user_namespaces", "0")
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _is_mapped(proc: int) -> bool:
    """Whether this root is that of a user namespace with one user, who cannot become another."""
    with os.fdopen(os.open("self/uid_map", os.O_RDONLY, dir_fd=proc)) as file:
        return file.read().split()[2] == "1"


def limit(limits: dict[str, int]) -> None:
    """Set limits; after the user namespace exists, so that only its processes are counted."""
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


def run(task: bytes, proc: int, null: int, limits: dict[str, int], argv: list[str]) -> None:
    """Become the program; its standard input is the task."""
    become_nobody(proc)
    os.close(proc)
    stdin = os.memfd_create("task")
    os.write(stdin, task)
    os.lseek(stdin, 0, os.SEEK_SET)
    limit(limits)
    os.dup2(stdin, 0)
    os.dup2(null, 2)
    os.execve(argv[0], argv, {})  # noqa: S606 - capabilities end here: its user is not root


def start(limits: dict[str, int], root: Path, python: Path, argv: list[str]) -> None:
    """Start the program; OSError."""
    task = sys.stdin.buffer.readline()
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    null = os.open("/dev/null", os.O_RDWR)
    for name, text in IPC_LIMITS.items():
        write(proc, f"sys/kernel/{name}", text)
    build_root(root, python)
    enter(root)
    failed, reason = os.pipe()  # closed by execve
    if os.fork() == 0:
        try:
            run(task, proc, null, limits, argv)
        except OSError as error:
            os.write(reason, str(error).encode())
        os._exit(1)
    os.close(reason)
    if problem := os.read(failed, select.PIPE_BUF):
        raise OSError(problem.decode())


def reap(*_: object) -> None:
    """End when no process is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        os._exit(0)


def main(root: str, python: str, limits: str, *argv: str) -> None:
    """Standard error gets STARTED, or the reason. The end of standard input ends all processes."""
    try:
        start(json.loads(limits), Path(root), Path(python), list(argv))
    except OSError as error:
        sys.exit(str(error))
    sys.stderr.write(STARTED)
    sys.stderr.flush()
    signal.signal(signal.SIGCHLD, reap)
    reap()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
