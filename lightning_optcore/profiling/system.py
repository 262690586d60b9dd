"""What the operating system knows of this process, its workers, and the machine, ten times a second.

To wake a thread costs more than what it then reads. So the training thread takes the samples itself, between two steps,
whenever one is due; the sampler's own thread wakes once a second for what is read seldom, and only takes over where the
steps are too long to keep the interval.

Ten times a second there are the CPU times of the process and its workers; memory and the machine are read ever more
seldom as a run goes on, down to once in one and three seconds.

Where there is /proc its files are opened once and read again in place, a few microseconds each; elsewhere psutil is
asked for the little that it knows everywhere.
"""

from __future__ import annotations

import multiprocessing.process
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter, perf_counter_ns, process_time, sleep
from typing import Any, Protocol

import numpy as np
import psutil

# Running totals unless a unit says otherwise. Seconds, bytes, counts.
COLUMNS = (
    "time",
    "cpu",  # CPU seconds of this process, all threads
    "system_cpu",  # of them in the kernel
    "main_cpu",  # on a core: the process's first thread
    "main_wait",  # runnable, but without a core: the same thread
    "rss",  # bytes now
    "minor_faults",
    "major_faults",
    "threads",  # of Python now
    "workers",  # now
    "worker_cpu",  # CPU seconds of all workers
    "worker_wait",  # runnable, but without a core
    "worker_rss",  # bytes now
    "read_bytes",  # from disks, with the workers
    "read_chars",  # by read(), from wherever, with the workers
    "net_bytes",  # received by all interfaces
    "switches",  # voluntary context switches of the first thread
    "machine_busy",  # CPU seconds of all processes, all cores
    "memory_used",  # share of the limit now
    "pressure_cpu",  # seconds in which some task waited
    "pressure_io",
    "pressure_memory",
    "throttled",  # seconds that a quota kept the cgroup off its cores
    "gpu_busy",  # percent now, the busiest GPU
    "gpu_memory",  # share of the fullest GPU now
    "gpu_temperature",  # degrees Celsius now
    "gpu_power",  # watts now, all GPUs
)
_ROW = struct.Struct(f"{len(COLUMNS)}d")
# What is dear to read, or moves slowly.
_SELDOM_SECONDS = 1.0
_NEVER = 1 << 62


class Reader(Protocol):
    """Fills in what one source knows."""

    def often(self, row: list[float]) -> None:
        """Read what every sample has."""

    def seldom(self, row: list[float]) -> None:
        """Read what moves slowly, at most once a second."""

    def close(self) -> None:
        """Give back what is open."""


class Sampler:
    """Samples the system, from a thread of its own and from whoever calls :meth:`tick`.

    Args:
        interval: Seconds between two samples.
        capacity: Samples that are kept; older ones are overwritten.
        readers: Where the figures come from; what this machine has by default.
        on_sample: Called in the sampler's thread after each sample.

    Example:
        >>> sampler = Sampler(interval=0.01)
        >>> sampler.start(); sampler.stop()
        >>> bool(sampler.table()["rss"][0] > 0)
        True
    """

    def __init__(
        self,
        interval: float = 0.1,
        capacity: int = 6000,
        readers: list[Reader] | None = None,
        on_sample: Callable[[], None] | None = None,
    ) -> None:
        self.interval = interval
        self.capacity = capacity
        self.samples = 0
        self.dropped = 0
        # perf_counter_ns() from which on a tick samples.
        self.due = _NEVER
        self.failures: dict[str, str] = {}
        self._readers = readers
        self._on_sample = on_sample
        self._buffer = bytearray(_ROW.size * capacity)
        self._row = [0.0] * len(COLUMNS)
        self._relaxed = False
        self._lock = threading.Lock()
        # The thread that may sample; one that was stopped finds another here, or none, and ends.
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether samples are being taken."""
        return self._thread is not None

    def start(self) -> None:
        """Begin, or go on after a stop."""
        if self._thread is not None:
            return
        if self._readers is None:
            self._readers = system_readers()
        self._sample(seldom=True)
        self._thread = threading.Thread(target=self._run, name="optcore-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample; the thread ends by itself when it wakes."""
        with self._lock:
            if self._thread is None:
                return
            self._thread = None
            self._sample(seldom=True)
            self.due = _NEVER

    def tick(self) -> None:
        """Sample, if the sampler's thread is not just doing so; to be called when ``due`` has passed."""
        if self._thread is not None and self._lock.acquire(blocking=False):
            try:
                self._sample(seldom=False)
            finally:
                self._lock.release()

    def relax(self) -> None:
        """Leave the interval to those who call :meth:`tick`, as long as they keep it."""
        self._relaxed = True

    def close(self) -> None:
        """Stop, and close the files."""
        self.stop()
        with self._lock:
            for reader in self._readers or []:
                reader.close()
            self._readers = None

    def table(self) -> dict[str, np.ndarray]:
        """Return the samples that are kept, oldest first, by column."""
        rows = np.frombuffer(self._buffer, dtype=np.float64).reshape(self.capacity, -1)
        if self.samples <= self.capacity:
            rows = rows[: self.samples].copy()
        else:
            rows = np.roll(rows, -(self.samples % self.capacity), axis=0)
        return {name: rows[:, i] for i, name in enumerate(COLUMNS)}

    def _run(self) -> None:
        me = threading.current_thread()
        often = True
        last_seldom = perf_counter()
        while True:
            # An Event to wait on would end the thread sooner, and costs twice as much each time.
            sleep(self.interval if often else max(_SELDOM_SECONDS, self.interval))
            with self._lock:
                if self._thread is not me:
                    return
                kept = perf_counter() - self._row[0] < 2 * self.interval
                seldom = perf_counter() - last_seldom >= _SELDOM_SECONDS * 0.99
                if seldom or not (kept and self._relaxed):
                    self._sample(seldom)
                if seldom:
                    last_seldom = perf_counter()
                often = not (kept and self._relaxed)
            if self._on_sample is not None:
                self._on_sample()

    def _sample(self, seldom: bool) -> None:
        row = self._row
        now = perf_counter_ns()
        self.due = now + round(self.interval * 1e9)
        if self.samples:
            # A thread that gets no core in time, or steps that are long: what was left out is counted.
            self.dropped += max(0, int((now / 1e9 - row[0]) / self.interval) - 1)
        row[0] = now / 1e9
        for reader in self._readers or []:
            try:
                reader.often(row)
                if seldom:
                    reader.seldom(row)
            except Exception as error:
                # A GPU that falls off the bus, a /proc file that goes away: the run is worth more than a figure.
                self.failures.setdefault(type(reader).__name__, f"{type(error).__name__}: {error}")
        _ROW.pack_into(self._buffer, (self.samples % self.capacity) * _ROW.size, *row)
        self.samples += 1


def system_readers() -> list[Reader]:
    """Return what this machine offers."""
    readers: list[Reader] = [ProcReader() if Path("/proc/self/statm").exists() else PsutilReader()]
    gpus = NvmlReader.if_there_is_one()
    return [*readers, gpus] if gpus is not None else readers


class _Due:
    """Says when to look again: ever more seldom, as what is missed becomes a smaller part of what was seen.

    Args:
        at_most: Seconds between two looks in the long run.
    """

    _SHARE = 0.04

    def __init__(self, at_most: float) -> None:
        self._at_most = at_most
        self._began: float | None = None
        self._next = 0.0

    def now(self, time: float) -> bool:
        """Return whether it is time for a look, which is then taken to happen."""
        if time < self._next:
            return False
        if self._began is None:
            self._began = time
        self._next = time + min(self._SHARE * (time - self._began), self._at_most)
        return True


class ProcReader:
    """Reads /proc and the cgroup of this process."""

    def __init__(self) -> None:
        # A file of /proc costs thirty microseconds where the caches are the model's.
        self._own_due, self._machine_due = _Due(at_most=1.0), _Due(at_most=3.0)
        self._tick = 1.0 / os.sysconf("SC_CLK_TCK")
        self._page = float(os.sysconf("SC_PAGE_SIZE"))
        self._files: dict[str, int] = {}
        self._workers: dict[int, tuple[int, int, int]] = {}
        # What workers had used when they ended, so that totals never go back.
        self._ended = [0.0, 0.0]
        self._last_of: dict[int, tuple[bytes, bytes]] = {}
        for key, path in (
            ("statm", "/proc/self/statm"),
            ("sched", "/proc/self/schedstat"),
            ("io", "/proc/self/io"),
            ("status", "/proc/self/status"),
            ("machine", "/proc/stat"),
            ("net", "/proc/net/dev"),
            ("meminfo", "/proc/meminfo"),
            ("pressure_cpu", "/proc/pressure/cpu"),
            ("pressure_io", "/proc/pressure/io"),
            ("pressure_memory", "/proc/pressure/memory"),
            *cgroup_files().items(),
        ):
            with suppress(OSError):
                self._files[key] = os.open(path, os.O_RDONLY)
        self._memory_limit = self._limit()
        self._find_workers()

    def often(self, row: list[float]) -> None:
        """Read this process and its workers: what costs a few microseconds even when no cache is warm."""
        pread, files = os.pread, self._files
        row[1] = process_time()
        if self._own_due.now(row[0]):
            row[5] = int(pread(files["statm"], 64, 0).split(None, 2)[1]) * self._page
            if "sched" in files:
                run, wait, _ = pread(files["sched"], 64, 0).split()
                row[3], row[4] = int(run) / 1e9, int(wait) / 1e9
        cpu, waited = self._ended[0], self._ended[1]
        for pid, (sched, _, _) in self._workers.items():
            try:
                run, wait, _ = pread(sched, 64, 0).split()
            except (OSError, ValueError):
                # It has ended; what it used last stays in the totals.
                run, wait = self._last_of[pid]
            self._last_of[pid] = (run, wait)
            cpu += int(run) / 1e9
            waited += int(wait) / 1e9
        row[9], row[10], row[11] = float(len(self._workers)), cpu, waited

    def seldom(self, row: list[float]) -> None:
        """Look for new workers; read disks, network, memory and pressure."""
        self._find_workers()
        import resource  # where there is no /proc there may be none

        usage = resource.getrusage(resource.RUSAGE_SELF)
        row[2], row[6], row[7] = usage.ru_stime, float(usage.ru_minflt), float(usage.ru_majflt)
        row[8] = float(threading.active_count())
        read, chars = self._io(self._files.get("io"))
        resident = 0.0
        for _, io, statm in self._workers.values():
            more = self._io(io)
            read, chars = read + more[0], chars + more[1]
            with suppress(OSError, IndexError):
                resident += int(os.pread(statm, 64, 0).split(None, 2)[1]) * self._page
        row[12] = resident
        # A worker that has ended takes its bytes with it: totals must not go back.
        row[13], row[14] = max(read, row[13]), max(chars, row[14])
        if self._machine_due.now(row[0]):
            self._read_machine(row)

    def _read_machine(self, row: list[float]) -> None:
        row[15] = self._received()
        row[16] = self._number("status", b"voluntary_ctxt_switches:")
        busy = self._text("machine").split(b"\n", 1)[0].split()[1:]
        row[17] = (sum(map(int, busy[:3])) + sum(map(int, busy[5:8]))) * self._tick
        row[18] = self._memory_used()
        for i, name in enumerate(("pressure_cpu", "pressure_io", "pressure_memory")):
            _, found, rest = self._text(name).partition(b"total=")
            row[19 + i] = int(rest.split()[0]) / 1e6 if found else 0.0
        row[22] = self._number("cpu_stat", b"throttled_usec") / 1e6 + self._number("cpu_stat", b"throttled_time") / 1e9

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}
        for pid in list(self._workers):
            self._forget(pid)

    def _find_workers(self) -> None:
        pids = set(_child_pids())
        for pid in [pid for pid in self._workers if pid not in pids]:
            self._forget(pid)
        for pid in pids - set(self._workers):
            sched = _opened(f"/proc/{pid}/schedstat")
            if sched >= 0:
                self._workers[pid] = (sched, _opened(f"/proc/{pid}/io"), _opened(f"/proc/{pid}/statm"))
                self._last_of[pid] = (b"0", b"0")

    def _forget(self, pid: int) -> None:
        for handle in self._workers.pop(pid):
            if handle >= 0:
                os.close(handle)
        for i, value in enumerate(self._last_of.pop(pid)):
            self._ended[i] += int(value) / 1e9

    def _io(self, handle: int | None) -> tuple[float, float]:
        if handle is None or handle < 0:
            return 0.0, 0.0
        try:
            text = os.pread(handle, 512, 0)
        except OSError:
            return 0.0, 0.0
        values = dict(line.split(b": ") for line in text.splitlines() if b": " in line)
        return float(values.get(b"read_bytes", 0)), float(values.get(b"rchar", 0))

    def _received(self) -> float:
        lines = self._text("net").splitlines()[2:]
        return float(sum(int(line.partition(b":")[2].split()[0]) for line in lines if b":" in line))

    def _memory_used(self) -> float:
        if self._memory_limit is not None:
            used = self._number("memory_now", b"") - self._number("memory_stat", b"inactive_file")
            return max(used, 0.0) / self._memory_limit
        total, available = self._number("meminfo", b"MemTotal:"), self._number("meminfo", b"MemAvailable:")
        return 1 - available / total if total else 0.0

    def _limit(self) -> float | None:
        text = self._text("memory_limit").strip()
        machine = self._number("meminfo", b"MemTotal:") * 1024
        if not text.isdigit() or (machine and int(text) >= machine):
            return None
        return float(text)

    def _text(self, key: str) -> bytes:
        handle = self._files.get(key)
        return os.pread(handle, 16384, 0) if handle is not None else b""

    def _number(self, key: str, after: bytes) -> float:
        _, found, rest = self._text(key).partition(after) if after else (b"", True, self._text(key))
        words = rest.split(maxsplit=1) if found else []
        return float(words[0]) if words else 0.0


class PsutilReader:
    """The little that every operating system tells."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def often(self, row: list[float]) -> None:
        """Read CPU time and memory of this process."""
        with self._process.oneshot():
            times = self._process.cpu_times()
            row[1], row[2], row[3] = times.user + times.system, times.system, times.user + times.system
            row[5] = float(self._process.memory_info().rss)
            row[8] = float(self._process.num_threads())

    def seldom(self, row: list[float]) -> None:
        """Read workers and the machine."""
        cpu = rss = 0.0
        pids = _child_pids()
        for pid in pids:
            with suppress(psutil.Error):
                worker = psutil.Process(pid)
                times = worker.cpu_times()
                cpu, rss = cpu + times.user + times.system, rss + worker.memory_info().rss
        row[9], row[10], row[12] = float(len(pids)), max(cpu, row[10]), rss
        row[15] = float(psutil.net_io_counters().bytes_recv)
        row[17] = sum(psutil.cpu_times()) - psutil.cpu_times().idle
        row[18] = psutil.virtual_memory().percent / 100

    def close(self) -> None:
        """Nothing is open."""


class NvmlReader:
    """Reads NVIDIA GPUs, at most once a second."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    @classmethod
    def if_there_is_one(cls) -> NvmlReader | None:
        """Return a reader where NVML answers."""
        try:
            import pynvml

            pynvml.nvmlInit()
            reader = cls(pynvml)
        except Exception:
            # No library, no driver, no rights: a machine without GPUs.
            return None
        return reader if reader._devices else None

    def often(self, row: list[float]) -> None:
        """Nothing: a query takes a millisecond."""

    def seldom(self, row: list[float]) -> None:
        """Read utilisation, memory, temperature and power."""
        nvml, busy, memory, heat, power = self._nvml, 0.0, 0.0, 0.0, 0.0
        for device in self._devices:
            use = nvml.nvmlDeviceGetMemoryInfo(device)
            busy = max(busy, float(nvml.nvmlDeviceGetUtilizationRates(device).gpu))
            memory = max(memory, use.used / use.total)
            heat = max(heat, float(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)))
            power += nvml.nvmlDeviceGetPowerUsage(device) / 1000
        row[23], row[24], row[25], row[26] = busy, memory, heat, power

    def close(self) -> None:
        """End the session with the driver."""
        with suppress(Exception):
            self._nvml.nvmlShutdown()


def cgroup_files() -> dict[str, str]:
    """Return the files of this process's cgroup, version 2 or 1: memory limit and use, CPU throttling."""
    found: dict[str, str] = {}
    for name, base in _cgroups():
        for key, version_2, version_1 in (
            ("memory_limit", "memory.max", "memory.limit_in_bytes"),
            ("memory_now", "memory.current", "memory.usage_in_bytes"),
            ("memory_stat", "memory.stat", "memory.stat"),
            ("cpu_stat", "cpu.stat", "cpu.stat"),
        ):
            if name and not key.startswith(name):
                continue
            for file in (version_2, version_1):
                if key not in found and (base / file).exists():
                    found[key] = str(base / file)
    return found


def _cgroups() -> Iterator[tuple[str, Path]]:
    """Yield (controller, folder): of version 2 the controller is empty, since one folder has them all."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in ("", "memory", "cpu"):
                # Inside a container the path is that of the host, and the folder is the root itself.
                for folder in (root / controller / path.lstrip("/"), root / controller):
                    if folder.is_dir():
                        yield controller, folder
                        break


def _child_pids() -> list[int]:
    """Return the processes that were started through multiprocessing: the workers of the loaders."""
    children = getattr(multiprocessing.process, "_children", None)
    if children is None:
        return [child.pid for child in psutil.Process().children()]
    return [child.pid for child in tuple(children) if child.pid is not None]


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return -1
