"""The command line, run in this process but for what only a process of its own can show."""

from __future__ import annotations

import collections
import contextlib
import enum
import fcntl
import http.server
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import echo
import numpy as np
import optree
import pytest
import torch
from learner_process import Learner
from peers import Peer, PeerConnection, Script, full_queue, greeting

from echo_torch import EchoSink, numpy_example
from echo_torch.cli import bench, main
from echo_torch.cli.example import server_code
from echo_torch.cli.table import table
from echo_torch.samples.spec import SampleSpec
from echo_torch.wire.protocol import WireLeaf, encode_handshake

SOON = ("--timeout", "0.3")
"""For a server that is not meant to answer."""
END_S = 30.0
"""Seconds in which a process must have ended; it takes milliseconds."""

EXAMPLES = """
import torch
from torch.utils.data import IterableDataset, TensorDataset

sample = {"obs": torch.zeros(4), "action": torch.tensor(1)}
batch = {"obs": torch.zeros(64, 4), "action": torch.zeros(64, dtype=torch.int64)}
other = {"obs": torch.zeros(4, dtype=torch.float64), "action": torch.tensor(1)}
longer = {**sample, "reward": 0.0, "weight": 0.0}
text = {"prompt": "hello"}
dataset = TensorDataset(torch.zeros(10, 4), torch.zeros(10, dtype=torch.int64))


def made():
    return sample


def broken():
    raise RuntimeError("no\\nluck")


class Made(TensorDataset):
    def __init__(self):
        super().__init__(torch.zeros(10, 4))


class Stream(IterableDataset):
    def __iter__(self):
        yield sample


class config:
    sample = sample
"""
NUMPY_SAMPLE = {"obs": np.zeros(4, np.float32), "action": np.zeros((), np.int64)}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module ``mine`` in the current directory, which is not on the path of imports."""
    (tmp_path / "mine.py").write_text(EXAMPLES)
    (tmp_path / "failing.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "exiting.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)  # for processes
    yield
    for name in ("mine", "failing", "exiting"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; gives its exit code, what it printed, and what it printed as errors."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code: Any = main(argv)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def without_times(text: str) -> str:
    return re.sub(r"^(\w+) +\d+\.\d+ ms", r"\1 T ms", text, flags=re.MULTILINE)


def silence(conn: PeerConnection) -> None:
    """Says nothing, and stays whatever the client does."""
    conn.receive_all()
    assert conn.received == b""


def say(data: bytes) -> Script:
    def script(conn: PeerConnection) -> None:
        conn.send(data)
        conn.receive_all()
        assert conn.received == b""

    return script


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    """The port of a server of HTTP."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


# doctor: what is right.

CAVEAT = "the wire carries no names and no dtypes: compare these with the learner yourself"


def test_doctor_finds_nothing_wrong_with_a_server_that_fits(tmp_path: Path) -> None:
    """Run as a user does."""
    with Learner(NUMPY_SAMPLE) as learner:
        address = f"localhost:{learner.port}"
        command = [sys.executable, "-W", "error", "-m", "echo_torch", "doctor", address, "--example", "mine:sample"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=END_S)
    assert (done.returncode, done.stderr) == (0, "")
    steps, spec, *_ = without_times(done.stdout).split("\n\n")
    assert steps.splitlines()[1:] == [
        f"connect T ms  127.0.0.1:{learner.port}",
        "handshake T ms  an echo server, wire version 1, 2 arrays and 24 bytes per sample",
    ]
    assert re.fullmatch(r"resolve T ms  (::1, )?127\.0\.0\.1", steps.splitlines()[0])
    assert spec.splitlines() == [
        "leaf  server       example",
        "   0  8-byte  []   8-byte   []   ['action'] torch.int64",
        "   1  4-byte  [4]  4-byte   [4]  ['obs'] torch.float32",
    ]
    assert done.stdout.endswith(f"\n\nOK: {address} takes samples; the sizes of the example fit; {CAVEAT}\n")


def test_doctor_shows_what_a_server_expects(run) -> None:
    with Peer(say(greeting([np.zeros((3, 84, 84), np.uint8), np.zeros((), "V16")])), "::1") as peer:
        code, out, err = run("doctor", f"[::1]:{peer.port}")
    assert (code, err) == (0, "")
    assert without_times(out) == (
        "resolve T ms  ::1\n"
        f"connect T ms  [::1]:{peer.port}\n"
        "handshake T ms  an echo server, wire version 1, 2 arrays and 21,184 bytes per sample\n"
        "\n"
        "leaf  server\n"
        "   0  1-byte   [3, 84, 84]\n"
        "   1  16-byte  []\n"
        "\n"
        f"OK: [::1]:{peer.port} takes samples; give --example to compare with what you send; {CAVEAT}\n"
    )


# doctor: what is wrong. Whatever it is, nothing is sent.

START_IT = "start the server as the command `example` prints it, or send what the server expects"
FIRST = "leaf 0 differs: server expects 8-byte items [], example has"


@pytest.mark.parametrize(
    ("example", "row", "says"),
    [
        (
            "other",
            "   1  4-byte  [4]  8-byte   [4]  ['obs'] torch.float64   DIFFERS",
            "leaf 1 differs: server expects 4-byte items [4], example has ['obs']: torch.float64 [4] (8-byte items); "
            + START_IT,
        ),
        (
            "longer",
            "   2  nothing       8-byte   []   ['reward'] torch.float64  DIFFERS",
            "leaf 2 differs: server expects nothing more, example has ['reward']: torch.float64 [] (8-byte items), "
            f"and 1 more differ; {START_IT}",
        ),
        (
            "batch",
            "   1  4-byte  [4]  4-byte   [64, 4]  ['obs'] torch.float32   DIFFERS",
            f"{FIRST} ['action']: torch.int64 [64] (8-byte items), and 1 more differ; the example is a batch: give one "
            "sample of it",
        ),
        (
            "Made",
            "   1  4-byte  [4]  nothing                          DIFFERS",
            f"{FIRST} [0]: torch.float32 [4] (4-byte items), and 1 more differ; {START_IT}",
        ),
    ],
)
def test_doctor_names_the_leaf_that_differs(run, example: str, row: str, says: str) -> None:
    with Peer(say(greeting(NUMPY_SAMPLE))) as peer:
        code, out, err = run("doctor", f"127.0.0.1:{peer.port}", "--example", f"mine:{example}")
    assert (code, err) == (1, f"FAILED: 127.0.0.1:{peer.port}: {says}\n")
    assert row in out.splitlines()
    assert "OK" not in out


def test_doctor_of_a_web_server(run) -> None:
    with web_server() as port:
        code, _, err = run("doctor", f"127.0.0.1:{port}", *SOON)
    what = "no echo server: it waits for its client to speak first, as HTTP servers do, and proxies with TLS"
    assert (code, err) == (1, f"FAILED: 127.0.0.1:{port}: {what}; check the port, or give --tls-ca\n")


def test_doctor_of_a_closed_port(run) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        peer = f"127.0.0.1:{nobody.getsockname()[1]}"
        code, _, err = run("doctor", peer)
    why = "nobody listens there (Connection refused); start the learner first, or check the port"
    assert (code, err) == (1, f"FAILED: {peer}: {why}\n")


def test_doctor_of_a_learner_that_is_stopped(run) -> None:
    """It takes no harm from that."""
    with Learner(NUMPY_SAMPLE) as learner:
        learner.freeze()
        peer = f"127.0.0.1:{learner.port}"
        code, _, err = run("doctor", peer, *SOON)
        learner.thaw()
        what = "accepts connections, but sends nothing and does not notice that we closed (waited 0.3 s)"
        why = "its process is stopped or hangs, or it is a forwarded port: look at the learner's process"
        assert (code, err) == (1, f"FAILED: {peer}: {what}; {why}\n")
        with EchoSink("127.0.0.1", learner.port, NUMPY_SAMPLE) as sink:
            sink.send({"obs": np.ones((32, 4), np.float32), "action": np.ones(32, np.int64)})
            assert (learner.take(32)["obs"] == 1).all()


def nothing_there(conn: PeerConnection) -> None:
    conn.close()


ECHO = greeting(NUMPY_SAMPLE)
OTHER_PORT = "check the port: something else listens there"
NOT_THERE = "a proxy or a forwarded port with nothing behind it does so: check that the learner runs"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (silence, ": accepts connections, but sends nothing and does not notice that we closed (waited 0.3 s); "),
        (
            say(b"SSH-2.0-OpenSSH_9.6\r\n"),
            f": unexpected handshake magic: got b'SSH-', expected b'ECHO'; no echo server?; {OTHER_PORT}\n",
        ),
        (
            say(ECHO[:4] + b"\2" + ECHO[5:]),
            ": unsupported echo wire version 2; this client speaks 1; "
            "install an echo-torch and an id-echo that speak the same\n",
        ),
        (
            say(ECHO[:5] + struct.pack("<I", 2**31) + ECHO[9:]),
            f": handshake announces {2**31} num_arrays, more than the 4096 that this client accepts; {OTHER_PORT}\n",
        ),
        (
            say(ECHO[:7]),
            ": handshake not complete within 0.3 s; got 7 bytes of it; check the network, and whether that is an echo "
            "server\n",
        ),
        (nothing_there, f" closed the connection during the handshake, after 0 bytes; {NOT_THERE}\n"),
        (
            say(encode_handshake([])),
            ": samples of no bytes are nothing to send; give the server another example\n",
        ),
    ],
    ids=["silent", "ssh", "version", "too many", "partial", "hangs up", "empty"],
)
def test_doctor_of_other_peers(run, script: Script, says: str) -> None:
    with Peer(script) as peer:
        code, _, err = run("doctor", f"127.0.0.1:{peer.port}", *SOON)
    assert code == 1
    assert err.startswith(f"FAILED: 127.0.0.1:{peer.port}{says}")
    assert err.count("\n") == 1


def test_doctor_of_a_host_that_does_not_answer(run) -> None:
    with full_queue() as listener:
        peer = f"127.0.0.1:{listener.getsockname()[1]}"
        code, _, err = run("doctor", peer, *SOON)
    remedy = "check the address, and whether a firewall drops what is sent"
    assert (code, err) == (1, f"FAILED: {peer}: nothing answers there (no connection within 0.3 s); {remedy}\n")


def test_doctor_of_what_can_be_no_name(run) -> None:
    code, out, err = run("doctor", "nobody..invalid:50051")
    assert (code, out) == (2, "")
    assert "argument HOST:PORT: host: got 'nobody..invalid', expected a name or an address" in err


def test_doctor_of_a_name_that_does_not_resolve(run) -> None:
    host = "nobody.invalid"
    code, out, err = run("doctor", f"{host}:50051")
    assert (code, out) == (1, "")
    problem = rf"FAILED: {host}:50051: the name does not resolve \(.+\); check it, or give an IP address\n"
    assert re.fullmatch(problem, err)


def test_doctor_of_a_host_to_which_there_is_no_way(run) -> None:
    """TCP connects to no broadcast address."""
    code, _, err = run("doctor", "127.255.255.255:50051")
    problem = r"FAILED: 127.255.255.255:50051: no way there \(.+\); check the address and the network\n"
    assert code == 1
    assert re.fullmatch(problem, err)


# Arguments.


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("learner", "got 'learner', expected HOST:PORT, such as learner:50051 or [::1]:50051"),
        (":50051", "got ':50051', expected HOST:PORT, "),
        ("::1:50051", "got '::1:50051', expected HOST:PORT, "),
        ("tcp://learner:50051", "got 'tcp://learner:50051', expected HOST:PORT, "),
        ("learner:echo", "got 'learner:echo', expected a number after the last colon"),
        ("learner:-1", "got 'learner:-1', expected a number after the last colon"),
        ("learner:0", "port: got 0, expected at least 1"),
        ("learner:65536", "port: got 65536, expected 1 to 65535"),
    ],
)
def test_an_address_that_is_none_is_refused(run, address: str, says: str) -> None:
    for command in ("doctor", "bench"):
        code, out, err = run(command, address)
        assert (code, out) == (2, "")
        assert f"echo-torch {command}: error: argument HOST:PORT: {says}" in err


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("mine", "got 'mine', expected MODULE:OBJECT, such as mymodule:dataset"),
        (":sample", "got ':sample', expected MODULE:OBJECT"),
        ("thine:sample", "no module thine: neither in "),
        ("mine.py:sample", "no module mine.py: neither in "),
        (
            "failing:sample",
            "importing failing raised ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        ),
        ("exiting:sample", "importing exiting raised SystemExit: 3"),
        ("mine:nothing", "mine:nothing: mine has no 'nothing'"),
        ("mine:config.nothing", "mine:config.nothing: config has no 'nothing'"),
        ("mine:broken", "mine:broken: getting a sample from it raised RuntimeError: no luck"),
        ("mine:text", "mine:text: example['prompt']: got str, expected a tensor, numpy array or number; encode it"),
    ],
)
def test_an_example_that_is_none_is_refused(run, example: str, says: str) -> None:
    code, out, err = run("example", example)
    assert (code, out) == (2, "")
    usage, problem = err.splitlines()
    assert usage.startswith("usage: echo-torch example ")
    assert problem.startswith(f"echo-torch example: error: argument MODULE:OBJECT: {says}")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "error: the following arguments are required: COMMAND"),
        (("cure",), "invalid choice: 'cure'"),
        (("doctor", "learner:1", "--timeout", "0"), "argument --timeout: got '0', expected seconds, more than 0"),
        (("bench", "learner:1", "--seconds", "soon"), "argument --seconds: got 'soon', expected seconds, more than 0"),
        (("bench", "learner:1", "--batch-size", "0"), "argument --batch-size: got '0', expected a whole number of at"),
        (("serve",), "error: the following arguments are required: --example"),
        (("serve", "--example", "mine:sample", "--port", "65536"), "--port: got '65536', expected 0 to 65535"),
    ],
)
def test_arguments_that_are_wrong_are_refused(run, argv: tuple[str, ...], says: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.parametrize("command", ["doctor", "bench", "example", "serve"])
def test_every_command_has_help(run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: echo-torch {command} ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sample", numpy_example(NUMPY_SAMPLE)),
        ("config.sample", numpy_example(NUMPY_SAMPLE)),
        ("made", numpy_example(NUMPY_SAMPLE)),
        ("Stream", numpy_example(NUMPY_SAMPLE)),
        ("dataset", (np.zeros(4, np.float32), np.zeros((), np.int64))),
        ("Made", (np.zeros(4, np.float32),)),
    ],
)
def test_an_example_is_a_sample_or_what_gives_one(run, name: str, expected: Any) -> None:
    code, out, err = run("example", f"mine:{name}")
    assert (code, err) == (0, "")
    assert_same(made_by(out), expected)


# bench.


def test_bench_delivers_what_it_says(run) -> None:
    with Learner(NUMPY_SAMPLE) as learner:
        code, out, err = run("bench", f"127.0.0.1:{learner.port}", "--seconds", "0.2", "--batch-size", "64")
        assert (code, err) == (0, "")
        warning, sending, sent, _, *report = out.splitlines()
        assert warning.startswith(f"warning: this fills the learner at 127.0.0.1:{learner.port} with samples of zeros")
        assert sending == "sending batches of 64 samples of 24 bytes for 0.2 s"
        (samples,) = re.findall(r"^sent ([\d,]+) samples, all acknowledged; the last 8 twice$", sent)
        count = int(samples.replace(",", ""))
        received = learner.take(count)
        assert len(received["action"]) == count > 0
        assert not received["action"].any()
        assert not received["obs"].any()
    assert [line.split()[0] for line in report] == ["samples/s", "MB/s", "CPU", "blocked"]
    figures = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in report}
    assert figures["MB/s"] == pytest.approx(24e-6 * figures["samples/s"], abs=0.06)
    assert 0 < figures["samples/s"] <= count / 0.2
    assert 0 <= figures["blocked"] <= 100


def test_bench_sends_items_of_any_size(run) -> None:
    dtypes = ["u1", "u2", "V3", "u4", "u8", "V16", "V100"]
    with Learner([np.zeros(2, dtype) for dtype in dtypes]) as learner:
        code, out, _ = run("bench", f"127.0.0.1:{learner.port}", "--seconds", "0.01", "--batch-size", "32")
        assert code == 0
        assert "sending batches of 32 samples of 268 bytes" in out
        for leaf in learner.take(32):
            assert not leaf.view(np.uint8).any()


def test_bench_makes_no_batch_that_does_not_fit_into_memory(run, monkeypatch) -> None:
    monkeypatch.setattr(bench, "BATCH_BYTES", 4100)

    def take_all(conn: PeerConnection) -> None:
        conn.send_handshake([np.zeros(1000, np.uint8)])
        conn.receive_all(ack_every=1000)

    with Peer(take_all) as peer:
        code, out, _ = run("bench", f"127.0.0.1:{peer.port}", "--seconds", "0.01")
    assert code == 0
    assert "sending batches of 4 samples of 1,000 bytes" in out


def test_bench_names_what_numpy_cannot_make(run) -> None:
    with Peer(say(encode_handshake([WireLeaf(2**32 - 1, (1,))]))) as peer:
        code, _, err = run("bench", f"127.0.0.1:{peer.port}")
    assert code == 1
    problem = rf"FAILED: 127\.0\.0\.1:{peer.port}: samples of 4,294,967,295 bytes cannot be made here \(.+\); "
    assert re.fullmatch(f"{problem}is that the right server\\?\n", err)


def test_bench_gives_up_on_a_learner_that_does_not_drain(run, monkeypatch) -> None:
    monkeypatch.setattr(bench, "STALL_S", 0.2)
    with Peer(lambda conn: (conn.send_handshake(NUMPY_SAMPLE), conn.receive_all())) as peer:
        code, _, err = run("bench", f"127.0.0.1:{peer.port}", "--seconds", "60")
    assert code == 1
    problem = rf"FAILED: 127\.0\.0\.1:{peer.port}: nothing was acknowledged for 0.2 s, and [\d,]+ samples are left; "
    assert re.fullmatch(rf"{problem}is the learner stopped, or does it not drain\?\n", err)


def test_bench_of_a_learner_that_goes_away(run) -> None:
    def script(conn: PeerConnection) -> None:
        conn.send_handshake(NUMPY_SAMPLE)
        conn.receive(24 * 100)
        conn.close()

    with Peer(script) as peer:
        code, _, err = run("bench", f"127.0.0.1:{peer.port}", "--seconds", "60")
    assert code == 1
    problem = rf"FAILED: 127\.0\.0\.1:{peer.port}: the peer closed the connection; .+ samples un-acked; "
    assert re.fullmatch(rf"{problem}is the learner still running\?\n", err)


def test_bench_reaches_a_server_as_doctor_does(run) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        code, out, err = run("bench", f"127.0.0.1:{nobody.getsockname()[1]}")
    assert (code, out) == (1, "")
    assert "nobody listens there" in err


# example.


def made_by(code: str) -> Any:
    """The example that the server of a program has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(echo, "Server", lambda example, **_: example)
        names: dict[str, Any] = {}
        exec(code, names)
    return names["server"]


def assert_same(got: Any, expected: Any) -> None:
    """Whether two trees of numpy arrays have the same leaves, in the same order and at the same paths."""
    ours, theirs = SampleSpec(got).leaves, SampleSpec(expected).leaves
    assert [(leaf.key_path, leaf.shape, leaf.wire_dtype) for leaf in ours] == [
        (leaf.key_path, leaf.shape, leaf.wire_dtype) for leaf in theirs
    ]


Point = collections.namedtuple("Point", "x y")


DTYPES = ["?", "i1", "u2", "f2", "f4", "c8", "c16", "g", ">f4", ">i8", "V7", "M8[ns]", "m8[s]"]


class Color(str, enum.Enum):
    RED = "r"
    BLUE = "b"


class Digit(enum.IntEnum):
    TWO = 2
    ONE = 1


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(3),
        5,
        [torch.zeros(()), 1.0, True, 1j],
        (torch.zeros(2, 0), torch.zeros(1)),
        {"b": torch.zeros(1), "a": {"it's": 1, 'a "b"\n': (2,)}},
        {2: 1.0, 1: True},
        {Color.RED: 1, Color.BLUE: 1.0},
        {Digit.TWO: 1, Digit.ONE: 1.0},
        collections.OrderedDict(b=1, a=2.0),
        collections.defaultdict(list, b=1, a=2.0),
        collections.deque([1, 2.0]),
        Point([], Point(None, torch.zeros(4))),
        {"empty": (), "none": None, "one": torch.zeros(1)},
        {dtype: np.zeros(2, dtype) for dtype in DTYPES},
        np.zeros(2, [("x", "f4"), ("y", "i8", 3)]),
        np.rec.fromarrays([np.zeros(2), np.zeros(2, np.int8)], names="x,y"),
        [torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float8_e5m2, torch.uint16)],
    ],
)
def test_example_code_makes_the_same_server(example: Any) -> None:
    assert_same(made_by(server_code(SampleSpec(example))), numpy_example(example))


def test_example_of_a_key_without_code(run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("sample = {frozenset(): 1}")
    code, out, err = run("example", "mine:sample")
    assert (code, out) == (1, "")
    assert err == "FAILED: the key frozenset() has no code that gives it; use strings as keys\n"


def test_example_says_how_to_see_what_numpy_lacks(run, tmp_path: Path) -> None:
    """What is printed is run as it is, but for the port, and the code in its comment on what then arrives."""
    values = torch.arange(32 * 3, dtype=torch.bfloat16).reshape(32, 3)
    (tmp_path / "mine.py").write_text(
        "import torch\nsample = {'x': (torch.zeros(3, dtype=torch.bfloat16),), 'n': 1, 'l': [1.0]}"
    )
    code, out, _ = run("example", "mine:sample")
    assert code == 0
    assert out == (
        "import echo\n"
        "import numpy as np\n"
        "\n"
        "server = echo.Server(\n"
        "    {\n"
        "        'l': [\n"
        "            np.zeros((), np.float64),\n"
        "        ],\n"
        "        'n': np.zeros((), np.int64),\n"
        "        'x': (\n"
        "            np.zeros((3,), np.uint16),  # torch.from_numpy(sample.batch['x'][0]).view(torch.bfloat16)\n"
        "        ),\n"
        "    },\n"
        "    batch_size=256,\n"
        "    transport=echo.TcpTransport(port=50051),\n"
        ")\n"
    )
    names: dict[str, Any] = {"torch": torch}
    exec(out.replace("50051", "0").replace("256", "32"), names)
    names["server"].start()
    try:
        example = {"x": (values[0],), "n": 1, "l": [1.0]}
        with EchoSink("127.0.0.1", names["server"].port, example) as sink:
            sink.send({"x": (values,), "n": torch.zeros(32, dtype=torch.int64), "l": [torch.zeros(32).double()]})
            names["sample"] = names["server"].sample()
            (comment,) = re.findall("# (.*)", out)
            # Read-only memory, which torch warns of; the learner may copy it first.
            names["sample"] = names["sample"]._replace(batch=optree.tree_map(np.copy, names["sample"].batch))
            assert torch.equal(eval(comment, names), values)
    finally:
        names["server"].close()


# serve.


@contextlib.contextmanager
def serving(stderr: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves, and its port."""
    command = [sys.executable, "-W", "error", "-m", "echo_torch", "serve", "--example", "mine:sample", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            assert process.stdout is not None
            (port,) = re.findall(
                r"^listening on port (\d+) for samples of "
                r"\{\['action'\]: torch.int64 \[\], \['obs'\]: torch.float32 \[4\]\}; Ctrl-C ends$",
                process.stdout.readline(),
            )
            yield process, int(port)
        finally:
            process.kill()


def send(port: int, count: int) -> None:
    """Send samples, the last 8 of them twice, as closing does."""
    with EchoSink("127.0.0.1", port, NUMPY_SAMPLE) as sink:
        sink.send({"obs": np.zeros((count, 4), np.float32), "action": np.zeros(count, np.int64)})


def test_serve_counts_what_it_takes_until_it_is_interrupted() -> None:
    with serving() as (process, port):
        send(port, 70)
        assert process.stderr is not None
        assert process.stderr.readline() == "64 samples, 64 of them in the last second\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=END_S)
    assert (process.returncode, err) == (0, "")
    assert re.fullmatch(r"took 64 samples in \d+\.\d s, in full batches of 32\n", out)


def test_serve_shows_a_bar_at_a_terminal() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(ours, "rb", buffering=0) as terminal, serving(theirs) as (process, port):
        os.close(theirs)
        send(port, 96)
        shown = b""
        while b"96.0 samples" not in shown:
            assert select.select([terminal], [], [], END_S)[0], shown
            shown += terminal.read(1000)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # nobody has the other end any more
            while terminal.read(1000):
                pass
        out, _ = process.communicate(timeout=END_S)
    assert process.returncode == 0
    assert out.startswith("took 96 samples in ")


def test_serve_on_a_port_that_is_taken(run) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        code, out, err = run("serve", "--example", "mine:sample", "--port", str(port))
    assert (code, out) == (1, "")
    assert err.startswith(f"FAILED: port {port}: ")
    assert err.endswith("; choose another with --port, or 0 for any\n")


def test_serve_without_id_echo_says_how_to_install_it(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "echo", None)
    code, out, err = run("serve", "--example", "mine:sample")
    assert (code, out) == (1, "")
    assert err.startswith("FAILED: no id-echo to serve with (")
    assert err.endswith("; pip install 'echo-torch[server]'\n")


# Tables.


def test_a_table_is_aligned() -> None:
    assert table([("leaf", "is"), ("0", "a"), ("1,000", "")], "><") == " leaf  is\n    0  a\n1,000"
