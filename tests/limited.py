"""Running lines in a process that may take little more memory and time: for inputs that claim to be huge."""

import resource
import subprocess
import sys
from pathlib import Path

_SECONDS = 600  # of a machine that has other things to do; the processor's are limited by `limit`


def run_limited(code: str, *arguments: object) -> str:
    """Run Python lines, ``arguments`` being ``sys.argv[1:]``, and return what they print; they must succeed.

    They call ``limit()`` once all is imported.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from limited import limit\n{code}", *map(str, arguments)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def limit(memory: int = 2**28, seconds: int = 10) -> None:
    """Let this process take so much memory more, and so many seconds of the processor more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory,) * 2)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds,) * 2)
