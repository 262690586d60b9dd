from __future__ import annotations

import gc
import json
import pickle
import time

import pytest
import torch
from bottlenecks import CASES, HEALTHY, run
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from plain_training import Network, Samples, loader_of
from torch import nn

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN
from lightning_optcore.profiling import collector as collector_module
from lightning_optcore.profiling.profile_report import CAUSES, ProfileReport

pytestmark = pytest.mark.filterwarnings("ignore")


def profiler(**options) -> PerformanceProfiler:
    return PerformanceProfiler(**{"live": False, **options})


class Clock(Callback):
    """An independent clock around the training."""

    def on_train_start(self, *_):
        self.start = time.perf_counter()

    def on_train_end(self, *_):
        self.seconds = time.perf_counter() - self.start


# One way of each cause that shows in a second or two on a shared machine; all of them, counted, in benchmarks/.
@pytest.mark.parametrize(
    ("cause", "half"),
    [
        ("data.latency", "a"),
        ("data.cpu", "a"),
        ("data.collate", "a"),
        ("data.workers", "a"),
        ("transfer", "a"),
        ("compute", "a"),
        ("optimizer", "b"),
        ("logging", "b"),
        ("callback", "a"),
        ("validation", "a"),
        ("checkpoint", "a"),
        ("garbage_collection", "b"),
        ("config", "a"),
    ],
)
def test_an_injected_bottleneck_is_found(cause, half):
    report = run(CASES[cause, half])
    # What else the machine does must not decide: a neighbour may stand beside the cause.
    causes = [f.cause for f in report.findings if f.cause != "noisy_neighbour" and f.severity != "low"]
    assert causes[0] == cause, report.to_json()
    finding = next(f for f in report.findings if f.cause == cause)
    assert finding.samples >= 50
    assert finding.evidence


@pytest.mark.parametrize("name", ["mlp", "manual optimization", "transformer"])
def test_a_healthy_run_raises_no_alarm(name):
    causes = {f.cause for f in run(HEALTHY[name]).findings if f.severity != "low"}
    assert causes <= {"noisy_neighbour"}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"val_check_interval": 0.3}])
def test_the_phases_add_up_to_an_independent_clock(make_trainer, options):
    clock, callback = Clock(), profiler()
    make_trainer(clock, callback, max_epochs=4, **options).fit(CNN(width=8, depth=1), Digits())
    report = callback.report
    assert report.wall_seconds == pytest.approx(clock.seconds, rel=0.02)
    assert sum(phase.seconds for phase in report.phases.values()) == pytest.approx(clock.seconds, rel=0.02)
    assert report.phases["other"].share < 0.1
    assert report.steps == 80
    assert report.stage == "fit"
    assert set(report.phases) > {"data_wait", "forward", "backward", "optimizer", "validation"}


def test_of_short_steps_not_all_are_timed_in_detail_and_the_phases_are_the_same(make_trainer, monkeypatch):
    def shares() -> dict[str, float]:
        clock, callback = Clock(), profiler()
        trainer = make_trainer(clock, callback, max_steps=1500)
        trainer.fit(Network(64, 2), loader_of(Samples(16 * 1500), batch_size=16))
        report = callback.report
        assert report.steps == 1500
        assert sum(phase.seconds for phase in report.phases.values()) == pytest.approx(clock.seconds, rel=0.02)
        assert sum(sum(values) for values in report.timeline["phases"].values()) == pytest.approx(
            sum(report.timeline["step_ms"]), rel=0.02
        )
        return {name: phase.share for name, phase in report.phases.items()}

    sampled = shares()
    monkeypatch.setattr(collector_module, "IN_DETAIL", bytes([1]) * len(collector_module.IN_DETAIL))
    for name, share in shares().items():
        assert sampled[name] == pytest.approx(share, abs=0.05), name


def test_what_validation_logs_is_part_of_it(make_trainer):
    """It goes where validation goes, and counts towards what a rarer validation gains."""

    class Logs(CNN):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            for i in range(20):
                self.log(f"val/{i}", float(i))

    callback = profiler()
    make_trainer(callback, max_steps=40, val_check_interval=5).fit(Logs(width=4, depth=1), Digits(batch_size=16))
    phases = callback.report.phases
    assert phases["validation"].seconds > 10 * phases["logging"].seconds


def test_manual_optimization_has_its_phases():
    phases = run(HEALTHY["manual optimization"]).phases
    assert phases["backward"].seconds > 0
    assert phases["optimizer"].seconds > 0
    assert phases["other"].share < 0.2


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_have_reports_too(make_trainer, stage):
    callback = profiler()
    trainer = make_trainer(callback)
    if stage == "predict":
        trainer.predict(BoringModel(), BoringModel().train_dataloader())
    else:
        getattr(trainer, stage)(BoringModel(), verbose=False)
    assert callback.report.stage == stage
    assert callback.reports[stage] is callback.report
    assert callback.report.steps == 64
    assert callback.report.phases["forward"].seconds > 0


def test_a_test_after_the_fit_keeps_the_fits_report(make_trainer, tmp_path):
    callback = profiler(output_dir=str(tmp_path))
    trainer = make_trainer(callback)
    trainer.fit(BoringModel())
    trainer.test(BoringModel(), verbose=False)
    assert set(callback.reports) == {"fit", "test"}
    assert {path.name for path in tmp_path.glob("*.json")} == {"profile.json", "profile_test.json"}
    assert ProfileReport.from_json((tmp_path / "profile.json").read_text()) == callback.reports["fit"]


def test_everything_is_as_before_afterwards(make_trainer):
    callback, theirs = profiler(), SimpleProfiler()
    model, loader = Network(), loader_of()
    collate, hooks = loader.collate_fn, list(gc.callbacks)
    trainer = make_trainer(callback, profiler=theirs, max_steps=10)
    trainer.fit(model, loader)
    assert trainer.profiler is theirs
    assert len(theirs.recorded_durations["run_training_batch"]) == 10
    assert "log" not in vars(model)
    assert "log_metrics" not in vars(trainer._logger_connector)
    assert "process_dataloader" not in vars(trainer.strategy)
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
    assert loader.collate_fn is collate
    assert gc.callbacks == hooks
    pickle.dumps(model.net)


class Breaks(Network):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        if batch_idx == 40:
            raise self.error("in the middle")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_breaks_off_is_reported(make_trainer, tmp_path, error):
    callback = profiler(output_dir=str(tmp_path))
    trainer = make_trainer(callback)
    with pytest.raises((error, SystemExit)):
        trainer.fit(Breaks(error), loader_of())
    assert callback.report.steps >= 40
    assert json.loads((tmp_path / "profile.json").read_text())["steps"] == callback.report.steps
    assert isinstance(trainer.profiler, PassThroughProfiler)


def test_three_steps_are_too_few(make_trainer):
    callback = profiler()
    make_trainer(callback, max_steps=3).fit(Network(), loader_of())
    assert callback.report.primary.cause == "inconclusive"
    assert "needed" in callback.report.primary.evidence[0]


def test_a_folder_that_cannot_be_written_costs_the_file_alone(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    callback = profiler(output_dir=str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the report is in callback.report alone"):
        make_trainer(callback, max_steps=5).fit(Network(), loader_of())
    assert callback.report is not None


def test_two_of_them_are_refused(make_trainer):
    with pytest.raises(MisconfigurationException, match="two of these callbacks"):
        make_trainer(profiler(), profiler()).fit(BoringModel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0: expected seconds"),
        ({"mode": "full"}, "mode='full': expected one of comprehensive, light"),
        ({"thresholds": {"cpu": 1}}, "thresholds.cpu=1: expected one of cpu_usage"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        PerformanceProfiler(**options)


def test_the_light_mode_takes_phases_alone(make_trainer):
    callback = profiler(mode="light")
    make_trainer(callback, max_steps=40).fit(Network(), loader_of())
    assert callback.report.steps == 40
    assert callback.report.phases["forward"].share > 0.1
    assert callback.report.system["cores_used"] == 0


def test_the_first_verdict_comes_while_it_runs(make_trainer):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if callback.report is not None and not seen:
                seen.append(batch_idx)

    class Slow(Network):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

    callback = profiler()
    make_trainer(callback, Look(), max_steps=100).fit(Slow(), loader_of())
    assert seen
    assert seen[0] <= 55


def test_the_shares_go_to_the_logger(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    make_trainer(profiler(), logger=logger, max_steps=30).fit(Network(), loader_of())
    logger.save()
    assert "profile/data_wait" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_the_trace_opens_as_chromes(make_trainer, tmp_path):
    callback = profiler(output_dir=str(tmp_path), trace=True)
    make_trainer(callback, max_steps=30).fit(Network(), loader_of())
    events = json.loads((tmp_path / "profile_trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    steps = [event for event in slices if event["name"].startswith("step ")]
    assert len(steps) == 30
    parts = [e for e in slices if not e["name"].startswith("step ")]
    assert {"forward", "backward", "data_wait"} <= {event["name"] for event in parts}
    for step in steps:
        inside = [e["dur"] for e in parts if step["ts"] <= e["ts"] + 1e-3 < step["ts"] + step["dur"]]
        assert sum(inside) == pytest.approx(step["dur"], rel=0.05, abs=50)


class Uneven(Network):
    """Every tenth step multiplies large matrices."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 10 == 9:
            torch.linalg.svd(torch.randn(400, 400))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["comprehensive", "light"])
def test_torch_profiler_looks_into_the_slowest_steps(make_trainer, tmp_path, mode):
    callback = profiler(output_dir=str(tmp_path), worst_steps=True, mode=mode)
    make_trainer(callback, max_steps=400, profiler="simple").fit(Uneven(), loader_of())
    report = callback.report
    assert next(iter(report.operators)).startswith("aten::linalg_svd") or "aten::_linalg_svd" in report.operators
    (note,) = [note for note in report.notes if "slowest recorded step" in note]
    assert int(note.split("step is ")[1].split(",")[0]) % 10 == 0, "a mark counts the steps that were begun"
    events = json.loads((tmp_path / "profile_worst_steps.json").read_text())["traceEvents"]
    assert any("svd" in event.get("name", "") for event in events)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert 0 < report.primary.samples < 400 - 5
    assert report.phases["other"].share < 0.2, "what torch.profiler costs is in no phase"
    assert report.phases["garbage_collection"].share < 0.1
    assert any("under torch.profiler are left out of the phases" in note for note in report.notes)


def test_worst_steps_of_an_interrupted_run_are_closed(make_trainer, tmp_path):
    class Broken(Uneven):
        def training_step(self, batch, batch_idx):
            if batch_idx == 23:
                raise RuntimeError("broken off")
            return super().training_step(batch, batch_idx)

    callback = profiler(output_dir=str(tmp_path), worst_steps=True, mode="light")
    with pytest.raises(RuntimeError, match="broken off"):
        make_trainer(callback, max_steps=400).fit(Broken(), loader_of())
    assert callback.report.operators
    with torch.profiler.profile() as free:
        torch.ones(2) + 1
    assert free.key_averages()


def test_worst_steps_leave_pytorch_profiler_alone(make_trainer, tmp_path):
    callback = profiler(output_dir=str(tmp_path), worst_steps=True, mode="light")
    make_trainer(callback, max_steps=30, profiler="pytorch", default_root_dir=tmp_path).fit(Network(), loader_of())
    assert any("PyTorchProfiler has torch.profiler already" in note for note in callback.report.notes)


def test_a_read_only_folder_does_not_cost_the_run_its_worst_steps(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    callback = profiler(output_dir=str(tmp_path / "file" / "folder"), worst_steps=True, mode="light")
    with pytest.warns(UserWarning, match="output_dir"):
        make_trainer(callback, max_steps=30).fit(Uneven(), loader_of())
    assert callback.report.operators
    assert any(note.startswith("worst_steps: NotADirectoryError") for note in callback.report.notes)


def test_a_hook_of_a_subclass_is_called(make_trainer):
    class Counting(PerformanceProfiler):
        steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1

    callback = Counting(live=False)
    make_trainer(callback, max_steps=30).fit(Network(), loader_of())
    assert callback.steps == 30


def test_workers_that_fork_do_not_disturb_it(make_trainer):
    callback = profiler()
    make_trainer(callback, max_epochs=2).fit(CNN(width=4, depth=1), Digits(num_workers=2))
    assert callback.report.steps == 40
    assert not any("Reader" in note for note in callback.report.notes)


def test_advice_outside_of_hydra_names_the_argument():
    report = run(CASES["data.latency", "a"])
    best = next(f for f in report.findings if f.cause == "data.latency").recommendations[0]
    assert best.override.startswith("DataLoader(num_workers=")
    assert not best.applies
    assert 1 <= best.expected_speedup[0] < best.expected_speedup[1]


def test_the_same_training_with_it_and_without_it(make_trainer):
    def trained(*callbacks) -> torch.Tensor:
        torch.manual_seed(0)
        model = CNN(width=4, depth=1)
        torch.manual_seed(1)
        make_trainer(*callbacks, max_epochs=2).fit(model, Digits())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(), trained(profiler()))


def test_what_is_injected_is_in_the_catalogue_of_causes():
    assert {cause for cause, _ in CASES} <= set(CAUSES)


def test_it_stands_beside_the_techniques(make_trainer, tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from lightning_optcore.callbacks import KnowledgeDistillation, PostTrainingQuantization, StructuredPruning

    quantization = PostTrainingQuantization(rounds=2, batch_sizes=(1,))
    pruning = StructuredPruning(target_params=0.7, criterion="l2", start_epoch=1)
    callback = profiler()
    make_trainer(KnowledgeDistillation(), pruning, EMAWeightAveraging(), quantization, callback, max_epochs=3).fit(
        CNN(width=8, depth=2), Digits()
    )
    assert quantization.error is None
    assert pruning.left["params"] <= 0.7
    assert callback.report.steps == 60
    assert callback.report.details["StructuredPruning"] > 0
