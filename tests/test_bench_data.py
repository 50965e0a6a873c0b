"""What the data benchmark measures with: its store is one, its passes read every clip, memory is told."""

import numpy as np

from osscl_min import bench_data
from osscl_min.config import AudioConfig
from osscl_min.data.reader import open_data
from osscl_min.data.store import read_store


def test_the_large_store_is_a_store(tmp_path):
    bench_data.write_store(tmp_path / "store", 70)
    reader = open_data(tmp_path / "store", AudioConfig(), splits=["train"]).train
    random = np.random.default_rng(0)
    expected = [random.integers(-32768, 32768, 160_000, "<i2") for _ in range(70)]
    assert np.array_equal(reader.read([69, 3]), np.stack([expected[69], expected[3]]))
    assert len({clip.machine for clip in reader.clips}) == 41
    result = bench_data.reading(str(tmp_path / "store"), 2)
    assert result["clips"] == 70 and 0 < result["seconds"] < 60
    memory = result["memory_mb"]
    assert memory is None or 0 < memory < 100  # the buffer alone has 20


def test_files_are_packed_and_read(tmp_path):
    bench_data.write_clips(tmp_path / "data", 42)
    done = bench_data.packing(str(tmp_path / "data"), str(tmp_path / "store"), 1)
    assert done["processor"] > 0 and len(read_store(tmp_path / "store")[2]) == 42
    assert bench_data.reading(str(tmp_path / "data"), 1)["clips"] == 42
