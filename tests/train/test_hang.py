"""A run that stands still says so once, with what its threads do."""

from __future__ import annotations

import threading
import time

from moezoo.train.hang import HangWatch, stacks


def waits_for_ever(over: threading.Event) -> None:
    over.wait()


def test_every_thread_is_shown() -> None:
    over = threading.Event()
    thread = threading.Thread(target=waits_for_ever, args=(over,))
    thread.start()
    try:
        text = stacks()
    finally:
        over.set()
        thread.join()
    assert "waits_for_ever" in text and "test_every_thread_is_shown" in text


def test_it_speaks_once_for_each_standstill() -> None:
    said: list[str] = []
    with HangWatch("process 3", 0.2, said.append, look=0.02) as watch:
        watch.beat("doing step 7")
        until = time.monotonic() + 10
        while not said and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)
        assert len(said) == 1
        watch.beat("doing step 8")
        while len(said) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    assert said[0].startswith("process 3 has been doing step 7 for ")
    assert "test_it_speaks_once" in said[0] and "doing step 8" in said[1]


def test_without_a_limit_it_says_nothing() -> None:
    said: list[str] = []
    before = threading.active_count()
    with HangWatch("process 0", 0.0, said.append) as watch:
        watch.beat("doing step 1")
        assert threading.active_count() == before
    assert said == []


def test_progress_keeps_it_quiet() -> None:
    said: list[str] = []
    with HangWatch("process 0", 2.0, said.append, look=0.02) as watch:
        for step in range(50):  # longer than the limit
            watch.beat(f"doing step {step}")
            time.sleep(0.05)
    assert said == []
