"""What the operating system, and NVML, know of this process, its workers and the machine: who fills in a sample.

Where there is /proc its files are opened once and read again in place, a few microseconds each; elsewhere psutil is
asked for the little that it knows everywhere.
"""

from __future__ import annotations

import multiprocessing.process
import os
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

try:
    import resource
except ImportError:  # Windows, which has no /proc either
    resource = None  # type: ignore[assignment]

from lightning_optcore.profiling.cgroups import cgroup_files

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
    "pressure_time",  # when the pressures were read
    "workers",  # now
    "worker_cpu",  # CPU seconds of all workers
    "worker_wait",  # runnable, but without a core
    "worker_rss",  # bytes now
    "read_bytes",  # from disks, with the workers
    "read_chars",  # by read(), from wherever, with the workers
    "net_bytes",  # received by all interfaces
    "switches",  # voluntary context switches of this process
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
    "own_time",  # when this process's memory and waiting were read
    "seldom_time",  # when its faults, switches and bytes were
    "machine_time",  # when the machine was
    "worker_time",  # when the CPU time and waiting of workers were
)
OWN_TIME, SELDOM_TIME, MACHINE_TIME, PRESSURE_TIME, WORKER_TIME = map(
    COLUMNS.index, ("own_time", "seldom_time", "machine_time", "pressure_time", "worker_time")
)
# What is read less often than "time" says grew from one of its own readings to another.
TIME_OF = {
    **dict.fromkeys(("main_cpu", "main_wait", "rss"), "own_time"),
    **dict.fromkeys(("minor_faults", "major_faults", "switches", "read_bytes", "read_chars"), "seldom_time"),
    **dict.fromkeys(("worker_cpu", "worker_wait"), "worker_time"),
    **dict.fromkeys(("net_bytes", "machine_busy", "throttled"), "machine_time"),
    **dict.fromkeys(("pressure_cpu", "pressure_io", "pressure_memory"), "pressure_time"),
}


Row = array  # of doubles, one for each column


def new_row() -> Row:
    """Return a row of zeros."""
    return array("d", bytes(8 * len(COLUMNS)))


class Reader(Protocol):
    """Knows one source."""

    # perf_counter_ns() from which on it wants to be asked for a glance.
    due: float

    def glance(self, now: int) -> Any:
        """Return what moves fast, as raw as it comes; ``now`` is ``perf_counter_ns()``.

        It is called between two steps, by the training thread, while another may be in ``seldom``.
        """

    def fill(self, row: Row, glance: Any) -> None:
        """Write into a row what was glanced at."""

    def seldom(self, row: Row, last: bool = False) -> None:
        """Read what moves slowly, at most once a second; for the ``last`` time all that was put off."""

    def close(self) -> None:
        """Give back what is open."""


def system_readers() -> list[Reader]:
    """Return what this machine offers."""
    readers: list[Reader] = [ProcReader() if Path("/proc/self/statm").exists() else PsutilReader()]
    gpus = NvmlReader.if_there_is_one()
    return [*readers, gpus] if gpus is not None else readers


class _Due:
    """Says when to look again: ever more seldom, as what is missed becomes a smaller part of what was seen.

    Args:
        share: Of the time since the first look, until the next one.
        at_least: Seconds between two looks in the beginning.
        at_most: Seconds between two looks in the long run.
    """

    def __init__(self, share: float, at_least: float, at_most: float) -> None:
        self._share = share
        self._at_least, self._at_most = at_least * 1e9, at_most * 1e9
        self._began: int | None = None
        # perf_counter_ns() of the next look.
        self.next = 0.0

    def looked(self, now: int) -> None:
        """Say that a look is being taken."""
        if self._began is None:
            self._began = now
        self.next = now + min(max(self._share * (now - self._began), self._at_least), self._at_most)


# statm and schedstat of the process; process number and schedstat of each worker.
_Glance = tuple[tuple[bytes, bytes] | None, list[tuple[int, bytes]] | None]


class ProcReader:
    """Reads /proc and the cgroup of this process."""

    def __init__(self) -> None:
        # A file of /proc costs twenty to fifty microseconds where the caches are the model's, /proc/stat 170.
        self._own_due, self._machine_due = _Due(0.2, 0.0, 2.0), _Due(0.2, 2.0, 5.0)
        self._workers_due, self._pressure_due = _Due(0.05, 0.0, 0.5), _Due(0.5, 5.0, 15.0)
        self._tick = 1.0 / os.sysconf("SC_CLK_TCK")
        self._page = float(os.sysconf("SC_PAGE_SIZE"))
        self._files: dict[str, int] = {}
        self._workers: dict[int, tuple[int, int, int]] = {}
        # CPU and waiting seconds of workers: of all that have ended, so that totals never go back, and of each other.
        self._ended = (0.0, 0.0)
        self._last_of: dict[int, tuple[float, float]] = {}
        # What a glance reads, replaced as a whole.
        self._schedules: tuple[tuple[int, int], ...] = ()
        self.due = 0.0
        # Of workers that have ended; a glance may just be reading them.
        self._to_close: list[int] = []
        for key, path in (
            ("statm", "/proc/self/statm"),
            ("sched", "/proc/self/schedstat"),
            ("io", "/proc/self/io"),
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

    def glance(self, now: int) -> _Glance:
        """Read this process and its workers, if there are any, which are due ever more seldom."""
        own = self._glance_at_itself(now) if now >= self._own_due.next else None
        workers, self.due = None, self._own_due.next
        if self._schedules:
            workers = self._glance_at_workers(now) if now >= self._workers_due.next else None
            self.due = min(self.due, self._workers_due.next)
        return own, workers

    def _glance_at_itself(self, now: int) -> tuple[bytes, bytes]:
        self._own_due.looked(now)
        files = self._files
        return os.pread(files["statm"], 64, 0), os.pread(files["sched"], 64, 0) if "sched" in files else b""

    def _glance_at_workers(self, now: int) -> list[tuple[int, bytes]]:
        self._workers_due.looked(now)
        seen = []
        for pid, schedule in self._schedules:
            # One that has ended cannot be read; what it used last stays in the totals.
            with suppress(OSError):
                seen.append((pid, os.pread(schedule, 64, 0)))
        return seen

    def fill(self, row: Row, glance: _Glance) -> None:
        """Write what was glanced at."""
        own, workers = glance
        if own is not None:
            statm, sched = own
            row[5] = int(statm.split(None, 2)[1]) * self._page
            row[OWN_TIME] = row[0]
            if sched:
                run, wait, _ = sched.split()
                row[3], row[4] = int(run) / 1e9, int(wait) / 1e9
        if workers is not None:
            row[WORKER_TIME] = row[0]
            for pid, text in workers:
                if pid in self._last_of and text:
                    run, wait, _ = text.split()
                    self._last_of[pid] = int(run) / 1e9, int(wait) / 1e9
            self._add_workers(row)

    def _add_workers(self, row: Row) -> None:
        used = [self._ended, *self._last_of.values()]
        row[9], row[10], row[11] = float(len(self._workers)), sum(one[0] for one in used), sum(one[1] for one in used)

    def seldom(self, row: Row, last: bool = False) -> None:
        """Look for new workers; read disks, network, memory and pressure."""
        self._find_workers()
        self._add_workers(row)
        if not self._workers:
            # None of them is known as well.
            row[WORKER_TIME] = row[0]
        if resource is not None:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            row[2], row[6], row[7], row[16] = usage.ru_stime, usage.ru_minflt, usage.ru_majflt, usage.ru_nvcsw
        row[SELDOM_TIME] = row[0]
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
        now = round(row[0] * 1e9)
        if last or now >= self._machine_due.next:
            self._machine_due.looked(now)
            self._read_machine(row)
        if last or now >= self._pressure_due.next:
            self._pressure_due.looked(now)
            self._read_pressure(row)

    def _read_machine(self, row: Row) -> None:
        row[MACHINE_TIME] = row[0]
        row[15] = self._received()
        busy = self._text("machine").split(b"\n", 1)[0].split()[1:]
        row[17] = (sum(map(int, busy[:3])) + sum(map(int, busy[5:8]))) * self._tick
        row[18] = self._memory_used()
        row[22] = self._number("cpu_stat", b"throttled_usec") / 1e6 + self._number("cpu_stat", b"throttled_time") / 1e9

    def _read_pressure(self, row: Row) -> None:
        row[PRESSURE_TIME] = row[0]
        for i, name in enumerate(("pressure_cpu", "pressure_io", "pressure_memory")):
            _, found, rest = self._text(name).partition(b"total=")
            row[19 + i] = int(rest.split()[0]) / 1e6 if found else 0.0

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}
        self._schedules = ()
        for pid in list(self._workers):
            self._forget(pid)
        self._close_ended()

    def _find_workers(self) -> None:
        self._close_ended()
        pids = set(_child_pids())
        if pids == self._workers.keys():
            return
        for pid in [pid for pid in self._workers if pid not in pids]:
            self._forget(pid)
        for pid in pids - set(self._workers):
            sched = _opened(f"/proc/{pid}/schedstat")
            if sched >= 0:
                self._workers[pid] = (sched, _opened(f"/proc/{pid}/io"), _opened(f"/proc/{pid}/statm"))
                self._last_of[pid] = (0.0, 0.0)
        self._schedules = tuple((pid, files[0]) for pid, files in self._workers.items())
        self.due = self._workers_due.next = 0.0

    def _forget(self, pid: int) -> None:
        self._to_close += [handle for handle in self._workers.pop(pid) if handle >= 0]
        used, waited = self._last_of.pop(pid)
        self._ended = (self._ended[0] + used, self._ended[1] + waited)

    def _close_ended(self) -> None:
        for handle in self._to_close:
            os.close(handle)
        self._to_close = []

    def _io(self, handle: int | None) -> tuple[float, float]:
        if handle is None or handle < 0:
            return 0.0, 0.0
        try:
            text = os.pread(handle, 512, 0)
        except OSError:
            return 0.0, 0.0
        return _number_after(text, b"read_bytes: "), _number_after(text, b"rchar: ")

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

    due = 0.0

    def __init__(self) -> None:
        self._process = psutil.Process()

    def glance(self, now: int) -> tuple[float, float, float]:
        """Read CPU time and memory of this process."""
        with self._process.oneshot():
            times = self._process.cpu_times()
            return times.user, times.system, self._process.memory_info().rss

    def fill(self, row: Row, glance: tuple[float, float, float]) -> None:
        """Write what was read."""
        user, system, rss = glance
        row[2], row[3], row[5] = system, user + system, rss
        row[OWN_TIME] = row[0]

    def seldom(self, row: Row, last: bool = False) -> None:
        """Read workers and the machine."""
        cpu = rss = 0.0
        pids = _child_pids()
        for pid in pids:
            with suppress(psutil.Error):
                worker = psutil.Process(pid)
                times = worker.cpu_times()
                cpu, rss = cpu + times.user + times.system, rss + worker.memory_info().rss
        row[9], row[10], row[12] = float(len(pids)), max(cpu, row[10]), rss
        row[MACHINE_TIME] = row[0]
        row[15] = float(psutil.net_io_counters().bytes_recv)
        row[17] = sum(psutil.cpu_times()) - psutil.cpu_times().idle
        row[18] = psutil.virtual_memory().percent / 100

    def close(self) -> None:
        """Nothing is open."""


class NvmlReader:
    """Reads NVIDIA GPUs, at most once a second."""

    due = float("inf")

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

    def glance(self, now: int) -> None:
        """Nothing: a query takes a millisecond."""

    def fill(self, row: Row, glance: None) -> None:
        """Nothing was glanced at."""

    def seldom(self, row: Row, last: bool = False) -> None:
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


def _number_after(text: bytes, name: bytes) -> float:
    """Return the number that stands after a name, to the end of its line; 0 where there is none."""
    first = text.find(name) + len(name)
    return float(text[first : text.find(b"\n", first)]) if first >= len(name) else 0.0


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
