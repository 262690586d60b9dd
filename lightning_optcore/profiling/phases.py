"""The phases of a training step, and which of Lightning's profiler actions belongs to which."""

from __future__ import annotations

DATA_WAIT = "data_wait"
TRANSFER = "transfer"
FORWARD = "forward"
BACKWARD = "backward"
COMMUNICATION = "communication"
OPTIMIZER = "optimizer"
LOGGING = "logging"
CALLBACK = "callback"
VALIDATION = "validation"
CHECKPOINT = "checkpoint"
GARBAGE_COLLECTION = "garbage_collection"
OTHER = "other"

# The order is that of the columns in the recorded steps.
PHASES = (
    DATA_WAIT,
    TRANSFER,
    FORWARD,
    BACKWARD,
    COMMUNICATION,
    OPTIMIZER,
    LOGGING,
    CALLBACK,
    VALIDATION,
    CHECKPOINT,
    GARBAGE_COLLECTION,
    OTHER,
)

_OF_HOOK = {
    "training_step": FORWARD,
    "validation_step": FORWARD,
    "test_step": FORWARD,
    "predict_step": FORWARD,
    "backward": BACKWARD,
    "on_before_backward": BACKWARD,
    "on_after_backward": BACKWARD,
    "optimizer_step": OPTIMIZER,
    "optimizer_zero_grad": OPTIMIZER,
    "on_before_optimizer_step": OPTIMIZER,
    "on_before_zero_grad": OPTIMIZER,
    "configure_gradient_clipping": OPTIMIZER,
    "lr_scheduler_step": OPTIMIZER,
    "batch_to_device": TRANSFER,
    "transfer_batch_to_device": TRANSFER,
    "on_before_batch_transfer": TRANSFER,
    "on_after_batch_transfer": TRANSFER,
    "save_checkpoint": CHECKPOINT,
    "on_save_checkpoint": CHECKPOINT,
    "on_load_checkpoint": CHECKPOINT,
}
_CHECKPOINT_CALLBACKS = ("ModelCheckpoint", "OnExceptionCheckpoint")
# What this package's own profiler does at the beginning and the end of a run is nobody's bottleneck.
_OWN = "PerformanceProfiler"
_NOT_OF_TRAINING = ("setup", "teardown", "prepare_data", "configure_callbacks", "configure_model", "on_fit_start")


def phase_of(action: str) -> tuple[str, str | None]:
    """Return the phase of one of Lightning's profiler actions, and whose time it is where that has a name.

    Example:
        >>> phase_of("[Strategy]SingleDeviceStrategy.backward")
        ('backward', None)
        >>> phase_of("[Callback]EarlyStopping{'monitor': 'a'}.on_train_batch_end")
        ('callback', 'EarlyStopping')
        >>> phase_of("[_TrainingEpochLoop].train_dataloader_next")
        ('data_wait', None)
    """
    if action.endswith("_next"):
        return DATA_WAIT, None
    owner, _, hook = action.rpartition(".")
    kind, _, name = owner.partition("]")
    if hook in _NOT_OF_TRAINING or name.partition("{")[0] == _OWN:
        return OTHER, None
    if kind == "[Callback":
        who = name.partition("{")[0]
        if who.startswith(_CHECKPOINT_CALLBACKS) or hook in ("on_save_checkpoint", "on_load_checkpoint"):
            return CHECKPOINT, None
        return CALLBACK, who
    if hook in _OF_HOOK:
        return _OF_HOOK[hook], None
    if kind in ("[LightningModule", "[LightningDataModule") and hook.startswith("on_"):
        return CALLBACK, f"{name}.{hook}"
    return OTHER, None
