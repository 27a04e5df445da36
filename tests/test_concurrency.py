"""Threads, fork, Ctrl-C, and a pool that sleeps when it has nothing to do."""

from __future__ import annotations

import concurrent.futures
import os
import select
import signal
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from inputs import qkv
from subproc import run, start

import fastattn

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")


@pytest.mark.one_dtype
def test_sixteen_callers(kernel, dtype):
    """Different problems at once; each gets its own result."""
    problems = [
        qkv(dtype, B=1 + n % 3, Sq=1 + 17 * n, Sk=40 + 29 * n, Hq=2, D=8 + n, seed=n) for n in range(16)
    ]
    want = [fastattn.mha(*arrays, kernel=kernel, causal=True) for arrays in problems]
    barrier = threading.Barrier(16)

    def worker(n):
        barrier.wait()
        return all(
            np.array_equal(fastattn.mha(*problems[n], kernel=kernel, causal=True), want[n]) for _ in range(5)
        )

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(worker, range(16)))


def test_setting_threads_while_others_compute(threads):
    arrays = qkv(np.float32, B=2, Sq=100, Sk=200, Hq=4, D=32)
    want = fastattn.mha(*arrays)
    stop = threading.Event()

    def change():
        n = 0
        while not stop.is_set():
            fastattn.set_num_threads(1 + n % 4)
            n += 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda _: np.array_equal(fastattn.mha(*arrays), want), range(100))
            assert all(results)
    finally:
        stop.set()
        changer.join()


@pytest.mark.one_dtype
def test_gil_is_released(kernel, dtype):
    """Another Python thread goes on while a call computes."""
    q, k, v = qkv(dtype, B=1, Sq=1024, Sk=1024, Hq=2, D=64)
    done, ticks = threading.Event(), []
    fastattn.mha(q, k, v, kernel=kernel)  # a kernel that does not take it says so here, not in the thread

    def compute():
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            begin = time.monotonic()
            fastattn.mha(q, k, v, kernel=kernel)
            ticks.append((begin, time.monotonic()))
        done.set()

    worker = threading.Thread(target=compute)
    worker.start()
    seen = []
    while not done.is_set():
        seen.append(time.monotonic())
        time.sleep(0.0005)
    worker.join()
    inside = sum(any(begin < t < end for begin, end in ticks) for t in seen)
    assert inside > len(seen) / 4, f"{inside} of {len(seen)} wake-ups fell into a call"


# ---- fork -----------------------------------------------------------------------------------------
@needs_fork
@pytest.mark.cpu_only
@pytest.mark.one_dtype
def test_fork(kernel, dtype):
    """A child of a process whose pool has run calls at once, gets the same bits, and so does its child."""
    run(f"""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # CPython warns of fork beside threads
        name = {kernel!r}
        fastattn.set_num_threads(4)
        a = qkv(dtype_of(name), 2, 256, 4, 32)
        want = fastattn.mha(*a, kernel=name)
        def check(depth):
            assert np.array_equal(fastattn.mha(*a, kernel=name), want)
            assert fastattn.get_num_threads() == 4
            if depth:
                pid = os.fork()
                if pid == 0:
                    try:
                        check(depth - 1)
                        os._exit(0)
                    except BaseException as e:
                        print(repr(e), flush=True)
                        os._exit(1)
                assert os.waitpid(pid, 0)[1] == 0, "child failed"
                assert np.array_equal(fastattn.mha(*a, kernel=name), want)
        for _ in range(5):
            check(2)
    """, timeout=60)  # fmt: skip


@needs_fork
@pytest.mark.cpu_only
@pytest.mark.one_dtype
def test_fork_while_another_thread_computes(kernel, dtype):
    run(f"""
        import threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        name = {kernel!r}
        fastattn.set_num_threads(4)
        a = qkv(dtype_of(name), 2, 200, 4, 32)
        want = fastattn.mha(*a, kernel=name)
        stop = False
        def busy():
            while not stop:
                assert np.array_equal(fastattn.mha(*a, kernel=name), want)
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for t in threads: t.start()
        for n in range(30):
            time.sleep(0.001 * (n % 5))
            pid = os.fork()
            if pid == 0:
                ok = all(np.array_equal(fastattn.mha(*a, kernel=name), want) for _ in range(3))
                os._exit(0 if ok else 1)
            assert os.waitpid(pid, 0)[1] == 0, "child failed"
        stop = True
        for t in threads: t.join()
    """, timeout=100)  # fmt: skip


@needs_fork
def test_multiprocessing_fork():
    run("""
        import multiprocessing, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        a = qkv("float32", 2, 256, 4, 32)
        want = fastattn.mha(*a)
        def work(_):
            return np.array_equal(fastattn.mha(*a), want)
        with multiprocessing.get_context("fork").Pool(4) as pool:
            assert all(pool.map(work, range(16)))
    """, timeout=60)  # fmt: skip


# ---- Ctrl-C ---------------------------------------------------------------------------------------
LONG = """
    import faulthandler
    name = {kernel!r}
    fastattn.set_num_threads({threads})
    a = qkv(dtype_of(name), 1, {Sq}, 1, 128, Sk={Sk})
    fastattn.mha(*(x[:, :16] for x in a), kernel=name)
    print("ready", flush=True)
    begin = time.monotonic()
    try:
        while True:
            fastattn.mha(*a, kernel=name, **{kwargs})
            assert {loop}, "the call was meant to be long"
    except KeyboardInterrupt:
        print(time.monotonic(), time.monotonic() - begin, flush=True)
    fastattn.mha(*(x[:, :16] for x in a), kernel=name)  # the process goes on
    print("alive", flush=True)
"""


def interrupt(code):
    process = start(code)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        time.sleep(0.3)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        answered, _, _ = select.select([process.stdout], [], [], 30)
        assert answered, "no KeyboardInterrupt within 30 s"
        line = process.stdout.readline().split()
        assert len(line) == 2, process.communicate()[1]
        assert process.stdout.readline() == "alive\n"
        assert process.wait(20) == 0
        return float(line[0]) - sent
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.cpu_only
@pytest.mark.one_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", ["prefill", "masked"])
def test_ctrl_c_within_a_fifth_of_a_second(kernel, dtype, threads, case):
    kwargs = "dict(mask=np.ones((1, 1, 1, 1), bool), causal=True)" if case == "masked" else "dict()"
    code = LONG.format(kernel=kernel, threads=threads, Sq=65536, Sk=65536, kwargs=kwargs, loop=False)
    delay = interrupt(code)
    assert delay < 0.2, f"KeyboardInterrupt after {delay:.3f} s"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.cpu_only
@pytest.mark.one_dtype
def test_ctrl_c_in_a_decode_call(kernel, dtype):
    """Many short calls in a row: the interrupt arrives in or between them."""
    code = LONG.format(kernel=kernel, threads=2, Sq=1, Sk=20000, kwargs="dict()", loop=True)
    delay = interrupt(code)
    assert delay < 0.2, f"KeyboardInterrupt after {delay:.3f} s"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.cpu_only
@pytest.mark.one_dtype
def test_interrupt_before_the_first_poll(kernel, dtype):
    """A signal from the first milliseconds of a call is not lost, whatever the call does at that time."""
    out, _ = run(f"""
        import signal
        class Interrupt(Exception): pass
        def handler(*_): raise Interrupt
        signal.signal(signal.SIGALRM, handler)
        name = {kernel!r}
        a = qkv(dtype_of(name), 1, 65536, 1, 128)
        worst = 0
        for n in range(12):
            begin = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.003 * n)
                fastattn.mha(*a, kernel=name)
            except Interrupt:
                worst = max(worst, time.monotonic() - begin - 0.001 - 0.003 * n)
            else:
                raise AssertionError(f"interrupt {{n}} is lost")
        print(worst)
    """, timeout=60)  # fmt: skip
    assert float(out) < 0.2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_python_signal_handlers_run_during_a_call():
    """A handler that does not raise: it runs at once, and the call completes with the right result."""
    out, _ = run("""
        import signal
        when = []
        signal.signal(signal.SIGALRM, lambda *_: when.append(time.monotonic()))
        a = qkv("float32", 1, 6000, 4, 64)
        want = fastattn.mha(*a, device="cpu")
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        armed = time.monotonic()
        got = fastattn.mha(*a, device="cpu")
        end = time.monotonic()
        while not when: time.sleep(0.001)
        assert np.array_equal(got, want)
        print(end - armed, when[0] - armed)
    """)  # fmt: skip
    took, delay = map(float, out.split())
    assert delay < 0.25, (
        f"the handler ran {delay:.3f} s after it was armed for 0.05 s (the call took {took:.3f} s)"
    )


# ---- idle -----------------------------------------------------------------------------------------
def test_no_spinning_while_idle():
    out, _ = run("""
        fastattn.set_num_threads(4)
        a = qkv("float32", 2, 256, 4, 32)
        for _ in range(5): fastattn.mha(*a)
        time.sleep(0.05)
        begin = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - begin)
    """)  # fmt: skip
    assert float(out) < 0.02, f"{float(out):.3f} s of CPU in 0.5 s of idleness"


def test_exit_while_a_daemon_thread_computes():
    """The interpreter ends without a crash or a hang."""
    run("""
        import threading
        a = qkv("float32", 1, 2048, 4, 64)
        def busy():
            while True: fastattn.mha(*a)
        for _ in range(2): threading.Thread(target=busy, daemon=True).start()
        time.sleep(0.2)
    """, timeout=30)  # fmt: skip


def test_exit_while_daemon_threads_wait_for_the_gil():
    """Their threads stand in line to come back when the interpreter ends. It aborted 9 times of 10."""
    run("""
        import threading
        fastattn.set_num_threads(1)
        a = qkv("float32", 1, 64, 4, 64)
        def busy():
            while True: fastattn.mha(*a)
        for _ in range(6): threading.Thread(target=busy, daemon=True).start()
        time.sleep(0.05)
    """, timeout=30)  # fmt: skip


LEAVING = """
    import threading
    sys.setswitchinterval(INTERVAL)
    q, s = np.ones((1, 1, 1, 8), np.float32), np.ones((1, 64, 4, 16), np.float32)
    k = np.broadcast_to(np.ones((), np.float32), (1, 2**27, 1, 8))
    def loop():  # Python code wherever fastattn asks for something
        for _ in range(50): pass
    class Slow:
        def __init__(self, array=None): self.array = array
        def __dlpack__(self, **keywords): loop(); return self.array.__dlpack__(**keywords)
        def __dlpack_device__(self): loop(); return self.array.__dlpack_device__()
    class Number:
        def __index__(self): loop(); return 1
        def __repr__(self): loop(); return "Number"
        def __del__(self): loop()
    def fails(*args, **keywords):
        try: fastattn.mha(*args, **keywords)
        except (TypeError, ValueError): pass
        else: raise AssertionError
    def busy():
        while True:
            CALL
    for _ in range(THREADS): threading.Thread(target=busy, daemon=True).start()
    if DELAY: time.sleep(DELAY)
"""
LEAVING_CALLS = {
    "huge": "fastattn.mha(q, k, k)",
    "small": "fastattn.mha(s, s, s)",
    "dlpack": "fastattn.mha(Slow(s), Slow(s), Slow(s), alibi_slopes=Slow(s[0, 0, :, 0]))",
    "numbers": "fastattn.mha(s, s, s, q_offset=Number(), seed=Number(), window=[Number(), Number()])",
    "errors": "fails(s, s, s, layout=Number()); fails(s, Slow(s.astype(complex)), s); fails(s, s, q)",
    "explain": "fastattn.explain(s, s, s); fastattn.kernels()",
    "backward": "fastattn.mha_backward(s, s, s, s, *fastattn.mha(s, s, s, return_lse=True))",
    "measure": "fastattn._core.measure_read_bandwidth(1 << 16, 1, 0.001)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="threads are not unwound there")
@pytest.mark.parametrize("call", LEAVING_CALLS.values(), ids=LEAVING_CALLS)
def test_exit_while_daemon_threads_are_anywhere_in_a_call(call):
    """CPython before 3.14 unwinds a thread that comes for the GIL at exit; the process aborted."""
    code = textwrap.dedent(LEAVING.replace("CALL", call))
    # Threads that change places as usual, and all the time.
    for threads, interval, delay in ((1, 0.005, 0), (2, 1e-6, 0), (2, 1e-6, 0.002), (2, 0.005, 0.01)):
        begin = f"THREADS, INTERVAL, DELAY = {threads}, {interval}, {delay}\n"
        assert run(begin + code, timeout=60) == ("", "")
