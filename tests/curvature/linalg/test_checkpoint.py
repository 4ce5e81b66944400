"""Runs that are cut off and called again end with the bits that uninterrupted ones end with; others are refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from curvature import GGNOperator, HessianOperator, Objective, SpectrumPlan, eigsh, layer_spectra, solve, spectrum
from curvature.errors import InputError
from curvature.linalg import cg, diagonal, minres, spectral_density, trace
from curvature.linalg.base import checkpoint as checkpoints
from curvature.linop import LinearOperator
from curvature.sharding.files import read, write


class Cut(Exception):
    """What kills a run."""


class Lasting(LinearOperator):
    """A, of which a run is killed after some products; `calls` counts those that were made."""

    def __init__(self, A: Tensor, last: float = float("inf")) -> None:
        super().__init__((len(A), len(A)), A.dtype, A.device)
        self.matrix, self.last, self.calls = A, last, 0

    def _matmat(self, X: Tensor) -> Tensor:
        if self.calls >= self.last:
            raise Cut
        self.calls += 1
        return self.matrix @ X


@pytest.fixture(autouse=True)
def _at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have states be written at every step, however long that takes."""
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


def symmetric(n: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (Q * torch.logspace(0, -3, n, dtype=torch.float64)) @ Q.T


def indefinite() -> Tensor:
    A = symmetric()
    return A - 0.1 * torch.eye(len(A), dtype=A.dtype)


B = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SINGULAR = torch.diag(torch.cat([torch.linspace(1, 2, 30), torch.zeros(10)])).double()
NARROW: dict[str, Any] = {"num_basis": 9, "confidence": 0.99, "rtol": 1e-8}
CONTINUED = SpectrumPlan(k=3, num_bottom=1, num_probes=2, num_steps=8, rtol=1e-9, confidence=None)
SMALL = SpectrumPlan(k=2, num_bottom=1, num_probes=2, num_steps=6)

CALLS: dict[str, tuple[Callable[[], Tensor], Callable[..., Any]]] = {
    **{
        f"trace by {method}": (symmetric, lambda A, m=method, **k: trace(A, method=m, num_matvecs=20, generator=0, **k))
        for method in ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace")
    },
    "trace to an accuracy": (symmetric, lambda A, **k: trace(A, rtol=0.3, generator=0, block_size=3, **k)),
    "trace by signs to an accuracy": (
        symmetric,
        lambda A, **k: trace(A, method="hutchinson", rtol=0.5, generator=0, block_size=3, **k),
    ),
    "diagonal": (symmetric, lambda A, **k: diagonal(A, num_matvecs=20, generator=0, **k)),
    "diagonal by blocks": (symmetric, lambda A, **k: diagonal(A, num_matvecs=18, generator=0, block_size=4, **k)),
    "diagonal by signs": (
        symmetric,
        lambda A, **k: diagonal(A, method="hutchinson", num_matvecs=13, block_size=2, generator=0, **k),
    ),
    "density": (symmetric, lambda A, **k: spectral_density(A, num_probes=4, num_steps=5, generator=0, **k)),
    "spectrum and pairs that are continued": (
        lambda: symmetric(200),
        lambda A, **k: spectrum(A, CONTINUED, generator=0, **k),
    ),
    "every entry": (lambda: symmetric(30), lambda A, **k: spectrum(A, SpectrumPlan(k=2), generator=0, **k)),
    "eigenpairs": (symmetric, lambda A, **k: eigsh(A, 2, method="lanczos", generator=0, **NARROW, **k)),
    "conjugate gradients": (symmetric, lambda A, **k: cg(A, B, rtol=1e-9, damping=1e-3, **k)),
    "one right-hand side": (symmetric, lambda A, **k: solve(A, B[:, 0], damping=0.1, rtol=1e-13, **k)),
    "kept iterates": (symmetric, lambda A, **k: cg(A, B, rtol=1e-9, keep=1.5, reorthogonalise=True, **k)),
    "from a start": (symmetric, lambda A, **k: minres(A, B, x0=B.flip(0), rtol=1e-13, **k)),
    "indefinite": (indefinite, lambda A, **k: solve(A, B, rtol=1e-9, **k)),
    "no solution": (lambda: SINGULAR, lambda A, **k: minres(A, B, **k)),
}


AGAIN = {"density", "no solution", "eigenpairs", "from a start"}
"""Make some products anew: a probe that was cut off, and what comes before or after an iteration."""


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results hold the same, but for the time that they took."""
    facts = [(x.to_dict() if hasattr(x, "to_dict") else x) for x in (a, b)]
    for each in facts:
        each.pop("seconds", None)
    left, right = map(tree_leaves, facts)
    return len(left) == len(right) and all(
        torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0)) if isinstance(x, Tensor) else x == y or x != x
        for x, y in zip(left, right, strict=True)
    )


def finished(call: Callable[..., Any], A: Tensor, folder: Path, between: int) -> tuple[Any, int, int]:
    """Return the result of a run that is killed every few products, the products it took and how often it was cut."""
    calls = 0
    for attempt in range(100):
        lasting = Lasting(A, last=between)
        try:
            result = call(lasting, checkpoint=folder)
        except Cut:
            calls += lasting.calls
            continue
        return result, calls + lasting.calls, attempt
    pytest.fail("the run does not go on")


@pytest.mark.parametrize("name", CALLS)
def test_a_run_that_is_killed_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    of, call = CALLS[name]
    A = of()
    whole = Lasting(A)
    alone = call(whole)
    result, calls, cuts = finished(call, A, tmp_path / "run", max(7 if name in AGAIN else 3, whole.calls // 5))
    assert same_bits(alone, result)
    assert cuts > 0
    # one product a call to compare the matrix; a step before a residual that was cut off is made again
    assert calls <= whole.calls + (6 if name in AGAIN else 1) * (cuts + 1) + 3
    again = Lasting(A)
    assert same_bits(alone, call(again, checkpoint=tmp_path / "run"))
    assert again.calls <= max(8, whole.calls // 2)


def test_nothing_changes_without_interruption(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "all pairs": (symmetric, lambda A, **k: eigsh(A, 2, method="dense", generator=0, **k)),
        "spectrum": (symmetric, lambda A, **k: spectrum(A, SMALL, generator=0, **k)),
    }
    for name, (of, call) in {**CALLS, **more}.items():
        assert same_bits(call(Lasting(of())), call(Lasting(of()), checkpoint=str(tmp_path / name)))


def test_states_are_written_for_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    written = []

    def writing(_: Any, folder: Path, __: Any) -> None:
        now[0] += 2.0
        written.append(folder.name)
        Path(folder).mkdir(parents=True)

    monkeypatch.setattr(checkpoints, "SHARE", 0.05)
    monkeypatch.setattr(checkpoints, "write", writing)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    saved = checkpoints.Checkpoint(tmp_path)
    for _ in range(100):
        now[0] += 1.0
        saved.keep(lambda: {})
    assert len(written) == 3  # after 1, 41 and 81 seconds of work: 2 s each
    assert [path.name for path in tmp_path.iterdir()] == ["state-000000-000002"]


@pytest.mark.parametrize("name", ["trace by auto", "trace by hutchinson", "conjugate gradients"])
def test_pieces_are_written_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third step, whatever the time: what was not written is computed again, and what was read is as it was."""
    monkeypatch.setattr(checkpoints.Checkpoint, "_told", lambda _, mine: [3] if isinstance(mine, int) else [mine])
    of, call = CALLS[name]
    A = of()
    whole = Lasting(A)
    alone = call(whole)
    result, _, cuts = finished(call, A, tmp_path / "run", max(12, whole.calls // 3))
    assert same_bits(alone, result)
    assert cuts > 0
    ranges = [list(map(int, piece.name.split("-")[1:])) for piece in (tmp_path / "run").glob("piece-*")]
    assert name == "conjugate gradients" or any(stop - first == 3 for first, stop in ranges)


# -- what is refused --------------------------------------------------------------------------------------------------


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> Objective:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)
    return Objective(model, nn.CrossEntropyLoss(), (x, torch.arange(8) % 3))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run of an objective that was killed."""
    folder = tmp_path / "run"

    def kill(spent: int, _: str) -> None:
        if spent >= 5:
            raise Cut

    with pytest.raises(Cut):
        trace(net(), num_matvecs=12, generator=0, callback=kill, checkpoint=folder)
    return folder


def other_weights() -> Objective:
    o = net()
    with torch.no_grad():
        next(o.model.parameters()).mul_(1 + 1e-8)
    return o


def other_data() -> Objective:
    o = net()
    return Objective(o.model, nn.CrossEntropyLoss(), (torch.ones(8, 4, dtype=torch.float64), torch.arange(8) % 3))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other weights": (
        lambda folder: trace(other_weights(), num_matvecs=12, generator=0, checkpoint=folder),
        "differs in the parameters of the model: make the call that began it, or give checkpoint a new folder",
    ),
    "other data": (
        lambda folder: trace(other_data(), num_matvecs=12, generator=0, checkpoint=folder),
        "differs in the matrix, whose products are others",
    ),
    "another matrix": (
        lambda folder: trace(net(), matrix="ggn", num_matvecs=12, generator=0, checkpoint=folder),
        "differs in the matrix, whose products are others",
    ),
    "another dtype": (
        lambda folder: trace(net(dtype=torch.float32), num_matvecs=12, generator=0, checkpoint=folder),
        r"the matrix \(43 x 43, torch.float64, cpu, now 43 x 43, torch.float32, cpu\)",
    ),
    "other arguments": (
        lambda folder: trace(net(), num_matvecs=13, generator=1, checkpoint=folder),
        "differs in num_matvecs, generator",
    ),
    "another function": (
        lambda folder: diagonal(net(), num_matvecs=12, generator=0, checkpoint=folder),
        r"what is computed \(trace, now diagonal\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused(name: str, stopped: Path) -> None:
    call, text = REFUSED[name]
    with pytest.raises(InputError, match=text):
        call(stopped)
    trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)  # it is as it was


def test_other_tensors_among_the_arguments_are_refused(tmp_path: Path) -> None:
    A = symmetric()
    cg(A, B, rtol=1e-9, checkpoint=tmp_path)
    with pytest.raises(InputError, match="differs in B"):
        cg(A, B * (1 + 1e-9), rtol=1e-9, checkpoint=tmp_path)
    with pytest.raises(InputError, match="differs in preconditioner"):
        cg(A, B, rtol=1e-9, preconditioner=symmetric(), checkpoint=tmp_path)
    with pytest.raises(InputError, match="differs in the matrix"):
        cg(1.001 * A, B, rtol=1e-9, checkpoint=tmp_path)


def test_torn_writes_are_refused_or_made_again(stopped: Path) -> None:
    alone = trace(net(), num_matvecs=12, generator=0)
    last = max(stopped.glob("piece-*"))
    (last / ".metadata").unlink()  # killed while it wrote
    assert same_bits(alone, trace(net(), num_matvecs=12, generator=0, checkpoint=stopped))
    first = min(stopped.glob("piece-*"))
    data = next(first.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)
    data.write_bytes(whole)
    (first / ".metadata").write_bytes(b"\x80")
    with pytest.raises(InputError, match="cannot be read"):
        trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)
    first.rename(stopped / "elsewhere")
    with pytest.raises(InputError, match="lacks 'piece-000000'"):
        trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)
    (stopped / "elsewhere").rename(first)
    (stopped / "run.json").write_text(json.dumps({"call": "trace"}), encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)


def test_other_versions_are_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of probes that another version drew stand beside probes that this one would draw."""
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_FORM", 0)
        with pytest.raises(InputError, match=r"differs in the versions of the libraries \(torch .*, form 1; now"):
            trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)
    facts = json.loads((stopped / "run.json").read_text(encoding="utf-8"))
    del facts["versions"]
    (stopped / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(InputError, match="not noted"):
        trace(net(), num_matvecs=12, generator=0, checkpoint=stopped)


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    """Two had thrown out each other's half-written pieces."""
    script = tmp_path / "other.py"
    script.write_text(
        "import sys, torch\n"
        "from curvature.linalg import trace\n"
        "def wait(*_):\n"
        "    print('at work', flush=True)\n"
        "    sys.stdin.readline()\n"
        "trace(torch.eye(30), num_matvecs=12, generator=0, callback=wait, checkpoint=sys.argv[1])\n",
        encoding="utf-8",
    )
    call = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "at work\n"
        before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
        with pytest.raises(InputError, match=f"is being written by process {other.pid} on .*: wait until"):
            trace(torch.eye(30), num_matvecs=12, generator=0, checkpoint=tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
        other.kill()
    found = trace(torch.eye(30), num_matvecs=12, generator=0, checkpoint=tmp_path / "run")
    assert same_bits(found, trace(torch.eye(30), num_matvecs=12, generator=0))


def test_a_run_that_failed_here_keeps_nobody_out(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise Cut

    with pytest.raises(Cut) as kept:  # with its traceback, as a notebook keeps it
        trace(torch.eye(30), num_matvecs=12, generator=0, callback=fail, checkpoint=tmp_path / "run")
    trace(torch.eye(30), num_matvecs=12, generator=0, checkpoint=tmp_path / "run")
    assert kept.value is not None


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be written: Not a directory\. Give checkpoint a folder that can"):
        trace(symmetric(), num_matvecs=8, generator=0, checkpoint=tmp_path / "file" / "run")


def test_folders_with_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "weights.pt"):
        with pytest.raises(InputError, match="give checkpoint a folder of its own"):
            trace(symmetric(), num_matvecs=8, generator=0, checkpoint=folder)
    with pytest.raises(InputError, match="LOBPCG"):
        eigsh(symmetric(), 1, method="lobpcg", generator=0, checkpoint=tmp_path / "run")
    with pytest.raises(InputError, match="checkpoint must be"):
        trace(symmetric(), num_matvecs=8, generator=0, checkpoint=3)  # type: ignore[arg-type]


def test_objectives_and_layers(tmp_path: Path) -> None:
    o = net()
    b = o.gradient()

    def killing(after: int) -> Callable[..., None]:
        counted = [0]

        def kill(*_: Any) -> None:
            counted[0] += 1
            if counted[0] == after:
                raise Cut

        return kill

    calls: dict[str, Callable[..., Any]] = {
        "solve": lambda **k: solve(GGNOperator(o), o.space.to_dict(b), damping=0.01, rtol=1e-10, **k),
        "layers": lambda **k: layer_spectra(o, SMALL, generator=0, **k),
        "spectrum": lambda **k: spectrum(HessianOperator(o), SMALL, generator=0, **k),
    }
    for name, call in calls.items():
        result = None
        for after in (1, 2, 4, 5, 7, 10, 1000):
            told = {"callback" if name == "solve" else "progress": killing(after)}
            try:
                result = call(checkpoint=tmp_path / name, **told)
                break
            except Cut:
                continue
        assert result is not None
        alone = call()
        pairs = zip(alone.values(), result.values(), strict=True) if name == "layers" else [(alone, result)]
        assert all(same_bits(a, b) for a, b in pairs), name


def test_tensors_come_back_as_they_lay(tmp_path: Path) -> None:
    X = torch.randn(600, 400, dtype=torch.float64)
    tree = {
        "large": [X, X.T, X[::2]],
        "small": (X[:3, :5].T, torch.tensor(1.5), torch.zeros(0, 3)),
        "plain": [None, 1, 2.5, float("inf"), "text", True],
    }
    write(tree, tmp_path / "tree", None)
    found = read(tmp_path / "tree", None, torch.device("cpu"), None)
    assert same_bits(tree, found)
    for a, b in zip(tree_leaves(tree), tree_leaves(found), strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert sorted(range(a.ndim), key=a.stride) == sorted(range(a.ndim), key=b.stride)
