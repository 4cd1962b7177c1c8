"""Wall time by cause and the speed of steps, on a clock that the test holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moezoo.errors import UserError
from moezoo.train import chips, watch
from moezoo.train.watch import Speed, StepTime, WallTime


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_inside_does_not_count_for_what_is_around() -> None:
    clock = Clock()
    spent = WallTime(clock)
    clock.now = 5.0  # before the first cause: nobody's
    with spent.of("steps"):
        clock.now = 7.0
        with spent.of("save"):
            clock.now = 10.0
        clock.now = 11.0
        assert spent.seconds["steps"] == 3.0
    clock.now = 20.0
    with pytest.raises(ZeroDivisionError), spent.of("input"):
        clock.now = 21.0
        _ = 1 / 0
    found = spent.seconds
    assert (found["steps"], found["save"], found["input"]) == (3.0, 3.0, 1.0)
    assert spent.goodput == pytest.approx(3 / 7)
    spent.moved("lost", 1.0)
    assert spent.seconds["lost"] == 1.0 and spent.goodput == pytest.approx(2 / 7)
    spent.moved("lost", 100.0)  # no more than there was
    assert spent.seconds["steps"] == 0.0 and spent.seconds["lost"] == 3.0
    assert str(spent) == "7 s: save 43 %, lost 43 %, input 14 %"
    assert WallTime(clock).goodput == 0.0


def line(step: int, seconds: float, split: str = "train") -> dict[str, Any]:
    return {"step": step, "split": split, "timing": {"seconds": seconds}}


def test_an_account_goes_on_where_the_run_does(tmp_path: Path) -> None:
    clock = Clock()
    spent = WallTime(clock)
    with spent.of("compile"):
        clock.now = 4.0
    with spent.of("steps"):
        clock.now = 14.0
    watch.keep(tmp_path, spent, 20)
    # It goes on from step 10: what was counted up to 20, and steps up to 30, have to be done again.
    again = WallTime()
    lines = [line(10, 5.0), line(20, 6.0), line(20, 9.0, "test"), line(30, 7.0)]
    said: list[str] = []
    lines += [line(40, float("nan")), {"step": 50, "split": "train", "timing": [3]}]
    watch.resume(again, tmp_path, 10, lines, said.append)
    assert not said
    found = again.seconds
    assert (found["compile"], found["steps"], found["lost"]) == (4.0, 4.0, 13.0)
    new = WallTime()
    watch.resume(new, tmp_path / "other", 0, [], said.append)
    assert sum(new.seconds.values()) == 0.0
    for damage in ("{", "[]", '{"seconds": {}}', '{"seconds": 3}'):
        (tmp_path / watch.NAME).write_text(damage)
        with pytest.raises(UserError, match="wall_time.json' is damaged: wall time counts from"):
            watch.kept(tmp_path)
        watch.resume(new, tmp_path, 10, [], said.append)  # which keeps no run from going on
    assert len(said) == 4 and sum(new.seconds.values()) == 0.0


def test_speed_of_steps() -> None:
    speed = Speed(16, "images", 4, chips.of_kind("NVIDIA H100 80GB HBM3"))
    assert speed.taken() == {}
    for seconds in (0.1, 0.1, 0.1, 0.5):
        speed.step(StepTime(seconds, 0.02, 1e12))
    found = speed.taken()
    assert found["steps_per_second"] == pytest.approx(5.0)
    assert found["images_per_second"] == pytest.approx(80.0)
    assert found["images_per_second_per_device"] == pytest.approx(20.0)
    assert found["step_ms_median"] == pytest.approx(100.0)
    assert 100.0 < found["step_ms_p95"] <= 500.0
    assert found["input_wait"] == pytest.approx(0.1)
    # 4e12 operations in 0.8 s on four devices.
    assert found["tflops_per_device"] == pytest.approx(1.25)
    assert found["mfu"] == pytest.approx(1.25e12 / 989e12)
    assert speed.taken() == {}
    speed.step(StepTime(0.1, 0.0, None))
    assert "mfu" not in speed.taken()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_chips_by_the_names_that_jax_gives_them(kind: str, name: str) -> None:
    found = chips.of_kind(kind)
    assert found is not None and found.name == name


def test_unknown_chips() -> None:
    assert chips.of_kind("cpu") is None and chips.of_topology("v99:2x2") is None
    found = chips.of_topology("v5p:2x2x4")
    assert found is not None and found.memory == 95e9
