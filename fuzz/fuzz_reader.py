"""The reader against any bytes: `python -m fuzz.fuzz_reader -max_total_time=60`, with libFuzzer's options.

An input is a byte that chooses the kind of file and how small the chunks are, then the file.
"""

import json
import os
from pathlib import Path

from fuzz import running, seeds

CHUNKS = (1, 3, 64, 2**18)


def fuzz(options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["retuner"]):
        from fuzz import reading
        from retuner import json_rows

    for module, name, value in reading.SMALL_LIMITS:
        setattr(module, name, value)
    folder = Path(os.environ["FUZZ_WORK"])
    paths = [folder / f"x{suffix}" for suffix in reading.SUFFIXES]
    packed = folder / "packed"
    packed.mkdir()

    def test_one(data: bytes) -> int:
        if not data:
            return 0
        path, content = paths[data[0] % len(paths)], data[1:]
        json_rows.CHUNK_BYTES = CHUNKS[data[0] // len(paths) % len(CHUNKS)]
        path.write_bytes(content)
        whole = reading.check(path, content)
        if not path.name.endswith(".gz"):
            reading.check_packed(packed / f"{path.name}.gz", content, whole, path.name)
        return 1

    def chosen(name: str) -> list[int]:
        fits = [number for number, suffix in enumerate(reading.SUFFIXES) if name == f"x{suffix}"]
        return [number + len(paths) * chunk for number in fits for chunk in (0, len(CHUNKS) - 1)]

    begins = [
        bytes([choice]) + content
        for name, content in seeds.broken_files().items()
        for choice in chosen("x." + name.split(".", 1)[-1])
    ]
    for row in seeds.real_rows():
        line = json.dumps(row, ensure_ascii=False).encode()[: seeds.MAX_SEED_BYTES]
        begins += [bytes([choice]) + line + b"\n" + line for choice in chosen("x.jsonl")]
    running.start(test_one, begins, seeds.WORDS, options)


if __name__ == "__main__":
    running.main("fuzz.fuzz_reader", fuzz)
