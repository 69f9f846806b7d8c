"""What the disk alone takes: read the tensor files of folders to their ends, in calls of 8 MiB, one thread.

python -S -m benchmarks.verify_floor FOLDER ...
"""

import os
import sys

_BLOCK = 8 * 2**20
_TENSORS = (".safetensors", ".onnx_data", ".onnx", ".data")


def main() -> None:
    buffer = memoryview(bytearray(_BLOCK))
    for folder in sys.argv[1:]:
        for name in sorted(os.listdir(folder)):
            if name.endswith(_TENSORS):
                with open(os.path.join(folder, name), "rb", buffering=0) as source:
                    while source.readinto(buffer):
                        pass


if __name__ == "__main__":
    main()
