"""Programs that a model wrote, run against their tests in a process of their own.

What is kept apart: the network (an empty network namespace of the kernel), CPU time, memory, and writing to files
(resource limits of the kernel). Deleting, renaming and starting other processes are refused by a hook inside Python,
which stops accidents and not an attacker; files of this user can be read. Whoever fears worse runs the evaluation in a
container or a virtual machine without anything of value.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from engram.config import UserError

SECONDS = 5.0
MEMORY_BYTES = 1 << 30

_ISOLATED = ("unshare", "--user", "--map-root-user", "--net")

# Reads the word that proves its end, then the program, from its input. A program that exits early proves nothing.
_RUNNER = """
import resource, sys
word, program = sys.stdin.read().split("\\n", 1)
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
refused = ("os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.link", "os.symlink",
           "os.mkdir", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.killpg",
           "subprocess.Popen", "shutil.", "socket.", "ctypes.", "pty.spawn", "signal.pthread_kill")
def hook(event, arguments):
    if event.startswith(refused) or (event == "open" and arguments[2] & 0o1103):
        raise PermissionError(f"{event} is refused here")
out, complaints = sys.stdout, sys.stderr
# Nobody reads what the program prints, and it may never stop.
sys.stdout = sys.stderr = open("/dev/null", "w")
sys.addaudithook(hook)
try:
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
except BaseException as error:
    complaints.write(f"{type(error).__name__}: {error}"[:500])
    complaints.flush()
    sys.exit(1)
out.write("\\n" + word)
out.flush()
"""


@dataclass(frozen=True)
class Outcome:
    """Whether the program ran to its end; if not, why: the last line of its complaint, or the limit that it met."""

    passed: bool
    reason: str


@functools.cache
def check_available() -> None:
    """Raise UserError where the kernel does not let this user cut a process off from the network."""
    if shutil.which("unshare") is None:
        raise UserError("--run-code: the program `unshare` (util-linux) is missing: programs would have the network")
    done = subprocess.run([*_ISOLATED, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"--run-code: this machine gives no network namespace of its own ({done.stderr.strip()}): programs would "
            "have the network; allow user namespaces, or leave these benchmarks out"
        )


def run_program(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a Python program. Raises UserError where it cannot be isolated."""
    check_available()
    word = secrets.token_hex(16)
    limits = (str(max(1, round(seconds))), str(memory_bytes))
    command = [*_ISOLATED, sys.executable, "-I", "-S", "-c", _RUNNER, *limits]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, complaint = process.communicate(f"{word}\n{program}".encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(False, f"ran longer than {seconds:g} s")
    if process.returncode == 0 and out.decode(errors="replace").endswith("\n" + word):
        return Outcome(True, "")
    lines = complaint.decode(errors="replace").strip().splitlines()
    return Outcome(False, lines[-1] if lines else f"ended early with status {process.returncode}")
