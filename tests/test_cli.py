from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

JOBS = ("train", "measure", "report", "submit", "jobs", "node")


def loaded_modules(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_importing_the_package_loads_no_torch():
    loaded = loaded_modules("import lightning_optcore; dir(lightning_optcore)")
    assert not loaded & {"torch", "lightning", "hydra", "numpy"}


def test_discovering_hydras_plugins_loads_no_torch():
    loaded = loaded_modules("from hydra.core.plugins import Plugins; Plugins.instance()")
    assert {f"hydra_plugins.lightning_optcore.{name}" for name in ("user_conf", "sweeper", "launcher")} <= loaded
    assert not loaded & {"torch", "lightning", "ray", "lightning_optcore.executor"}


@pytest.mark.parametrize("job", JOBS)
def test_showing_the_configuration_loads_no_torch(job):
    code = (
        f"import sys; sys.argv = ['optcore', '{job}', '--cfg', 'job']\nfrom lightning_optcore.cli import main; main()"
    )
    assert not loaded_modules(code) & {"torch", "lightning"}


def test_every_public_name_resolves():
    import lightning_optcore

    for name in lightning_optcore.__all__:
        assert getattr(lightning_optcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = lightning_optcore.colour


def test_without_a_job_it_is_train(optcore):
    shown = OmegaConf.create(optcore("--cfg", "job").stdout)
    assert shown.job == "train"
    assert shown == OmegaConf.create(optcore("train", "--cfg", "job").stdout)


def test_overrides_reach_the_job(optcore):
    overrides = ("model.width=7", "callbacks=post_training_quantization")
    shown = OmegaConf.create(optcore(*overrides, "--cfg", "job").stdout)
    assert shown.model.width == 7
    assert shown.callbacks.post_training_quantization.scheme == "auto"


@pytest.mark.parametrize("job", JOBS)
def test_help_names_the_job(optcore, job):
    done = optcore(job, "--help")
    assert done.returncode == 0
    assert f"optcore {job}" in done.stdout


def test_an_unknown_job_lists_the_jobs(optcore):
    done = optcore("tran")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "optcore: unknown job 'tran': expected one of train, adapt, continual, measure, profile, nas, report, "
        "dashboard, submit, jobs, node, then overrides such as model.width=64"
    ]


@pytest.mark.parametrize("argument", ["data=null", "data="])
def test_a_group_that_is_emptied_lists_its_options(optcore, argument):
    done = optcore("train", argument)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"optcore: {argument}: data is a group of configurations: expected one of digits, fashion_mnist, "
        "few_shot_digits, few_shot_digits_task, few_shot_fashion_mnist, few_shot_fashion_mnist_task"
    ]


def test_a_mistyped_option_names_the_key(optcore):
    done = optcore("train", "model.widht=8")
    assert done.returncode == 1
    assert "widht" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistyped_group_option_lists_the_options(optcore):
    done = optcore("train", "data=digit")
    assert done.returncode == 1
    assert "digits" in done.stderr
    assert "fashion_mnist" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_of_the_current_folder_are_found(optcore, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("_target_: my_package.Net\n")
    shown = OmegaConf.create(optcore("model=mine", "--cfg", "job").stdout)
    assert shown.model == {"_target_": "my_package.Net"}


@pytest.mark.parametrize(
    ("given", "as_hydra_reads_it"),
    [
        ("[a.b=1,c=2]", "['a.b=1','c=2']"),
        ("[callbacks=[x,y],model={a:1,b:2}]", "['callbacks=[x,y]','model={a:1,b:2}']"),
        ("['a=1', \"b=2\"]", "['a=1',\"b=2\"]"),
        ("[name='x,y']", r"['name=\'x,y\'']"),
        ("a.b=1", "['a.b=1']"),
        ("[]", "[]"),
    ],
)
def test_the_overrides_of_a_submitted_job_need_no_quotes(optcore, given, as_hydra_reads_it):
    without = optcore("submit", f"overrides={given}", "--cfg", "job")
    quoted = optcore("--config-name=submit", f"overrides={as_hydra_reads_it}", "--cfg", "job")
    assert without.returncode == quoted.returncode == 0
    assert OmegaConf.create(without.stdout).overrides == OmegaConf.create(quoted.stdout).overrides
