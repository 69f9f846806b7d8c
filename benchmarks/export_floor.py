"""What the disk alone takes: read a checkpoint's files to their ends, then write as many bytes as an export.

    python -S -m benchmarks.export_floor CHECKPOINT OUT BYTES

Sequential calls of 8 MiB, one thread, no fsync.
"""

import os
import sys

_BLOCK = 8 * 2**20


def main() -> None:
    checkpoint, out, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    buffer = memoryview(bytearray(_BLOCK))
    for name in sorted(os.listdir(checkpoint)):
        if name.endswith(".safetensors"):
            with open(os.path.join(checkpoint, name), "rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass
    os.mkdir(out)
    with open(os.path.join(out, "floor"), "wb", buffering=0) as sink:
        while nbytes > 0:
            nbytes -= sink.write(buffer[: min(_BLOCK, nbytes)])


if __name__ == "__main__":
    main()
