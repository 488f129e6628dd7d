"""What a person sees: plain lines in a file, one live line on a terminal, and no garbage left of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pretrain.errors import Exit
from pretrain.terminal import clock, short
from tests.distributed import REPOSITORY, die_with_parent
from tests.pretrain import running
from tests.training import write_config

COLUMNS = 100


class Screen:
    """A small terminal: what it shows after all these characters. Raises AssertionError on a sequence that it does not
    know, so that nothing goes unseen."""

    def __init__(self, text: str) -> None:
        self.lines, self.row, self.column = [""], 0, 0
        self.cursor_shown = True
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]|\x1b", text):
            if len(part) > 1:
                self._control(part[2:-1], part[-1])
            else:
                self._show(part)

    def _control(self, number: str, letter: str) -> None:
        if (number, letter) in (("?25", "l"), ("?25", "h")):
            self.cursor_shown = letter == "h"
        elif (number, letter) == ("2", "K"):
            self.lines[self.row] = ""
        elif letter == "A":
            self.row -= int(number)
        else:
            assert letter == "m", f"unknown control sequence {number}{letter}"

    def _show(self, character: str) -> None:
        assert character != "\x1b"
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            self.lines += [""] * (self.row - len(self.lines) + 1)
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


class Session:
    """`python -m pretrain ARGUMENTS` on a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))

        def take_terminal() -> None:
            die_with_parent()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        ignored = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")
        environment = {name: value for name, value in os.environ.items() if name not in ignored}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pretrain", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**environment, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.raw = b""

    def read_until(self, text: str) -> None:
        """Up to the text, or to the end."""
        while text.encode() not in self.raw or not text:
            try:
                more = os.read(self.ours, 65536)
            except OSError:  # the other side is closed
                more = b""
            if not more:
                assert not text, f"{text!r} never came:\n{self.raw.decode()}"
                return
            self.raw += more

    def press(self, key: bytes) -> None:
        os.write(self.ours, key)

    def end(self) -> tuple[int, str]:
        self.read_until("")
        os.close(self.ours)
        return self.process.wait(timeout=60), self.raw.decode()


def test_a_file_gets_plain_lines_one_a_logged_step(tiny_data: Path) -> None:
    told = (running.trained(tiny_data).parent / "stdout").read_text()
    assert "\x1b" not in told and "\r" not in told
    line = r"step (\d+)/12: loss \d\.\d{4}, grad norm \d\.\d{3}, lr \d\.\d\de-0\d(?:, [\d,]+ tokens/s, MFU \d+\.\d%)?, ETA "
    found = re.findall(rf"^{line}(?:-:--:--|\d:\d\d:\d\d)$", told, re.MULTILINE)
    assert found == [str(step) for step in range(1, 13)]
    assert re.search(r"^step 12: validation loss \d\.\d{4}, \d\.\d{3} bits a byte$", told, re.MULTILINE)
    assert re.search(r"^finished: 12 steps, 2\.5K tokens, [\d,]+ tokens/s$", told, re.MULTILINE)
    assert re.search(r"^validation loss 6\.\d{3} at the start, \d\.\d{3} now$", told, re.MULTILINE)
    assert (running.trained(tiny_data).parent / "stderr").read_text() == ""


def test_a_terminal_gets_one_live_line_with_an_eta_and_is_left_clean(tmp_path: Path, tiny_data: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    session = Session("train", config, *running.SHORT, "schedule.total=60 steps", "monitor.validate_every=20 steps")
    code, raw = session.end()
    assert code == 0, raw
    assert re.search(r"step \d+/60 .*loss \d\.\d{4}  [\d,]+ tokens/s ETA \d:\d\d:\d\d", raw)
    screen = Screen(raw)
    assert screen.cursor_shown
    shown = [line.rstrip() for line in screen.lines if line.strip()]
    live = [line for line in shown if "ETA" in line]
    assert len(live) == 1 and live[0].startswith("step 60/60 ") and live[0].endswith("ETA 0:00:00"), shown
    assert all(len(line) <= COLUMNS for line in live)
    kept = [line for line in shown if line not in live]
    assert all(
        re.match(r"/|60 steps, |kernels: |step \d+: (validation|saved)|finished: 60|validation loss", line)
        for line in kept
    )
    assert [line for line in kept if ": validation loss" in line][-1].startswith("step 60: ")
    assert shown[-2].startswith("finished: 60 steps"), "what remains is said below the line"


def test_ctrl_c_on_a_terminal_saves_and_leaves_it_clean(tmp_path: Path, tiny_data: Path) -> None:
    long = ("schedule.total=1000000 steps", "monitor.validate_every=null", "checkpoint.every=1000000 steps")
    session = Session("train", write_config(tmp_path, tiny_data), *running.SHORT, *long)
    session.read_until("tokens/s")
    session.press(b"\x03")
    code, raw = session.end()
    assert code == Exit.STOPPED, raw
    screen = Screen(raw)
    shown = [line.rstrip() for line in screen.lines if line.strip()]
    assert screen.cursor_shown and "Traceback" not in raw
    [step] = running.steps_of(tmp_path / "run")
    assert any("saving after this step (Ctrl-C again to leave at once)" in line for line in shown), shown
    assert shown[-1].strip() == f"python -m pretrain train {tmp_path / 'run'}"
    assert shown[-2].startswith(f"stopped after step {step:,}, which is saved")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00")],
)
def test_a_time_is_told_in_hours_minutes_and_seconds(seconds: float, words: str) -> None:
    assert clock(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0"), (999, "999"), (1234, "1.23K"), (1234567, "1.23M"), (7e9, "7B"), (1.5e13, "15T")]
)
def test_a_count_is_told_in_three_digits(count: float, words: str) -> None:
    assert short(count) == words
