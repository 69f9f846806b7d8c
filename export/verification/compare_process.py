"""The program of a process that compares weights for another: see `comparisons`."""

import sys

from .comparisons import serve

if __name__ == "__main__":
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    serve(sys.stdin.buffer, out)
