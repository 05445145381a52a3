"""`prepare` holds a few blocks and a few bytes a row, however many rows there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, random, resource, sys
from pathlib import Path
from prepare_stage import Stage

place, count = Path(sys.argv[1]), int(sys.argv[2])
numbers = random.Random(1)
(place / "data").mkdir()
with (place / "data" / "x.jsonl").open("w") as file:
    for row in range(count):
        said = " ".join(str(numbers.randrange(10**5)) for _ in range(20))
        file.write(json.dumps({"prompt": said, "completion": f"answer {row} " * 5}) + "\\n")
facts = Stage(place).over(place / "data")
print(facts.rows_read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(place: Path, rows: int) -> int:
    """The most memory of a whole process that prepares so many rows."""
    place.mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place), str(rows)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    read, most = map(int, done.stdout.split())
    assert read == rows
    return most


@pytest.mark.slow
def test_eight_times_the_rows_take_the_same_memory(tmp_path):
    assert peak(tmp_path / "many", 400_000) <= 1.3 * peak(tmp_path / "few", 50_000)
