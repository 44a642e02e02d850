"""The examples, run as a reader would run them: in a process of their own, with what they print as the evidence."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import eventually
from fake_device import install_immediate_device
from learner_process import Learner
from torch.nn.utils import parameters_to_vector

from echo_torch import EchoSink, numpy_example

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"
BENCHMARK = EXAMPLES / "benchmark.py"

RUN_S = 90.0
"""Seconds for a whole run; it takes some ten, and twice that on a busy machine."""
GONE_S = 20.0
"""Seconds in which all its processes must have ended after it did; they take milliseconds."""
INTERRUPTED_S = 8.0
"""Seconds in which one that is interrupted must have ended; the sink may take 5 of them."""


@contextlib.contextmanager
def running(example: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """An example, in a process group of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        [sys.executable, str(example), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def alive(session: int) -> list[str]:
    """The processes of a session that still run, by their stat lines. Nobody may have collected those that ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            line = stat.read_text()
            state, _parent, _group, its_session = line.rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(line)
    return found


def assert_all_gone(session: int) -> None:
    deadline = time.monotonic() + GONE_S
    while alive(session) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(session)


def figures(pattern: str, report: str) -> list[float]:
    """The numbers that the groups of a pattern match, on the one line that it matches."""
    (line,) = re.findall(rf"^{pattern}", report, re.MULTILINE)
    return [float(number.replace(",", "")) for number in ([line] if isinstance(line, str) else line)]


def test_quickstart_delivers_every_sample() -> None:
    """The last batch of an epoch is a smaller one."""
    with running(QUICKSTART, "--epochs", "2", "--batch-size", "100") as process:
        # Both pipes end only when no process holds them any more, so nothing that it started keeps its stdout.
        report, errors = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, errors
        assert_all_gone(process.pid)
    samples = 2 * 1504
    assert figures(r"sent +([\d,]+) samples", report) == [samples]
    assert figures(r"received +([\d,]+) samples", report) == [samples]
    (accuracy,) = figures(r"accuracy +([\d.]+)%", report)
    assert 80 < accuracy <= 100
    share, sink_s, loop_s = figures(r"sink cost +([\d.]+)% .*: ([\d.]+) s of ([\d.]+) s", report)
    assert 0 < sink_s < loop_s
    assert share == pytest.approx(100 * sink_s / loop_s, abs=1)


@pytest.mark.slow
def test_quickstart_killed_leaves_no_process() -> None:
    with running(QUICKSTART, "--epochs", "1000") as process:
        assert process.stdout is not None
        assert "listens on port" in process.stdout.readline()
        process.kill()
        process.communicate(timeout=GONE_S)
        assert process.returncode == -signal.SIGKILL
        assert_all_gone(process.pid)


@pytest.fixture(scope="module")
def quickstart() -> dict[str, Any]:
    """The names that the example defines, without a run of it."""
    return runpy.run_path(str(QUICKSTART))


@pytest.mark.parametrize(
    ("indices", "flip", "says"),
    [
        ([2, 0, 1], 0, None),
        ([2, 0, 1, 2], 0, None),
        ([2], 0, "2 samples missing, such as (epoch, index) (0, 0)"),
        ([2, 0, 1, 5], 0, "1 samples never sent, such as (epoch, index) (0, 5)"),
        ([2, 0, 1], 1, "logits of 1 samples not as it was sent"),
        ([2, 0, 1, 2], 1, "logits of 1 samples not as it was sent"),
    ],
    ids=["right", "a duplicate", "missing", "never sent", "one bit", "one bit of a duplicate"],
)
def test_quickstart_check_fails_when_it_should(
    quickstart: dict[str, Any], indices: list[int], flip: int, says: str | None
) -> None:
    sent = torch.randn(1, 6, 10)  # one epoch of six digits, of which three are for training
    logits = sent[0, indices].numpy()
    logits.view(np.uint32)[-1, -1] ^= flip
    received = {"epoch": np.zeros(len(indices), np.int64), "index": np.array(indices), "logits": logits}
    expectation = pytest.raises(SystemExit, match=re.escape(says)) if says else contextlib.nullcontext()
    with expectation:
        quickstart["check_received"](received, {(0, 0), (0, 1), (0, 2)}, {"logits": sent})


@pytest.mark.slow
def test_workers_deliver_every_sample() -> None:
    with running(EXAMPLES / "workers.py", "--epochs", "2", "--samples", "250") as process:
        report, errors = process.communicate(timeout=RUN_S)
        assert (process.returncode, errors) == (0, "")
        assert_all_gone(process.pid)
    samples = 8 * 32  # rounded up
    assert figures(r"sent +([\d,]+) samples", report) == [2 * samples]
    assert figures(r"received +each of ([\d,]+) samples at least (\d+) times", report) == [samples, 2]
    (accuracy,) = figures(r"accuracy +([\d.]+)%", report)
    assert 60 < accuracy <= 100  # 95 and more in 60 orders of 16 batches; with 8, one of them was still at 50


@contextlib.contextmanager
def workers_in_an_epoch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The example while its two workers send, and its temporary folder; a short name, for sockets are there."""
    home = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(home))
        with running(EXAMPLES / "workers.py", "--epochs", "1000") as process:
            assert process.stdout is not None
            assert "listens on port" in process.stdout.readline()
            eventually(lambda: len(ledgers(home)) == 3)
            yield process, home


def ledgers(home: Path) -> list[Path]:
    """The files by which workers tell what they sent."""
    return list(home.glob("echo_torch-*/*"))


@pytest.mark.slow
def test_workers_killed_leaves_no_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its workers notice within 5 seconds, and the learner when they have ended."""
    with workers_in_an_epoch(tmp_path_factory) as (process, _):
        process.kill()
        process.communicate(timeout=GONE_S)
        assert process.returncode == -signal.SIGKILL
        assert_all_gone(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True], ids=["main", "group"])
def test_workers_interrupted_ends_at_once(tmp_path_factory: pytest.TempPathFactory, whole_group: bool) -> None:
    with workers_in_an_epoch(tmp_path_factory) as (process, home):
        began = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=GONE_S)
        assert time.monotonic() - began < INTERRUPTED_S
        assert (process.returncode, errors.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
        assert_all_gone(process.pid)
        assert not ledgers(home)


@pytest.mark.slow
def test_the_learner_of_workers_misses_what_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of 32 once instead of twice, and another three times; then it comes after all."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    child_process = importlib.import_module("quickstart").child_process
    workers = importlib.import_module("workers")
    dataset = workers.Pieces(32)
    with (
        child_process(workers.learn, numpy_example(dataset[0]), 32, 2) as learner,
        EchoSink("127.0.0.1", learner.recv(), dataset[0]) as sink,
    ):
        for index in [*range(32), 6, 6, *(index for index in range(32) if index not in (5, 6))]:
            sink.send({**dataset[index], "index": index})
        sink.wait(RUN_S)
        assert not learner.poll(1.0)
        for _ in range(32):
            sink.send({**dataset[5], "index": 5})
        assert learner.poll(RUN_S)
        assert 0 <= learner.recv() <= 1


SMALLEST = ("--cases", "29B", "--rounds", "1", "--seconds", "0.02")


@pytest.mark.slow
def test_benchmark_fills_every_table(tmp_path: Path) -> None:
    path, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    some = ("--others", "pyzmq,gloo,queue")  # without what takes long to start
    some += ("--quick", "--tables", "throughput,trips,room,memory,busy,loop,loaders,counting,dataset,others")
    with running(BENCHMARK, *SMALLEST, *some, "--json", str(path), "--plot", str(plot)) as process:
        report, errors = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, errors
        assert_all_gone(process.pid)
    tables = json.loads(path.read_text())
    senders = ("sink", "client", "stock", "stock 1024", "raw")
    assert [(row["peer"], row["sender"]) for row in tables["throughput"]] == [
        (peer, sender) for peer in ("null", "real") for sender in senders
    ]
    for first in (0, len(senders)):
        assert_ratios_hold(dict(zip(senders, tables["throughput"][first:], strict=False)))
    assert [row["case"] for row in tables["trips"]] == ["29B", "28KB"]
    assert [row["threads"] for row in tables["memory"]] == [1, 1]
    assert {row["sender"] for row in tables["busy"]} == {"sink", "client", "stock"}
    assert all(row["alone_steps_s"] > 0 and row["samples_s"] > 0 for row in tables["loop"])
    assert [row["sender"] for row in tables["loaders"]] == ["sink", "sink, not forwarded", "stock"]
    assert all(row["samples_s"] > 0 and row["kept"] > 0 for row in tables["loaders"])
    assert [row["case"] for row in tables["counting"]] == ["1 x 29B", "256 x 29B", "256 x 1KB", "64 x 28KB"]
    assert all(row["readings"] >= 4 for row in tables["counting"])  # before and after the check, and the packing
    assert [row["way"] for row in tables["dataset"]] == ["raw", "raw + copy", "EchoDataset", "copy=False"]
    assert_others(tables["others"])
    assert "Left out" not in report
    assert_drawn(plot)
    (room,) = tables["room"]
    assert room["vs_memcpy"] == pytest.approx(room["send_us"] / room["memcpy_us"])
    assert re.search(r"^The null peer was busy for \d+% \(29B\)", report, re.MULTILINE)
    assert report.count("reached\n") + report.count("missed\n") == len(tables["targets"]) > 0


def assert_others(rows: list[dict[str, Any]]) -> None:
    assert [row["sender"] for row in rows] == ["sink", "pyzmq", "gloo", "queue", "queue, shared"]
    for row in rows:
        assert all(row[key] > 0 for key in ("samples_s", "mb_s", "cpu_us", "blocked_us", "peer_busy")), row
        assert row["sink_faster"] == pytest.approx(rows[0]["samples_s"] / row["samples_s"])
        assert row["sink_cpu"] == pytest.approx(rows[0]["cpu_us"] / row["cpu_us"])
        assert row["sink_blocked"] == pytest.approx(rows[0]["blocked_us"] / row["blocked_us"])


def assert_drawn(plot: Path) -> None:
    """Whether it is a PNG, and large enough for three panels."""
    signature, width, height = struct.unpack(">8s8x2I", plot.read_bytes()[:24])
    assert signature == b"\x89PNG\r\n\x1a\n"
    assert width > 1500
    assert height > 200


def assert_ratios_hold(rows: dict[str, dict[str, float]]) -> None:
    """Whether the ratios of rows of one peer are those of their figures."""
    for row in rows.values():
        for ratio, figure in {
            "vs_stock": "samples_s",
            "cpu_vs_stock": "cpu_us",
            "blocked_vs_stock": "blocked_us",
        }.items():
            assert row[ratio] == pytest.approx(row[figure] / rows["stock"][figure])
        assert row["vs_limit"] == pytest.approx(row["samples_s"] / rows["raw"]["samples_s"])
        assert row["mb_s"] == pytest.approx(29e-6 * row["samples_s"])


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the benchmark defines, without a run of it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(BENCHMARK))


def test_benchmark_judges_the_figures_it_has(benchmark: dict[str, Any]) -> None:
    def row(case: str, sender: str, peer: str, **figures: float) -> dict[str, Any]:
        return {"case": case, "sender": sender, "peer": peer, **figures}

    rows = [
        row("29B", "sink", "real", vs_limit=0.95, cpu_vs_stock=0.07),
        row("1KB", "sink", "real", vs_limit=0.94, cpu_vs_stock=0.06),
        row("29B", "stock", "real", vs_limit=0.5, cpu_vs_stock=1.0),
        row("28KB", "sink", "real", vs_limit=0.5, cpu_vs_stock=1.0),
    ]
    judged = benchmark["judge"]({"throughput": rows, "trips": [{"case": "28KB", "vs_stock": 1.2}]})
    assert [(found["of"], found["figure"], found["verdict"]) for found in judged] == [
        ("29B sink real", 0.95, "reached"),
        ("1KB sink real", 0.94, "missed"),
        ("29B sink real", 0.07, "missed"),
        ("1KB sink real", 0.06, "reached"),
        ("28KB", 1.2, "missed"),
    ]


def test_benchmark_names_the_others_that_are_not_installed(
    benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name not in ("zmq", "ray") else None)
    assert benchmark["others"](argparse.Namespace(others=["pyzmq", "gloo", "ray"], cases=[])) == []
    assert capsys.readouterr().out.endswith("\nLeft out, as it is not installed: pyzmq, ray.\n")


def test_benchmark_trusts_only_what_arrives_as_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    others = importlib.import_module("benchmark_others")
    case = importlib.import_module("benchmark_senders").cases()["29B"]
    counter = others.BatchCounter()
    for _ in range(2):
        counter.add(others.arrays_of(case))
    counter.wait_for(2)
    others.check_received("queue", counter.report(), 2, case)
    with pytest.raises(RuntimeError, match="queue: 2 batches arrived, 3 were sent"):
        others.check_received("queue", counter.report(), 3, case)
    other = case._replace(batch={**case.batch, "done": ~case.batch["done"]})
    with pytest.raises(RuntimeError, match=r"queue: .* arrived, .* was sent"):
        others.check_received("queue", counter.report(), 2, other)
    counter.end()
    counter.wait_for(3)  # in vain, and so at once


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tables", "busy"), "--plot: got tables busy, expected one of throughput, others"),
        ((), "--plot: matplotlib is not installed: pip install 'echo-torch[bench]'"),
    ],
    ids=["nothing to draw", "no matplotlib"],
)
def test_benchmark_says_before_it_measures_that_it_cannot_draw(
    benchmark: dict[str, Any],
    options: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--plot", "figures.png", *options])
    with pytest.raises(SystemExit):
        benchmark["parse_arguments"]()
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--cases", "30B"), ("--peers", "unreal"), ("--others", "mail"), ("--tables", "none,busy")]
)
def test_benchmark_names_what_it_does_not_know(
    benchmark: dict[str, Any],
    option: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *option])
    with pytest.raises(SystemExit):
        benchmark["parse_arguments"]()
    assert f"{option[0]}: got {option[1].split(',')[0]}, expected of " in capsys.readouterr().err


@pytest.mark.parametrize(("option", "got"), [("--rounds", "0"), ("--seconds", "0"), ("--seconds", "-1")])
def test_benchmark_refuses_rounds_of_nothing(
    benchmark: dict[str, Any],
    option: str,
    got: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), option, got])
    with pytest.raises(SystemExit):
        benchmark["parse_arguments"]()
    assert f"{option}: got {got}, expected" in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark_fills_the_tables_of_a_device(
    benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one that is made of the CPU: what runs on a real one is all but the same, and its figures are others."""
    install_immediate_device(monkeypatch)
    device = importlib.import_module("benchmark_device")

    def tiny(_: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        return torch.nn.Linear(8, 4), {"input": torch.randn(16, 8), "label": torch.randint(0, 4, (16,))}

    monkeypatch.setattr(device, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(device, "SENDS", 3)
    monkeypatch.setattr(device, "STAGED_BYTES", (1 << 20, 48 << 20))
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--device", "cpu", "--rounds", "1", "--seconds", "0.001"])
    benchmark["main"]()
    report = capsys.readouterr().out
    assert report.startswith(f"torch {torch.__version__}, cpu\n")
    (verdicts,) = re.findall(r"^Targets\n(.*)", report, re.MULTILINE | re.DOTALL)
    assert len(verdicts.splitlines()) == 1 + 2 + 3 + 1 + 1 + 1
    for title in (
        "From the device into pinned rows",
        "Caller blocked in EchoSink.send",
        "Training steps",
        "What a send of",
    ):
        assert title in report


CARTPOLE = EXAMPLES / "cartpole.py"
ENDLESS = ("--updates", "1000000")


def said(pipe: Any, pattern: str) -> re.Match[str]:
    """In the first line that has it, of those that come."""
    lines = []
    for line in pipe:
        lines.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"{pattern!r} is not in what was said: {lines}")


def connected(port: int) -> int:
    """How many connections there are to a port of this machine."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(local.split(":")[1], 16) == port and state == "01" for _, local, _, state, *_ in rows)


def acting(process: subprocess.Popen[str]) -> list[int]:
    """The processes of both actors, of either engine, when they are connected to the learner."""
    port = int(said(process.stdout, r"listens on port (\d+)")[1])
    deadline = time.monotonic() + RUN_S
    while connected(port) < 2:
        assert time.monotonic() < deadline, "the actors did not come"
        time.sleep(0.02)
    found = []
    for line in alive(process.pid):
        pid = int(line.split()[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"spawn_main" in command or command.startswith(b"ray::RayActor"):
            found.append(pid)
    assert len(found) == 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_cartpole_loses_nothing(engine: str, tmp_path: Path) -> None:
    plot = tmp_path / "curve.png"
    drawn = ("--plot", str(plot)) if engine == "local" else ()
    with running(CARTPOLE, "--engine", engine, "--updates", "20", *drawn) as process:
        report, errors = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, errors
        assert engine == "ray" or errors == ""  # Ray has its say
        assert_all_gone(process.pid)
    updates, steps, seconds = figures(r"learned +([\d,]+) updates from ([\d,]+) steps in ([\d.]+) s", report)
    assert updates == 20
    assert 0.8 * 20 * 32 * 64 < steps <= 20 * 32 * 64  # without those that only begin an episode
    assert seconds > 0
    average, most = figures(r"lag +([\d.]+) updates on average, ([\d.]+) at most", report)
    assert 0 <= average <= most
    pattern = r"sent +([\d,]+) unrolls of (\d) actors, ([\d,]+) acknowledged, ([\d,]+) received"
    sent, actors, acknowledged, received = figures(pattern, report)
    assert actors == 2
    assert sent == acknowledged == received >= 20 * 32
    took, waited = figures(r"sink cost +([\d.]+)% of the actors' time; ([\d.]+)%", report)
    assert 0 < took < 100
    assert 0 <= waited <= took
    assert not drawn or 1000 < plot.stat().st_size < 100_000


@pytest.mark.slow
def test_cartpole_goes_on_without_an_actor_that_is_killed_and_not_without_any() -> None:
    with running(CARTPOLE, *ENDLESS) as process:
        first, second = acting(process)
        os.kill(first, signal.SIGKILL)
        said(process.stderr, rf"actor \d is gone: .*process {first} ended with exit code -9")
        os.kill(second, signal.SIGKILL)
        _, errors = process.communicate(timeout=RUN_S)
        assert process.returncode == 1
        assert f"process {second} ended with exit code -9" in errors
        assert errors.endswith("\nFAILED: no actor is left\n")
        assert_all_gone(process.pid)


@pytest.mark.slow
def test_cartpole_interrupted_ends_at_once() -> None:
    """And its actors do not hear of it."""
    with running(CARTPOLE, *ENDLESS) as process:
        for pid in acting(process):
            blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
            assert blocked is not None
            assert int(blocked[1], 16) >> (signal.SIGINT - 1) & 1
        assert_ends_when_interrupted(process)


def assert_ends_when_interrupted(process: subprocess.Popen[str]) -> None:
    """As by Ctrl-C, of which all of its group hear."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=GONE_S)  # which is less than it gives actors that it asks to end
    assert (process.returncode, errors.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    assert_all_gone(process.pid)


@pytest.mark.slow
def test_cartpole_on_ray_goes_on_without_an_actor_until_it_is_interrupted() -> None:
    with running(CARTPOLE, "--engine", "ray", *ENDLESS) as process:
        os.kill(acting(process)[0], signal.SIGKILL)
        said(process.stderr, r"actor \d is gone: Actor(Died|Unavailable)Error")
        assert_ends_when_interrupted(process)


@pytest.mark.slow
def test_cartpole_killed_leaves_no_process() -> None:
    """The actors notice that the learner is gone when they send."""
    with running(CARTPOLE, *ENDLESS) as process:
        acting(process)
        process.kill()
        process.communicate(timeout=GONE_S)
        assert process.returncode == -signal.SIGKILL
        assert_all_gone(process.pid)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that has the algorithm."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("cartpole_agent")


def test_cartpole_targets_are_the_returns_of_the_policy_that_acted(agent: Any) -> None:
    """Where nothing was learned since: of each step, up to the end of its episode, whatever is beyond."""
    steps, generator = 40, torch.Generator().manual_seed(0)
    values, reward = torch.rand(1, steps + 1, generator=generator), torch.rand(1, steps, generator=generator)
    terminated, valid = torch.zeros(1, steps, dtype=torch.bool), torch.ones(1, steps, dtype=torch.bool)
    terminated[0, 10] = True
    last = {10: False, 25: True, steps - 1: True}  # steps of episodes, and whether the next value counts
    valid[0, [11, 26]] = False
    batch = {"reward": reward, "terminated": terminated, "valid": valid}
    targets, advantages = agent.vtrace(values, torch.ones(1, steps), batch)
    for step in set(range(steps)) - {11, 26}:
        end = min(index for index in last if index >= step)
        rewards = torch.cat([reward[0, step : end + 1], values[0, end + 1 : end + 2] * last[end]])
        expected = (agent.DISCOUNT ** torch.arange(len(rewards)) * rewards).sum()
        assert targets[0, step].item() == pytest.approx(expected.item(), rel=1e-4)
        assert advantages[0, step].item() == pytest.approx((expected - values[0, step]).item(), abs=1e-4)


def test_cartpole_weighs_what_the_policy_would_do_by_now(agent: Any) -> None:
    """Less where it would rather not, and never more: both targets of V-trace, written out."""
    values, reward = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25]])
    nothing, all_of_it = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    batch = {"reward": reward, "terminated": nothing, "valid": all_of_it}
    targets, advantages = agent.vtrace(values, torch.tensor([[0.5, 3.0]]), batch)
    discount = agent.DISCOUNT
    second = 0.25 + discount * 4
    first = 1 + 0.5 * (0.5 + discount * 2 - 1) + discount * 0.5 * (second - 2)
    assert targets[0].tolist() == pytest.approx([first, second])
    assert advantages[0].tolist() == pytest.approx([0.5 + discount * second - 1, second - 2])


@pytest.mark.parametrize("balanced", [True, False], ids=["truncated", "terminated"])
def test_cartpole_tells_truncated_from_terminated(agent: Any, monkeypatch: pytest.MonkeyPatch, balanced: bool) -> None:
    """And the step that begins an episode from those that are acted."""
    cartpole = importlib.import_module("cartpole")
    game = cartpole.Environments(8, seed=0)
    returns, ends = np.zeros(8), np.zeros(8, bool)
    for _ in range(600):
        x, speed, angle, turning = game.observation.T
        action = (0.05 * x + 0.1 * speed + angle + 0.5 * turning > 0) if balanced else np.ones(8)
        seen = game.step(action.astype(np.int64))
        assert (seen["valid"] == ~ends).all()
        assert (abs(game.observation[ends]) <= 0.05).all()  # a new episode
        returns += seen["valid"]
        ends = seen["episode"] > 0
        assert (seen["episode"][ends] == returns[ends]).all()
        assert (seen["terminated"][ends] != balanced).all()
        assert (returns[ends] == 500).all() or not balanced
        returns[ends] = 0
        if ends.any() and balanced:
            break
    else:
        assert not balanced


@pytest.mark.slow
def test_cartpole_finds_whole_weights_however_often_they_change(agent: Any) -> None:
    engines = importlib.import_module("cartpole_engines")
    mailbox = engines.SharedMailbox(torch.zeros(50_000))
    done = threading.Event()

    def publish() -> None:
        version = 0
        while not done.is_set():
            version += 1
            mailbox.put(version, torch.full((50_000,), float(version)))

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        seen = set[int]()
        while len(seen) < 500:
            version, weights = mailbox.newest()
            assert (weights == version).all()
            seen.add(version)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("options", "missing", "says"),
    [
        (("--engine", "local,mail"), (), "--engine: got mail, expected of local, ray"),
        (("--engine", "ray"), ("ray",), "--engine: ray is not installed: pip install 'echo-torch[ray]'"),
        (
            ("--plot", "curve.png"),
            ("matplotlib",),
            "--plot: matplotlib is not installed: pip install 'echo-torch[bench]'",
        ),
    ],
    ids=["unknown", "no ray", "no matplotlib"],
)
def test_cartpole_says_what_it_needs(
    agent: Any,
    options: tuple[str, ...],
    missing: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cartpole = importlib.import_module("cartpole")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    monkeypatch.setattr(sys, "argv", ["cartpole.py", *options])
    with pytest.raises(SystemExit):
        cartpole.main()
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_vector_environments_learn(autoreset: str) -> None:
    """To balance twice as long as they can at random, in a few seconds; the actors end with their learner."""
    with running(EXAMPLES / "vector_env.py", "--autoreset", autoreset, "--target", "60") as process:
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, err
    # An actor that sends in the very moment in which the server closes sees a reset, and logs that.
    assert "Traceback" not in err
    assert re.fullmatch(r"\d+ updates, mean return \d\d+\n", out)


def test_a_window_of_vector_environments_has_each_transition_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What followed a step is the first of the next, but where an episode ended; reset steps are not valid."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("vector_env")
    for autoreset in ("next_step", "same_step"):
        with Learner(numpy_example(example.EXAMPLE), batch_size=32) as learner:
            weights = parameters_to_vector(example.Agent().parameters()).detach()
            actor = threading.Thread(target=example.act, args=(0, learner.port, weights, autoreset))
            actor.start()
            got = {name: torch.from_numpy(leaf) for name, leaf in learner.take(320).items()}
            learner.stop_server()
            actor.join(RUN_S)
            assert not actor.is_alive()
        obs, followed, done, valid = got["obs"], got["next_obs"], got["done"], got["valid"]
        goes_on = ~done[:, :-1]
        assert torch.equal(followed[:, :-1][goes_on], obs[:, 1:][goes_on])
        if autoreset == "same_step":
            assert valid.all()
            # The last observation of an episode is out of bounds, and not the first of the next.
            assert (followed[got["terminated"]].abs()[:, [0, 2]] > torch.tensor([2.4, 0.2])).any(1).all()
        else:
            assert torch.equal(~valid[:, 1:], done[:, :-1])
            assert torch.equal(followed[:, :-1], obs[:, 1:])
        assert done.any()
        assert (got["episode_return"][done] >= 8).all()


def test_a_replay_memory_behind_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    replayed = importlib.import_module("vector_env").replayed
    batches = [{"obs": torch.arange(32) + 32 * number} for number in range(5)]
    for number, memory in enumerate(replayed(batches, capacity=64, size=16)):
        assert memory["obs"].shape == (16,)
        assert memory["obs"].min() >= 32 * (number - 1)
        assert memory["obs"].max() < 32 * (number + 1)
