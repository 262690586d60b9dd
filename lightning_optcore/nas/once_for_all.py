"""Sub-networks of a supernet that was trained once, judged with the weights that they share.

A judgement costs an evaluation rather than a training, so that a search may look at hundreds of architectures.

Source: Cai et al., "Once-for-All: Train One Network and Specialize it for Efficient Deployment", 2020,
https://arxiv.org/abs/1908.09791. Batch norm: Guo et al., 2020, https://arxiv.org/abs/1904.00420, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_optcore.nas.supernet import SupernetError, kind_of, sub_network

Forward = Callable[[nn.Module, Any], Any]


def recalibrate_batch_norm(network: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> int:
    """Compute the statistics of a network's batch norm anew, in place.

    Those of a supernet are of all its sub-networks together. Weights stay, and so does the rest of the network's
    state; only batch norm sees the batches as in training.

    Args:
        network: A sub-network.
        batches: A few of the training set; of one that is a tuple or list the first element is forwarded.
        forward: ``forward(network, batch)``, where the network takes something else.

    Returns:
        How many batches there were; 0 where there is no batch norm.

    Raises:
        SupernetError: If there is batch norm, but no batch.

    Example:
        >>> network = nn.BatchNorm1d(1).eval()
        >>> recalibrate_batch_norm(network, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        2
        >>> network.running_mean
        tensor([4.])
    """
    layers = [one for one in network.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    if not layers:
        return 0
    modes = {module: module.training for module in network.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        # The mean of all batches rather than one that forgets.
        layer.momentum = None
        layer.train()
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                (forward or _forward)(network, batch)
                count += 1
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise SupernetError("no batch to recalibrate batch norm with: expected a few of the training set")
    return count


def inherited_evaluator(
    network: nn.Module,
    quality: Callable[[nn.Module], Mapping[str, float]],
    *,
    calibration: Iterable[Any] = (),
    forward: Forward | None = None,
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Return a function from an architecture to what it is worth with a trained supernet's weights.

    It can be given to any search as its ``evaluate``. Neither the supernet nor earlier sub-networks are changed by it,
    so that an architecture's worth does not depend on when it is asked.

    Args:
        network: A supernet whose weights were trained, e.g. by
            :class:`lightning_optcore.callbacks.SampledTraining`.
        quality: From a sub-network in evaluation mode to its figures: accuracy, latency, bytes, whatever is searched.
        calibration: Batches of the training set for batch norm, kept in memory; may be empty where there is none.
        forward: As in :func:`recalibrate_batch_norm`.

    Raises:
        SupernetError: If the network is no supernet.

    Example:
        >>> from lightning_optcore.nas._nni_compat import nni_nas
        >>> from lightning_optcore.nas.supernet import supernet
        >>> class Space(nni_nas().nn.ModelSpace):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nni_nas().nn.MutableLinear(2, nni_nas().nni.choice("width", [2, 4]))
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> evaluate = inherited_evaluator(
        ...     supernet(Space()), lambda network: {"params": sum(one.numel() for one in network.parameters())}
        ... )
        >>> evaluate({"width": 2}), evaluate({"width": 4})
        ({'params': 6.0}, {'params': 12.0})
    """
    kind_of(network)
    batches = list(calibration)

    def evaluate(architecture: Mapping[str, Any]) -> dict[str, float]:
        alone = sub_network(network, architecture)
        recalibrate_batch_norm(alone, batches, forward)
        return {name: float(value) for name, value in quality(alone.eval()).items()}

    return evaluate


def _forward(network: nn.Module, batch: Any) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    device = next((parameter.device for parameter in network.parameters()), None)
    return network(inputs.to(device) if device is not None and isinstance(inputs, torch.Tensor) else inputs)
