import time

import pytest

from slimserve.core import progress as module
from slimserve.core.progress import progress


def test_plain_lines_show_the_count_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLAIN_EVERY_S", 0.0)
    with progress("building", 4, "blocks") as tick:
        time.sleep(0.01)
        tick(2, note="1.0 GiB")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "building …"
    assert lines[1].startswith("building: 2/4 blocks after 0 s, about 0 s left (1.0 GiB)")
    assert lines[-1].startswith("building: done in ")


def test_plain_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("building", 1000, "blocks") as tick:
        for done in range(1000):
            tick(done)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_progress_bars_of_libraries_stay_out_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm

    from slimserve.core.progress import hidden_bars

    with hidden_bars():
        assert list(tqdm(range(3), desc="unpacking")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    list(tqdm(range(3), desc="unpacking"))
    assert "unpacking" in capsys.readouterr().err
