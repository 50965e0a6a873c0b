"""The benchmark of scoring, in its smallest form."""

from osscl_min import bench_score
from osscl_min.bench_score import case, false_alarms


def test_false_alarms_are_counted_on_clips_that_set_no_threshold(tiny_run):
    rows = false_alarms(tiny_run / "best.pt", tiny_run / "data", "cpu")
    assert [row["normal_clips"] for row in rows] == [24] * 2 + [12] * 2
    assert rows[0]["held_out_clips"] == "validation split, 4"
    assert rows[2]["held_out_clips"] == "and half of the test normals, 16"
    assert [row["rate_found"] is None for row in rows] == [True, True, True, False]  # 16 resolve 10 % alone
    assert rows[3]["rate_found"] == rows[3]["false_alarms"] / 12
    assert rows[3]["binomial_low"] <= rows[3]["rate_found"] <= rows[3]["binomial_high"]


def test_many_files_and_a_long_one(tiny_run, tmp_path, monkeypatch):
    clips = sorted((tiny_run / "data").glob("*/test/*.wav"))
    many = bench_score._many(tmp_path / "many", clips, 50)
    assert case(str(tiny_run / "best.pt"), str(many), "cpu")["windows"] == 50
    long = bench_score._long(tmp_path / "long", clips[:3], 5)
    figures = case(str(tiny_run / "best.pt"), str(long), "cpu")
    assert figures["windows"] == 9 and figures["peak_mb"] > 0 and figures["windows_per_second"] > 0
