from __future__ import annotations

from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.device_clock import DeviceClock
from lightning_optcore.profiling.phases import BACKWARD, FORWARD, PHASES

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
STEP = "[Strategy]SingleDeviceStrategy.training_step"
BACK = "[Strategy]SingleDeviceStrategy.backward"


class Device:
    """A queue: what is given takes its time, and is done only when the device gets to it."""

    def __init__(self) -> None:
        self.given = 0.0
        self.done = 0.0
        self.events = 0
        self.waits = 0

    def event(self):
        device = self
        device.events += 1

        class Event:
            def record(self):
                self.at = device.given

            def query(self):
                return device.done >= self.at

            def elapsed_time(self, end):
                assert end.query()
                return end.at - self.at

            def synchronize(self):
                device.waits += 1

        return Event()


def step(collector: Collector, device: Device) -> None:
    collector.start(FETCH)
    collector.stop(FETCH)
    with collector.profile(STEP):
        device.given += 3.0
    with collector.profile(BACK):
        device.given += 6.0


def test_time_is_read_when_the_device_has_passed_it_and_nobody_waits():
    device = Device()
    clock = DeviceClock(device.event)
    collector = Collector(device=clock)
    for _ in range(4):
        step(collector, device)
    assert clock.milliseconds == {}, "the device has done nothing yet"
    device.done = 18.0
    step(collector, device)
    forward, backward = PHASES.index(FORWARD), PHASES.index(BACKWARD)
    assert clock.milliseconds[forward] == 6.0
    assert clock.milliseconds[backward] == 12.0
    device.done = device.given
    step(collector, device)
    assert clock.milliseconds[forward] == 15.0
    assert device.waits == 0


def test_events_are_used_again():
    device = Device()
    collector = Collector(device=DeviceClock(device.event))
    for _ in range(200):
        step(collector, device)
        device.done = device.given
    assert device.events < 20


def test_a_queue_that_does_not_move_costs_no_memory():
    device = Device()
    clock = DeviceClock(device.event, most_pending=50)
    collector = Collector(device=clock)
    for _ in range(100):
        step(collector, device)
    assert device.events == 50
    assert clock.skipped == 100 * 4 - 50


def test_the_phases_of_the_cpu_are_as_before():
    device = Device()
    collector = Collector(device=DeviceClock(device.event))
    step(collector, device)
    assert collector.stack == []
    assert collector.seconds()[FORWARD] > 0
