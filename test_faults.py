"""What threatens a long run, with real processes, on demand: `python test_faults.py [NAME ...]`. Minutes each, on a CPU.

Ends: whatever ends a script, all its processes are gone within ten seconds.
Soak: 3,000 steps; memory, open files, threads and the time of a step do not grow.
"""
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from test_smoke import HERE, SMALL, save_tokenizer, small_tokenizer, start, write_shapes

AT_THE_THIRD_STEP = """
import os, signal, sys
import torch
import losses, train_dit
import train_tokenizer as tt
def planted(step, calls=[0]):
    def training_step(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3 and os.environ.get("RANK", "1") == "1":
            {}
        return step(*args, **kwargs)
    return training_step
tt.training_step, train_dit.training_step = planted(tt.training_step), planted(train_dit.training_step)
tt.run((tt if sys.argv.pop(1) == "train_tokenizer.py" else train_dit).main)
"""
ENDS = {
    "an exception": "raise ValueError('planted')", "SystemExit": "sys.exit('planted')",
    "out of memory": "raise torch.OutOfMemoryError('planted')", "no memory": "raise MemoryError",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)", "SIGHUP": "os.kill(os.getpid(), signal.SIGHUP)",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT)", "two Ctrl-C": "[os.kill(os.getpid(), signal.SIGINT) for _ in '12']",
}


def alive(group):
    """The processes of a group that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, state, _, pgrp = (stat.read_text().rsplit(")", 1)[0].split(" ")[0],
                                   *stat.read_text().rsplit(")", 1)[1].split()[:3])
        except OSError:  # it has just ended
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(pid))
    return found


def test_ends():
    """Exceptions, exits and signals at the third step, with 0 and 2 workers, alone and with two ranks."""
    slowest = 0
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        tok = ["train_tokenizer.py", *SMALL, "--stage", "1", "--steps", "999", "--save-every", "999"]
        dit = ["train_dit.py", "--preset", "tiny", "--tokenizer", save_tokenizer(small_tokenizer(), d / "tok.pt"),
               "--size", "32", "--data", write_shapes(d / "data"), "--val", write_shapes(d / "val"), "--batch-size",
               "8", "--dtype", "fp32", "--steps", "999"]
        cases = [(tok, end, w, r) for end in ENDS for w, r in ((0, 0), (2, 0), (2, 2))]
        cases += [(dit, end, 2, 0) for end in ENDS] + [(dit, "an exception", 2, 2)]
        for k, (command, how, workers, ranks) in enumerate(cases):
            script = d / "driver.py"
            script.write_text(AT_THE_THIRD_STEP.format(f"open({str(d / 'now')!r}, 'w').close(); {ENDS[how]}"))
            process = start(script, *command, "--workers", workers, "--out", d / str(k), ranks=ranks)
            while process.poll() is None and not (d / "now").exists():
                time.sleep(0.01)
            began, case = time.time(), f"{command[0]}, {how}, {workers} workers, {ranks} ranks"
            while alive(process.pid) and time.time() < began + 20:
                process.poll()
                time.sleep(0.05)
            seconds, left = time.time() - began, alive(process.pid)
            if left:
                os.killpg(process.pid, signal.SIGKILL)
            text = process.communicate()[1]
            assert (d / "now").exists() and process.returncode and not left and seconds < 10, (case, seconds, text[-3000:])
            slowest = max(slowest, seconds)
            print(f"{case}: {seconds:.1f} s")
            (d / "now").unlink()
    return f"{len(cases)} ends, the slowest after {slowest:.1f} s"


SOAK = """
import gc, json, os, sys, threading, time
import train_dit
import train_tokenizer as tt
rows = []
def measured(step):
    def training_step(*args, **kwargs):
        result = step(*args, **kwargs)
        resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        rows.append((resident, len(os.listdir("/proc/self/fd")), threading.active_count(), time.perf_counter()))
        return result
    return training_step
tt.training_step, train_dit.training_step = measured(tt.training_step), measured(train_dit.training_step)
script, out = sys.argv.pop(1), sys.argv.pop(1)
(tt if script == "train_tokenizer.py" else train_dit).main(sys.argv[1:])
json.dump(rows, open(out, "w"))
"""


def test_soak(steps=3000):
    """Stages 1 to 3, a baseline and the generator at the smallest sizes, as many steps each: resident memory, open
    files, threads and the time of a step between the second and the last thousand."""
    said = []
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d / "soak.py").write_text(SOAK)
        data = ["--data", write_shapes(d / "data", 24, 32), "--val", write_shapes(d / "val", 24, 32)]
        quiet = ["--log-every", "10", "--save-every", "1000", "--grid-every", "1000", "--steps", str(steps)]
        tok = ["train_tokenizer.py", *SMALL, *data, "--size", "32", *quiet]
        dit = ["train_dit.py", "--preset", "tiny", "--size", "32", "--batch-size", "8", *data, *quiet]
        for name, command in {
                "stage 1": [*tok, "--stage", "1"], "stage 2": [*tok, "--stage", "2"], "stage 3": [*tok, "--stage", "3"],
                "vavae": [*tok, "--model", "vavae"], "generator": [*dit, "--tokenizer", d / "tok" / "stage3.pt"]}.items():
            out = d / ("tok" if "stage" in name else name)
            script, *flags = map(str, command)
            subprocess.run([sys.executable, d / "soak.py", script, d / "rows.json", *flags, "--out", out], check=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
            rows = json.loads((d / "rows.json").read_text())
            third = len(rows) // 3
            seconds = [b[3] - a[3] for a, b in itertools.pairwise(rows)]
            middle, last = seconds[third:2 * third], seconds[2 * third:]
            grown = (rows[-1][0] - rows[third][0]) / 2 ** 20
            said.append(f"{name} {rows[-1][0] / 2 ** 20:.0f} MB ({grown:+.1f}), {rows[-1][1]} files, {rows[-1][2]} "
                        f"threads, {1000 * statistics.median(middle):.1f} then {1000 * statistics.median(last):.1f} ms")
            print(said[-1], flush=True)
            assert grown < 10 and rows[-1][1] <= rows[third][1] and rows[-1][2] <= rows[third][2], said[-1]
            assert statistics.median(last) < 1.2 * statistics.median(middle), said[-1]
    return "; ".join(said)


def main():
    words = sys.argv[1:]
    tests = [(n, f) for n, f in globals().items() if n.startswith("test_") and (not words or any(w in n for w in words))]
    failed = 0
    for name, test in tests:
        try:
            print(f"ok    {name}: {test()}", flush=True)
        except Exception:  # noqa: BLE001, whatever a test raises is its failure
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
