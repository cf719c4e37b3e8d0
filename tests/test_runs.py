"""The store of finished runs: what is stored, under which name, and what is left after a kill."""

import dataclasses
import enum
import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import revprop.runs
from revprop.runs import RunStore, write_atomically

SETTINGS = {"method": "fr", "alpha": 0.1, "seed": 3}


@dataclasses.dataclass(frozen=True)
class Settings:
    alpha: float
    method: str = "fr"
    seed: int = 3


def json_values(floats):
    leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | floats | st.text(max_size=8)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | mappings(inner), max_leaves=8)


def mappings(values):
    return st.dictionaries(st.text(max_size=8), values, max_size=4)


def test_a_row_holds_settings_result_and_provenance(tmp_path):
    store = RunStore(tmp_path)
    row = store.put(SETTINGS, {"accuracy": 0.625, "history": [{"epoch": 0, "loss": None}]})
    assert row["settings"] == SETTINGS
    assert row["accuracy"] == 0.625
    assert row["history"] == [{"epoch": 0, "loss": None}]
    assert row["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert row["versions"]["numpy"] == np.__version__
    assert set(row["versions"]) == {"python", "torch", "numpy", "revprop"}
    assert set(row["machine"]) == {"processor", "cores", "memory_gib", "system"}
    assert row["machine"]["cores"] >= 1
    assert row["finished"].endswith("+00:00")
    assert store.get(SETTINGS) == row
    assert RunStore(tmp_path).rows() == [row]
    assert [path.name for path in tmp_path.iterdir()] == [f"{store.key(SETTINGS)}.json"]


def test_the_key_is_the_hash_of_the_canonical_json():
    canonical = b'{"alpha":0.1,"method":"fr","seed":3}'
    assert RunStore(Path("x")).key(SETTINGS) == hashlib.sha256(canonical).hexdigest()[:16]


def test_the_key_depends_on_values_alone():
    store = RunStore(Path("x"))
    assert store.key(dict(reversed(SETTINGS.items()))) == store.key(SETTINGS)
    assert store.key(Settings(alpha=0.1)) == store.key(SETTINGS)
    assert store.key({**SETTINGS, "seed": np.int64(3)}) == store.key(SETTINGS)
    assert store.key({"layers": (1, 2)}) == store.key({"layers": [1, 2]})
    assert store.key({"alpha": 1}) == store.key({"alpha": 1.0})
    assert store.key({"alpha": 0.0}) == store.key({"alpha": -0.0})
    assert store.key({"alpha": 1}) != store.key({"alpha": True})
    assert store.key({"alpha": 1}) != store.key({"alpha": "1"})
    assert store.key({**SETTINGS, "seed": 4}) != store.key(SETTINGS)


@given(first=mappings(json_values(st.floats(allow_nan=False, allow_infinity=False))))
def test_any_json_settings_have_a_key_that_survives_a_round_trip(first):
    key = RunStore(Path("x")).key(first)
    assert key == RunStore(Path("x")).key(json.loads(json.dumps(first)))
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")


def test_values_of_other_libraries_become_plain(tmp_path):
    class Colour(enum.Enum):
        RED = "red"

    result = {"vector": np.arange(3), "number": np.float32(0.5), "truth": np.bool_(True), "colour": Colour.RED}
    row = RunStore(tmp_path).put(Settings(alpha=0.5), result)
    assert (row["vector"], row["number"], row["truth"], row["colour"]) == ([0, 1, 2], 0.5, True, "red")
    assert row["settings"] == {"alpha": 0.5, "method": "fr", "seed": 3}
    assert RunStore(tmp_path).rows() == [row]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path, bad):
    store = RunStore(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"result\.history\[1\]\.loss is -?(nan|inf)"):
        store.put(SETTINGS, {"history": [{"loss": 0.5}, {"loss": bad}]})
    with pytest.raises(ValueError, match=r"settings\.alpha is"):
        store.put({"alpha": bad}, {})
    assert not (tmp_path / "runs").exists()


def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(TypeError, match=r"result\.model is a object"):
        store.put(SETTINGS, {"model": object()})
    with pytest.raises(TypeError, match=r"result\.counts has the key 3"):
        store.put(SETTINGS, {"counts": {3: 1}})
    with pytest.raises(ValueError, match="adds machine, finished to every row"):
        store.put(SETTINGS, {"finished": "", "machine": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_store_only_grows(tmp_path):
    store = RunStore(tmp_path)
    first = store.put(SETTINGS, {"accuracy": 0.5})
    with pytest.raises(FileExistsError, match="only grows"):
        store.put(SETTINGS, {"accuracy": 0.9})
    assert store.get(SETTINGS) == first


def test_run_runs_once(tmp_path):
    calls = []

    def function(settings):
        calls.append(settings)
        return {"half": settings.alpha / 2}

    store = RunStore(tmp_path)
    settings = Settings(alpha=0.5)
    first = store.run(settings, function)
    assert store.run(settings, function) == first
    assert first["half"] == 0.25
    assert calls == [settings]


def test_run_stores_nothing_when_the_function_raises(tmp_path):
    def interrupted(settings):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunStore(tmp_path).run(SETTINGS, interrupted)
    assert RunStore(tmp_path).rows() == []


def test_run_gives_the_row_of_another_process_that_was_faster(tmp_path):
    store = RunStore(tmp_path)

    def slower(settings):
        RunStore(tmp_path).put(settings, {"by": "the other"})
        return {"by": "this"}

    assert store.run(SETTINGS, slower)["by"] == "the other"
    assert [row["by"] for row in store.rows()] == ["the other"]


def test_many_may_finish_the_same_settings_at_once(tmp_path):
    for attempt in range(20):
        store, gate, rows = RunStore(tmp_path / str(attempt)), threading.Barrier(6), []

        def run(store=store, gate=gate, rows=rows):
            def function(settings):
                gate.wait()  # nobody finishes before all have found that there is no row
                return {"accuracy": 0.5}

            rows.append(store.run(SETTINGS, function))

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [row["accuracy"] for row in rows] == [0.5] * 6
        assert [path.name for path in store.folder.iterdir()] == [f"{store.key(SETTINGS)}.json"]


def test_rows_come_in_the_order_they_finished(tmp_path):
    store = RunStore(tmp_path)
    for seed in (4, 2, 9, 1):
        store.put({"seed": seed}, {})
    assert [row["settings"]["seed"] for row in store.rows()] == [4, 2, 9, 1]


def test_a_folder_that_is_not_there_is_an_empty_store(tmp_path):
    store = RunStore(tmp_path / "none")
    assert store.rows() == []
    assert store.get(SETTINGS) is None
    with pytest.raises(ValueError, match="holds no finished run"):
        store.to_parquet(tmp_path / "runs.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["", '{"settings": {"alp', "\xff\xfe", "[]", '{"settings": {}}', "null"])
def test_a_damaged_file_is_skipped_by_name_and_replaced_by_a_rerun(tmp_path, damage):
    store = RunStore(tmp_path)
    store.put({"seed": 0}, {"accuracy": 0.5})
    damaged = tmp_path / f"{store.key({'seed': 1})}.json"
    damaged.write_bytes(damage.encode("latin-1"))
    with pytest.warns(UserWarning, match=damaged.name) as caught:
        rows = store.rows()
    assert len(caught) == 1
    assert [row["settings"] for row in rows] == [{"seed": 0}]
    with pytest.warns(UserWarning, match=damaged.name):
        store.run({"seed": 1}, lambda settings: {"accuracy": 0.75})
    assert [row["accuracy"] for row in store.rows()] == [0.5, 0.75]


def test_an_unfinished_file_is_skipped_by_name_and_swept_by_a_rerun(tmp_path):
    store = RunStore(tmp_path)
    unfinished = tmp_path / f".{store.key(SETTINGS)}.json.0123.tmp"
    unfinished.write_text('{"settings": {', encoding="utf-8")
    with pytest.warns(UserWarning, match=unfinished.name):
        assert store.rows() == []
    store.put(SETTINGS, {})
    assert not unfinished.exists()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(revprop.runs.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_can_be_read_while_they_are_written(tmp_path):
    writer = threading.Thread(
        target=lambda: [RunStore(tmp_path).put({"seed": seed}, {"text": "x" * 5000}) for seed in range(60)]
    )
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*being written now")
        writer.start()
        while writer.is_alive():
            counts.append(len(RunStore(tmp_path).rows()))
        writer.join()
    assert counts == sorted(counts)
    assert len(RunStore(tmp_path).rows()) == 60


WRITER = """
import importlib.util, os, signal, sys
from pathlib import Path

folder, count, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
# From its file: the whole package would bring PyTorch along, seconds of starting each time.
spec = importlib.util.spec_from_file_location("runs", sys.argv[4])
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
if moment != "random":
    name, _, when = moment.partition(" ")
    original = getattr(os, name)
    calls = []
    def killing(*arguments):
        calls.append(1)
        if len(calls) == 5 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = original(*arguments)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(runs.os, name, killing)
print("ready", flush=True)
for seed in range(count):
    runs.RunStore(folder).run({"seed": seed}, lambda settings: {"text": str(settings["seed"]) * 20000})
print("done", flush=True)
"""


def start_writer(folder, count, moment):
    arguments = [str(folder), str(count), moment, revprop.runs.__file__]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True
    )


def check_rows(folder):
    """All rows present are whole; nothing but unfinished files is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*killed while writing")
        rows = RunStore(folder).rows()
    for row in rows:
        assert row["text"] == str(row["settings"]["seed"]) * 20000
    return sorted(row["settings"]["seed"] for row in rows)


needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


@needs_sigkill
def test_rows_survive_kills_at_random_moments(tmp_path):
    count, kills = 150, 0
    moments = random.Random(0)
    for _ in range(6):
        with start_writer(tmp_path, count, "random") as writer:
            assert writer.stdout.readline() == "ready\n"
            try:
                writer.wait(moments.uniform(0.0, 0.04))
            except subprocess.TimeoutExpired:
                writer.send_signal(signal.SIGKILL)
                kills += 1
        seeds = check_rows(tmp_path)
        assert seeds == list(range(len(seeds)))
    assert kills >= 1
    with start_writer(tmp_path, count, "random") as writer:
        assert writer.stdout.read() == "ready\ndone\n"
    assert check_rows(tmp_path) == list(range(count))
    assert sum(path.suffix == ".json" for path in tmp_path.iterdir()) == count


@needs_sigkill
@pytest.mark.parametrize(
    ("moment", "survivors"),
    # A put calls fsync twice, on the file and on the folder: the fifth call is that of the third row's file.
    [("fsync before", 2), ("fsync after", 2), ("replace before", 4), ("replace after", 5)],
)
def test_rows_survive_a_kill_at_the_worst_moments(tmp_path, moment, survivors):
    with start_writer(tmp_path, 8, moment) as writer:
        assert writer.stdout.read() == "ready\n"
    assert writer.returncode == -signal.SIGKILL
    assert check_rows(tmp_path) == list(range(survivors))
    with start_writer(tmp_path, 8, "random") as writer:
        assert writer.stdout.read() == "ready\ndone\n"
    assert check_rows(tmp_path) == list(range(8))
    assert len(list(tmp_path.iterdir())) == 8  # and the unfinished file of the killed run is gone


def test_to_parquet_holds_every_row(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    folder = tmp_path / "odd [name] *'s"
    store = RunStore(folder)
    store.put({"seed": 1, "method": "fr"}, {"accuracy": 0.5, "history": [{"epoch": 0, "loss": None}]})
    store.put({"seed": 0, "method": "bp", "alpha": 0.25}, {"accuracy": 1, "history": [{"epoch": 0, "loss": 0.5}]})
    path = tmp_path / "out" / "runs.parquet"
    store.to_parquet(path)
    found = duckdb.read_parquet(str(path)).project(
        "settings.seed, settings.method, settings.alpha, accuracy, history[1].loss, machine.cores >= 1"
    )
    assert found.fetchall() == [(1, "fr", None, 0.5, None, True), (0, "bp", 0.25, 1.0, 0.5, True)]
    assert list(path.parent.iterdir()) == [path]


def test_the_commit_is_that_of_the_checkout_and_none_elsewhere(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        answer = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    def commit():
        revprop.runs._commit.cache_clear()
        return revprop.runs._commit()

    module = tmp_path / "runs.py"
    module.write_text("one = 1\n", encoding="utf-8")
    monkeypatch.setattr(revprop.runs, "__file__", str(module))
    try:
        assert commit() is None
        try:
            git("init", "-q")
        except OSError:
            pytest.skip("git is not installed")
        assert commit() is None  # in a checkout, but not of it
        git("add", "runs.py")
        git("commit", "-q", "-m", "one")
        assert commit() == git("rev-parse", "HEAD")
        module.write_text("one = 2\n", encoding="utf-8")
        assert commit() == git("rev-parse", "HEAD") + "-dirty"
    finally:
        revprop.runs._commit.cache_clear()
